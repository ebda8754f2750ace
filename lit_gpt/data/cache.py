"""Open a corpus in the cache: compare its files with their digests, and check what they say.

A corpus is a folder of files: ids_00000.bin, … (the token ids, `shards`), corpus.json (their dtype and the tokenizer),
report.json (what was read) and rejected.jsonl (the rows that cannot be read). SHA256SUMS, written last, holds their
digests.

A digest shows that a file has changed since it was written. It does not show who wrote it: whatever the JSON files say
is therefore checked before it is used.
"""

import json
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.data.config import SPLITS
from lit_gpt.data.shards import ID_DTYPES, ShardedArray, open_shards, shard_path
from lit_gpt.digests import DIGESTS_FILE, damaged_files, read_digests, sha256_of_all, write_digests
from lit_gpt.files import atomic_write, open_regular
from lit_gpt.tokenizer import Tokenizer, from_state

CORPUS_FILE, REPORT_FILE, REJECTED_FILE = "corpus.json", "report.json", "rejected.jsonl"
MAX_COMPARED_BYTES = 2**31  # of a corpus, each time it is opened
MAX_JSON_BYTES = 2**26  # of corpus.json and of report.json

# What report.json contains: `int` and `float` are finite and not negative; a list has any number of the same items.
LOCATION = (str, int)  # file, line
FILE_SHAPE = {  # as `encodings.DetectedEncoding`
    "name": str,
    "bytes": int,
    "encoding": str,
    "sure": bool,
    "confidence": float,
    "runner_up": str,
    "examples": [str],
}
REPORT_SHAPE: dict[str, Any] = {
    "files": [FILE_SHAPE],
    "mode": str,
    "rows": int,
    "rejected": int,
    "rejected_first": [(*LOCATION, str)],  # reason
    "empty_rows": int,
    "documents": int,
    "duplicates": int,
    "duplicates_left_out": int,
    "duplicates_across": int,
    "duplicates_first": [(LOCATION, LOCATION)],
    "longest": [(*LOCATION, int)],  # characters
    "characters": int,
    "bytes": int,
    "tokens": int,
    "tokens_per_character": float,
    "parts": {split: {"documents": int, "tokens": int} for split in SPLITS},
    "vocab_size": int,
    "vocabulary_in_use": int,
    "least_frequent": [(int, str, int)],  # token, its text, count
}


class DamagedCorpusError(Exception):
    """A corpus in the cache is not as it was written. The message names the file."""


@dataclass(frozen=True)
class Corpus:
    """The token ids of all documents and how they were made.

    Attributes:
        key: Fingerprint of the source files and the config.
        ids: All token ids, split after split, (tokens,) uint16 or uint32, memory-mapped.
        tokenizer: The tokenizer that encoded them.
        report: What was read and what it contains; the contents of report.json.
        folder: Where the corpus is stored.
    """

    key: str
    ids: ShardedArray
    tokenizer: Tokenizer
    report: dict[str, Any]
    folder: Path

    def split(self, name: str) -> ShardedArray:
        """Return the token ids of the split "train", "val" or "test"."""
        sizes = [self.report["parts"][split]["tokens"] for split in SPLITS]
        index = SPLITS.index(name)
        start = sum(sizes[:index])
        return self.ids[start : start + sizes[index]]


def write_json(path: Path, content: dict[str, Any], indent: int | None = None) -> None:
    """Write corpus.json or report.json.

    Raises:
        OSError: It cannot be written.
    """
    atomic_write(path, lambda file: file.write(json.dumps(content, ensure_ascii=False, indent=indent).encode()))


def write_corpus_digests(folder: Path) -> None:
    """Write the digests of all files of a corpus, which is then complete.

    Raises:
        OSError: A file cannot be read, or SHA256SUMS cannot be written.
    """
    write_digests(folder, sha256_of_all(path for path in folder.iterdir() if path.is_file()))


