"""Assign documents to the training, validation and test split; find duplicates."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.data.config import SPLITS, CorpusConfig
from lit_gpt.data.sources import Source
from lit_gpt.data.tokenize import RECORD, RECORDS

SORTED = 2**20  # documents sorted together


def _records(path: Path, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Records, `RECORDS` at a time, each time with the number of the first."""
    while len(records := np.fromfile(path, RECORD, RECORDS, offset=start * RECORD.itemsize)):
        yield start, records
        start += len(records)


LEFT_OUT = len(SPLITS)  # the part of documents that came before


def _deal(count: int, recipe: CorpusConfig, files: list[Source], work: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The part of every document, (count,) uint8, and what is to be said of documents."""
    path, split = work / "records.bin", recipe.split
    of_file = np.array([SPLITS.index(source.split or "train") for source in files], dtype=np.uint8)
    if recipe.read_options.mode == "raw":
        parts = np.concatenate([of_file[records["file"]] for _, records in _records(path)])
        counts = [int((of_file == number).sum()) for number in range(len(SPLITS))]
        return parts, {"documents": counts, "duplicates": 0, "across": 0, "pairs": [], "longest": []}
    copies, pairs = _copies(path, count)
    parts = np.full(count, LEFT_OUT, dtype=np.uint8)
    kept = count - int(copies.sum()) if split.dedupe else count
    ends = [int(kept * (1 - split.val_fraction - split.test_fraction)), int(kept * (1 - split.test_fraction))]
    longest: list[tuple[int, int, int]] = []
    before = 0
    for first, records in _records(path):
        stays = ~copies[first : first + len(records)] if split.dedupe else np.ones(len(records), dtype=bool)
        if split.column is not None:
            dealt = records["mark"]
        elif any(source.split for source in files):
            dealt = of_file[records["file"]]
        elif split.seed is not None or split.group is not None:
            drawn = _uniform(records["mark"] if split.group is not None else records["hash"][:, 0], split.seed or 0)
            dealt = np.searchsorted([split.test_fraction, split.test_fraction + split.val_fraction], drawn, "right")
            dealt = np.array([2, 1, 0])[dealt]
        else:
            dealt = np.searchsorted(ends, before + np.cumsum(stays) - 1, side="right")
            before += int(stays.sum())
        parts[first : first + len(records)] = np.where(stays, dealt, LEFT_OUT)
        for i in np.argsort(records["characters"], kind="stable")[-5:]:
            longest.append((int(records["characters"][i]), int(records["file"][i]), int(records["line"][i])))
        longest = sorted(longest, key=lambda row: (-row[0], row[1:]))[:5]
    return parts, {
        "documents": [int((parts == number).sum()) for number in range(len(SPLITS))],
        "duplicates": int(copies.sum()),
        "across": _across(path, parts),
        "pairs": [[_place(path, files, i) for i in pair] for pair in pairs],
        "longest": [[str(files[file]), line, size] for size, file, line in longest],
    }


def _uniform(keys: np.ndarray, seed: int) -> np.ndarray:
    """Hashes, turned by the seed, as numbers from 0 to 1."""
    return (keys + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)) * 2.0**-64


def _place(path: Path, files: list[Source], number: int) -> list[Any]:
    (record,) = np.fromfile(path, RECORD, 1, offset=number * RECORD.itemsize)
    return [str(files[record["file"]]), int(record["line"])]


def _equals(path: Path, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents sorted so that equal ones stand together in their order, some millions at a time.

    Yields:
        Their numbers (n,), and where documents of a new text begin (n,) bool.
    """
    shares = 1 + count // SORTED
    for share in range(shares):
        numbers, hashes = [], []
        for first, records in _records(path):
            here = np.flatnonzero(records["hash"][:, 0] % shares == share)
            numbers.append(first + here)
            hashes.append(records["hash"][here])
        number, found = np.concatenate(numbers), np.concatenate(hashes)  # (n,), (n, 2)
        order = np.lexsort((found[:, 1], found[:, 0]))
        found = found[order]
        yield number[order], np.append(True, (found[1:] != found[:-1]).any(axis=1))[: len(order)]


def _copies(path: Path, count: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Which documents came before, (count,) bool, and the first twenty of them, each with the one it is a copy of."""
    copies, pairs = np.zeros(count, dtype=bool), []
    for numbers, begins in _equals(path, count):
        copies[numbers[~begins]] = True
        originals = numbers[begins][np.cumsum(begins) - 1]
        first = np.argsort(np.where(begins, count, numbers))[:20]
        pairs += [(int(numbers[i]), int(originals[i])) for i in first if not begins[i]]
    return copies, sorted(pairs)[:20]


def _across(path: Path, parts: np.ndarray) -> int:
    """Documents outside training whose text is also in it."""
    across = 0
    for numbers, begins in _equals(path, len(parts)):
        part = parts[numbers]
        trained = np.logical_or.reduceat(part == 0, np.flatnonzero(begins)) if len(part) else part.astype(bool)
        across += int(((part == 1) | (part == 2))[trained[np.cumsum(begins) - 1]].sum())
    return across
