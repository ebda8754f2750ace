"""Documents -> token ids in one file on disk, built once and found again by content.

The cache key is made of the files' bytes, the reading, the split and the tokenizer, never of names or times: a changed
text is another corpus. It is built under a lock, in a folder of its own that is renamed when it is whole. First the
documents are tokenized in the order of the files, block by block, by all cores; how far that came is written down, so
that a process that was killed goes on from there. Then the ids are laid out part after part of the split.
Nothing that is held grows with the text but some ten bytes a document.
"""

import array
import collections
import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from lit_gpt.data.readers import Reading, Rejected, open_pieces, open_rows, resolved
from lit_gpt.data.sources import Source
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import (
    BytePairTokenizer,
    CharTokenizer,
    Tokenizer,
    Vocab,
    from_state,
    learn_bpe,
    open_tokenizer,
    prune,
    tokenizer_key,
)

FORMAT = 2  # part of the key: raise it when the same input would give other files
BLOCK = 2**20  # characters tokenized at once
IDS = 2**22  # ids moved at once
RECORDS = 2**16  # documents looked at together
SORTED = 2**20  # documents sorted together
PARALLEL = 2**24  # bytes of text under which other processes take longer to start than they save
NOTED = 2.0  # seconds between two notes of how far tokenizing has come
TOLERATED = 0.1  # share of rows that may be rejected
LEARNED_FROM = 2**26  # characters a vocabulary is learned from at most
PARTS = ("train", "val", "test")
PART_NAMES = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2}  # in a column

RECORD = np.dtype(  # of a document, or of a block of a raw text
    [("tokens", "<u4"), ("characters", "<u4"), ("file", "<u4"), ("line", "<u4"), ("mark", "<u8"), ("hash", "<u8", 2)]
)


@dataclass(frozen=True)
class Split:
    """Which documents train, validate and test; the `data.*` flags of the same names.

    Attributes:
        val_fraction: the share that validates; of documents, in a raw text of tokens.
        test_fraction: the share kept for a test.
        seed: None: in order, the last ones are validation's and then the test's; a number: dealt by their text, so that
            equal texts share a part, and a document keeps its part when others come.
        column: holds the part's name instead: train, val or test.
        group: a column; documents with the same in it share a part.
        dedupe: whether a document that came before is left out.
    """

    val_fraction: float = 0.1
    test_fraction: float = 0.0
    seed: int | None = None
    column: str | None = None
    group: str | None = None
    dedupe: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--data.val_fraction is {self.val_fraction}: give a share between 0 and 1, as 0.1")
        if not 0 <= self.test_fraction < 1 - self.val_fraction:
            raise UserError(
                f"--data.test_fraction is {self.test_fraction}: give a share from 0 up that leaves some to train on"
            )
        if self.column is not None and (self.group is not None or self.seed is not None):
            raise UserError("--data.split_column decides alone: leave out --data.group_column and --data.split_seed")


@dataclass(frozen=True)
class Recipe:
    """Everything but the files that decides a corpus.

    Attributes:
        reading: how files are read.
        split: how documents are dealt.
        tokenizer: its name, or the path of a .tiktoken file.
        vocab: of a byte-pair vocabulary: "pruned" to what the corpus uses, or "full".
        vocab_size: of one that is learned from the text.
    """

    reading: Reading
    split: Split = Split()
    tokenizer: str = "cl100k_base"
    vocab: Vocab = "pruned"
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        by_rows = self.split.seed, self.split.column, self.split.group, self.split.dedupe or None
        if self.reading.mode == "raw" and any(setting is not None for setting in by_rows):
            raise UserError(
                "--data.mode raw has no rows: leave out data.split_seed, split_column, group_column and dedupe"
            )

    @property
    def tokenizer_name(self) -> str:
        """As it is shown, "cl100k_base pruned"."""
        if self.tokenizer == "bpe":
            return f"bpe {self.vocab_size}"
        prunes = self.tokenizer not in ("byte", "char")
        return f"{self.tokenizer} {self.vocab}" if prunes else self.tokenizer