def load_corpus(folder: Path) -> Corpus | None:
    """Open the corpus in a folder; return None if there is none.

    Raises:
        DamagedCorpusError: It is not as it was written.
    """
    if not os.path.lexists(folder):
        return None
    if folder.is_symlink() or not folder.is_dir():
        raise DamagedCorpusError(f"{folder} is no folder")
    num_shards, compared = _check_files(folder)
    description, report = (_read_json(folder / name) for name in (CORPUS_FILE, REPORT_FILE))
    if not _has_shape(report, REPORT_SHAPE):
        raise DamagedCorpusError(f"{REPORT_FILE} is no report of a corpus")
    dtype = description.get("dtype")
    try:
        tokenizer = from_state(description.get("tokenizer"))
    except ValueError as error:
        raise DamagedCorpusError(f"{CORPUS_FILE} has no valid tokenizer ({error})") from None
    if dtype not in ID_DTYPES:
        raise DamagedCorpusError(f"{CORPUS_FILE} has no valid dtype")
    try:
        ids = open_shards(folder, dtype, num_shards)
    except ValueError as error:  # empty, or not a whole number of ids
        raise DamagedCorpusError(f"the token ids cannot be opened ({error})") from None
    if len(ids) != sum(report["parts"][split]["tokens"] for split in SPLITS):
        raise DamagedCorpusError(f"{REPORT_FILE} counts other tokens than the {len(ids):,} that are there")
    if max((_largest_id(path, dtype) for path in compared), default=0) >= tokenizer.vocab_size:
        raise DamagedCorpusError(f"{CORPUS_FILE} has a tokenizer of fewer ids than the text")
    return Corpus(folder.name, ids, tokenizer, report, folder)


def _largest_id(path: Path, dtype: str) -> int:
    """Return the largest id of a shard. It is read in parts, so that its memory map stays out of memory."""
    largest = 0
    with open_regular(path) as file:
        while len(ids := np.fromfile(file, dtype, 2**20)):
            largest = max(largest, int(ids.max()))
    return largest


def _check_files(folder: Path) -> tuple[int, list[Path]]:
    """Compare the files of a corpus with their digests; return the number of its shards, and those that were compared.

    At most `MAX_COMPARED_BYTES` are read. The JSON files come first. Where the shards are larger together, as many are
    compared as fit, beginning with another one at another time.

    Raises:
        DamagedCorpusError: A file is missing, differs, or is no regular file.
    """
    json_files = (CORPUS_FILE, REPORT_FILE)
    try:
        names = read_digests(folder).keys() - {*json_files, REJECTED_FILE}
    except (OSError, ValueError):
        names = set()
    shards = [shard_path(folder, number).name for number in range(len(names))]
    if not shards or names != set(shards):
        raise DamagedCorpusError(f"{DIGESTS_FILE} is missing or damaged")
    first = time.time_ns() % len(shards)  # not a random number, which the training draws too
    names_in_order = [*json_files, *shards[first:], *shards[:first], REJECTED_FILE]
    compared: list[str] = []
    remaining = MAX_COMPARED_BYTES
    for name in names_in_order:
        try:
            found = os.lstat(folder / name)
        except OSError:
            found = None
        if found is None or not stat.S_ISREG(found.st_mode) or (name in json_files and found.st_size > MAX_JSON_BYTES):
            raise DamagedCorpusError(f"{name} is missing or damaged")
        remaining -= found.st_size
        if remaining >= 0:
            compared.append(name)
    damaged = damaged_files(folder, names_in_order, compared)
    if damaged:
        raise DamagedCorpusError(f"{', '.join(damaged)} is missing or damaged")
    return len(shards), [folder / name for name in compared if name in shards]


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        DamagedCorpusError: It holds none.
    """
    try:
        with open_regular(path) as file:
            content = json.loads(file.read(MAX_JSON_BYTES).decode())
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise DamagedCorpusError(f"{path.name} is missing or damaged")
    return content


def _has_shape(value: Any, shape: Any) -> bool:
    """Return whether a value of JSON has the types of a shape as `REPORT_SHAPE`."""
    if isinstance(shape, dict):
        same_keys = isinstance(value, dict) and value.keys() == shape.keys()
        return same_keys and all(_has_shape(value[key], shape[key]) for key in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_has_shape(item, shape[0]) for item in value)
    if isinstance(shape, tuple):
        same_length = isinstance(value, list) and len(value) == len(shape)
        return same_length and all(map(_has_shape, value, shape))
    if shape in (str, bool):
        return isinstance(value, shape)
    number = type(value) is int or (shape is float and type(value) is float)  # a bool is no number
    return number and 0 <= value < 2**63  # false for infinity and NaN
