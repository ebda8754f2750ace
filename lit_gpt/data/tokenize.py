"""Documents to token ids, one block of documents at a time.

A block holds consecutive documents of one file. Every block is tokenized independently, by any process, into a file of
its own: a build that was killed continues with the blocks that are missing.
"""

import array
import functools
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lit_gpt.data.config import SPLITS, CorpusConfig, SplitOptions
from lit_gpt.data.read_options import ReadOptions
from lit_gpt.data.readers import RejectedRow, open_rows, open_text_chunks, with_detected_encoding
from lit_gpt.data.sources import Source
from lit_gpt.errors import UserError, shorten
from lit_gpt.files import atomic_write, open_regular
from lit_gpt.tokenizer import CharTokenizer, Tokenizer, from_state, train_bpe

MAX_BLOCK_ROWS = 2**16
MAX_BLOCK_BYTES = 2**30  # of a block's file; no text of a block is so long
MAX_TRAINING_BYTES = 2**26  # a longer text is sampled to about this size before a tokenizer is trained on it

SPLIT_ALIASES = {"training": "train", "valid": "val", "validation": "val", "dev": "val"}  # in a split column

# one record per document; in raw mode one per block
DOCUMENT_DTYPE = np.dtype(
    [
        ("tokens", "<u4"),  # including end-of-text
        ("characters", "<u4"),
        ("file", "<u4"),  # index of the source
        ("line", "<u4"),  # where the document begins in it
        ("split_key", "<u8"),  # see `split_key`
        ("hash", "<u8", 2),  # 128 bits of BLAKE2b of the text; 0 in raw mode
    ]
)


def train_tokenizer(sources: list[Source], config: CorpusConfig) -> Tokenizer:
    """Return the tokenizer "char" or "bpe" with the vocabulary of a text.

    "char" takes the characters of all documents, those of the val and test split included: every one must have an id.
    """
    if config.tokenizer == "char":
        characters: set[str] = set()
        for text in read_texts(sources, config.read_options):
            characters.update(text)
        return CharTokenizer("".join(sorted(characters)))
    assert config.bpe_vocab_size is not None
    return train_bpe(_sample_texts(sources, config), config.bpe_vocab_size)


def read_texts(sources: list[Source], read_options: ReadOptions) -> Iterator[str]:
    """Yield every document that is neither rejected nor blank; in raw mode, the text of every file in chunks."""
    for source in sources:
        detected, _ = with_detected_encoding(source, read_options)
        if detected.mode == "raw":
            with open_text_chunks(source, detected) as (chunks, _):
                yield from (chunk.text for chunk in chunks if chunk.text)
        else:
            with open_rows(source, detected) as (rows, _):
                yield from (row.text for row in rows if not isinstance(row, RejectedRow) and row.text.strip())


def _sample_texts(sources: list[Source], config: CorpusConfig) -> Iterator[str]:
    """Yield every n-th document of the files that are not reserved for validation or test.

    n is 1 for files of up to `MAX_TRAINING_BYTES` together, and grows with their size.
    """
    size = sum(source.size() for source in sources)
    every = max(1, round(size / MAX_TRAINING_BYTES))
    training_sources = [source for source in sources if not source.split]
    for index, text in enumerate(read_texts(training_sources, config.read_options)):
        if index % every == 0:
            yield text


@dataclass
class Block:
    """Consecutive documents of one file, which are tokenized together; in raw mode, a part of its text.

    Attributes:
        texts: The documents.
        lines: Line in which each document begins.
        split_keys: Split key of each document, see `split_key`.
        rows: Number of rows read, blank and rejected rows included; in raw mode of lines.
        empty_rows: Number of rows without text.
        rejected: Rows, or in raw mode lines, that cannot be read.
        bytes_read: Number of bytes of the file that were read for the block.
        file: Index of the source.
        index: Index of the block in its file.
        needs_separator: Whether end-of-text goes before the block: in raw mode, where a new file begins.
    """

    texts: list[str] = field(default_factory=list)
    lines: array.array = field(default_factory=partial(array.array, "L"))
    split_keys: array.array = field(default_factory=partial(array.array, "Q"))
    rows: int = 0
    empty_rows: int = 0
    rejected: list[RejectedRow] = field(default_factory=list)
    bytes_read: int = 0
    file: int = 0
    index: int = 0
    needs_separator: bool = False


