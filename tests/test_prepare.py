"""Tests of scripts/prepare.py: the report, the comparison of tokenizers, and the files that the command writes."""

import errno
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import DEFAULT, Result, console_line, unwrap

from lit_gpt.cli.messages import print_rows
from lit_gpt.cli.prepare import main

Prepare = Callable[..., Result]


@pytest.fixture
def prepare(folder: Path, capsys: pytest.CaptureFixture[str]) -> Prepare:
    """Return a function that runs `python scripts/prepare.py` with its arguments."""

    def run(*flags: object) -> Result:
        capsys.readouterr()
        status = main([str(flag) for flag in flags], DEFAULT)
        printed = capsys.readouterr()
        return Result(status, unwrap(printed.out), printed.err)

    return run


TABLE = ["--data.files", "t.csv", "--data.columns", "text", "--data.tokenizer", "byte"]


@pytest.fixture
def table(folder: Path) -> list[str]:
    """Write a table of twenty rows, of which one is empty, one is rejected and one is a duplicate; return the flags."""
    rows = [f"{i},row {i}" for i in range(17)]
    Path("t.csv").write_text("\n".join(["id,text", *rows, "17,row 3", "18,", "19,a,b"]) + "\n", encoding="utf-8")
    return TABLE


def test_report_describes_rows_tokens_and_splits(prepare: Prepare, table: list[str]) -> None:
    result = prepare(*table)
    assert (result.status, result.err) == (0, "")
    assert console_line(result.out, "rows").startswith("20: 18 documents, 1 rejected, 1 empty")
    assert console_line(result.out, "rejected").startswith("t.csv line 21: 3 fields")
    assert console_line(result.out, "duplicates").startswith(
        "1 rows have the text of an earlier row (the first is t.csv"
    )
    characters = sum(len(f"row {i}") for i in [*range(17), 3])
    assert console_line(result.out, "text") == f"{characters} characters, {characters} bytes"
    assert console_line(result.out, "tokens").startswith(f"{characters + 18}, ")
    splits = [console_line(result.out, split) for split in ("train", "val")]
    assert [int(split.split()[0]) for split in splits] == [16, 2]
    assert (Path(console_line(result.out, "cache")) / "report.json").exists()


def test_dedupe_reports_left_out_duplicates(prepare: Prepare, table: list[str]) -> None:
    result = prepare(*table, "--data.dedupe", "true")
    assert result.status == 0
    assert console_line(result.out, "rows").endswith(", 1 duplicates left out")
    assert "duplicates  " not in result.out


def test_json_report_equals_report_in_cache(prepare: Prepare, table: list[str]) -> None:
    result = prepare(*table, "--json")
    (path,) = Path("data/cache").rglob("report.json")
    assert json.loads(result.out).items() <= json.loads(path.read_text(encoding="utf-8")).items()


def test_dry_run_leaves_nothing_behind(prepare: Prepare, table: list[str]) -> None:
    result = prepare(*table, "--dry_run")
    assert result.status == 0
    assert "cache " not in result.out
    assert not Path("data").exists()


def test_compare_counts_tokens_as_training_does(prepare: Prepare, table: list[str]) -> None:
    result = prepare(*table, "--compare", "--json")
    assert result.status == 0, result.err
    rows = {row["tokenizer"]: row for row in map(json.loads, result.out.splitlines())}
    assert {"cl100k_base full", "cl100k_base pruned", "bpe 1024", "char", "byte"} <= rows.keys()
    report = json.loads(prepare(*table, "--json").out)
    assert rows["byte"]["tokens"] == report["tokens"] - report["documents"]
    assert rows["byte"]["bytes_per_token"] == 1
    assert rows["byte"]["embedding_parameters"] == 128 * report["vocab_size"]  # the default d_model, tied embeddings
    assert rows["cl100k_base pruned"]["tokens"] == rows["cl100k_base full"]["tokens"]
    assert rows["cl100k_base pruned"]["vocabulary"] < 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", 0], "--processes is 0: give 1 or more"),
        (["--engine", "spark"], "argument --engine: invalid choice"),
        (["--data.file", "t.csv"], "unknown flag --data.file (did you mean 'data.files'?)"),
        (["--data.files", "none.csv"], "none.csv: no such file"),
    ],
    ids=["processes", "engine", "unknown flag", "missing file"],
)
def test_wrong_argument_gives_one_line_and_leaves_nothing(prepare: Prepare, flags: list, message: str) -> None:
    result = prepare(*flags)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert message in result.err
    assert not Path("data").exists()


def test_print_rows_aligns_columns_and_formats_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"name": "a", "loss": 1.5, "speed": 12345.6}, {"name": "long", "part_in_use": 0.01234, "speed": 1.0}]
    print_rows(rows, False)
    assert capsys.readouterr().out.splitlines() == [
        "                        part",
        "                          in",
        "name    loss   speed     use",
        "   a  1.5000  12,346",
        "long            1.00  0.0123",
    ]


def test_full_folder_for_temporary_files_is_one_line(
    prepare: Prepare, table: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")  # Python's error on a full disk

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", fail)
    result = prepare(*table)
    assert result.status == 2
    assert result.err.startswith("error: no temporary folder can be created (No usable temporary")


def test_print_rows_turns_a_table_that_is_too_wide(capsys: pytest.CaptureFixture[str]) -> None:
    columns = [f"milliseconds{number}" for number in range(5)]
    rows = [{"who": who, **dict.fromkeys(columns, 2.5)} for who in ("lit_gpt", "bare")]
    print_rows(rows, False)
    expected = ["          who  lit_gpt  bare", *(f"{column}     2.50  2.50" for column in columns)]
    assert capsys.readouterr().out.splitlines() == expected
    print_rows(rows * 6, False)  # turned it would be wider
    assert len(capsys.readouterr().out.splitlines()) == 13
    print_rows([], False)
    assert capsys.readouterr().out == ""
