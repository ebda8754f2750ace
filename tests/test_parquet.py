"""Values of Parquet tables as text."""

import datetime
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from test_readers import read_documents, read_rows

from lit_gpt.data.rows import RejectedRow, Row
from lit_gpt.errors import UserError


def test_parquet_values_become_text_and_invalid_bytes_are_rejected(tmp_path: Path) -> None:
    day = datetime.date(2024, 2, 29)
    rows = [{"a": b"bytes", "b": day, "c": Decimal("1.50"), "d": {"x": day, "y": [b"z", None]}, "e": True}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    expected = ['bytes|2024-02-29|1.50|{"x": "2024-02-29", "y": ["z", null]}|true']
    assert read_documents(tmp_path / "t.parquet", template="{a}|{b}|{c}|{d}|{e}") == expected
    pyarrow.parquet.write_table(pyarrow.table({"a": [b"\xff\xfe"]}), tmp_path / "binary.parquet")
    with pytest.raises(UserError, match="line 1: bytes that are not text in UTF-8"):
        read_documents(tmp_path / "binary.parquet")


def test_numbers_in_parquet_have_their_shortest_digits(tmp_path: Path) -> None:
    columns = {"a": pyarrow.array([0.1, None, 1e10], pyarrow.float32()), "b": [0.1, 1.0, 1e5], "c": [1, -0, None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    expected = ["0.1|0.1|1", "|1.0|0", "10000000000.0|100000.0|"]
    assert read_documents(tmp_path / "t.parquet", template="{a}|{b}|{c}") == expected


def test_time_that_python_does_not_have_is_written_by_arrow_or_rejects_its_row(tmp_path: Path) -> None:
    second = 10**9
    columns = {
        "nanoseconds": pyarrow.array([1, second], pyarrow.timestamp("ns")),
        "duration": pyarrow.array([5, 1000], pyarrow.duration("ns")),
        "late": pyarrow.array([2**62, 0], pyarrow.timestamp("us")),
        "list": pyarrow.array([[1], [second]], pyarrow.list_(pyarrow.timestamp("ns"))),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    found = {name: read_rows(tmp_path / "t.parquet", columns=(name,)) for name in columns}
    assert found["nanoseconds"] == [Row(1, "1970-01-01 00:00:00.000000001"), Row(2, "1970-01-01 00:00:01")]
    assert found["duration"] == [Row(1, "5"), Row(2, "0:00:00.000001")]
    for name, text in (("late", "1970-01-01 00:00:00"), ("list", '["1970-01-01 00:00:01"]')):
        rejected, row = found[name]
        assert isinstance(rejected, RejectedRow)
        assert rejected.reason.startswith("a value that cannot be written as text (")
        assert row == Row(2, text)


@pytest.mark.parametrize("kind", ["plain", "dictionary", "large", "list", "struct", "split key"])
def test_invalid_string_in_parquet_rejects_its_row_only(tmp_path: Path, kind: str) -> None:
    strings = pyarrow.array([b"a", b"R\xe9union", None, b"\xff", "中".encode()]).view(pyarrow.string())
    offsets = pyarrow.array(range(6), pyarrow.int32())
    values = {
        "large": lambda: strings.view(pyarrow.binary()).cast(pyarrow.large_binary()).view(pyarrow.large_string()),
        "list": lambda: pyarrow.ListArray.from_arrays(offsets, strings),
        "struct": lambda: pyarrow.StructArray.from_arrays([strings], ["x"]),
    }.get(kind, lambda: strings)()
    table = pyarrow.table({"text": values, "id": list("12345")})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", use_dictionary=kind == "dictionary")
    options = {"columns": ("id",), "split_key_column": "text"} if kind == "split key" else {"columns": ("text",)}
    rows = read_rows(tmp_path / "t.parquet", **options)
    assert [type(row) for row in rows] == [Row, RejectedRow, Row, RejectedRow, Row]
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]
    assert isinstance(rows[1], RejectedRow)
    assert rows[1].reason.startswith("bytes that are not text in UTF-8 (invalid continuation byte): correct that row")
    found = [row.split_key if kind == "split key" else row.text for row in rows if isinstance(row, Row)]
    expected = {"list": ['["a"]', "[null]", '["中"]'], "struct": ['{"x": "a"}', '{"x": null}', '{"x": "中"}']}
    assert found == expected.get(kind, ["a", "", "中"])
