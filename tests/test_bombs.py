"""Small files that decompress to far more than fits into memory, and rows that take long: bounded costs."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from corpora import build, documents

from lit_gpt.data import csv_tables, parquet, readers, sources
from lit_gpt.device import peak_memory, reset_peak_memory
from lit_gpt.errors import UserError

MEGABYTES, CPU = 2**20, torch.device("cpu")
SIZE = 100 * MEGABYTES  # decompressed
Measured = Callable[[], tuple[float, int]]


def compress(path: Path, begin: bytes, repeated: bytes) -> None:
    with pyarrow.output_stream(path, compression="zstd" if path.suffix == ".zst" else "gzip") as file:
        file.write(begin)
        for _ in range(SIZE // MEGABYTES):
            file.write(repeated * (MEGABYTES // len(repeated)))


@pytest.fixture
def measured() -> Iterator[Measured]:
    """Return a function that tells the seconds and the bytes of memory since the test began."""
    reset_peak_memory(CPU)
    start, before = time.process_time(), peak_memory(CPU)
    return lambda: (time.process_time() - start, peak_memory(CPU) - before)


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
@pytest.mark.parametrize(
    ("name", "begin", "repeated", "line"),
    [
        ("line.csv.zst", b"text\n", b"a", 2),
        ("header.csv.zst", b"", b"a", 1),
        ("wide.tsv.zst", b"", b"a\t", 1),
        ("line.txt.zst", b"", "长".encode(), 1),
        ("line.jsonl.zst", b'{"text": "', b"a", 1),
    ],
)
def test_line_that_is_no_row_is_refused(
    tmp_path: Path,
    measured: Measured,
    name: str,
    begin: bytes,
    repeated: bytes,
    line: int,
    tokenizer: str,
) -> None:
    compress(tmp_path / name, begin, repeated)
    with pytest.raises(UserError, match=rf"{name} line {line}: more than 16,777,216 characters, which is no row"):
        build(tmp_path / name, tokenizer)
    seconds, memory = measured()
    assert seconds < 4  # to write the file included
    assert memory < 400e6


def test_line_in_a_gzip_file_is_refused(tmp_path: Path, measured: Measured) -> None:
    compress(tmp_path / "t.csv.gz", b"text\n", b"a")
    with pytest.raises(UserError, match="line 2: more than 16,777,216 characters"):
        build(tmp_path / "t.csv.gz")
    assert measured()[1] < 400e6


@pytest.mark.parametrize(
    ("name", "repeated", "tokenizer", "mode"),
    [
        ("t.txt.zst", b"a", "byte", "raw"),
        ("t.txt.gz", b"a", "char", "raw"),
        ("t.txt.zst", b"the same line\n", "bpe", "rows"),
        ("t.csv.zst", b"\n", "byte", "rows"),  # blank lines are not rows
    ],
)
def test_text_that_compresses_too_well_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: Measured,
    name: str,
    repeated: bytes,
    tokenizer: str,
    mode: str,
) -> None:
    monkeypatch.setattr(sources, "MIN_LARGE", 2**20)
    monkeypatch.setattr(sources, "MAX_EXPANSION", 20)
    compress(tmp_path / name, b"text\n", repeated)
    with pytest.raises(UserError, match=r"more than [\d,]+ characters in [\d,]+ bytes, which is no text"):
        build(tmp_path / name, tokenizer, mode=mode)
    assert measured()[1] < 500e6


def test_table_in_which_every_line_opens_a_quote_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_tables, "MAX_READ_AGAIN", 2**16)
    (tmp_path / "t.csv").write_text("a,b\n" + 'x","\n' * 10_000, encoding="utf-8")
    with pytest.raises(UserError, match=r"line \d+: too many quotes: give --data.quote none"):
        build(tmp_path / "t.csv", columns=("a",))
    (tmp_path / "t.csv").write_text("a,b\n" + 'x,"open\ny,z\n' * 10_000, encoding="utf-8")  # read twice
    with pytest.raises(UserError, match=r"rows cannot be read"):
        build(tmp_path / "t.csv", columns=("a",))


def test_long_quoted_field_and_long_rows_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_tables, "MAX_ROW_LINES", 100)
    (tmp_path / "t.csv").write_text('text\n"' + "a\n" * 2000, encoding="utf-8")
    assert build(tmp_path / "t.csv").report["documents"] == 1999
    for module in (csv_tables, readers):
        monkeypatch.setattr(module, "MAX_ROW_CHARACTERS", 50)
    (tmp_path / "t.csv").write_text("text\n" + "a\n" * 20 + "abc\n", encoding="utf-8")
    found = build(tmp_path / "t.csv", template="{text}" * 20)
    assert documents(found) == ["a" * 20] * 20
    assert found.report["rejected_first"][0][1:] == [22, "more than 50 characters: shorten that text"]


def test_parquet_column_that_compresses_too_well_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_COLUMN_BYTES", 2**22)
    table = pyarrow.table({"text": ["a" * 2**23], "other": ["b"]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(UserError, match=r"has a column 'text' of 8,388,\d+ bytes, compressed to"):
        build(tmp_path / "t.parquet", columns=("text",))
    assert documents(build(tmp_path / "t.parquet", columns=("other",))) == ["b"]


def test_text_in_a_parquet_dictionary_is_in_memory_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    monkeypatch.setattr(sources, "MIN_LARGE", 2**24)
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000), ["a" * 2**19])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="which is no text"):
        build(tmp_path / "t.parquet")
    assert measured()[1] < 300e6


def test_parquet_dictionaries_give_the_same_rows(tmp_path: Path) -> None:
    texts = [None if i % 11 == 0 else f"row {i % 7}" for i in range(10_000)]
    columns = {"text": texts, "bytes": [text and text.encode() for text in texts], "n": range(10_000)}
    for use_dictionary in (True, False):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet", use_dictionary=use_dictionary)
        found = documents(build(tmp_path / "t.parquet", template="{n} {text} {bytes}"))
        assert found == [f"{i} {text or ''} {text or ''}" for i, text in enumerate(texts)]


def test_object_with_many_fields_takes_linear_time(tmp_path: Path, measured: Measured) -> None:
    row = {f"field {i}": "x" for i in range(40_000)}
    twice = json.dumps(row)[:-1] + ', "field 39999": "y"}'
    lines = [json.dumps(row), twice, json.dumps({"text": "here", **row}), json.dumps({"missing": 1, **row})]
    lines += ['{"text": "short"}'] * 40
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = build(tmp_path / "t.jsonl", columns=("text",))
    assert documents(found) == ["here", *["short"] * 40]
    assert found.report["rejected_first"][1][2] == "two fields called 'field 39999': rename or remove one"
    assert measured()[0] < 3


def test_table_with_many_columns_takes_linear_time(tmp_path: Path, measured: Measured) -> None:
    names = [f"column {i}" for i in range(40_000)]
    (tmp_path / "t.csv").write_text(",".join(names) + "\n" + ",".join("x" for _ in names) + "\n", encoding="utf-8")
    assert len(documents(build(tmp_path / "t.csv", columns=tuple(names)))[0]) == 2 * len(names) - 1
    with pytest.raises(UserError, match=r"has no column 'colum'; it has .*, … \(did you mean 'column \d'\?\)"):
        build(tmp_path / "t.csv", columns=("colum",))
    assert measured()[0] < 4


def test_messages_name_only_the_beginning_of_long_names(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"{'n' * 10**6},b\n1,2,3\n1,2\n1\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        build(tmp_path / "t.csv", columns=("b",))
    assert len(str(error.value)) < 500
    with pytest.raises(UserError) as error:
        build(tmp_path / "t.csv")
    assert len(str(error.value)) < 500
