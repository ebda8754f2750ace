"""The built-in table is what the README says of it, to the byte."""

import csv
import hashlib
from pathlib import Path

import pytest

from lit_gpt.data.sample import ROWS, sample_rows, write_sample


def test_the_bytes_are_the_same_on_every_machine(tmp_path: Path) -> None:
    write_sample(tmp_path / "data" / "mingcheng.csv")
    content = (tmp_path / "data" / "mingcheng.csv").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "d15fb4c8e06d24404b5fc35d96956a6799c22e80f81a05133bf7af173ec9cb8e"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mingcheng.csv"]


def test_a_table_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*paths: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("lit_gpt.data.sample.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_sample(tmp_path / "table.csv")
    assert list(tmp_path.iterdir()) == []


def test_rows_have_the_four_columns_and_both_languages(tmp_path: Path) -> None:
    write_sample(tmp_path / "table.csv")
    with open(tmp_path / "table.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == ROWS
    assert list(rows[0]) == ["id", "name", "category", "price"]
    assert [int(row["id"]) for row in rows] == list(range(1, ROWS + 1))
    chinese = sum(any("\u4e00" <= character <= "\u9fff" for character in row["name"]) for row in rows)
    assert 0.5 < chinese / ROWS < 0.7
    assert all(float(row["price"]) >= 9 for row in rows)


def test_hardly_a_validation_row_occurs_in_training() -> None:
    names = [name for _, name, _, _ in sample_rows()]
    training, validation = set(names[: ROWS * 9 // 10]), names[ROWS * 9 // 10 :]
    assert sum(name in training for name in validation) < 0.01 * len(validation)


def test_another_seed_gives_another_table() -> None:
    assert sample_rows(100, seed=1) != sample_rows(100, seed=2)
