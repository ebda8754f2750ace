"""Files come in as they are written; what cannot be read is said, with its place."""

import contextlib
import csv
import datetime
import io
import json
import re
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lit_gpt.data import readers
from lit_gpt.data.readers import ReadOptions, RejectedRow, Row, open_rows, open_text_chunks, with_detected_encoding
from lit_gpt.data.sources import Source, find_sources
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import BytePairTokenizer

ROWS = [
    {"title": "靜夜思", "author": "李白", "text": "床前明月光，\n疑是地上霜。"},
    {"title": 'A "quoted", title', "author": "", "text": "two  spaces, and a tab\tinside"},
    {"title": "🙂", "author": "café", "text": "{braces} and <|endoftext|>"},
]
POEM = "{title} — {author}\\n{text}"
POEMS = [f"{row['title']} — {row['author']}\n{row['text']}" for row in ROWS]


def write_table(path: Path, encoding: str = "utf-8", newline: str = "\n", delimiter: str = ",") -> Path:
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), lineterminator=newline, delimiter=delimiter)
        writer.writeheader()
        writer.writerows({key: value.replace("\n", newline) for key, value in row.items()} for row in ROWS)
    return path


def rows(path: Path, **reading: object) -> list[Row | RejectedRow]:
    source = Source(str(path))
    known, _ = with_detected_encoding(source, ReadOptions(**{"encoding": "utf-8", **reading}))  # type: ignore[arg-type]
    with open_rows(source, known) as (found, _):
        return list(found)


def documents(path: Path, **reading: object) -> list[str]:
    """The texts of all rows, if all can be read."""
    found = rows(path, **reading)
    for row in found:
        if isinstance(row, RejectedRow):
            raise UserError(f"{path} line {row.line}: {row.reason}")
    return [row.text for row in found if isinstance(row, Row)]


def pieces(path: Path, **reading: object) -> list[str]:
    source = Source(str(path))
    known, _ = with_detected_encoding(source, ReadOptions(mode="raw", **reading))  # type: ignore[arg-type]
    with open_text_chunks(source, known) as (found, _):
        return list(found)


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    jsonl, parquet = tmp_path / "t.jsonl", tmp_path / "t.parquet"
    jsonl.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), parquet)
    files: list[tuple[Path, dict[str, str]]] = [
        (write_table(tmp_path / "t.csv"), {}),
        (write_table(tmp_path / "bom.csv", "utf-8-sig"), {}),
        (write_table(tmp_path / "windows.csv", newline="\r\n"), {}),
        (write_table(tmp_path / "utf16.csv", "utf-16"), {"encoding": "utf-16"}),
        (write_table(tmp_path / "t.tsv", delimiter="\t"), {}),
        (write_table(tmp_path / "semicolon.csv", delimiter=";"), {"delimiter": ";"}),
        (jsonl, {}),
        (parquet, {}),
    ]
    for path, reading in files:
        assert documents(path, template=POEM, **reading) == POEMS, path.name


