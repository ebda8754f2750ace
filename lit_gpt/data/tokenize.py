"""Documents to token ids, block by block."""

import array
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from lit_gpt.data.config import CorpusConfig, SplitConfig
from lit_gpt.data.read_options import ReadOptions
from lit_gpt.data.readers import RejectedRow, open_rows, open_text_chunks, with_detected_encoding
from lit_gpt.data.sources import Source
from lit_gpt.tokenizer import (
    CharTokenizer,
    Tokenizer,
    from_state,
    learn_bpe,
)

RECORDS = 2**16  # documents looked at together, and rows in a block at most


LEARNED_FROM = 2**26  # characters a vocabulary is learned from at most


PART_NAMES = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2}  # in a column


RECORD = np.dtype(  # of a document, or of a block of a raw text
    [("tokens", "<u4"), ("characters", "<u4"), ("file", "<u4"), ("line", "<u4"), ("mark", "<u8"), ("hash", "<u8", 2)]
)


@contextmanager
def _whole(path: Path, work: Path) -> Iterator[IO[bytes]]:
    """Writes a file in `work`, under a name of its own; it appears at `path` when it is whole and on the disk."""
    new = work / f"{uuid.uuid4().hex}.new"
    with open(new, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def train_tokenizer(files: list[Source], recipe: CorpusConfig) -> Tokenizer:
    """The vocabulary of the characters, or of the byte pairs, of a text."""
    if recipe.tokenizer == "char":
        characters: set[str] = set()
        for text in read_texts(files, recipe.read_options):
            characters.update(text)
        return CharTokenizer("".join(sorted(characters)))
    return learn_bpe(_spread(files, recipe), recipe.vocab_size)


def read_texts(files: list[Source], reading: ReadOptions) -> Iterator[str]:
    """All documents, or the blocks of all raw texts, that can be read and are not blank."""
    for source in files:
        known, _ = with_detected_encoding(source, reading)
        if reading.mode == "raw":
            with open_text_chunks(source, known) as (pieces, _):
                yield from pieces
        else:
            with open_rows(source, known) as (rows, _):
                yield from (row.text for row in rows if not isinstance(row, RejectedRow) and row.text.strip())


def _spread(files: list[Source], recipe: CorpusConfig) -> Iterator[str]:
    """Documents that train, and of a long text as many of them as `LEARNED_FROM` allows, from all over it."""
    size = sum(source.size() for source in files)
    every = max(1, round(size / LEARNED_FROM))
    for number, text in enumerate(read_texts([source for source in files if not source.split], recipe.read_options)):
        if number % every == 0:
            yield text


@dataclass
class Block:
    """Documents that are tokenized together, or a stretch of a raw text.

    Attributes:
        texts: of the documents.
        lines: where each begins.
        marks: of each, what `SplitConfig` asks of it.
        rows: read for it, blank and rejected ones too.
        empty_rows: of them, those without text.
        rejected: of them, those that cannot be read.
        bytes: of the file, read for it.
        file: the number of theirs.
        number: of the block in it.
        follows: in raw mode, whether a text of another file ended before.
    """

    texts: list[str] = field(default_factory=list)
    lines: array.array = field(default_factory=partial(array.array, "L"))
    marks: array.array = field(default_factory=partial(array.array, "Q"))
    rows: int = 0
    empty_rows: int = 0
    rejected: list[RejectedRow] = field(default_factory=list)
    bytes: int = 0
    file: int = 0
    number: int = 0
    follows: bool = False


def read_blocks(
    files: list[Source], readings: list[ReadOptions], split: SplitConfig, size: int, number: int
) -> Iterator[Block]:
    """The blocks of file `number`, in order: always the same.

    Args:
        files: all of them.
        readings: of each, its encoding known.
        split: what it asks of a row is read.
        size: characters in a block that make it whole.
        number: of the file.
    """
    source, reading = files[number], readings[number]
    blocks = _raw_blocks if reading.mode == "raw" else _row_blocks
    read = 0
    for i, (block, position) in enumerate(blocks(source, reading, split, size)):
        block.file, block.number, block.bytes = number, i, position - read
        block.follows = reading.mode == "raw" and number > 0 and i == 0
        read = position
        yield block


def _raw_blocks(source: Source, reading: ReadOptions, split: SplitConfig, size: int) -> Iterator[tuple[Block, int]]:
    with open_text_chunks(source, reading) as (pieces, raw):
        for i, piece in enumerate(pieces):
            yield Block([piece], array.array("L", [1]), array.array("Q", [0]), rows=int(i == 0)), raw.tell()


def _row_blocks(source: Source, reading: ReadOptions, split: SplitConfig, size: int) -> Iterator[tuple[Block, int]]:
    block, characters = Block(), 0
    with open_rows(source, reading) as (rows, raw):
        for row in rows:
            block.rows += 1
            if not isinstance(row, RejectedRow) and (mark := _mark(row.split_key, split)) is None:
                row = RejectedRow(row.line, f"{row.split_key!r} is no part: write train, val or test")
            if isinstance(row, RejectedRow):
                block.rejected.append(row)
            elif not row.text.strip():
                block.empty_rows += 1
            else:
                block.texts.append(row.text)
                block.lines.append(row.line)
                block.marks.append(mark)
                characters += len(row.text)
            if characters >= size or block.rows >= RECORDS:
                yield block, raw.tell()
                block, characters = Block(), 0
    if block.rows:
        yield block, source.size()


def _mark(text: str, split: SplitConfig) -> int | None:
    """What is remembered of a row's mark: the part it names, or the hash of its group."""
    if split.column is not None:
        return PART_NAMES.get(text.strip().lower())
    if split.group is not None:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
    return 0


@dataclass
class Encoded:
    """Of a block: its ids end to end, how many each document has, each one's hash, and UTF-8 bytes in all."""

    ids: np.ndarray
    counts: np.ndarray
    hashes: np.ndarray
    size: int


def encode(tokenizer: Tokenizer, block: Block, raw: bool) -> Encoded:
    """A document closes with the end-of-text id; a raw text is taken as it is, only between two stands one."""
    if not block.texts:  # but rows that are none
        nothing = np.zeros(0, dtype=np.uint32)
        return Encoded(nothing, nothing, np.zeros((0, 2), dtype=np.uint64), 0)
    if raw:
        text = tokenizer.encode_documents(block.texts)[0][:-1]
        text = np.append(np.full(int(block.follows), tokenizer.end_of_text, dtype=np.uint32), text)
        size, nothing = len(block.texts[0].encode()), np.zeros((1, 2), dtype=np.uint64)
        return Encoded(text, np.array([len(text)]), nothing, size)
    ids, counts = tokenizer.encode_documents(block.texts)
    contents = [text.encode() for text in block.texts]
    digests = b"".join([hashlib.blake2b(content, digest_size=16).digest() for content in contents])
    return Encoded(ids, counts, np.frombuffer(digests, dtype="<u8").reshape(-1, 2), sum(map(len, contents)))


_tokenizers: dict[Path, Tokenizer] = {}  # in this process, by the folder that asks for them


def tokenize_block(work: Path, raw: bool, block: Block) -> dict[str, int]:
    """Leaves a block's ids in `work`, with the record of every document and the rest that is known of it.

    One that an earlier process has left is taken as it is.

    Returns:
        The block's rows, those rejected, and bytes read.
    """
    path = work / f"{block.file:07}_{block.number:09}.npz"
    if not path.exists():
        if work not in _tokenizers:
            _tokenizers[work] = from_state(json.loads((work / "tokenizer.json").read_text(encoding="utf-8")))
        encoded = encode(_tokenizers[work], block, raw)
        record = np.zeros(len(encoded.counts), dtype=RECORD)
        record["tokens"], record["hash"], record["file"] = encoded.counts, encoded.hashes, block.file
        record["characters"] = [len(text) for text in block.texts]
        record["line"], record["mark"] = block.lines, block.marks
        known: dict[str, Any] = {"file": block.file, "rows": block.rows, "empty_rows": block.empty_rows}
        known |= {"rejected": block.rejected, "bytes": encoded.size}
        known["used"] = np.flatnonzero(np.bincount(encoded.ids)).tolist()
        with _whole(path, work) as file:
            np.savez(file, ids=encoded.ids, record=record, known=np.array(json.dumps(known)))
    return {"rows": block.rows, "rejected": len(block.rejected), "bytes": block.bytes}
