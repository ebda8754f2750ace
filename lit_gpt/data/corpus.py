"""Tokenize documents into a corpus on disk, and find it again by its content.

A corpus is cached under a key made of the bytes of its files, the read options, the split options and the tokenizer;
names and times do not count. A build holds a lock and works in the folder `<key>.unfinished`:

1. Tokenize all files, block by block, in parallel processes or on a cluster (`tokenize`). A build that was killed
   continues from here with the blocks that are missing.
2. Assign every document to a split (`split`).
3. Copy the token ids into shards, split after split (`layout`), and rename the folder to `<key>`.

Memory does not grow with the text, except for a few bytes per document.
"""

import contextlib
import hashlib
import json
import logging
import shutil
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from lit_gpt.data.cache import (
    CORPUS_FILE,
    MAX_JSON_BYTES,
    REJECTED_FILE,
    REPORT_FILE,
    Corpus,
    DamagedCorpusError,
    load_corpus,
    write_corpus_digests,
    write_json,
)
from lit_gpt.data.config import SPLITS, CorpusConfig, boundaries
from lit_gpt.data.executors import Executor, ExecutorName, open_executor
from lit_gpt.data.layout import BAR_OPTIONS, id_dtype, plan_shards, prune_vocab, tokens_per_split, write_shards
from lit_gpt.data.read_options import ReadOptions
from lit_gpt.data.readers import with_detected_encoding
from lit_gpt.data.report import TextCounts, duplicate_report, merge_blocks, vocab_report
from lit_gpt.data.shards import TOKENS_PER_SHARD
from lit_gpt.data.sources import Source
from lit_gpt.data.split import assign_splits, duplicates, file_fractions, find_originals
from lit_gpt.data.tokenize import read_blocks, tokenize_block, train_tokenizer
from lit_gpt.device import available_cores
from lit_gpt.digests import DIGESTS_FILE, damaged_files, sha256_of_all, write_digests
from lit_gpt.errors import UserError
from lit_gpt.files import atomic_replace, remove
from lit_gpt.tokenizer import BytePairTokenizer, Tokenizer, from_state, open_tokenizer, tokenizer_key

# Part of the key: raise it when the same input gives other token ids. Checkpoints hold the key too, and a run resumes
# only with its own data; a corpus whose files are otherwise not as expected is built again under the same key.
FORMAT = 4
BLOCK_CHARACTERS = 2**20
TOKENIZER_FILE = "tokenizer.json"  # of an unfinished build
KEPT_FILES = (TOKENIZER_FILE, DIGESTS_FILE)
MIN_REJECTED_TO_STOP = 10_000  # rows
MIN_PARALLEL_BYTES = 2**24  # to start processes for a shorter text takes longer than they save

logger = logging.getLogger(__name__)


def open_corpus(
    sources: list[Source],
    config: CorpusConfig,
    cache: Path,
    processes: int | None = None,
    executor: ExecutorName = "local",
) -> Corpus:
    """Open a corpus in the cache, or build it there.

    Args:
        sources: Files, in the order in which they are read.
        config: Determines the corpus.
        cache: Folder of all cached corpora.
        processes: Number of processes that tokenize. None: one per core if the text is long, else 1.
        executor: "local" for processes of this machine, "ray" for a cluster, whose machines must all see `sources` and
            `cache` under the same paths. Both write the same files.

    Raises:
        UserError: A file cannot be read, too many rows are rejected, there is no text, or the cache cannot be written.
    """
    key = corpus_key(sources, config)
    folder = cache / key
    try:
        corpus = _load(folder)
        if corpus is None:
            cache.mkdir(parents=True, exist_ok=True)
            with _lock(cache / f"{key}.lock"):
                with contextlib.suppress(DamagedCorpusError):
                    corpus = load_corpus(folder)  # another process may have built it meanwhile
                if corpus is None:
                    remove(folder)
                    _build(sources, config, folder, processes, executor)
                    corpus = load_corpus(folder)
    except (OSError, DamagedCorpusError) as error:
        raise UserError(
            f"{cache}: the token cache cannot be written or read ({getattr(error, 'strerror', None) or error}): free "
            "disk space there, or run in a folder of your own"
        ) from None
    assert corpus is not None
    return corpus