def test_columns_are_joined_by_line_ends(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv")
    assert documents(path, columns=("author", "title"))[0] == "李白\n靜夜思"
    assert documents(path, columns=("text",)) == [row["text"] for row in ROWS]


def test_a_table_of_one_column_needs_no_choice(tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_text('name\nfirst\n"second, of two"\n\n  \n', encoding="utf-8")
    assert documents(tmp_path / "names.csv") == ["first", "second, of two", "  "]


def test_without_a_header_columns_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("1,first\n2,second\n", encoding="utf-8")
    assert documents(tmp_path / "t.csv", header=False, columns=("c2",)) == ["first", "second"]


def test_numbers_stay_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("code,price\n007,12.50\n", encoding="utf-8")
    assert documents(tmp_path / "t.csv", template="{code}: {price} {{yuan}}") == ["007: 12.50 {yuan}"]


def test_missing_and_nested_fields_become_text(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"a": null, "b": 1.5, "c": ["x", "中"]}', encoding="utf-8")
    assert documents(tmp_path / "t.jsonl", template="[{a}|{b}|{c}]") == ['[|1.5|["x", "中"]]']


def test_every_kind_of_parquet_value_becomes_text_or_is_said(tmp_path: Path) -> None:
    day = datetime.date(2024, 2, 29)
    rows = [{"a": b"bytes", "b": day, "c": Decimal("1.50"), "d": {"x": day, "y": [b"z", None]}, "e": True}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    expected = ['bytes|2024-02-29|1.50|{"x": "2024-02-29", "y": ["z", null]}|True']
    assert documents(tmp_path / "t.parquet", template="{a}|{b}|{c}|{d}|{e}") == expected
    pyarrow.parquet.write_table(pyarrow.table({"a": [b"\xff\xfe"]}), tmp_path / "binary.parquet")
    with pytest.raises(UserError, match="line 1: bytes that are not text in UTF-8"):
        documents(tmp_path / "binary.parquet")


def test_a_line_of_plain_text_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"first\r\n\r\nthird, last")
    assert documents(tmp_path / "t.txt") == ["first", "", "third, last"]


def test_fields_may_be_longer_than_pythons_limit(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text\n" + "长" * 300_000 + "\n", encoding="utf-8")
    assert [len(document) for document in documents(tmp_path / "t.csv")] == [300_000]


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]))] * 2), min_size=1))
def test_csv_rows_are_those_pythons_csv_wrote(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    expected = [re.sub("\r\n?", "\n", f"{a}\x1f{b}") for a, b in rows]
    assert documents(path, template="{a}\x1f{b}") == expected


def pythons_rows(content: bytes) -> list[list[str]] | None:
    """What Python's csv yields of these bytes; None where it, or the table, is broken or there is nothing."""
    if content in (b"", b"\xef", b"\xef\xbb", b"\xef\xbb\xbf"):
        return None
    try:
        text = content.decode("utf-8-sig")
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except (UnicodeDecodeError, csv.Error):
        return None
    if len({len(row) for row in rows}) > 1:
        return None
    return rows


PIECES = [
    b"a",
    b"1",
    b"",
    b",",
    b",",
    b'"',
    b'"',
    b'""',
    b"\n",
    b"\n",
    b"\r\n",
    b"\r",
    b" ",
    b";",
    b"\t",
    b"|",
    b"\x00",
]
PIECES += ["中".encode(), "é".encode(), b"\xef\xbb\xbf", b"\xff", b"\xd6\xd0", b"\xe4\xb8"]


@settings(max_examples=600, deadline=None)
@example(pieces=[b"\xef"])  # of a byte order mark: Python's decoder drops it
@given(pieces=st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), min_size=1, max_size=30))
def test_any_bytes_give_the_rows_python_gives_or_are_reported(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    content = b"".join(pieces) or b"a"
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(content)
    rows = pythons_rows(content)
    expected = None if rows is None else [re.sub("\r\n?", "\n", "\x1f".join(row)) for row in rows]
    first = next(
        (row for row in csv.reader(io.StringIO(content.decode("utf-8-sig", "replace"), newline="")) if row), "1"
    )
    template = "\x1f".join(f"{{c{number}}}" for number in range(1, len(first) + 1))
    got: list[str] | None = None
    with contextlib.suppress(UserError):
        got = documents(path, header=False, delimiter=",", template=template, encoding="utf-8")
    assert got == expected


def test_raw_text_in_blocks_encodes_as_the_whole_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(POEMS) + "\n\n  \n\tindented!\n\n\n- café\n" + "one more line\n" * 50
    (tmp_path / "t.txt").write_text(text, encoding="utf-8", newline="\r\n")
    tokenizer = BytePairTokenizer()
    for size in (1, 7, 64):
        monkeypatch.setattr(readers, "RAW_BLOCK", size)
        monkeypatch.setattr(readers, "LONGEST_BLOCK", 1000)
        blocks = pieces(tmp_path / "t.txt")
        assert len(blocks) > 10
        assert "".join(blocks) == text
        assert [token for block in blocks for token in tokenizer.encode(block)] == tokenizer.encode(text)


def test_raw_text_without_lines_comes_in_bounded_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "RAW_BLOCK", 10)
    monkeypatch.setattr(readers, "LONGEST_BLOCK", 50)
    (tmp_path / "t.txt").write_text("字" * 1000, encoding="utf-8")
    blocks = pieces(tmp_path / "t.txt")
    assert "".join(blocks) == "字" * 1000
    assert max(map(len, blocks)) <= 60


def test_globs_and_lists_name_files_in_order(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "c.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.csv").write_text("x")
    assert [Path(source.name).name for source in find_sources(f"{tmp_path}/*.csv")] == ["a.csv", "b.csv"]
    assert [Path(source.name).name for source in find_sources([f"{tmp_path}/c.txt", f"{tmp_path}/*.csv"])] == [
        "c.txt",
        "a.csv",
        "b.csv",
    ]
    assert [Path(source.name).name for source in find_sources(f"{tmp_path}/**/*.csv")] == ["a.csv", "b.csv", "d.csv"]


