"""Convert text to token ids and back, with tiktoken and without a network.

Every tokenizer has one id, `end_of_text`, that no text encodes to: the characters `<|endoftext|>` in a text stay text.
A checkpoint contains its tokenizer as plain data, see `Tokenizer.state` and `from_state`.
"""

import base64
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tiktoken
from tiktoken.registry import ENCODINGS

from lit_gpt.compat import encoding_pattern
from lit_gpt.errors import UserError, did_you_mean
from lit_gpt.library_tokenizer import LibraryTokenizer
from lit_gpt.tokenizer_base import ENDOFTEXT, Tokenizer
from lit_gpt.vocabularies import cl100k_pattern, get_encoding_offline, read_tiktoken_file, recognize_tiktoken_file
from lit_gpt.white_space import cut_long_runs, encode_run, find_long_runs

Vocab = Literal["pruned", "full"]

TOKENIZER_NAMES = ("cl100k_base", "o200k_base", "gpt2", "bpe", "char", "byte")
PRUNABLE = ("cl100k_base", "o200k_base", "gpt2")  # and .tiktoken files

MAX_SPECIAL_TOKENS = 1024  # ids of a vocabulary that are no parts of a text; public ones have at most 21


class BytePairTokenizer(Tokenizer):
    """Byte-pair encoding by tiktoken, with a vocabulary that is public, pruned, trained on the corpus, or from a file.

    Args:
        name: See `Tokenizer.name`.
        encoding: The vocabulary. Its special token `<|endoftext|>` is the end of text; it has a higher id than any part
            of a text.
        vocab_size: V; by default the highest id of the encoding + 1.
    """

    def __init__(self, name: str, encoding: tiktoken.Encoding, vocab_size: int | None = None) -> None:
        self.name, self.encoding = name, encoding
        self.end_of_text = encoding.eot_token
        self.vocab_size = encoding.n_vocab if vocab_size is None else vocab_size

    @classmethod
    def from_tokens(
        cls,
        name: str,
        tokens: Sequence[bytes],
        pattern: str,
        end_of_text: int | None = None,
        vocab_size: int | None = None,
    ) -> "BytePairTokenizer":
        """Return the tokenizer of a vocabulary that tiktoken does not know.

        Args:
            name: See `Tokenizer.name`.
            tokens: The bytes of the tokens in the order of their merges, all 256 single bytes included.
            pattern: The regular expression that splits a text into pre-tokens, inside which byte pairs are merged.
            end_of_text: The id of the end of text; the first one after `tokens` by default.
            vocab_size: V; `end_of_text + 1` by default.
        """
        ranks = {token: rank for rank, token in enumerate(tokens)}
        special_tokens = {ENDOFTEXT: len(tokens) if end_of_text is None else end_of_text}
        encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
        return cls(name, encoding, vocab_size)

    @cached_property
    def tokens(self) -> list[bytes]:
        """The bytes of the tokens in the order of their merges, which is also that of their ids 0, 1, 2, …"""
        return sorted(self.encoding.token_byte_values(), key=self.encoding.encode_single_token)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises:
            UserError: The regular expression that splits a text fails on this one.
        """
        ids: list[int] = []
        try:
            for part, is_pre_token in cut_long_runs(text, encoding_pattern(self.encoding)):
                ids += encode_run(self.encoding, part) if is_pre_token else self.encoding.encode_ordinary(part)
            return ids
        except BaseException as error:
            if not _is_pattern_error(error):
                raise
        raise UserError(
            f"the tokenizer {self.name} cannot split the text that begins with {text.lstrip()[:40]!r}: shorten it, or "
            "train with --data.tokenizer byte"
        )

    def encode_documents(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        joined = ENDOFTEXT.join([*texts, ""])
        if any(find_long_runs(joined)) or joined.count(ENDOFTEXT) != len(texts):  # a text contains these characters
            return super().encode_documents(texts)
        # One call, without lists of ints. The names of other special tokens in a text stay text.
        try:
            ids = self.encoding.encode_to_numpy(joined, allowed_special={ENDOFTEXT}, disallowed_special=())
        except BaseException as error:
            if not _is_pattern_error(error):
                raise
            return super().encode_documents(texts)  # its error names the text
        ends = np.flatnonzero(ids == self.end_of_text) + 1
        return ids, np.diff(ends, prepend=0)

    def token_bytes(self, token: int) -> bytes:
        if token >= self.end_of_text:  # it, and other special tokens of public vocabularies
            return b""
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:  # public vocabularies leave a few ids unused
            return b""

    def state(self) -> dict[str, Any]:
        # A checkpoint contains no copy of what is installed with this package.
        is_installed = self.encoding is ENCODINGS.get("cl100k_base")
        tokens = None if is_installed else [base64.b64encode(token).decode("ascii") for token in self.tokens]
        sizes = {"end_of_text": self.end_of_text, "vocab_size": self.vocab_size}
        return {"name": self.name, "pieces": tokens, "pattern": encoding_pattern(self.encoding), **sizes}


def _is_pattern_error(error: BaseException) -> bool:
    """Return whether tiktoken's regular expressions failed: a run of characters is too long, or they match nothing."""
    return isinstance(error, ValueError) or type(error).__name__ == "PanicException"  # of Rust, and no `Exception`