@dataclass(frozen=True)
class Corpus:
    """The ids of all documents, end to end, part after part, and what made them.

    Attributes:
        key: the fingerprint of files and recipe.
        ids: (tokens,) uint16 or uint32, memory-mapped.
        tokenizer: what encoded them.
        report: what was read and what came of it; as report.json.
        folder: where it lies.
    """

    key: str
    ids: np.ndarray
    tokenizer: Tokenizer
    report: dict[str, Any]
    folder: Path

    def part(self, name: str) -> np.ndarray:
        """The ids of "train", "val" or "test"."""
        sizes = [self.report["parts"][part]["tokens"] for part in PARTS]
        start = sum(sizes[: PARTS.index(name)])
        return self.ids[start : start + sizes[PARTS.index(name)]]


def open_corpus(files: list[Source], recipe: Recipe, cache: Path, processes: int | None = None) -> Corpus:
    """The corpus of `files`, from `cache` or built into it.

    Args:
        files: in the order in which they are read.
        recipe: what is made of them.
        cache: a folder.
        processes: that tokenize; None: as many as there are cores, if the text is long.

    Raises:
        UserError: what the readers raise, too many rows cannot be read, or there is no text at all.
    """
    key = corpus_key(files, recipe)
    folder = cache / key
    try:
        if (corpus := _open(folder)) is None:
            cache.mkdir(parents=True, exist_ok=True)
            lock = FileLock(cache / f"{key}.lock")
            try:
                lock.acquire(timeout=1)
            except Timeout:
                print("another process is at this text: waiting for it", file=sys.stderr)
            with lock:
                if (corpus := _open(folder)) is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    _build(files, recipe, folder, processes)
                    corpus = _open(folder)
    except OSError as error:
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
            tokenizer=from_state(description["tokenizer"]),
            report=json.loads((folder / "report.json").read_text(encoding="utf-8")),
            folder=folder,
        )
        return corpus if len(corpus.ids) == sum(corpus.report["parts"][part]["tokens"] for part in PARTS) else None
    except (FileNotFoundError, NotADirectoryError, LookupError, TypeError, ValueError):
        return None