def _lock(path: Path) -> AbstractContextManager:
    """Acquire a lock between processes, and log a warning if another process holds it.

    Python prints the warning to stderr unless the program configures logging.
    """
    if path.is_symlink():  # not ours
        path.unlink(missing_ok=True)
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        logger.warning("another process is tokenizing the same text: waiting for it to finish")
        return lock.acquire()


def _load(folder: Path) -> Corpus | None:
    """Open the corpus in a folder; return None if it is missing, or damaged, which is logged as a warning."""
    try:
        return load_corpus(folder)
    except DamagedCorpusError as error:
        logger.warning("%s is damaged (%s): tokenizing the text again", folder, error)
        return None


def corpus_key(sources: list[Source], config: CorpusConfig) -> str:
    """Return a fingerprint of everything that determines the token ids, 32 hexadecimal digits."""
    contents = [(source.suffix, source.split, source.sha256()) for source in sources]
    read_options = {  # spelled out, because a renamed field must not change the key
        "mode": config.read_options.mode,
        "format": config.read_options.format,
        "columns": config.read_options.columns,
        "template": config.read_options.template,
        "delimiter": config.read_options.delimiter,
        "quote": config.read_options.quote,
        "header": config.read_options.header,
        "skip_rows": config.read_options.skip_rows,
        "encoding": config.read_options.encoding,
        "mark": config.read_options.split_key_column,
    }
    tokenizer = tokenizer_key(config.tokenizer, config.vocab)
    settings = [FORMAT, contents, read_options, asdict(config.split_options), tokenizer, config.bpe_vocab_size]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _build(
    sources: list[Source], config: CorpusConfig, folder: Path, processes: int | None, executor_name: ExecutorName
) -> None:
    """Build a corpus beside `folder`, and rename it to `folder` when it is complete."""
    if processes is None:
        is_parallel = executor_name == "ray" or sum(source.size() for source in sources) >= MIN_PARALLEL_BYTES
        processes = available_cores() if is_parallel else 1
    unfinished = folder.with_suffix(".unfinished").absolute()
    try:
        work_folder = _open_work_folder(unfinished)
        tokenizer = _make_tokenizer(sources, config, work_folder)
        detected = [with_detected_encoding(source, config.read_options) for source in sources]
        read_options = [options for options, _ in detected]
        with open_executor(executor_name, processes) as executor:
            blocks = _tokenize(sources, read_options, config, work_folder, executor)
            counts = merge_blocks(sources, blocks, work_folder / "records.bin", unfinished / REJECTED_FILE)
            counts.check(sources, config.read_options.mode == "raw")
            report = _split_and_write(sources, config, counts, tokenizer, unfinished, executor)
        files = [
            {
                "name": str(source),
                "bytes": source.size(),
                "encoding": found.name,
                "sure": found.is_sure,
                "confidence": found.confidence,
                "runner_up": found.runner_up,
                "examples": list(found.examples),
            }
            for source, (_, found) in zip(sources, detected)
        ]
        report = {"files": files, "mode": config.read_options.mode, **report}
        write_json(unfinished / REPORT_FILE, report, indent=1)
        shutil.rmtree(work_folder)
        write_corpus_digests(unfinished)
        atomic_replace(unfinished, folder)
    except UserError:
        shutil.rmtree(unfinished, ignore_errors=True)  # workers of a cluster may still be writing
        raise


def _open_work_folder(unfinished: Path) -> Path:
    """Create the folder of a build and `work` in it; of what a killed build left, keep the blocks and the tokenizer.

    Nothing else stays: a symbolic link would lead the files of this build elsewhere.
    """
    work_folder = unfinished / "work"
    for folder in (unfinished, work_folder):
        if folder.is_symlink() or not folder.is_dir():
            remove(folder)
        folder.mkdir(exist_ok=True)
    for path in [*unfinished.iterdir(), *work_folder.iterdir()]:
        is_result = path.parent == work_folder and (path.suffix == ".npz" or path.name in KEPT_FILES)
        if path != work_folder and (path.is_symlink() or not path.is_file() or not is_result):
            remove(path)
    return work_folder


