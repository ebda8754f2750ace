"""Documents -> token ids in files on disk, built once and found again by content.

The cache key is made of the files' bytes, the reading, the split and the tokenizer, never of names or times: a changed
text is another corpus. It is built under a lock, in a folder of its own that is renamed when it is whole. First the
documents are tokenized block by block, by all cores or by a cluster, each block into a file of its own, so that a
process that was killed goes on from there. Then the ids are laid out in the order of the files, part after part of the
split.
Nothing that is held grows with the text but some ten bytes a document.
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from lit_gpt.data.config import SPLITS, CorpusConfig
from lit_gpt.data.executors import Executor, ExecutorName, open_executor
from lit_gpt.data.read_options import ReadOptions
from lit_gpt.data.readers import with_detected_encoding
from lit_gpt.data.shards import TOKENS_PER_SHARD, ShardedArray, open_shards, shard_path
from lit_gpt.data.sources import Source
from lit_gpt.data.split import LEFT_OUT, _deal
from lit_gpt.data.tokenize import RECORD, _whole, read_blocks, tokenize_block, train_tokenizer
from lit_gpt.device import available_cores
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import (
    BytePairTokenizer,
    Tokenizer,
    from_state,
    open_tokenizer,
    prune,
    tokenizer_key,
)

FORMAT = 3  # part of the key: raise it when the same input would give other files, or other blocks on the way
BLOCK = 2**20  # characters tokenized at once
PARALLEL = 2**24  # bytes of text under which other processes take longer to start than they save
TOLERATED = 0.1  # share of rows that may be rejected


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
    ids: ShardedArray
    tokenizer: Tokenizer
    report: dict[str, Any]
    folder: Path

    def split(self, name: str) -> ShardedArray:
        """The ids of "train", "val" or "test"."""
        sizes = [self.report["parts"][part]["tokens"] for part in SPLITS]
        start = sum(sizes[: SPLITS.index(name)])
        return self.ids[start : start + sizes[SPLITS.index(name)]]


def open_corpus(
    files: list[Source], recipe: CorpusConfig, cache: Path, processes: int | None = None, engine: ExecutorName = "local"
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
        return corpus if len(corpus.ids) == sum(corpus.report["parts"][part]["tokens"] for part in SPLITS) else None
    except (FileNotFoundError, NotADirectoryError, LookupError, TypeError, ValueError):
        return None


def corpus_key(files: list[Source], recipe: CorpusConfig) -> str:
    """A fingerprint of everything that decides the ids: 32 hexadecimal digits."""
    contents = [(source.suffix, source.compression, source.split, source.sha256()) for source in files]
    learned = recipe.vocab_size if recipe.tokenizer == "bpe" else None
    tokenizer = tokenizer_key(recipe.tokenizer, recipe.vocab)
    reading = {  # the names of fields are part of the key: a field of ReadOptions that is renamed keeps its name here
        "mode": recipe.read_options.mode,
        "columns": recipe.read_options.columns,
        "template": recipe.read_options.template,
        "delimiter": recipe.read_options.delimiter,
        "quote": recipe.read_options.quote,
        "header": recipe.read_options.header,
        "encoding": recipe.read_options.encoding,
        "mark": recipe.read_options.split_key_column,
    }
    settings = [FORMAT, contents, reading, asdict(recipe.split), tokenizer, learned]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _build(files: list[Source], recipe: CorpusConfig, folder: Path, processes: int | None, name: ExecutorName) -> None:
    """Writes a corpus into `folder`, which appears when it is whole."""
    unfinished = folder.with_suffix(".unfinished").absolute()
    work = unfinished / "work"
    work.mkdir(parents=True, exist_ok=True)  # of a process that was killed, it may be: the lock says nobody is at it
    try:
        tokenizer = _tokenizer(files, recipe, work)
        readings = [with_detected_encoding(source, recipe.read_options) for source in files]
        tally = Tally(files, [reading for reading, _ in readings], recipe)
        if processes is None:
            processes = available_cores() if name == "ray" or sum(source.size() for source in files) >= PARALLEL else 1
        with open_executor(name, processes) as engine:
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
            "mode": recipe.read_options.mode,
            **laid_out,
        }
        (unfinished / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
        shutil.rmtree(work)
        os.replace(unfinished, folder)
    except UserError:
        shutil.rmtree(unfinished, ignore_errors=True)  # a cluster may still be writing
        raise


def _tokenizer(files: list[Source], recipe: CorpusConfig, work: Path) -> Tokenizer:
    """The tokenizer, left in tokenizer.json for those who work; if it is learned from the text, then only once."""
    saved = work / "tokenizer.json"
    if saved.exists():
        return from_state(json.loads(saved.read_text(encoding="utf-8")))
    learned = recipe.tokenizer in ("char", "bpe")
    tokenizer = train_tokenizer(files, recipe) if learned else open_tokenizer(recipe.tokenizer)
    with _whole(saved, work) as file:
        file.write(json.dumps(tokenizer.state()).encode())
    return tokenizer


# ------------------------------------------------------------------------------------------------------- reading


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
    readings: list[ReadOptions]
    recipe: CorpusConfig
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


def _tokenize(tally: Tally, work: Path, engine: Executor) -> None:
    """Leaves the ids of all blocks in `work`; of some only, where `Tally.check` will refuse the text as it is."""
    total, rows, rejected = sum(source.size() for source in tally.files), 0, 0
    read = partial(read_blocks, tally.files, tally.readings, tally.recipe.split, BLOCK)
    tokenize = partial(tokenize_block, work, tally.recipe.read_options.mode == "raw")
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
    for part in range(len(SPLITS)):
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
    tally: Tally, documents: dict[Path, int], tokenizer: Tokenizer, unfinished: Path, engine: Executor
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
    shards = _stretches(documents, parts, work, TOKENS_PER_SHARD)
    sizes = dict.fromkeys(SPLITS, 0)
    for stretch in itertools.chain.from_iterable(shards):
        sizes[SPLITS[stretch.part]] += stretch.stop - stretch.start
    shown = {"desc": "writing", "unit": "token", "unit_scale": True, "delay": 2, "mininterval": 0.5, "leave": False}
    with tqdm(total=sum(sizes.values()), **shown) as bar:
        write = partial(write_shard, unfinished, tokenizer.vocab_size, dtype)
        for size, these in engine.run(_itself, write, list(enumerate(shards))):
            frequencies += these
            bar.update(size)
    if recipe.read_options.mode == "raw" and not any(source.split for source in tally.files):  # one text, cut by tokens
        tokens, split = sizes["train"], recipe.split
        ends = [int(tokens * (1 - split.val_fraction - split.test_fraction)), int(tokens * (1 - split.test_fraction))]
        sizes = dict(zip(SPLITS, (ends[0], ends[1] - ends[0], tokens - ends[1])))
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
        "parts": {part: {"documents": count, "tokens": sizes[part]} for part, count in zip(SPLITS, found["documents"])},
        "vocab_size": tokenizer.vocab_size,
        "vocabulary_in_use": int((frequencies > 0).sum()),
        "least_frequent": [
            [token, tokenizer.token_bytes(token).decode("utf-8", "backslashreplace"), int(frequencies[token])]
            for token in rare
        ],
    }
