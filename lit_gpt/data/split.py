"""Find duplicate documents and assign documents to the train, val and test split.

The functions read the records of all documents (`DOCUMENT_DTYPE`) from a file in chunks, and hold a few bytes per
document in memory.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lit_gpt.data.config import SPLITS, CorpusConfig, SplitOptions, boundaries
from lit_gpt.data.sources import Source
from lit_gpt.data.tokenize import DOCUMENT_DTYPE

TRAIN, VAL, TEST = range(len(SPLITS))
LEFT_OUT = len(SPLITS)  # stands for the split of a duplicate that is left out

RECORDS_PER_READ = 2**16
RECORDS_PER_SORT = 2**20  # approximate
NUM_LONGEST = 5  # documents that are listed


def read_records(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the records of a file in chunks, each with the index of its first document."""
    start = 0
    while len(records := np.fromfile(path, DOCUMENT_DTYPE, RECORDS_PER_READ, offset=start * DOCUMENT_DTYPE.itemsize)):
        yield start, records
        start += len(records)


def find_originals(path: Path) -> np.ndarray:
    """Return the index of the first document with the same text, for every document, (documents,) uint32.

    Documents with the same hash have the same text. They are sorted in groups of about `RECORDS_PER_SORT` by the
    remainder of the hash, where a text that is there many times counts once for each chunk that is read.

    Args:
        path: File with the records of all documents.
    """
    count = path.stat().st_size // DOCUMENT_DTYPE.itemsize
    originals = np.zeros(count, dtype=np.uint32 if count < 2**32 else np.uint64)
    num_groups = 1 + count // RECORDS_PER_SORT
    for group in range(num_groups):
        index_chunks, hash_chunks = [], []
        for start, records in read_records(path):
            positions = np.flatnonzero(records["hash"][:, 0] % num_groups == group)  # (n,)
            hashes = records["hash"][positions]  # (n, 2)
            first = _first_equal(hashes)  # (n,)
            originals[start + positions] = start + positions[first]
            is_first = first == np.arange(len(first))
            index_chunks.append(start + positions[is_first])
            hash_chunks.append(hashes[is_first])
        if index_chunks:
            indices = np.concatenate(index_chunks)
            originals[indices] = indices[_first_equal(np.concatenate(hash_chunks))]
    for start in range(0, count, RECORDS_PER_READ):  # from the first of its chunk to the first of all
        chunk = originals[start : start + RECORDS_PER_READ]
        chunk[:] = originals[chunk]
    return originals