def _make_tokenizer(sources: list[Source], config: CorpusConfig, work_folder: Path) -> Tokenizer:
    """Open or train the tokenizer and write it to tokenizer.json, for the workers and for a build that continues.

    A build that continues does not train it again, unless the file is damaged.
    """
    path = work_folder / TOKENIZER_FILE
    is_trained = config.tokenizer in ("char", "bpe")
    if is_trained and path.exists():
        with contextlib.suppress(ValueError, RecursionError):
            if path.stat().st_size <= MAX_JSON_BYTES and not damaged_files(work_folder, [TOKENIZER_FILE]):
                return from_state(json.loads(path.read_bytes()))
        logger.warning("%s is damaged: training the tokenizer again", path)
    tokenizer = train_tokenizer(sources, config) if is_trained else open_tokenizer(config.tokenizer)
    write_json(path, tokenizer.state())
    write_digests(work_folder, sha256_of_all([path]))
    return tokenizer


def _tokenize(
    sources: list[Source], read_options: list[ReadOptions], config: CorpusConfig, work_folder: Path, executor: Executor
) -> list[Path]:
    """Tokenize all blocks into `work_folder`, and return their files in order.

    Stop early if more than half of many rows are rejected. `TextCounts.check` fails on the blocks that are there.
    """
    total, rows, rejected = sum(source.size() for source in sources), 0, 0
    blocks: list[Path] = []
    damaged: list[Path] = []
    read = partial(read_blocks, sources, read_options, config.split_options, BLOCK_CHARACTERS)
    tokenize = partial(tokenize_block, work_folder, config.read_options.mode == "raw")
    with tqdm(desc="tokenizing", total=total, unit="B", unit_scale=True, **BAR_OPTIONS) as bar:
        for progress in executor.run(read, tokenize, range(len(sources))):
            blocks.append(progress.path)
            damaged += [progress.path] * progress.was_damaged
            rows += progress.rows
            rejected += progress.rejected
            bar.set_postfix_str(f"{rows:,} rows", refresh=False)
            bar.update(progress.bytes_read)
            if rejected >= MIN_REJECTED_TO_STOP and rows < 2 * rejected:
                break
    if damaged:
        logger.warning("%s is damaged (1 of %d): tokenized its rows again", min(damaged), len(damaged))
    return sorted(blocks)


def _split_and_write(
    sources: list[Source],
    config: CorpusConfig,
    counts: TextCounts,
    tokenizer: Tokenizer,
    unfinished: Path,
    executor: Executor,
) -> dict[str, Any]:
    """Assign the documents to splits, write the shards and corpus.json, and return the report."""
    work_folder = unfinished / "work"
    records = work_folder / "records.bin"
    is_raw = config.read_options.mode == "raw"
    num_records = sum(counts.documents_per_block.values())
    # in raw mode a record is a block, not a document, and none is a duplicate
    originals = np.arange(num_records) if is_raw else find_originals(records)
    is_duplicate = duplicates(originals)
    splits = assign_splits(records, sources, config, is_duplicate)
    shards = plan_shards(counts.documents_per_block, splits, records, TOKENS_PER_SHARD)
    new_ids = np.arange(tokenizer.vocab_size, dtype=np.uint32)
    if config.prunes_vocab and isinstance(tokenizer, BytePairTokenizer):
        tokenizer, new_ids = prune_vocab(tokenizer, counts.used_ids)
    frequencies = write_shards(unfinished, work_folder, shards, splits, new_ids, tokenizer, executor)
    description = {"dtype": id_dtype(tokenizer).str, "tokenizer": tokenizer.state()}
    write_json(unfinished / CORPUS_FILE, description)

    tokens = tokens_per_split(shards)
    if is_raw:
        documents = [sum((source.split or "train") == split for source in sources) for split in SPLITS]
        # the files that are given for no split are one text, which is divided by tokens
        first_val, first_test = boundaries(tokens[0], file_fractions(sources, config.split_options))
        tokens = [first_val, first_test - first_val + tokens[1], tokens[0] - first_test + tokens[2]]
    else:
        documents = np.bincount(splits, minlength=len(SPLITS))[: len(SPLITS)].tolist()
    return {
        "rows": counts.rows,
        "rejected": counts.rejected,
        "rejected_first": counts.rejected_examples,
        "empty_rows": counts.empty_rows,
        "documents": sum(documents),
        **duplicate_report(records, sources, config, splits, is_duplicate, originals),
        "characters": counts.characters,
        "bytes": counts.num_bytes,
        "tokens": sum(tokens),
        "tokens_per_character": sum(tokens) / counts.characters,
        "parts": {split: {"documents": documents[i], "tokens": tokens[i]} for i, split in enumerate(SPLITS)},
        **vocab_report(tokenizer, frequencies),
    }