class ByteTokenizer(Tokenizer):
    """One id for each byte of UTF-8, and 256 for the end of text."""

    name = "byte"
    vocab_size, end_of_text = 257, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_documents(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        # The byte 0xFF never occurs in UTF-8.
        joined = b"\xff".join([*(text.encode() for text in texts), b""])
        ids = np.frombuffer(joined, dtype=np.uint8).astype(np.uint32)
        ends = np.flatnonzero(ids == 0xFF)
        ids[ends] = self.end_of_text
        return ids, np.diff(ends + 1, prepend=0)

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


class CharTokenizer(Tokenizer):
    """One id for each character of the corpus.

    Args:
        characters: The characters in the order of their ids.
    """

    name = "char"

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.ids = {character: i for i, character in enumerate(characters)}
        self.end_of_text, self.vocab_size = len(characters), len(characters) + 1

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises:
            UserError: A character is not in the vocabulary.
        """
        try:
            return [self.ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise UserError(
                f"character {character!r} (U+{ord(character):04X}) is not among the {len(self.ids)} characters of the "
                "training text: leave it out, or train with --data.tokenizer byte or cl100k_base"
            ) from None

    def token_bytes(self, token: int) -> bytes:
        return self.characters[token].encode("utf-8") if token < len(self.characters) else b""

    def state(self) -> dict[str, Any]:
        return {"name": self.name, "characters": self.characters}


def from_state(state: Any) -> Tokenizer:
    """Return the tokenizer whose `Tokenizer.state` is `state`. Nothing but an installed vocabulary is read for it.

    Raises:
        ValueError: No tokenizer has this state.
        UserError: Its vocabulary is not installed.
    """
    match state:
        case {"name": "byte"}:
            return ByteTokenizer()
        case {"name": "char", "characters": str(characters)} if len(set(characters)) == len(characters):
            characters.encode()  # a surrogate is a ValueError
            return CharTokenizer(characters)
        case {"name": str(name), "pieces": None} if name in PRUNABLE:
            return open_tokenizer(name)
        case {
            "name": str(name),
            "pieces": [*pieces],
            "pattern": str(pattern),
            "end_of_text": int(end_of_text),
            "vocab_size": int(vocab_size),
        } if pattern and len(pieces) <= end_of_text < vocab_size <= len(pieces) + MAX_SPECIAL_TOKENS:
            return BytePairTokenizer.from_tokens(name, _decode_tokens(pieces), pattern, end_of_text, vocab_size)
        case {"name": "tokenizer.json", "json": str(text), "begin": int(begin), "end": int(end), "size": int(size)}:
            return LibraryTokenizer(text, begin, end, size)
    raise ValueError("no tokenizer has this state")


def _decode_tokens(pieces: list[Any]) -> list[bytes]:
    """Return tokens that are given in base64.

    Raises:
        ValueError: They are no vocabulary: one is empty or there twice, or a single byte is missing.
    """
    if not all(isinstance(piece, str) for piece in pieces):
        raise ValueError("a token is not text")
    tokens = [base64.b64decode(piece, validate=True) for piece in pieces]
    distinct = set(tokens)
    if len(distinct) < len(tokens) or b"" in distinct or not distinct.issuperset(bytes([i]) for i in range(256)):
        raise ValueError("the tokens are no vocabulary")
    return tokens


# ------------------------------------------------------------------------------------- choice by name


def check_tokenizer_name(name: str) -> None:
    """Check the value of `data.tokenizer`.

    Raises:
        UserError: The name is unknown, or the file does not exist or cannot be read.
    """
    if name.endswith((".tiktoken", ".json")):
        if not os.path.isfile(os.path.expanduser(name)):
            raise UserError(
                f"--data.tokenizer {name}: no such file: give a .tiktoken file, or {', '.join(TOKENIZER_NAMES)}"
            )
        if not os.access(os.path.expanduser(name), os.R_OK):
            raise UserError(f"--data.tokenizer {name} cannot be read (no permission): allow it, as with chmod u+r")
    elif name not in TOKENIZER_NAMES:
        raise UserError(
            f"--data.tokenizer {name} is unknown{did_you_mean(name, TOKENIZER_NAMES)}: choose one of "
            f"{', '.join(TOKENIZER_NAMES)}, or give a .tiktoken file"
        )


def tokenizer_key(name: str, vocab: Vocab) -> list[str]:
    """Return what identifies a tokenizer in the key of a corpus: its name, or the SHA-256 of its file; and `vocab`."""
    if name.endswith((".tiktoken", ".json")):
        with open(os.path.expanduser(name), "rb") as file:
            name = hashlib.file_digest(file, "sha256").hexdigest()
    return [name] if name in TOKENIZER_NAMES and name not in PRUNABLE else [name, vocab]


def open_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer with a name or a file, with its full vocabulary.

    Args:
        name: A value of `data.tokenizer` that needs no training: not "bpe" or "char".

    Raises:
        UserError: Its vocabulary is not installed, or its file is not a vocabulary.
    """
    if name == "byte":
        return ByteTokenizer()
    if name in PRUNABLE:
        return BytePairTokenizer(name, get_encoding_offline(name))
    path = Path(os.path.expanduser(name))
    return open_state_file(path) if path.suffix == ".json" else open_tiktoken_file(path)


def open_state_file(path: Path) -> Tokenizer:
    """Return the tokenizer whose `Tokenizer.state` is in a JSON file, as `--model.init_from` writes it.

    Raises:
        UserError: The file has no such state, or its vocabulary is not installed.
    """
    try:
        return from_state(json.loads(path.read_text(encoding="utf-8")))
    except UserError:
        raise
    except ValueError:
        raise UserError(f"{path} has no tokenizer of lit_gpt: give the file that --model.init_from wrote") from None


def open_tiktoken_file(path: Path) -> BytePairTokenizer:
    """Return the tokenizer of a .tiktoken file. A vocabulary that is not public uses the pattern of cl100k_base.

    Raises:
        UserError: See `read_tiktoken_file`.
    """
    public = recognize_tiktoken_file(path)
    if public is not None:
        return BytePairTokenizer(*public)
    return BytePairTokenizer.from_tokens("file", read_tiktoken_file(path), cl100k_pattern())


# ------------------------------------------------------------------------------ vocabularies that fit a corpus


def train_bpe(texts: Iterable[str], vocab_size: int) -> BytePairTokenizer:
    """Train a byte-pair vocabulary on texts (Sennrich et al. 2016).

    Args:
        texts: The texts.
        vocab_size: The number of ids, the end of text included; fewer if the texts have no more pairs to merge.

    Raises:
        UserError: `vocab_size` is not more than the 256 single bytes.
    """
    import rustbpe  # only needed here

    if not 257 <= vocab_size < 2**31:
        raise UserError(f"--data.vocab_size is {vocab_size}: give more than 256, the number of single bytes")
    trainer = rustbpe.Tokenizer()
    parts = (part for text in texts for part, _ in cut_long_runs(text, cl100k_pattern()))
    trainer.train_from_iterator(parts, vocab_size - 1, pattern=cl100k_pattern())
    ranked = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    return BytePairTokenizer.from_tokens("bpe", [bytes(token) for token, _ in ranked], cl100k_pattern())


def prune(tokenizer: BytePairTokenizer, used: Iterable[int]) -> tuple[BytePairTokenizer, np.ndarray]:
    """Remove the tokens that a corpus does not need; its texts split exactly as before.

    Merges that never happen in a corpus can be removed without any effect on the others. What remains: the single
    bytes, so that any other text can be encoded; the used tokens; and every merge on the way to a used token. Those are
    found by encoding the token's bytes with lower ranks only, because merges inside a token do not depend on the bytes
    around it.

    Args:
        tokenizer: The tokenizer that encoded the corpus.
        used: The ids that occur in the corpus.

    Returns:
        The pruned tokenizer; and the ids that remain, ascending int64, whose new ids are 0, 1, 2, ….
    """
    tokens = tokenizer.tokens
    ranks = {token: rank for rank, token in enumerate(tokens)}
    remaining = {rank for rank, token in enumerate(tokens) if len(token) == 1}
    queue = [int(rank) for rank in used if rank != tokenizer.end_of_text]
    while queue:
        rank = queue.pop()
        if rank not in remaining:
            remaining.add(rank)
            queue.extend(encode_below(tokens[rank], ranks, max_rank=rank))
    ids = sorted(remaining)
    pattern = encoding_pattern(tokenizer.encoding)
    return BytePairTokenizer.from_tokens(tokenizer.name, [tokens[rank] for rank in ids], pattern), np.array(ids)


def encode_below(token: bytes, ranks: dict[bytes, int], max_rank: int) -> list[int]:
    """Return the ids of a token's bytes after byte-pair encoding with the merges below `max_rank`, usually two ids."""
    parts: list[bytes] = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        pair_ranks = [ranks.get(left + right, max_rank) for left, right in itertools.pairwise(parts)]
        best = min(range(len(pair_ranks)), key=pair_ranks.__getitem__)
        if pair_ranks[best] >= max_rank:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return [ranks[part] for part in parts]
