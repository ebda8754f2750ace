"""Duplicates, and which split a document is in."""

import re
from pathlib import Path

import numpy as np
import pytest
from corpora import corpus_config, split_table, write_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_gpt.data import split
from lit_gpt.data.config import SPLITS, SplitOptions
from lit_gpt.data.corpus import open_corpus
from lit_gpt.data.read_options import Mode
from lit_gpt.data.sources import Source
from lit_gpt.data.split import LEFT_OUT, TEST, TRAIN, VAL, assign_splits, count_leaked, duplicates, find_originals
from lit_gpt.data.tokenize import DOCUMENT_DTYPE
from lit_gpt.errors import UserError

ROWS = [(f"poem {i % 90}", ["train", "Validation", "test"][i % 3], f"writer {i % 17}") for i in range(1000)]


def write_records(path: Path, hashes: list[int]) -> Path:
    """Write records of documents that differ in the hash only."""
    records = np.zeros(len(hashes), dtype=DOCUMENT_DTYPE)
    records["hash"] = np.array(hashes, dtype=np.uint64)[:, None]
    records.tofile(path)
    return path


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "RECORDS_PER_READ", 3)
    monkeypatch.setattr(split, "RECORDS_PER_SORT", 4)


# ---------------------------------------------------------------------------------------------- assigning documents


def test_without_options_last_documents_are_val_and_test(tmp_path: Path) -> None:
    splits, _ = split_table(write_table(tmp_path / "t.csv", ROWS), val_fraction=0.2, test_fraction=0.05)
    texts = [text for text, _, _ in ROWS]
    assert splits == [texts[:750], texts[750:950], texts[950:]]


def test_split_column_names_split(tmp_path: Path) -> None:
    splits, report = split_table(write_table(tmp_path / "t.csv", [*ROWS, ("odd", "other", "x")]), column="part")
    for documents, name in zip(splits, ("train", "Validation", "test")):
        assert documents == [text for text, part, _ in ROWS if part == name]
    reason = "'other' is not a split: write train, val or test"
    assert report["rejected_first"] == [[str(tmp_path / "t.csv"), 1002, reason]]


def test_seed_keeps_equal_texts_together_and_documents_in_their_split(tmp_path: Path) -> None:
    rows = [(f"{i % 4000} poem", "", "") for i in range(5000)]
    options = {"val_fraction": 0.2, "test_fraction": 0.1}
    splits, report = split_table(write_table(tmp_path / "t.csv", rows), seed=1, **options)
    assert [round(len(documents) / 5000, 1) for documents in splits] == [0.7, 0.2, 0.1]
    assert not set(splits[0]) & (set(splits[1]) | set(splits[2]))
    assert (report["duplicates"], report["duplicates_across"]) == (1000, 0)
    longer = write_table(tmp_path / "longer.csv", [("new", "", ""), *rows])
    splits_of_longer, _ = split_table(longer, seed=1, **options)
    assert [[text for text in documents if text != "new"] for documents in splits_of_longer] == splits
    splits_of_other_seed, _ = split_table(tmp_path / "t.csv", seed=2, **options)
    assert splits_of_other_seed != splits


def test_split_by_hash_is_stable_across_versions(tmp_path: Path) -> None:
    hashes = [step * 0x1000_0000_0000_0000 for step in range(16)]
    path = write_records(tmp_path / "records.bin", hashes)
    assigned = {}
    for seed in (0, 1, 7):
        config = corpus_config(split=SplitOptions(seed=seed, val_fraction=0.25, test_fraction=0.125))
        splits = assign_splits(path, [Source("t.csv")], config, np.zeros(16, dtype=bool))
        assigned[seed] = "".join(SPLITS[index][0] if index != TEST else "T" for index in splits)
    assert assigned == {0: "TTvvvvtttttttttt", 1: "tttttttTTvvvvttt", 7: "vttttttttttTTvvv"}


def test_group_keeps_its_rows_together(tmp_path: Path) -> None:
    rows = [(f"poem {i}", "", f"writer {i % 200}") for i in range(2000)]
    splits, _ = split_table(write_table(tmp_path / "t.csv", rows), group="writer", val_fraction=0.3)
    writer = {text: name for text, _, name in rows}
    groups = [{writer[text] for text in documents} for documents in splits]
    assert sum(map(len, splits)) == 2000
    assert len(splits[1]) > 300
    assert not groups[0] & groups[1]


def test_val_and_test_files_are_their_splits(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"of {name}\n" * 3, encoding="utf-8")
    sources = [Source(str(tmp_path / f"{name}.txt"), part) for name, part in (("a", ""), ("b", "val"), ("c", "test"))]
    for mode in ("rows", "raw"):
        corpus = open_corpus(sources, corpus_config("byte", mode=mode), tmp_path / "cache")
        for part, name in (("train", "a"), ("val", "b"), ("test", "c")):
            text = corpus.tokenizer.decode(corpus.split(part))
            assert text.replace("\n", "") == f"of {name}" * 3
        assert [counts["documents"] for counts in corpus.report["parts"].values()] == (
            [3, 3, 3] if mode == "rows" else [1, 1, 1]
        )


