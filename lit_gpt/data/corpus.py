"""Documents -> token ids in one file on disk, built once and found again by content.

The cache key is made of the files' bytes, the reading and the tokenizer, never of names or times: a changed text is
another corpus. A corpus is built under a lock, in a folder of its own that is renamed when it is whole.
"""

import array
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from lit_gpt.data.readers import Reading, read_documents, read_text
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import (
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    TokenizerName,
    Vocab,
    from_state,
    pruned_vocabulary,
)

FORMAT = 1  # part of the key: raise it when the same input would give other files
BLOCK = 2**22  # ids moved at once


@dataclass(frozen=True)
class Corpus:
    """The ids of all documents, end to end, and what made them.

    Attributes:
        key: the fingerprint of files, reading and tokenizer.
        ids: (tokens,) uint16 or uint32, memory-mapped.
        ends: (documents,) int64, where each document ends in `ids`.
        tokenizer: what encoded them.
        counts: files, documents, empty_rows, characters.
    """

    key: str
    ids: np.ndarray
    ends: np.ndarray
    tokenizer: Tokenizer
    counts: dict[str, int]


def open_corpus(files: list[Path], reading: Reading, name: TokenizerName, vocab: Vocab, cache: Path) -> Corpus:
    """The corpus of `files`, from `cache` or built into it.

    Raises:
        UserError: what the readers raise, or there is no text at all.
    """
    key = corpus_key(files, reading, name, vocab)
    folder = cache / key
    try:
        if (corpus := _open(folder)) is None:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / "lock"):
                if (corpus := _open(folder)) is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    _build(files, reading, name, vocab, folder)
                    corpus = _open(folder)
    except OSError as error:
        if error.filename is not None and Path(os.fsdecode(error.filename)) in files:
            raise UserError(f"{os.fsdecode(error.filename)} cannot be read ({error.strerror}): give another") from None
        raise UserError(
            f"{cache}: the token cache cannot be written or read ({error.strerror or error}): make room there, or run "
            "in a folder of your own"
        ) from None
    assert corpus is not None
    return corpus


def _open(folder: Path) -> Corpus | None:
    """What stands in `folder`; None where there is nothing, or it is not whole."""
    try:
        description = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        corpus = Corpus(
            key=folder.name,
            ids=np.memmap(folder / "ids.bin", dtype=description["dtype"], mode="r").view(np.ndarray),
            ends=np.fromfile(folder / "ends.bin", dtype=np.int64),
            tokenizer=from_state(description["tokenizer"]),
            counts=description["counts"],
        )
    except (FileNotFoundError, NotADirectoryError, LookupError, TypeError, ValueError):
        return None
    whole = len(corpus.ends) == corpus.counts["documents"] and len(corpus.ids) == corpus.ends[-1]
    return corpus if whole else None


def corpus_key(files: list[Path], reading: Reading, name: TokenizerName, vocab: Vocab) -> str:
    """A fingerprint of everything that decides the ids: 32 hexadecimal digits."""
    contents = []
    for path in files:
        with open(path, "rb") as file:
            contents.append((path.suffix.lower(), hashlib.file_digest(file, "sha256").hexdigest()))
    settings = [FORMAT, contents, asdict(reading), name, vocab if name == "cl100k_base" else None]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _build(files: list[Path], reading: Reading, name: TokenizerName, vocab: Vocab, folder: Path) -> None:
    """Writes ids.bin, ends.bin and corpus.json into `folder`, which appears when they are whole."""
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # what a killed process left; the lock says nobody is at it
    unfinished.mkdir()
    try:
        tokenizer: Tokenizer
        if name == "char":
            characters = set().union(*(piece for path in files for piece in _pieces(path, reading)))
            tokenizer = CharTokenizer("".join(sorted(characters)))
        else:
            tokenizer = ByteTokenizer() if name == "byte" else BytePairTokenizer()
        with open(unfinished / "ids.bin", "wb") as file:
            ends, counts = _encode(files, reading, tokenizer, file)
        if not counts["characters"]:
            found = (
                f"no text in any of {counts['empty_rows']} rows"
                if counts["empty_rows"]
                else "no rows, at most a header"
            )
            raise UserError(f"{', '.join(map(str, files))}: {found}: give a file with text in it")
        if isinstance(tokenizer, BytePairTokenizer) and vocab == "pruned":
            tokenizer = _prune(unfinished / "ids.bin", tokenizer)
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        if dtype == "uint16":
            _narrow(unfinished / "ids.bin")
        np.asarray(ends, dtype=np.int64).tofile(unfinished / "ends.bin")
        description = {"dtype": dtype, "counts": counts, "tokenizer": tokenizer.state()}
        (unfinished / "corpus.json").write_text(json.dumps(description), encoding="utf-8")
        os.replace(unfinished, folder)
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(unfinished)