BAD_FILES: dict[str, tuple[str, bytes, dict[str, object], str]] = {
    "empty": ("t.csv", b"", {}, "is empty: give a file with text"),
    "unknown kind": ("t.docx", b"x", {}, r"unknown kind of file .docx; .csv, .tsv, .txt, .jsonl, .parquet can be read"),
    "no choice": (
        "t.csv",
        b"id,name\n1,x\n",
        {},
        "has columns id, name: choose with --data.columns or --data.template",
    ),
    "unknown column": (
        "t.csv",
        b"id,name\n1,x\n",
        {"columns": ("nmae",)},
        r"no column 'nmae'; it has id, name \(did you mean 'name'\?\)",
    ),
    "unknown field": (
        "t.csv",
        b"id,name\n1,x\n",
        {"template": "{id} {price}"},
        "no column 'price'; it has id, name: choose with --data.template",
    ),
    "long row": ("t.csv", b"a,b\n1,2\n3,4,5\n", {"columns": ("a",)}, "line 3: 3 fields where there are 2 columns"),
    "open quote": (
        "t.csv",
        b'a\n"never closed\nmore\n',
        {},
        "line 2: a quote is opened and never closed: mend that row's quotes",
    ),
    "not utf-8": (
        "t.csv",
        "name\nfirst\n中文\n".encode("gb18030"),
        {"encoding": "utf-8"},
        "line 3: bytes d6 d0 ce c4 are not utf-8: mend that row, or give the file's own encoding, as --data.encoding",
    ),
    "not utf-16 but said so": ("t.csv", "name\nx\n".encode("utf-16"), {"encoding": "utf-8"}, "line 1: bytes ff fe are"),
    "not json": ("t.jsonl", b'{"a": 1}\n{"a": \n', {}, r"line 2: not JSON \(Expecting value\)"),
    "deep json": ("t.jsonl", b'{"a": ' + b"[" * 100_000, {}, r"line 1: not JSON \(maximum recursion depth"),
    "no object": ("t.jsonl", b"[1, 2]\n", {}, "line 1: a list; one JSON object a line is needed"),
    "missing field": (
        "t.jsonl",
        b'{"a": 1}\n{"b": 2}\n',
        {"columns": ("a",)},
        "line 2: it has no column 'a'; it has b",
    ),
    "a name twice": ("t.csv", b"a,a\n1,2\n", {"columns": ("a",)}, "has 2 columns called 'a'"),
    "a format": ("t.csv", b"a,b\n1,2\n", {"template": "{a:.2f}"}, "no column 'a:.2f'; it has a, b"),
    "half a character": ("t.jsonl", rb'{"a": "\ud83d"}', {}, "line 1: half a character"),
    "not utf-16": (
        "t.csv",
        b"name\nabcd\n",
        {"encoding": "utf-16"},
        r"t\.csv: UTF-16 stream does not start with BOM: give its encoding, as --data.encoding utf-8",
    ),
    "not parquet": ("t.parquet", b"PAR1 but not", {}, "cannot be read as a Parquet table of text"),
}


@pytest.mark.parametrize(("name", "content", "reading", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_cannot_be_read_is_said(
    tmp_path: Path, name: str, content: bytes, reading: dict[str, object], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        documents(tmp_path / name, **reading)


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        ({"encoding": "utf-9"}, "--data.encoding utf-9 is unknown"),
        ({"delimiter": ", "}, "--data.delimiter ', ' is not one character"),
        ({"template": "no column"}, "--data.template 'no column' names no column"),
        ({"template": "{open"}, "expected '}' before end of string"),
    ],
    ids=["encoding", "delimiter", "template without a column", "open brace"],
)
def test_a_reading_that_cannot_be_is_said(reading: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        ReadOptions(**reading)  # type: ignore[arg-type]


def test_files_that_are_not_there_are_said(tmp_path: Path) -> None:
    (tmp_path / "poems.csv").write_text("x")
    with pytest.raises(UserError, match=r"poem\.csv: no such file \(did you mean 'poems\.csv'\?\)"):
        find_sources(f"{tmp_path}/poem.csv")
    with pytest.raises(UserError, match=r"is a folder: give its files, as --data\.files '.*/\*\.csv'"):
        find_sources(str(tmp_path))
    with pytest.raises(UserError, match="no file to read"):
        find_sources([])
    with pytest.raises(UserError, match=r"--data\.files is empty"):
        find_sources("")
