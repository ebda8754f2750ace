"""The tokenizer of an imported model: a tokenizer.json of Hugging Face, computed by the library `tokenizers`."""

import json
from functools import cached_property
from typing import Any

from lit_gpt.byte_level import BYTES, to_bytes
from lit_gpt.errors import UserError
from lit_gpt.tokenizer_base import Tokenizer


class LibraryTokenizer(Tokenizer):
    """A tokenizer.json.

    The names of special tokens in a text stay text, as with every tokenizer here.

    Args:
        text: The content of the file.
        begin: The id before a document.
        end: The id after one.
        size: V; models often have a few ids more than their tokenizer.

    Raises:
        UserError: `tokenizers` is not installed, or the text is no tokenizer, or one of a kind that has no bytes, or
            `begin` or `end` is no id.
    """

    name = "tokenizer.json"

    def __init__(self, text: str, begin: int, end: int, size: int) -> None:
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                "this tokenizer needs the package tokenizers, which is not installed: pip install 'lit-gpt[hf]'"
            ) from None
        for token in (begin, end):
            if not (type(token) is int and 0 <= token < size):
                raise UserError(
                    f"the tokenizer begins or ends a text with {token!r}, which is no id below {size:,}: give another "
                    "file"
                )
        try:
            self.library = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises no narrower class
            raise UserError(f"the tokenizer is damaged ({str(error)[:100]}): give its tokenizer.json") from None
        self.library.encode_special_tokens = True
        self.library.no_truncation()
        self.library.no_padding()
        self.text, self.begin, self.end_of_text, self.vocab_size = text, begin, end, size
        self._bytes = self._bytes_of_ids()

    @property
    def begin_of_text(self) -> int:
        return self.begin

    @cached_property
    def description(self) -> dict[str, Any]:
        """The content of the file as JSON."""
        description: dict[str, Any] = json.loads(self.text)
        return description

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises:
            UserError: The vocabulary lacks a character of it, and has no id for unknown ones.
        """
        try:
            ids: list[int] = self.library.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises no narrower class
            raise UserError(f"the tokenizer cannot encode {text[:40]!r} ({str(error)[:100]})") from None
        return ids

    def token_bytes(self, token: int) -> bytes:
        return self._bytes.get(token, b"")

    def state(self) -> dict[str, Any]:
        ends = {"begin": self.begin, "end": self.end_of_text, "size": self.vocab_size}
        return {"name": self.name, "json": self.text, **ends}

    def _bytes_of_ids(self) -> dict[int, bytes]:
        """Return the bytes of each id that is a part of a text."""
        steps = {step["type"] for step in _steps(self.description.get("decoder"))}
        pieces = self.library.get_vocab(with_added_tokens=False)
        if "ByteLevel" in steps:  # added tokens may stand in the vocabulary too
            found = {token: to_bytes(piece) for piece, token in pieces.items() if BYTES.keys() >= set(piece)}
        elif {"ByteFallback", "Metaspace", "Fuse"} & steps:
            found = {token: _bytes_of_piece(piece) for piece, token in pieces.items()}
        else:
            kinds = ", ".join(sorted(steps)) or "none"
            raise UserError(f"the tokenizer's decoder ({kinds}) is not supported: give one of bytes or characters")
        for token, added in self.library.get_added_tokens_decoder().items():
            found[token] = b"" if added.special else added.content.encode("utf-8")
        return found


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a decoder, which is one step, a sequence of them, or missing."""
    if decoder is None:
        return []
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps


def _bytes_of_piece(piece: str) -> bytes:
    """Return the bytes of a token of SentencePiece: "▁" is a blank, "<0x0A>" a byte."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode("utf-8")
