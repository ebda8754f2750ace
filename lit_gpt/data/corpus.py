"""Documents -> token ids in files on disk, built once and found again by content.

The cache key is made of the files' bytes, the reading, the split and the tokenizer, never of names or times: a changed
text is another corpus. It is built under a lock, in a folder of its own that is renamed when it is whole. First the
documents are tokenized block by block, by all cores or by a cluster, each block into a file of its own, so that a
process that was killed goes on from there. Then the ids are laid out in the order of the files, part after part of the
split.
Nothing that is held grows with the text but some ten bytes a document.
"""

import array
import hashlib
import itertools
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TextIO

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from lit_gpt.data.engines import Engine, EngineName, cores, open_engine
from lit_gpt.data.readers import Reading, Rejected, open_pieces, open_rows, resolved
from lit_gpt.data.shards import SHARD, Shards, open_shards, shard_path
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

FORMAT = 3  # part of the key: raise it when the same input would give other files, or other blocks on the way
BLOCK = 2**20  # characters tokenized at once
RECORDS = 2**16  # documents looked at together, and rows in a block at most
SORTED = 2**20  # documents sorted together
PARALLEL = 2**24  # bytes of text under which other processes take longer to start than they save
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
    ids: Shards
    tokenizer: Tokenizer
    report: dict[str, Any]
    folder: Path

    def part(self, name: str) -> Shards:
        """The ids of "train", "val" or "test"."""
        sizes = [self.report["parts"][part]["tokens"] for part in PARTS]
        start = sum(sizes[: PARTS.index(name)])
        return self.ids[start : start + sizes[PARTS.index(name)]]


def open_corpus(
    files: list[Source], recipe: Recipe, cache: Path, processes: int | None = None, engine: EngineName = "local"
) -> Corpus:
    """The corpus of `files`, from `cache` or built into it.

    Args:
        files: in the order in which they are read.
        recipe: what is made of them.
        cache: a folder.
        processes: that tokenize; None: as many as there are cores, if the text is long.
        engine: who tokenizes: "local", this machine, or "ray", a cluster, all of which must see `files` and `cache`
            where this machine does. It changes nothing of what is written.

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
                    _build(files, recipe, folder, processes, engine)
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
            ids=open_shards(folder, description["dtype"]),
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


def _build(files: list[Source], recipe: Recipe, folder: Path, processes: int | None, name: EngineName) -> None:
    """Writes a corpus into `folder`, which appears when it is whole."""
    unfinished = folder.with_suffix(".unfinished").absolute()
    work = unfinished / "work"
    work.mkdir(parents=True, exist_ok=True)  # of a process that was killed, it may be: the lock says nobody is at it
    try:
        tokenizer = _tokenizer(files, recipe, work)
        readings = [resolved(source, recipe.reading) for source in files]
        tally = Tally(files, [reading for reading, _ in readings], recipe)
        if processes is None:
            processes = cores() if name == "ray" or sum(source.size() for source in files) >= PARALLEL else 1
        with open_engine(name, processes) as engine:
            _tokenize(tally, work, engine)
            with open(unfinished / "rejected.jsonl", "w", encoding="utf-8") as rejected:
                documents = _gather(tally, work, rejected)
            tally.check()
            laid_out = _lay_out(tally, documents, tokenizer, unfinished, engine)
        report = {
            "files": [
                {"name": str(source), "bytes": source.size(), "encoding": reading.encoding, "sure": round(sure, 2)}
                for source, (reading, sure) in zip(files, readings)
            ],
            "mode": recipe.reading.mode,
            **laid_out,
        }
        (unfinished / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
        shutil.rmtree(work)
        os.replace(unfinished, folder)
    except UserError:
        shutil.rmtree(unfinished, ignore_errors=True)  # a cluster may still be writing
        raise


def _tokenizer(files: list[Source], recipe: Recipe, work: Path) -> Tokenizer:
    """The tokenizer, left in tokenizer.json for those who work; if it is learned from the text, then only once."""
    saved = work / "tokenizer.json"
    if saved.exists():
        return from_state(json.loads(saved.read_text(encoding="utf-8")))
    learned = recipe.tokenizer in ("char", "bpe")
    tokenizer = learned_tokenizer(files, recipe) if learned else open_tokenizer(recipe.tokenizer)
    with _whole(saved, work) as file:
        file.write(json.dumps(tokenizer.state()).encode())
    return tokenizer


@contextmanager
def _whole(path: Path, work: Path) -> Iterator[IO[bytes]]:
    """Writes a file in `work`, under a name of its own; it appears at `path` when it is whole and on the disk."""
    new = work / f"{uuid.uuid4().hex}.new"
    with open(new, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


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
        lines: where each begins.
        marks: of each, what `Split` asks of it.
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
    rejected: list[Rejected] = field(default_factory=list)
    bytes: int = 0
    file: int = 0
    number: int = 0
    follows: bool = False


def read_blocks(files: list[Source], readings: list[Reading], split: Split, size: int, number: int) -> Iterator[Block]:
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


def _raw_blocks(source: Source, reading: Reading, split: Split, size: int) -> Iterator[tuple[Block, int]]:
    with open_pieces(source, reading) as (pieces, raw):
        for i, piece in enumerate(pieces):
            yield Block([piece], array.array("L", [1]), array.array("Q", [0]), rows=int(i == 0)), raw.tell()


def _row_blocks(source: Source, reading: Reading, split: Split, size: int) -> Iterator[tuple[Block, int]]:
    block, characters = Block(), 0
    with open_rows(source, reading) as (rows, raw):
        for row in rows:
            block.rows += 1
            if not isinstance(row, Rejected) and (mark := _mark(row.mark, split)) is None:
                row = Rejected(row.line, f"{row.mark!r} is no part: write train, val or test")
            if isinstance(row, Rejected):
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


def _mark(text: str, split: Split) -> int | None:
    """What is remembered of a row's mark: the part it names, or the hash of its group."""
    if split.column is not None:
        return PART_NAMES.get(text.strip().lower())
    if split.group is not None:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
    return 0


