"""The report counts what files and corpora contain."""

from pathlib import Path

import numpy as np
import pytest
from corpora import build

from lit_gpt.data import corpus, split, tokenize
from lit_gpt.errors import UserError


def test_report_counts_tokens_and_documents(tmp_path: Path) -> None:
    texts = ["床前明月光", "🙂🙂 smile", "שלום עולם", "e\u0301te\u0301", "家" * 50]
    (tmp_path / "t.txt").write_text("\n".join(texts), encoding="utf-8")
    found = build(tmp_path / "t.txt", "cl100k_base")
    report = found.report
    counts = np.bincount(found.ids, minlength=found.tokenizer.vocab_size)
    assert report["vocab_size"] == found.tokenizer.vocab_size
    assert report["vocabulary_in_use"] == (counts > 0).sum()
    assert report["tokens_per_character"] == len(found.ids) / sum(map(len, texts))
    assert report["documents"] == sum(counts["documents"] for counts in report["parts"].values()) == 5
    assert len(report["least_frequent"]) == 10
    for token, _, count in report["least_frequent"]:
        assert counts[token] == count == 1


def test_report_lists_longest_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "RECORDS_PER_READ", 4)
    lengths = [3, 9, 1, 7, 9, 2, 8, 5, 9, 6]
    path = tmp_path / "t.txt"
    path.write_text("\n".join("a" * length for length in lengths), encoding="utf-8")
    expected = [[str(path), 2, 9], [str(path), 5, 9], [str(path), 9, 9], [str(path), 7, 8], [str(path), 4, 7]]
    assert build(path).report["longest"] == expected


def test_report_of_raw_mode_has_no_duplicates(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("same\nsame\n" * 9, encoding="utf-8")
    report = build(tmp_path / "t.txt", mode="raw").report
    assert (report["duplicates"], report["duplicates_across"], report["duplicates_first"]) == (0, 0, [])
    assert (report["documents"], report["longest"]) == (1, [])


def test_text_without_documents_is_user_error(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n , \n,\n", encoding="utf-8")
    with pytest.raises(UserError, match="no text in any of 2 rows"):
        build(tmp_path / "t.csv", template="{a}{b}")
    (tmp_path / "header.csv").write_text("a\n", encoding="utf-8")
    with pytest.raises(UserError, match="no rows, at most a header"):
        build(tmp_path / "header.csv")


def test_build_stops_early_if_most_rows_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MIN_REJECTED_TO_STOP", 20)
    monkeypatch.setattr(tokenize, "MAX_BLOCK_ROWS", 10)
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "1,2\n" * 10 + "3\n" * 500, encoding="utf-8")
    with pytest.raises(UserError, match=r"\(20 of 30 rows cannot be read\)"):
        build(path, columns=("a",))


def test_build_reads_all_rows_if_few_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MIN_REJECTED_TO_STOP", 20)
    monkeypatch.setattr(tokenize, "MAX_BLOCK_ROWS", 10)
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "3\n" * 19 + "1,2\n" * 200 + "3\n" + "1,2\n" * 10, encoding="utf-8")
    report = build(path, columns=("a",)).report
    assert (report["rows"], report["rejected"], report["documents"]) == (230, 20, 210)


@pytest.mark.parametrize(("rejected", "is_error"), [(10, False), (11, True)])
def test_more_than_tenth_of_rows_rejected_is_user_error(tmp_path: Path, rejected: int, is_error: bool) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "1,2\n" * (100 - rejected) + "3\n" * rejected, encoding="utf-8")
    if is_error:
        with pytest.raises(UserError, match=r"line 91: 1 fields .* \(11 of 100 rows cannot be read\)"):
            build(path, columns=("a",))
    else:
        assert build(path, columns=("a",)).report["rejected"] == rejected
