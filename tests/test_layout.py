"""Shards hold the tokens of all documents, split after split."""

from pathlib import Path

import numpy as np
import pytest
from corpora import build, split_table, write_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_gpt.data import corpus, tokenize
from lit_gpt.data.config import SPLITS
from lit_gpt.data.executors import open_executor
from lit_gpt.data.layout import id_dtype, plan_shards, prune_vocab, tokens_per_split, write_shards
from lit_gpt.data.sample import write_sample
from lit_gpt.data.shards import open_shards
from lit_gpt.data.split import LEFT_OUT
from lit_gpt.data.tokenize import DOCUMENT_DTYPE
from lit_gpt.tokenizer import BytePairTokenizer, ByteTokenizer, open_tokenizer


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    blocks=st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.integers(0, LEFT_OUT)), max_size=6), min_size=1, max_size=5
    ),
    tokens_per_shard=st.integers(1, 12),
)
def test_shards_hold_documents_ordered_by_split(
    tmp_path: Path, blocks: list[list[tuple[int, int]]], tokens_per_shard: int
) -> None:
    """Each block is a list of documents, given as (tokens, split); every token has an id of its own."""
    for path in [*tmp_path.glob("*.bin"), *tmp_path.glob("*.npz")]:
        path.unlink()
    next_id, ordered, documents_per_block, all_records = 0, [], {}, []
    for index, block in enumerate(blocks):
        records = np.zeros(len(block), dtype=DOCUMENT_DTYPE)
        records["tokens"] = [tokens for tokens, _ in block]
        total = int(records["tokens"].sum())
        for tokens, split in block:
            ordered += [(split, token_id) for token_id in range(next_id, next_id + tokens)]
            next_id += tokens
        path = tmp_path / f"{index:03}.npz"
        np.savez(path, ids=np.arange(next_id - total, next_id, dtype=np.uint32), record=records, known="{}")
        documents_per_block[path] = len(block)
        all_records.append(records)
    np.concatenate(all_records).tofile(tmp_path / "records.bin")
    splits = np.array([split for block in blocks for _, split in block], dtype=np.uint8)
    expected = [token_id for split, token_id in sorted(ordered) if split != LEFT_OUT]

    shards = plan_shards(documents_per_block, splits, tmp_path / "records.bin", tokens_per_shard)
    assert tokens_per_split(shards) == [sum(part == index for part, _ in ordered) for index in range(len(SPLITS))]
    sizes = [sum(span.stop - span.start for span in spans) for spans in shards]
    assert all(size == tokens_per_shard for size in sizes[:-1])

    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 300  # more than there are tokens
    new_ids = np.arange(300, dtype=np.uint32)[::-1]
    with open_executor("local", 1) as executor:
        frequencies = write_shards(tmp_path, tmp_path, shards, splits, new_ids, tokenizer, executor)
    if expected:
        np.testing.assert_array_equal(open_shards(tmp_path, "<u2", len(shards)), 299 - np.array(expected))
    np.testing.assert_array_equal(frequencies, np.isin(299 - np.arange(300), expected))


@pytest.mark.parametrize(("vocab_size", "expected"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_id_dtype_holds_every_id(vocab_size: int, expected: str) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = vocab_size
    assert id_dtype(tokenizer) == np.dtype(expected)


def test_sizes_of_blocks_and_shards_do_not_change_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "names.txt"
    path.write_text("静夜思\n\nsecond <|endoftext|>\n   \nthird\n", encoding="utf-8")
    expected = build(path, "cl100k_base")
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 3)
    monkeypatch.setattr(corpus, "TOKENS_PER_SHARD", 4)
    monkeypatch.setattr(corpus, "FORMAT", 99)  # changes the key, so that the corpus is built again
    found = build(path, "cl100k_base")
    assert found.key != expected.key
    assert len(list(found.folder.glob("ids_*.bin"))) == -(-len(expected.ids) // 4)
    np.testing.assert_array_equal(found.ids, expected.ids)
    for name in SPLITS:
        np.testing.assert_array_equal(found.split(name), expected.split(name))
    assert found.tokenizer == expected.tokenizer
    assert found.report == expected.report


def test_documents_of_a_split_stay_in_order_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "MAX_BLOCK_ROWS", 7)
    rows = [(f"poem {i}", ["train", "val", "test"][i % 3], "") for i in range(60)]
    splits, _ = split_table(write_table(tmp_path / "t.csv", rows), column="part")
    assert splits == [[text for text, part, _ in rows if part == name] for name in SPLITS]


def test_pruned_ids_stand_for_the_same_bytes(tmp_path: Path) -> None:
    write_sample(tmp_path / "t.csv")
    pruned = build(tmp_path / "t.csv", "cl100k_base", "pruned", columns=("name",))
    full = build(tmp_path / "t.csv", "cl100k_base", "full", columns=("name",))
    assert (pruned.ids.dtype, full.ids.dtype) == (np.uint16, np.uint32)
    assert len(pruned.ids) == len(full.ids)
    assert pruned.tokenizer.vocab_size < 2000 < full.tokenizer.vocab_size == 100_277
    for start in range(0, len(full.ids), 9973):
        window = slice(start, start + 300)
        assert [pruned.tokenizer.token_bytes(token) for token in np.asarray(pruned.ids[window])] == [
            full.tokenizer.token_bytes(token) for token in np.asarray(full.ids[window])
        ]


def test_prune_vocab_maps_used_ids_and_end_of_text() -> None:
    tokenizer = open_tokenizer("cl100k_base")
    assert isinstance(tokenizer, BytePairTokenizer)
    used = set(tokenizer.encode("hello world")) | {tokenizer.end_of_text}
    pruned, new_ids = prune_vocab(tokenizer, used)
    assert pruned.decode(new_ids[tokenizer.encode("hello world")].tolist()) == "hello world"
    assert new_ids[tokenizer.end_of_text] == pruned.end_of_text
    assert (len(new_ids), int(new_ids.max())) == (tokenizer.vocab_size, pruned.vocab_size - 1)
