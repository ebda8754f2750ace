"""Copy the token ids of all blocks into the shards of a corpus: split after split, in each the documents in order."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from lit_gpt.data.config import SPLITS
from lit_gpt.data.executors import Executor
from lit_gpt.data.shards import shard_path
from lit_gpt.data.tokenize import DOCUMENT_DTYPE, read_block
from lit_gpt.files import atomic_write
from lit_gpt.tokenizer import BytePairTokenizer, Tokenizer, prune

# Of tqdm: a bar only in a terminal, and only for what takes longer than two seconds.
BAR_OPTIONS: dict[str, Any] = {"delay": 2, "mininterval": 0.5, "leave": False, "disable": None}


class Span(NamedTuple):
    """A range of the token ids that a block holds of one split.

    Attributes:
        block: File of the block.
        first_document: Index of the block's first document among all documents.
        split: Index of the split.
        start: First token of the range, counted among the block's tokens of this split.
        stop: End of the range, exclusive.
    """

    block: Path
    first_document: int
    split: int
    start: int
    stop: int


def plan_shards(
    documents_per_block: dict[Path, int], splits: np.ndarray, records: Path, tokens_per_shard: int
) -> list[list[Span]]:
    """Return what each shard holds: spans in the order split, block.

    Args:
        documents_per_block: Number of documents of every block, in order.
        splits: The split of each document, (documents,) uint8.
        records: File with the records of all documents.
        tokens_per_shard: Number of tokens in every shard but the last one.
    """
    tokens = np.zeros((len(documents_per_block), len(SPLITS) + 1), dtype=np.int64)  # the last column is for LEFT_OUT
    first_documents = np.cumsum([0, *documents_per_block.values()]).tolist()
    for i, (first, count) in enumerate(zip(first_documents, documents_per_block.values())):
        record = np.fromfile(records, DOCUMENT_DTYPE, count, offset=first * DOCUMENT_DTYPE.itemsize)
        np.add.at(tokens[i], splits[first : first + count], record["tokens"])
    shards: list[list[Span]] = [[]]
    free = tokens_per_shard
    for split in range(len(SPLITS)):
        for block, first, count in zip(documents_per_block, first_documents, tokens[:, split].tolist()):
            start = 0
            while start < count:
                if free == 0:
                    shards.append([])
                    free = tokens_per_shard
                stop = min(count, start + free)
                shards[-1].append(Span(block, first, split, start, stop))
                free -= stop - start
                start = stop
    return shards


def tokens_per_split(shards: list[list[Span]]) -> list[int]:
    counts = [0] * len(SPLITS)
    for spans in shards:
        for span in spans:
            counts[span.split] += span.stop - span.start
    return counts


def prune_vocab(tokenizer: BytePairTokenizer, used_ids: set[int]) -> tuple[BytePairTokenizer, np.ndarray]:
    """Return the tokenizer without the tokens that a text does not need, and a table from old to new ids.

    Args:
        tokenizer: The full tokenizer, V ids.
        used_ids: The ids that occur in the text.

    Returns:
        The pruned tokenizer, and the new id of every old one, (V,) uint32; 0 for ids that are gone.
    """
    pruned, kept_ids = prune(tokenizer, np.array(sorted(used_ids - {tokenizer.end_of_text})))
    new_ids = np.zeros(tokenizer.vocab_size, dtype=np.uint32)
    new_ids[kept_ids] = np.arange(len(kept_ids), dtype=np.uint32)
    new_ids[tokenizer.end_of_text] = pruned.end_of_text
    return pruned, new_ids


def id_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Return the smallest unsigned little-endian type that holds every id."""
    return np.dtype("<u2") if tokenizer.vocab_size <= 2**16 else np.dtype("<u4")


def write_shards(
    folder: Path,
    work_folder: Path,
    shards: list[list[Span]],
    splits: np.ndarray,
    new_ids: np.ndarray,
    tokenizer: Tokenizer,
    executor: Executor,
) -> np.ndarray:
    """Write all shards into `folder`, in parallel, and return how often each id occurs, (V,) int64.

    Args:
        folder: Folder of the corpus.
        work_folder: Folder of the blocks. The tables that the workers need are written to it.
        shards: What each shard holds, from `plan_shards`.
        splits: The split of each document, (documents,) uint8.
        new_ids: The id to write for every id in the blocks, uint32.
        tokenizer: Its `vocab_size` V decides the dtype.
        executor: Runs the workers.
    """
    splits.tofile(work_folder / "splits.bin")
    np.save(work_folder / "new_ids.npy", new_ids)
    frequencies = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    write = partial(_write_shard, folder, work_folder, tokenizer.vocab_size, id_dtype(tokenizer))
    total = sum(tokens_per_split(shards))
    with tqdm(desc="writing", total=total, unit="token", unit_scale=True, **BAR_OPTIONS) as bar:
        for shard_frequencies in executor.run(_as_list, write, list(enumerate(shards))):
            frequencies += shard_frequencies
            bar.update(int(shard_frequencies.sum()))
    return frequencies


def _as_list(item: Any) -> Sequence[Any]:
    """Make one task of each item, for `Executor.run`."""
    return [item]


def _write_shard(
    folder: Path, work_folder: Path, vocab_size: int, dtype: np.dtype, shard: tuple[int, list[Span]]
) -> np.ndarray:
    """Write one shard, given as its number and its spans, and return how often each id occurs, (V,) int64."""
    number, spans = shard
    new_ids = np.load(work_folder / "new_ids.npy")
    frequencies = np.zeros(vocab_size, dtype=np.int64)

    def write(file: BinaryIO) -> None:
        for span in spans:
            ids = new_ids[_read_span(span)].astype(dtype)
            np.add(frequencies, np.bincount(ids, minlength=vocab_size), out=frequencies)
            file.write(ids.tobytes())

    atomic_write(shard_path(folder, number), write, temporary_folder=work_folder)
    return frequencies


def _read_span(span: Span) -> np.ndarray:
    """Return the ids of a span as they are in its block, (tokens,) uint32."""
    ids, records, _ = read_block(span.block)
    lengths = records["tokens"]
    splits = np.fromfile(span.block.with_name("splits.bin"), np.uint8, len(lengths), offset=span.first_document)
    is_in_split = splits == span.split
    if not is_in_split.all():
        ids = ids[np.repeat(is_in_split, lengths)]
    return ids[span.start : span.stop]