def _first_equal(hashes: np.ndarray) -> np.ndarray:
    """Return the index of the first equal row for every row of (n, 2) uint64, (n,) int64."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # a stable sort
    hashes = hashes[order]
    is_first = np.append(True, (hashes[1:] != hashes[:-1]).any(axis=1))[: len(order)]
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[is_first][np.cumsum(is_first) - 1]
    return first


def duplicates(originals: np.ndarray) -> np.ndarray:
    """Return the mask of the documents whose text has occurred before, (documents,) bool."""
    return originals != np.arange(len(originals), dtype=originals.dtype)


def count_leaked(originals: np.ndarray, splits: np.ndarray) -> int:
    """Return the number of val and test documents whose text is also in the train split.

    Args:
        originals: The first document with the same text for every document, from `find_originals`.
        splits: The split of each document, (documents,) uint8.
    """
    in_train = np.zeros(len(originals), dtype=bool)
    leaked = 0
    chunks = [slice(start, start + RECORDS_PER_READ) for start in range(0, len(originals), RECORDS_PER_READ)]
    for chunk in chunks:
        in_train[originals[chunk][splits[chunk] == TRAIN]] = True
    for chunk in chunks:
        is_held_out = (splits[chunk] == VAL) | (splits[chunk] == TEST)
        leaked += int((is_held_out & in_train[originals[chunk]]).sum())
    return leaked


def assign_splits(path: Path, sources: list[Source], config: CorpusConfig, is_duplicate: np.ndarray) -> np.ndarray:
    """Return the index of the split of every document, (documents,) uint8.

    The split comes from the split column; otherwise from the file, if it is given for a split; otherwise from a hash of
    the group or the text, or from the position among the documents of these other files. In raw mode, where a record is
    a block, only the file counts; `layout` splits a single text by tokens.

    Args:
        path: File with the records of all documents.
        sources: All sources.
        config: Determines the splits.
        is_duplicate: Mask of the duplicates, which get `LEFT_OUT` if `dedupe` is set, (documents,) bool.
    """
    options, is_raw = config.split_options, config.read_options.mode == "raw"
    split_of_file = np.array([SPLITS.index(source.split or "train") for source in sources], dtype=np.uint8)
    is_divided_file = np.array([not source.split for source in sources]) & (not is_raw)
    fractions = file_fractions(sources, options)
    is_kept = ~is_duplicate if options.dedupe else np.ones_like(is_duplicate)
    count = sum(
        int((is_divided_file[records["file"]] & is_kept[start : start + len(records)]).sum())
        for start, records in read_records(path)
    )
    splits = np.full(len(is_duplicate), LEFT_OUT, dtype=np.uint8)
    before = 0  # documents of divided files
    for start, records in read_records(path):
        kept = is_kept[start : start + len(records)]
        is_divided = is_divided_file[records["file"]]
        if options.column is not None:
            assigned = records["split_key"]
        elif options.seed is not None or options.group is not None:
            assigned = _split_by_hash(records, options, fractions)
        else:
            positions = before + np.cumsum(kept & is_divided) - 1
            assigned = np.searchsorted(boundaries(count, fractions), positions, side="right")
            before += int((kept & is_divided).sum())
        if options.column is None:
            assigned = np.where(is_divided, assigned, split_of_file[records["file"]])
        splits[start : start + len(records)] = np.where(kept, assigned, LEFT_OUT)
    return splits


def file_fractions(sources: list[Source], options: SplitOptions) -> tuple[float, float]:
    """Return the fractions of the val and of the test split in the files that are given for no split."""
    splits = {source.split for source in sources}
    return options.fractions("val" in splits, "test" in splits)


def _split_by_hash(records: np.ndarray, options: SplitOptions, fractions: tuple[float, float]) -> np.ndarray:
    """Return the split of each document, determined by the hash of its group or of its text, and the seed."""
    keys = records["split_key"] if options.group is not None else records["hash"][:, 0]
    # the seed rotates the ring of 64-bit hashes; 2^64 / golden ratio spreads the rotations of successive seeds evenly
    rotation = np.uint64((options.seed or 0) * 0x9E3779B97F4A7C15 % 2**64)
    uniform = (keys + rotation) * 2.0**-64  # (n,) in [0, 1]
    val, test = fractions
    return np.array([TEST, VAL, TRAIN])[np.searchsorted([test, test + val], uniform, side="right")]


def longest_documents(path: Path) -> list[tuple[int, int, int]]:
    """Return the longest documents as (file, line, characters), the longest first.

    Args:
        path: File with the records of all documents.
    """
    longest: list[tuple[int, int, int]] = []
    for _, records in read_records(path):
        for i in np.argsort(records["characters"], kind="stable")[-NUM_LONGEST:]:
            record = records[i]
            longest.append((int(record["file"]), int(record["line"]), int(record["characters"])))
        longest = sorted(longest, key=lambda document: (-document[2], *document[:2]))[:NUM_LONGEST]
    return longest


def location(path: Path, document: int) -> tuple[int, int]:
    """Return the file and the line of a document."""
    (record,) = np.fromfile(path, DOCUMENT_DTYPE, 1, offset=document * DOCUMENT_DTYPE.itemsize)
    return int(record["file"]), int(record["line"])