def corpus_key(files: list[Source], recipe: Recipe) -> str:
    """A fingerprint of everything that decides the ids: 32 hexadecimal digits."""
    contents = [(source.kind, source.packing, source.part, source.digest()) for source in files]
    learned = recipe.vocab_size if recipe.tokenizer == "bpe" else None
    tokenizer = tokenizer_key(recipe.tokenizer, recipe.vocab)
    settings = [FORMAT, contents, asdict(recipe.reading), asdict(recipe.split), tokenizer, learned]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _build(files: list[Source], recipe: Recipe, folder: Path, processes: int | None) -> None:
    """Writes a corpus into `folder`, which appears when it is whole."""
    unfinished = folder.with_suffix(".unfinished")
    unfinished.mkdir(exist_ok=True)  # it may be there, of a process that was killed: the lock says nobody is at it
    try:
        tokenizer = _tokenizer(files, recipe, unfinished)
        readings = [resolved(source, recipe.reading) for source in files]
        tally = Tally(files, [reading for reading, _ in readings], recipe)
        if processes is None:
            processes = cores() if sum(source.size() for source in files) >= PARALLEL else 1
        _tokenize(tally, tokenizer, unfinished, processes)
        tally.check()
        report = {
            "files": [
                {"name": str(source), "bytes": source.size(), "encoding": reading.encoding, "sure": round(sure, 2)}
                for source, (reading, sure) in zip(files, readings)
            ],
            "mode": recipe.reading.mode,
            **_lay_out(tally, tokenizer, recipe, unfinished),
        }
        (unfinished / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
        for name in ("raw.bin", "records.bin", "progress.json", "tokenizer.json"):
            (unfinished / name).unlink(missing_ok=True)
        os.replace(unfinished, folder)
    except UserError:
        shutil.rmtree(unfinished)
        raise


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tokenizer(files: list[Source], recipe: Recipe, unfinished: Path) -> Tokenizer:
    """The tokenizer; if it is learned from the text, then only once."""
    saved = unfinished / "tokenizer.json"
    if recipe.tokenizer not in ("char", "bpe"):
        return open_tokenizer(recipe.tokenizer)
    if saved.exists():
        return from_state(json.loads(saved.read_text(encoding="utf-8")))
    tokenizer = learned_tokenizer(files, recipe)
    saved.with_suffix(".new").write_text(json.dumps(tokenizer.state()), encoding="utf-8")
    os.replace(saved.with_suffix(".new"), saved)
    return tokenizer


def learned_tokenizer(files: list[Source], recipe: Recipe) -> Tokenizer:
    """The vocabulary of the characters, or of the byte pairs, of a text."""
    if recipe.tokenizer == "char":
        characters: set[str] = set()
        for text in read_texts(files, recipe.reading):
            characters.update(text)
        return CharTokenizer("".join(sorted(characters)))
    return learn_bpe(_spread(files, recipe), recipe.vocab_size)


def read_texts(files: list[Source], reading: Reading) -> Iterator[str]:
    """All documents, or the blocks of all raw texts, that can be read and are not blank."""
    for source in files:
        known, _ = resolved(source, reading)
        if reading.mode == "raw":
            with open_pieces(source, known) as (pieces, _):
                yield from pieces
        else:
            with open_rows(source, known) as (rows, _):
                yield from (row.text for row in rows if not isinstance(row, Rejected) and row.text.strip())


def _spread(files: list[Source], recipe: Recipe) -> Iterator[str]:
    """Documents that train, and of a long text as many of them as `LEARNED_FROM` allows, from all over it."""
    size = sum(source.size() for source in files)
    every = max(1, round(size / LEARNED_FROM))
    for number, text in enumerate(read_texts([source for source in files if not source.part], recipe.reading)):
        if number % every == 0:
            yield text


# ------------------------------------------------------------------------------------------------------- reading


@dataclass
class Block:
    """Documents that are tokenized together, or a stretch of a raw text.

    Attributes:
        texts: of the documents.
        file: the number of theirs.
        lines: where each begins.
        marks: of each, what `Split` asks of it.
        position: how many bytes of all files have been read.
        follows: in raw mode, whether a text of another file ended before.
    """

    texts: list[str]
    file: int
    lines: array.array
    marks: array.array
    position: int
    follows: bool = False


@dataclass
class Tally:
    """Reads files and counts what is in them.

    Attributes:
        files: in order.
        readings: of each, its encoding known.
        recipe: of the corpus.
        rows: read so far, blank and rejected ones too.
        empty_rows: of them, those without text.
        rejected: of them, those that cannot be read.
        reasons: the first twenty, as [file, line, reason].
        characters: in documents.
    """

    files: list[Source]
    readings: list[Reading]
    recipe: Recipe
    rows: int = 0
    empty_rows: int = 0
    rejected: int = 0
    reasons: list[list[Any]] = field(default_factory=list)
    characters: int = 0

    def blocks(self, rejected: TextIO) -> Iterator[Block]:
        """All that is to be tokenized, in order; what cannot be is written to `rejected`, one JSON object a line."""
        before = 0
        for number, (source, reading) in enumerate(zip(self.files, self.readings)):
            if reading.mode == "raw":
                yield from self._raw(number, before)
            else:
                yield from self._documents(number, before, rejected)
            before += source.size()

    def _raw(self, number: int, before: int) -> Iterator[Block]:
        first = True
        with open_pieces(self.files[number], self.readings[number]) as (pieces, raw):
            for piece in pieces:
                self.characters += len(piece)
                marks = array.array("Q", [0])
                yield Block([piece], number, array.array("L", [1]), marks, before + raw.tell(), first and number > 0)
                first = False
        self.rows += 1

    def _documents(self, number: int, before: int, rejected: TextIO) -> Iterator[Block]:
        def fresh() -> Block:
            return Block([], number, array.array("L"), array.array("Q"), 0)

        block, size = fresh(), 0
        with open_rows(self.files[number], self.readings[number]) as (rows, raw):
            for row in rows:
                self.rows += 1
                if not isinstance(row, Rejected) and (mark := self._mark(row.mark)) is None:
                    row = Rejected(row.line, f"{row.mark!r} is no part: write train, val or test")
                if isinstance(row, Rejected):
                    self._reject(number, row, rejected)
                    continue
                if not row.text.strip():
                    self.empty_rows += 1
                    continue
                block.texts.append(row.text)
                block.lines.append(row.line)
                block.marks.append(mark)
                size += len(row.text)
                if size >= BLOCK or len(block.texts) >= RECORDS:
                    self.characters += size
                    block.position = before + raw.tell()
                    yield block
                    block, size = fresh(), 0
        if block.texts:
            self.characters += size
            block.position = before + self.files[number].size()
            yield block

    def _mark(self, text: str) -> int | None:
        """What is remembered of a row's mark: the part it names, or the hash of its group."""
        split = self.recipe.split
        if split.column is not None:
            return PART_NAMES.get(text.strip().lower())
        if split.group is not None:
            return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
        return 0

    def _reject(self, number: int, row: Rejected, rejected: TextIO) -> None:
        self.rejected += 1
        note = {"file": str(self.files[number]), "line": row.line, "reason": row.reason}
        if len(self.reasons) < 20:
            self.reasons.append(list(note.values()))
        rejected.write(json.dumps(note, ensure_ascii=False) + "\n")
        if self.rejected == 10_000 and self.rows < 2 * self.rejected:
            self.check()

    def check(self) -> None:
        """Raises UserError where so many rows cannot be read that the fault is not theirs, or there is no text."""
        if self.rejected > TOLERATED * self.rows:
            file, line, reason = self.reasons[0]
            raise UserError(f"{file} line {line}: {reason} ({self.rejected:,} of {self.rows:,} rows cannot be read)")
        if not self.characters:
            rows = f"no text in any of {self.empty_rows} rows" if self.empty_rows else "no rows, at most a header"
            raise UserError(f"{', '.join(map(str, self.files))}: {rows}: give a file with text in it")


# ---------------------------------------------------------------------------------------------------- tokenizing


@dataclass
class Encoded:
    """Of a block: its ids end to end, how many each document has, each one's hash, and UTF-8 bytes in all."""

    ids: np.ndarray
    counts: np.ndarray
    hashes: np.ndarray
    size: int


def encode(tokenizer: Tokenizer, block: Block, raw: bool) -> Encoded:
    """A document closes with the end-of-text id; a raw text is taken as it is, only between two stands one."""
    if raw:
        text = tokenizer.encode_documents(block.texts)[0][:-1]
        text = np.append(np.full(int(block.follows), tokenizer.end_of_text, dtype=np.uint32), text)
        size, nothing = len(block.texts[0].encode()), np.zeros((1, 2), dtype=np.uint64)
        return Encoded(text, np.array([len(text)]), nothing, size)
    ids, counts = tokenizer.encode_documents(block.texts)
    contents = [text.encode() for text in block.texts]
    digests = b"".join([hashlib.blake2b(content, digest_size=16).digest() for content in contents])
    return Encoded(ids, counts, np.frombuffer(digests, dtype="<u8").reshape(-1, 2), sum(map(len, contents)))


_worker_tokenizer: Tokenizer


def _start_worker(state: dict[str, Any]) -> None:
    """Makes a worker ready, that leaves signals to its parent and ends with it."""
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _worker_tokenizer = from_state(state)


def _work(block: Block, raw: bool) -> Encoded:
    return encode(_worker_tokenizer, block, raw)


def _encoded(
    blocks: Iterable[Block], tokenizer: Tokenizer, raw: bool, processes: int
) -> Iterator[tuple[Block, Encoded]]:
    """Blocks with their ids, in order; other processes work ahead by two blocks each."""
    if processes == 1:
        yield from ((block, encode(tokenizer, block, raw)) for block in blocks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start_worker, (tokenizer.state(),))
    waiting: collections.deque[tuple[Block, Future[Encoded]]] = collections.deque()
    try:
        for block in blocks:
            waiting.append((block, pool.submit(_work, block, raw)))
            if len(waiting) > 2 * processes:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool:
        raise OSError(None, "a process that tokenizes was killed; it goes on from here when run again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _tokenize(tally: Tally, tokenizer: Tokenizer, unfinished: Path, processes: int) -> None:
    """Writes all ids to raw.bin as uint32, a record of every document to records.bin, and what cannot be read.

    Blocks that an earlier process has done are read and counted anew, which is quick, and not tokenized.
    """
    raw, note = tally.recipe.reading.mode == "raw", unfinished / "progress.json"
    done = {"blocks": 0, "ids": 0, "records": 0, "size": 0}
    with contextlib.suppress(FileNotFoundError, ValueError):
        done = json.loads(note.read_text(encoding="utf-8"))
    total = sum(source.size() for source in tally.files)
    with (
        open(unfinished / "raw.bin", "ab") as ids,
        open(unfinished / "records.bin", "ab") as records,
        open(unfinished / "rejected.jsonl", "w", encoding="utf-8") as rejected,
        tqdm(desc="tokenizing", total=total, unit="B", unit_scale=True, delay=2, mininterval=0.5, leave=False) as bar,
    ):
        ids.truncate(4 * done["ids"])
        records.truncate(RECORD.itemsize * done["records"])
        blocks = tally.blocks(rejected)
        for _ in range(done["blocks"]):
            bar.update(next(blocks).position - bar.n)
        noted = time.monotonic()
        for block, encoded in _encoded(blocks, tokenizer, raw, processes):
            ids.write(encoded.ids.astype("<u4", copy=False).tobytes())
            record = np.zeros(len(encoded.counts), dtype=RECORD)
            record["tokens"], record["hash"], record["file"] = encoded.counts, encoded.hashes, block.file
            record["characters"] = [len(text) for text in block.texts]
            record["line"], record["mark"] = block.lines, block.marks
            records.write(record.tobytes())
            done["blocks"] += 1
            done["ids"] += len(encoded.ids)
            done["records"] += len(record)
            done["size"] += encoded.size
            bar.set_postfix_str(f"{tally.rows:,} rows", refresh=False)
            bar.update(block.position - bar.n)
            if time.monotonic() - noted > NOTED:
                _note(note, done, ids, records)
                noted = time.monotonic()
        for _ in blocks:  # none: all were done, and what follows the last is still to be read
            pass
        _note(note, done, ids, records)


def _note(note: Path, done: dict[str, int], *files: Any) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    note.with_suffix(".new").write_text(json.dumps(done), encoding="utf-8")
    os.replace(note.with_suffix(".new"), note)


# ---------------------------------------------------------------------------------------------------- laying out


def _records(path: Path, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Records, `RECORDS` at a time, each time with the number of the first."""
    while len(records := np.fromfile(path, RECORD, RECORDS, offset=start * RECORD.itemsize)):
        yield start, records
        start += len(records)


def _chunks(unfinished: Path) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Documents with their ids, about `IDS` of these at a time: which documents, ids in each (n,), ids (m,)."""
    position = 0
    for first, records in _records(unfinished / "records.bin"):
        ends = np.cumsum(records["tokens"], dtype=np.int64)
        cuts = np.unique(np.searchsorted(ends, np.arange(IDS, ends[-1] + IDS, IDS), side="left") + 1)
        for start, end in zip([0, *cuts], [*cuts.clip(max=len(records))]):
            counts = records["tokens"][start:end]
            size = int(counts.sum(dtype=np.int64))
            ids = np.fromfile(unfinished / "raw.bin", "<u4", size, offset=4 * position)
            yield slice(first + start, first + end), counts, ids
            position += size


def _lay_out(tally: Tally, tokenizer: Tokenizer, recipe: Recipe, unfinished: Path) -> dict[str, Any]:
    """Writes ids.bin, part after part, and corpus.json; returns the report."""
    done = json.loads((unfinished / "progress.json").read_text(encoding="utf-8"))
    parts, found = _deal(done["records"], recipe, tally.files, unfinished)
    if isinstance(tokenizer, BytePairTokenizer) and recipe.tokenizer_name.endswith(" pruned"):
        used = np.zeros(tokenizer.vocab_size, dtype=bool)
        for _, _, ids in _chunks(unfinished):
            used[ids] = True
        used[tokenizer.end_of_text] = False
        pruned, kept = prune(tokenizer, np.flatnonzero(used))
        new_id = np.zeros(tokenizer.vocab_size, dtype=np.uint32)
        new_id[kept] = np.arange(len(kept), dtype=np.uint32)
        new_id[tokenizer.end_of_text] = pruned.end_of_text
        tokenizer = pruned
    else:
        new_id = None
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 2**16 else np.dtype("<u4")
    frequencies = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    sizes = dict.fromkeys(PARTS, 0)
    filled = [number for number in range(len(PARTS)) if (parts == number).any()]
    shown = {"desc": "writing", "unit": "token", "unit_scale": True, "delay": 2, "mininterval": 0.5, "leave": False}
    with open(unfinished / "ids.bin", "wb") as out, tqdm(total=len(filled) * done["ids"], **shown) as bar:
        for number in filled:
            for documents, counts, ids in _chunks(unfinished):
                bar.update(len(ids))
                here = parts[documents] == number
                if not here.any():
                    continue
                ids = ids if here.all() else ids[np.repeat(here, counts)]
                ids = (ids if new_id is None else new_id[ids]).astype(dtype)
                frequencies += np.bincount(ids, minlength=len(frequencies))
                out.write(ids.tobytes())
                sizes[PARTS[number]] += len(ids)
        out.flush()
        os.fsync(out.fileno())
    if recipe.reading.mode == "raw" and not any(source.part for source in tally.files):  # one text, cut by tokens
        tokens, split = sizes["train"], recipe.split
        ends = [int(tokens * (1 - split.val_fraction - split.test_fraction)), int(tokens * (1 - split.test_fraction))]
        sizes = dict(zip(PARTS, (ends[0], ends[1] - ends[0], tokens - ends[1])))
    description = {"dtype": dtype.str, "tokenizer": tokenizer.state()}
    (unfinished / "corpus.json").write_text(json.dumps(description), encoding="utf-8")
    tokens = sum(sizes.values())
    rare = [int(token) for token in np.argsort(frequencies, kind="stable") if frequencies[token]][:10]
    return {
        "rows": tally.rows,
        "rejected": tally.rejected,
        "rejected_first": tally.reasons,
        "empty_rows": tally.empty_rows,
        "documents": sum(found["documents"]),
        "duplicates": found["duplicates"],
        "duplicates_left_out": found["duplicates"] if recipe.split.dedupe else 0,
        "duplicates_across": found["across"],
        "duplicates_first": found["pairs"],
        "longest": found["longest"],
        "characters": tally.characters,
        "bytes": done["size"],
        "tokens": tokens,
        "tokens_per_character": tokens / tally.characters,
        "parts": {part: {"documents": count, "tokens": sizes[part]} for part, count in zip(PARTS, found["documents"])},
        "vocab_size": tokenizer.vocab_size,
        "vocabulary_in_use": int((frequencies > 0).sum()),
        "least_frequent": [
            [token, tokenizer.token_bytes(token).decode("utf-8", "backslashreplace"), int(frequencies[token])]
            for token in rare
        ],
    }


LEFT_OUT = len(PARTS)  # the part of documents that came before


def _deal(count: int, recipe: Recipe, files: list[Source], unfinished: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The part of every document, (count,) uint8, and what is to be said of documents."""
    path, split = unfinished / "records.bin", recipe.split
    of_file = np.array([PARTS.index(source.part or "train") for source in files], dtype=np.uint8)
    if recipe.reading.mode == "raw":
        parts = np.concatenate([of_file[records["file"]] for _, records in _records(path)])
        counts = [int((of_file == number).sum()) for number in range(len(PARTS))]
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
        elif any(source.part for source in files):
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
        "documents": [int((parts == number).sum()) for number in range(len(PARTS))],
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