def read_blocks(
    sources: list[Source],
    read_options: list[ReadOptions],
    split_options: SplitOptions,
    block_characters: int,
    file: int,
) -> Iterator[Block]:
    """Yield the blocks of one file in order. The same arguments always give the same blocks.

    Args:
        sources: All sources.
        read_options: The options of each source, with its encoding.
        split_options: Determines the split key of each document.
        block_characters: A block ends when it has this many characters. In raw mode `open_text_chunks` decides.
        file: Index of the source to read.
    """
    source, is_raw = sources[file], read_options[file].mode == "raw"
    if is_raw:
        blocks = _read_raw_blocks(source, read_options[file])
    else:
        blocks = _read_row_blocks(source, read_options[file], split_options, block_characters)
    previous_position = 0
    for index, (block, position) in enumerate(blocks):
        block.file, block.index, block.bytes_read = file, index, position - previous_position
        block.needs_separator = is_raw and file > 0 and index == 0
        previous_position = position
        yield block


def _read_raw_blocks(source: Source, read_options: ReadOptions) -> Iterator[tuple[Block, int]]:
    """Yield the blocks of a file in raw mode, each with the position in the file at its end, in bytes."""
    with open_text_chunks(source, read_options) as (chunks, raw_file):
        for text, lines, rejected in chunks:
            texts = [text] if text else []
            places = array.array("L", [1] * len(texts)), array.array("Q", [0] * len(texts))
            yield Block(texts, *places, rows=lines, rejected=rejected), raw_file.tell()


def _read_row_blocks(
    source: Source, read_options: ReadOptions, split_options: SplitOptions, block_characters: int
) -> Iterator[tuple[Block, int]]:
    """Yield the blocks of a file with a document per row, each with the position in the file at its end, in bytes."""
    block, characters = Block(), 0
    with open_rows(source, read_options) as (rows, raw_file):
        for row in rows:
            block.rows += 1
            if not isinstance(row, RejectedRow) and (key := split_key(row.split_key, split_options)) is None:
                row = RejectedRow(row.line, f"{shorten(row.split_key)!r} is not a split: write train, val or test")
            if isinstance(row, RejectedRow):
                block.rejected.append(row)
            elif not row.text.strip():
                block.empty_rows += 1
            else:
                block.texts.append(row.text)
                block.lines.append(row.line)
                block.split_keys.append(key)
                characters += len(row.text)
            if characters >= block_characters or block.rows >= MAX_BLOCK_ROWS:
                yield block, raw_file.tell()
                block, characters = Block(), 0
    if block.rows:
        yield block, source.size()


def split_key(value: str, split_options: SplitOptions) -> int | None:
    """Return the number that stands for the value of a row in the split column or in the group column.

    Returns:
        With a split column the index of the split in `SPLITS`, None if the value does not name one. With a group
        column a hash of the value. Otherwise 0.
    """
    if split_options.column is not None:
        name = value.strip().lower()
        name = SPLIT_ALIASES.get(name, name)
        return SPLITS.index(name) if name in SPLITS else None
    if split_options.group is not None:
        return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest())
    return 0


class EncodedBlock(NamedTuple):
    """The token ids of a block.

    Attributes:
        ids: Token ids of all documents, concatenated, (tokens,) uint32.
        records: One record for each document, (documents,) `DOCUMENT_DTYPE`.
        metadata: Counts, the rejected rows and the ids that occur.
    """

    ids: np.ndarray
    records: np.ndarray
    metadata: dict[str, Any]


def encode_block(tokenizer: Tokenizer, block: Block, is_raw: bool) -> EncodedBlock:
    """Tokenize a block. Every document ends with end-of-text; in raw mode it stands between files only.

    Raises:
        UserError: In raw mode, the tokenizer cannot encode the text. A document that it cannot encode is rejected.
    """
    ids, lengths = np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.int64)
    if block.texts:  # otherwise all rows are blank or rejected
        try:
            ids, lengths = tokenizer.encode_documents(block.texts)
        except UserError:
            if is_raw:
                raise
            return encode_block(tokenizer, _reject_documents(tokenizer, block), is_raw)
    if block.texts and is_raw:
        separator = np.full(int(block.needs_separator), tokenizer.end_of_text, dtype=np.uint32)
        ids = np.append(separator, ids[:-1])  # `encode_documents` appends end-of-text
        lengths = np.array([len(ids)])
    return _describe_block(block, ids, lengths, is_raw)


def _reject_documents(tokenizer: Tokenizer, block: Block) -> Block:
    """Return a block in which the documents that the tokenizer cannot encode are rejected rows."""
    encodable = replace(block, texts=[], lines=array.array("L"), split_keys=array.array("Q"))
    rejected = list(block.rejected)
    for text, line, key in zip(block.texts, block.lines, block.split_keys, strict=True):
        try:
            tokenizer.encode(text)
        except UserError as error:
            rejected.append(RejectedRow(line, str(error)))
        else:
            encodable.texts.append(text)
            encodable.lines.append(line)
            encodable.split_keys.append(key)
    encodable.rejected = sorted(rejected)
    return encodable