@pytest.mark.parametrize("files", ["val", "test", "val test", ""])
@pytest.mark.parametrize(
    "options", [{}, {"val_fraction": 0.3}, {"test_fraction": 0.2}, {"test_fraction": 0.2, "seed": 3}, {"seed": 3}]
)
@pytest.mark.parametrize("mode", ["rows", "raw"])
def test_files_of_a_split_are_in_it_and_options_divide_the_others(
    tmp_path: Path, files: str, options: dict, mode: Mode
) -> None:
    sources = []
    for name in ("", *files.split()):
        lines = [f"of {name or 'none'} {number:04}" for number in range(300)]
        (tmp_path / f"t{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        sources.append(Source(str(tmp_path / f"t{name}.txt"), name))
    try:
        split_options = SplitOptions(**options)
        split_options.check_split_files("val" in files, "test" in files, mode == "raw")
        config = corpus_config("byte", split=split_options, mode=mode)
    except UserError:
        return  # see test_corpus_config.py
    corpus = open_corpus(sources, config, tmp_path / "cache")
    found = [corpus.tokenizer.decode(corpus.split(name)) for name in SPLITS]
    assert sum(text.count("none") for text in found) == 300
    for name, text in zip(SPLITS, found):
        for other in ("val", "test"):
            assert text.count(f"of {other}") == (300 if other == name and name in files.split() else 0)
    shares = [text.count("none") / 300 for text in found]
    val = 0 if "val" in files else options.get("val_fraction", 0.1)
    test = 0 if "test" in files else options.get("test_fraction", 0)
    assert shares == pytest.approx([1 - val - test, val, test], abs=0.05 if "seed" in options else 0.02)
    if "seed" not in options:
        texts = [text for part in found for text in re.findall(r"of none \d+", part)]
        assert mode == "raw" or texts == sorted(texts)


def test_raw_text_is_split_by_tokens(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("0123456789" * 10, encoding="utf-8")
    options = SplitOptions(val_fraction=0.2, test_fraction=0.1)
    corpus = open_corpus([Source(str(tmp_path / "t.txt"))], corpus_config(split=options, mode="raw"), tmp_path)
    assert [len(corpus.split(name)) for name in SPLITS] == [70, 20, 10]


# ------------------------------------------------------------------------------------------------------ duplicates


def test_duplicates_are_counted_and_left_out_with_dedupe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "RECORDS_PER_SORT", 300)
    monkeypatch.setattr(split, "RECORDS_PER_READ", 128)
    path, texts = write_table(tmp_path / "t.csv", ROWS), [text for text, _, _ in ROWS]
    _, report = split_table(path)
    assert report["duplicates"] == 1000 - 90
    assert (report["documents"], report["duplicates_left_out"]) == (1000, 0)
    assert report["duplicates_across"] == 100  # every val document
    assert report["duplicates_first"][0] == [[str(path), 92], [str(path), 2]]
    assert len(report["duplicates_first"]) == 20
    splits, report = split_table(path, dedupe=True)
    assert splits == [texts[:81], texts[81:90], []]
    assert (report["documents"], report["duplicates_left_out"], report["duplicates_across"]) == (90, 910, 0)


@pytest.mark.usefixtures("small_chunks")
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hashes=st.lists(st.integers(0, 8), min_size=1, max_size=40))
def test_find_originals_matches_dictionary(tmp_path: Path, hashes: list[int]) -> None:
    originals = find_originals(write_records(tmp_path / "records.bin", hashes))
    first: dict[int, int] = {}
    expected = [first.setdefault(value, i) for i, value in enumerate(hashes)]
    assert originals.tolist() == expected
    assert duplicates(originals).tolist() == [original != i for i, original in enumerate(expected)]


@pytest.mark.usefixtures("small_chunks")
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from([TRAIN, VAL, TEST, LEFT_OUT])), min_size=1, max_size=40
    )
)
def test_count_leaked_matches_sets(tmp_path: Path, documents: list[tuple[int, int]]) -> None:
    path = write_records(tmp_path / "records.bin", [value for value, _ in documents])
    trained = {value for value, part in documents if part == TRAIN}
    expected = sum(part in (VAL, TEST) and value in trained for value, part in documents)
    assert count_leaked(find_originals(path), np.array([part for _, part in documents], dtype=np.uint8)) == expected


@pytest.mark.usefixtures("small_chunks")
def test_texts_that_share_half_of_their_hash_are_different(tmp_path: Path) -> None:
    records = np.zeros(3, dtype=DOCUMENT_DTYPE)
    records["hash"] = [[1, 2], [1, 3], [2, 2]]
    records.tofile(tmp_path / "records.bin")
    assert not duplicates(find_originals(tmp_path / "records.bin")).any()