def _pieces(path: Path, reading: Reading) -> Iterator[str]:
    return read_documents(path, reading) if reading.mode == "rows" else read_text(path, reading)


def _encode(
    files: list[Path], reading: Reading, tokenizer: Tokenizer, out: BinaryIO
) -> tuple[array.array, dict[str, int]]:
    """Appends every document's ids to `out` as uint32; returns where each ends, and the counts.

    A row's document closes with the end-of-text id. A raw text is taken as it is; only between two such files does one
    stand, so that a single file gives its own ids and no more.
    """
    ends = array.array("q")
    counts = {"files": len(files), "documents": 0, "empty_rows": 0, "characters": 0}
    position = 0

    def write(ids: Iterable[int]) -> None:
        nonlocal position
        block = np.fromiter(ids, dtype=np.uint32)
        out.write(block.tobytes())
        position += len(block)

    with tqdm(desc="tokenizing", unit=" characters", unit_scale=True, delay=2, leave=False) as bar:
        for path in files:
            if reading.mode == "raw" and position:
                write([tokenizer.end_of_text])
            for piece in _pieces(path, reading):
                bar.update(len(piece))
                if reading.mode == "rows":
                    if not piece.strip():
                        counts["empty_rows"] += 1
                        continue
                    write([*tokenizer.encode(piece), tokenizer.end_of_text])
                    ends.append(position)
                else:
                    write(tokenizer.encode(piece))
                counts["characters"] += len(piece)
            if reading.mode == "raw":
                ends.append(position)
    counts["documents"] = len(ends)
    return ends, counts


def _prune(path: Path, full: BytePairTokenizer) -> BytePairTokenizer:
    """Rewrites a file of cl100k_base ids to the pruned vocabulary of what occurs in it."""
    ids = np.memmap(path, dtype=np.uint32, mode="r+")
    used = np.zeros(full.vocab_size, dtype=bool)
    for start in range(0, len(ids), BLOCK):
        used[ids[start : start + BLOCK]] = True
    used[full.end_of_text] = False
    kept = pruned_vocabulary(np.flatnonzero(used))
    pruned = BytePairTokenizer([full.token_bytes(token) for token in kept])
    new_id = np.zeros(full.vocab_size, dtype=np.uint32)
    new_id[kept] = np.arange(len(kept), dtype=np.uint32)
    new_id[full.end_of_text] = pruned.end_of_text
    for start in range(0, len(ids), BLOCK):
        ids[start : start + BLOCK] = new_id[ids[start : start + BLOCK]]
    ids.flush()
    return pruned


def _narrow(path: Path) -> None:
    """Rewrites a file of uint32 ids as uint16, in place: what is written never overtakes what is still to be read."""
    with open(path, "r+b") as file:
        read = written = 0
        while block := (file.seek(read), file.read(4 * BLOCK))[1]:
            read += len(block)
            file.seek(written)
            written += file.write(np.frombuffer(block, dtype=np.uint32).astype(np.uint16).tobytes())
        file.truncate(written)