@dataclass
class Tally:
    """Counts what is in files.

    Attributes:
        files: in order.
        readings: of each, its encoding known.
        recipe: of the corpus.
        rows: read, blank and rejected ones too.
        empty_rows: of them, those without text.
        rejected: of them, those that cannot be read.
        reasons: the first twenty, as [file, line, reason].
        characters: in documents.
        bytes: of them, in UTF-8.
        used: ids that occur in them.
    """

    files: list[Source]
    readings: list[Reading]
    recipe: Recipe
    rows: int = 0
    empty_rows: int = 0
    rejected: int = 0
    reasons: list[list[Any]] = field(default_factory=list)
    characters: int = 0
    bytes: int = 0
    used: set[int] = field(default_factory=set)

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


def _tokenize(tally: Tally, work: Path, engine: Engine) -> None:
    """Leaves the ids of all blocks in `work`; of some only, where `Tally.check` will refuse the text as it is."""
    total, rows, rejected = sum(source.size() for source in tally.files), 0, 0
    read = partial(read_blocks, tally.files, tally.readings, tally.recipe.split, BLOCK)
    tokenize = partial(tokenize_block, work, tally.recipe.reading.mode == "raw")
    with tqdm(desc="tokenizing", total=total, unit="B", unit_scale=True, delay=2, mininterval=0.5, leave=False) as bar:
        for done in engine.run(read, tokenize, range(len(tally.files))):
            rows += done["rows"]
            rejected += done["rejected"]
            bar.set_postfix_str(f"{rows:,} rows", refresh=False)
            bar.update(done["bytes"])
            if rejected >= 10_000 and rows < 2 * rejected:
                return


def _gather(tally: Tally, work: Path, rejected: TextIO) -> dict[Path, int]:
    """All blocks in order, and how many documents each has.

    Counts what is in them, writes their records to records.bin, and what cannot be read to `rejected`, one JSON object
    a line.
    """
    documents: dict[Path, int] = {}
    with open(work / "records.bin", "wb") as records:
        for path in sorted(work.glob("*.npz")):
            with np.load(path) as block:
                record, known = block["record"], json.loads(str(block["known"]))
            records.write(record.tobytes())
            documents[path] = len(record)
            tally.rows += known["rows"]
            tally.empty_rows += known["empty_rows"]
            tally.rejected += len(known["rejected"])
            tally.characters += int(record["characters"].sum(dtype=np.int64))
            tally.bytes += known["bytes"]
            tally.used.update(known["used"])
            for line, reason in known["rejected"]:
                note = {"file": str(tally.files[known["file"]]), "line": line, "reason": reason}
                if len(tally.reasons) < 20:
                    tally.reasons.append(list(note.values()))
                rejected.write(json.dumps(note, ensure_ascii=False) + "\n")
    return documents


# ---------------------------------------------------------------------------------------------------- laying out