def _describe_block(block: Block, ids: np.ndarray, lengths: np.ndarray, is_raw: bool) -> EncodedBlock:
    """Return the token ids of a block with all else that its file contains.

    Args:
        block: The block.
        ids: Token ids of all documents, concatenated, (tokens,) uint32.
        lengths: Number of tokens of each document, (documents,).
        is_raw: Whether the file is one text; then there are no hashes.
    """
    contents = [text.encode() for text in block.texts]
    records = np.zeros(len(contents), dtype=DOCUMENT_DTYPE)
    records["tokens"], records["file"] = lengths, block.file
    records["characters"] = [len(text) for text in block.texts]
    records["line"], records["split_key"] = block.lines, block.split_keys
    if contents and not is_raw:
        digests = b"".join([hashlib.blake2b(content, digest_size=16).digest() for content in contents])
        records["hash"] = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)  # (documents, 2)
    metadata = {
        "file": block.file,
        "rows": block.rows,
        "empty_rows": block.empty_rows,
        "rejected": [list(row) for row in block.rejected],
        "bytes": sum(map(len, contents)),
        "used": np.flatnonzero(np.bincount(ids)).tolist(),
    }
    return EncodedBlock(ids, records, metadata)


@functools.cache
def _load_tokenizer(path: Path) -> Tokenizer:
    return from_state(json.loads(path.read_text(encoding="utf-8")))


class BlockProgress(NamedTuple):
    """What a block adds to the progress bar, and its file.

    Attributes:
        rows: Number of rows read.
        rejected: Number of rows that cannot be read.
        bytes_read: Number of bytes of the source that were read.
        path: The file of the block.
        was_damaged: Whether the file was there before, and was not that of this block.
    """

    rows: int
    rejected: int
    bytes_read: int
    path: Path
    was_damaged: bool


def tokenize_block(work_folder: Path, is_raw: bool, block: Block) -> BlockProgress:
    """Tokenize a block with the tokenizer in `work_folder`/tokenizer.json and write it to `work_folder`.

    The file is an .npz of three arrays: `ids` (tokens,) uint32, `record` (documents,) `DOCUMENT_DTYPE`, and `known`, a
    JSON string of counts, rejected rows and the ids that occur. Sorted by name the files are in the order of the
    documents. A file that an earlier process has written is not written again, unless it is damaged.
    """
    path = work_folder / f"{block.file:07}_{block.index:09}.npz"
    tokenizer = _load_tokenizer(work_folder / "tokenizer.json")
    exists = path.exists()
    is_complete = exists and _is_file_of_block(path, tokenizer, block, is_raw)
    rejected, was_damaged = len(block.rejected), exists and not is_complete
    if not is_complete:
        encoded = encode_block(tokenizer, block, is_raw)
        if len(encoded.metadata["rejected"]) > rejected:  # the file of such a block is never taken for complete
            rejected, was_damaged = len(encoded.metadata["rejected"]), False

        def write(file: BinaryIO) -> None:
            known = np.array(json.dumps(encoded.metadata))
            np.savez(file, ids=encoded.ids, record=encoded.records, known=known)

        atomic_write(path, write, temporary_folder=work_folder)
    return BlockProgress(block.rows, rejected, block.bytes_read, path, was_damaged)


def read_block(path: Path) -> EncodedBlock:
    """Read a file that `tokenize_block` has written.

    Raises:
        OSError: It is damaged. Its checksums are compared; memory is bounded by its size, and no code in it runs.
    """
    try:
        with open_regular(path) as file:
            if file.seek(0, os.SEEK_END) > MAX_BLOCK_BYTES:
                raise ValueError("larger than a block")
            with zipfile.ZipFile(file) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("compressed, which a block is not")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                ids, records, metadata = arrays["ids"], arrays["record"], json.loads(str(arrays["known"]))
        if ids.dtype != np.uint32 or ids.ndim != 1 or records.dtype != DOCUMENT_DTYPE or records.ndim != 1:
            raise ValueError("other arrays than those of a block")
    except Exception:  # NumPy, zipfile and json raise exceptions of many kinds
        raise OSError(None, f"{path} is damaged; the same command makes it again") from None
    return EncodedBlock(ids, records, metadata)


def _is_file_of_block(path: Path, tokenizer: Tokenizer, block: Block, is_raw: bool) -> bool:
    """Return whether a file is undamaged and says of a block what its texts say, except for the token ids."""
    try:
        found = read_block(path)
    except OSError:
        return False
    lengths = found.records["tokens"]
    is_plausible = len(lengths) == len(block.texts) and lengths.sum(dtype=np.int64) == len(found.ids)
    if not is_plausible or (len(found.ids) and found.ids.max() >= tokenizer.vocab_size):
        return False
    expected = _describe_block(block, found.ids, lengths, is_raw)
    return np.array_equal(found.records, expected.records) and found.metadata == expected.metadata
