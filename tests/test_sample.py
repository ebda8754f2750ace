"""Tests of lit_gpt.data.sample."""

import csv
import hashlib
from pathlib import Path

import pytest

from lit_gpt.data.sample import NUM_ROWS, generate_rows, name_pattern, write_sample


def test_bytes_of_the_sample_are_pinned(tmp_path: Path) -> None:
    write_sample(tmp_path / "data" / "mingcheng.csv")
    content = (tmp_path / "data" / "mingcheng.csv").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "d15fb4c8e06d24404b5fc35d96956a6799c22e80f81a05133bf7af173ec9cb8e"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mingcheng.csv"]


def test_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*paths: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("lit_gpt.files.os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_sample(tmp_path / "table.csv")
    assert list(tmp_path.iterdir()) == []


def test_rows_have_the_four_columns_and_both_languages(tmp_path: Path) -> None:
    write_sample(tmp_path / "table.csv")
    with open(tmp_path / "table.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == NUM_ROWS
    assert list(rows[0]) == ["id", "name", "category", "price"]
    assert [int(row["id"]) for row in rows] == list(range(1, NUM_ROWS + 1))
    chinese = sum(any("\u4e00" <= character <= "\u9fff" for character in row["name"]) for row in rows)
    assert 0.5 < chinese / NUM_ROWS < 0.7
    assert all(float(row["price"]) >= 9 for row in rows)


def test_few_validation_names_occur_in_training() -> None:
    names = [name for _, name, _, _ in generate_rows()]
    training, validation = set(names[: NUM_ROWS * 9 // 10]), names[NUM_ROWS * 9 // 10 :]
    assert sum(name in training for name in validation) < 0.01 * len(validation)


def test_seed_changes_the_rows() -> None:
    assert generate_rows(100, seed=1) != generate_rows(100, seed=2)


def test_name_pattern_matches_exactly_the_names_of_the_table() -> None:
    pattern, names = name_pattern(), [name for _, name, _, _ in generate_rows(100)]
    assert all(pattern.fullmatch(name) for name in names)
    broken = [changed for name in names for changed in (name[1:], name[:-1], name + "x", name.replace(" ", "", 1))]
    assert not any(pattern.fullmatch(name) for name in broken)