def _records(path: Path, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Records, `RECORDS` at a time, each time with the number of the first."""
    while len(records := np.fromfile(path, RECORD, RECORDS, offset=start * RECORD.itemsize)):
        yield start, records
        start += len(records)


class Stretch(NamedTuple):
    """Ids that lie together, in a block and in a shard.

    Attributes:
        block: where they are.
        first: the number of the block's first document.
        part: of the documents they are of.
        start: the first of them among the block's ids of that part, and
        stop: the one after the last.
    """

    block: Path
    first: int
    part: int
    start: int
    stop: int


def _stretches(documents: dict[Path, int], parts: np.ndarray, work: Path, size: int) -> list[list[Stretch]]:
    """What each shard of `size` ids holds, the last perhaps fewer: part after part, in each all blocks in order."""
    tokens = np.zeros((len(documents), LEFT_OUT + 1), dtype=np.int64)
    firsts = np.cumsum([0, *documents.values()]).tolist()
    for i, first in enumerate(firsts[:-1]):
        record = np.fromfile(work / "records.bin", RECORD, firsts[i + 1] - first, offset=first * RECORD.itemsize)
        np.add.at(tokens[i], parts[first : firsts[i + 1]], record["tokens"])
    shards: list[list[Stretch]] = [[]]
    room = size
    for part in range(len(PARTS)):
        for path, first, count in zip(documents, firsts, tokens[:, part].tolist()):
            start = 0
            while start < count:
                if not room:
                    shards.append([])
                    room = size
                stop = min(count, start + room)
                shards[-1].append(Stretch(path, first, part, start, stop))
                room -= stop - start
                start = stop
    return shards


def _ids_of(stretch: Stretch) -> np.ndarray:
    """The ids of a stretch as its block has them, (n,) uint32."""
    with np.load(stretch.block) as block:
        ids, counts = block["ids"], block["record"]["tokens"]
    parts = np.fromfile(stretch.block.with_name("parts.bin"), np.uint8, len(counts), offset=stretch.first)
    here = parts == stretch.part
    return (ids if here.all() else ids[np.repeat(here, counts)])[stretch.start : stretch.stop]


def write_shard(
    unfinished: Path, vocab_size: int, dtype: np.dtype, shard: tuple[int, list[Stretch]]
) -> tuple[int, np.ndarray]:
    """Writes the shard of that number; returns how many ids are in it, and how often each is, (V,) int64.

    Args:
        unfinished: the corpus's folder.
        vocab_size: V.
        dtype: of the ids.
        shard: its number, and what is in it.
    """
    number, stretches = shard
    work = unfinished / "work"
    new_id = np.load(work / "new_id.npy")
    frequencies, size = np.zeros(vocab_size, dtype=np.int64), 0
    with _whole(shard_path(unfinished, number), work) as out:
        for stretch in stretches:
            ids = new_id[_ids_of(stretch)].astype(dtype)
            frequencies += np.bincount(ids, minlength=len(frequencies))
            out.write(ids.tobytes())
            size += len(ids)
    return size, frequencies


def _itself(item: Any) -> list[Any]:
    return [item]


def _lay_out(
    tally: Tally, documents: dict[Path, int], tokenizer: Tokenizer, unfinished: Path, engine: Engine
) -> dict[str, Any]:
    """Writes the shards, part after part, and corpus.json; returns the report."""
    recipe, work = tally.recipe, unfinished / "work"
    parts, found = _deal(sum(documents.values()), recipe, tally.files, work)
    parts.tofile(work / "parts.bin")
    new_id = np.arange(tokenizer.vocab_size, dtype=np.uint32)
    if isinstance(tokenizer, BytePairTokenizer) and recipe.tokenizer_name.endswith(" pruned"):
        pruned, kept = prune(tokenizer, np.array(sorted(tally.used - {tokenizer.end_of_text})))
        new_id[:] = 0
        new_id[kept] = np.arange(len(kept), dtype=np.uint32)
        new_id[tokenizer.end_of_text] = pruned.end_of_text
        tokenizer = pruned
    np.save(work / "new_id.npy", new_id)
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 2**16 else np.dtype("<u4")
    frequencies = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    shards = _stretches(documents, parts, work, SHARD)
    sizes = dict.fromkeys(PARTS, 0)
    for stretch in itertools.chain.from_iterable(shards):
        sizes[PARTS[stretch.part]] += stretch.stop - stretch.start
    shown = {"desc": "writing", "unit": "token", "unit_scale": True, "delay": 2, "mininterval": 0.5, "leave": False}
    with tqdm(total=sum(sizes.values()), **shown) as bar:
        write = partial(write_shard, unfinished, tokenizer.vocab_size, dtype)
        for size, these in engine.run(_itself, write, list(enumerate(shards))):
            frequencies += these
            bar.update(size)
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
        "bytes": tally.bytes,
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


def _deal(count: int, recipe: Recipe, files: list[Source], work: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The part of every document, (count,) uint8, and what is to be said of documents."""
    path, split = work / "records.bin", recipe.split
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
