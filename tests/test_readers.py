"""Tests of lit_gpt.data.readers and lit_gpt.data.read_options."""

import contextlib
import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lit_gpt.data import csv_tables, lines, readers
from lit_gpt.data.config import CorpusConfig
from lit_gpt.data.corpus import open_corpus
from lit_gpt.data.read_options import ReadOptions
from lit_gpt.data.readers import Reader, RejectedRow, Row, open_rows, open_text_chunks, with_detected_encoding
from lit_gpt.data.sources import Source, find_sources
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import open_tokenizer

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


def read_rows(path: Path, **options: object) -> list[Row | RejectedRow]:
    source = Source(str(path))
    read_options = ReadOptions(**{"encoding": "utf-8", **options})  # type: ignore[arg-type]
    detected, _ = with_detected_encoding(source, read_options)
    with open_rows(source, detected) as (rows, _):
        return list(rows)


def read_documents(path: Path, **options: object) -> list[str]:
    """Return the texts of all rows; raise UserError if one is rejected."""
    rows = read_rows(path, **options)
    for row in rows:
        if isinstance(row, RejectedRow):
            raise UserError(f"{path} line {row.line}: {row.reason}")
    return [row.text for row in rows if isinstance(row, Row)]


def read_chunks(path: Path, **options: object) -> list[str]:
    source = Source(str(path))
    detected, _ = with_detected_encoding(source, ReadOptions(mode="raw", **options))  # type: ignore[arg-type]
    with open_text_chunks(source, detected) as (chunks, _):
        return [chunk.text for chunk in chunks]


def test_all_formats_give_the_same_documents(tmp_path: Path) -> None:
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
    for path, options in files:
        assert read_documents(path, template=POEM, **options) == POEMS, path.name


def test_columns_are_joined_by_line_ends_in_the_given_order(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv")
    assert read_documents(path, columns=("author", "title"))[0] == "李白\n靜夜思"
    assert read_documents(path, columns=("text",)) == [row["text"] for row in ROWS]


def test_only_column_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_text('name\nfirst\n"second, of two"\n\n  \n', encoding="utf-8")
    assert read_documents(tmp_path / "names.csv") == ["first", "second, of two", "  "]


def test_columns_without_header_are_named_by_number(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("1,first\n2,second\n", encoding="utf-8")
    assert read_documents(tmp_path / "t.csv", header=False, columns=("c2",)) == ["first", "second"]


def test_csv_numbers_keep_their_digits(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("code,price\n007,12.50\n", encoding="utf-8")
    assert read_documents(tmp_path / "t.csv", template="{code}: {price} {{yuan}}") == ["007: 12.50 {yuan}"]


@pytest.mark.parametrize(
    "value",
    [
        *("1.5", "1.0", "0.10", "1e5", "1E+05", "-0", "-0.0", "12345678901234567890123", "9" * 5000, "1" * 400 + ".5"),
        *("true", "false", "NaN", "-Infinity", '["x", "中", 0.10]', '{"a": [1.0, {"b": true}], "c": null}', "[]", "{}"),
    ],
)
def test_jsonl_values_are_as_written(tmp_path: Path, value: str) -> None:
    (tmp_path / "t.jsonl").write_text(f'{{"a": {value}, "b": null}}', encoding="utf-8")
    assert read_rows(tmp_path / "t.jsonl", template="[{a}|{b}]") == [Row(1, f"[{value}|]")]
    assert read_rows(tmp_path / "t.jsonl", columns=("b",), split_key_column="a") == [Row(1, "", value)]


def test_every_line_of_a_txt_file_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"first\r\n\r\nthird, last")
    assert read_documents(tmp_path / "t.txt") == ["first", "", "third, last"]


def test_after_an_unclosed_quote_reading_continues_with_the_next_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.csv"
    path.write_text('text\nfine\n"open\nalso fine\n"two\nlines"\n"open to the end\nlast\n', encoding="utf-8")
    expected = [(2, "fine"), (4, "also fine"), (5, "two\nlines"), (8, "last")]
    rows = read_rows(path)
    assert [row[:2] for row in rows if isinstance(row, Row)] == expected
    assert [row.line for row in rows if isinstance(row, RejectedRow)] == [3, 7]
    monkeypatch.setattr(csv_tables, "MAX_ROW_LINES", 2)  # the quote in line 3 would run up to line 5
    assert read_rows(path)[1] == RejectedRow(
        3, "a quote is opened and never closed: correct the quotes of that row, or give --data.quote none"
    )


def test_quoted_text_of_many_lines_may_be_longer_than_a_line(tmp_path: Path) -> None:
    text = "a line of a novel, which is long\n" * (lines.MAX_LINE_CHARACTERS // 32)
    (tmp_path / "t.csv").write_text(f'text\nbefore\n"{text}"\nafter\n', encoding="utf-8")
    assert read_documents(tmp_path / "t.csv") == ["before", text, "after"]


def test_quote_character_can_be_chosen_or_disabled(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("a\ttext\n1\t'with\ttab'\n", encoding="utf-8")
    assert read_rows(path, quote="'", columns=("text",)) == [Row(2, "with\ttab")]
    path.write_text('a\ttext\n1\t5" wide, "so\n2\t"\n', encoding="utf-8")
    assert read_rows(path, quote="none", columns=("text",)) == [Row(2, '5" wide, "so'), Row(3, '"')]
    with pytest.raises(UserError, match=r"--data\.quote '\"\"' is not one character"):
        ReadOptions(quote='""')


def test_csv_field_may_exceed_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text\n" + "长" * 300_000 + "\n", encoding="utf-8")
    assert [len(document) for document in read_documents(tmp_path / "t.csv")] == [300_000]


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]))] * 2), min_size=1))
def test_rows_written_by_the_csv_module_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]
) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    expected = [re.sub("\r\n?", "\n", f"{a}\x1f{b}") for a, b in rows]
    assert read_documents(path, template="{a}\x1f{b}") == expected


def rows_of_csv_module(content: bytes) -> list[list[str]] | None:
    """Return the rows that Python's csv module reads; None if there are none or the table is malformed."""
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
    b"",
    b"a",
    b"1",
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
@example(pieces=[b"\xef"])  # begins a byte order mark: Python's decoder drops it
@example(pieces=[b"\xef\xbb\xbf", b"\xef\xbb\xbf"])  # only the first is a mark
@given(pieces=st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), min_size=1, max_size=30))
def test_arbitrary_bytes_are_read_as_by_the_csv_module_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    content = b"".join(pieces) or b"a"
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(content)
    rows = rows_of_csv_module(content)
    expected = None if rows is None else [re.sub("\r\n?", "\n", "\x1f".join(row)) for row in rows]
    first = next(
        (row for row in csv.reader(io.StringIO(content.decode("utf-8-sig", "replace"), newline="")) if row), "1"
    )
    template = "\x1f".join(f"{{c{number}}}" for number in range(1, len(first) + 1))
    found: list[str] | None = None
    with contextlib.suppress(UserError):
        found = read_documents(path, header=False, delimiter=",", template=template, encoding="utf-8")
    assert found == expected


def test_chunks_of_a_text_have_the_same_ids_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(POEMS) + "\n\n  \n\tindented!\n\n\n- café\n" + "one more line\n" * 50
    (tmp_path / "t.txt").write_text(text, encoding="utf-8", newline="\r\n")
    tokenizer = open_tokenizer("cl100k_base")
    for size in (1, 7, 64):
        monkeypatch.setattr(readers, "CHUNK_CHARACTERS", size)
        monkeypatch.setattr(readers, "MAX_CHUNK_CHARACTERS", 1000)
        chunks = read_chunks(tmp_path / "t.txt")
        assert len(chunks) > 10
        assert "".join(chunks) == text
        assert [token for chunk in chunks for token in tokenizer.encode(chunk)] == tokenizer.encode(text)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_lines_with_invalid_bytes_are_left_out_of_raw_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", size)
    monkeypatch.setattr(readers, "MAX_CHUNK_CHARACTERS", 1000)
    lines = [f"line {number} of a novel\n".encode() for number in range(1, 61)]
    lines[4], lines[30], lines[59] = b"caf\xe9\n", b"\xff\r\n", b"the end \xff"
    (tmp_path / "t.txt").write_bytes(b"".join(lines))
    expected = [f"line {number} of a novel\n" for number in range(1, 61) if number not in (5, 31, 60)]
    assert "".join(read_chunks(tmp_path / "t.txt", encoding="utf-8")) == "".join(expected)
    config = CorpusConfig(ReadOptions(mode="raw", encoding="utf-8"), tokenizer="cl100k_base")
    corpus = open_corpus([Source(str(tmp_path / "t.txt"))], config, tmp_path / str(size))
    assert corpus.tokenizer.decode(np.asarray(corpus.ids)) == "".join(expected)
    whole = open_tokenizer("cl100k_base").encode("".join(expected))
    assert [corpus.tokenizer.token_bytes(token) for token in np.asarray(corpus.ids)] == [
        open_tokenizer("cl100k_base").token_bytes(token) for token in whole
    ]
    assert (corpus.report["rows"], corpus.report["rejected"]) == (60, 3)
    assert [line for _, line, _ in corpus.report["rejected_first"]] == [5, 31, 60]


def test_lines_of_raw_text_are_counted_once_where_one_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", 4)
    monkeypatch.setattr(readers, "MAX_CHUNK_CHARACTERS", 8)
    options = ReadOptions(mode="raw", encoding="utf-8")
    for end in (b"", b"\n"):
        (tmp_path / "t.txt").write_bytes(b"a" * 30 + b"\nb\n\xff\nc" + end)
        with open_text_chunks(Source(str(tmp_path / "t.txt")), options) as (found, _):
            chunks = list(found)
        assert sum(chunk.lines for chunk in chunks) == 4
        assert [row.line for chunk in chunks for row in chunk.rejected] == [3]


def test_too_many_invalid_lines_of_raw_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"fine\n" * 17 + b"\xff\n" * 2)
    config = CorpusConfig(ReadOptions(mode="raw", encoding="utf-8"), tokenizer="byte")
    with pytest.raises(UserError, match=r"t\.txt line 18: bytes ff are not utf-8: .* \(2 of 19 lines cannot be read\)"):
        open_corpus([Source(str(tmp_path / "t.txt"))], config, tmp_path / "cache")


def test_text_without_line_ends_is_read_in_bounded_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", 10)
    monkeypatch.setattr(readers, "MAX_CHUNK_CHARACTERS", 50)
    (tmp_path / "t.txt").write_text("字" * 1000, encoding="utf-8")
    chunks = read_chunks(tmp_path / "t.txt")
    assert "".join(chunks) == "字" * 1000
    assert max(map(len, chunks)) <= 60


def test_format_added_to_readers_is_read_into_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_log(source: Source, file: Iterable[str], options: ReadOptions) -> Iterator[Row | RejectedRow]:
        for number, line in enumerate(file, start=1):
            time, separator, message = line.rstrip("\n").partition("|")
            if separator:
                yield Row(number, message)
            else:
                yield RejectedRow(number, f"{time!r} has no message: add one after |")

    monkeypatch.setitem(readers.READERS, ".log", Reader(read_log))
    lines = [f"12:00:{second:02}|message {second}" for second in range(60)]
    (tmp_path / "a.log.gz").write_bytes(gzip.compress("\r\n".join([*lines, "no time"]).encode("utf-16")))
    sources = find_sources(f"{tmp_path}/*.log.gz")
    corpus = open_corpus(sources, CorpusConfig(ReadOptions(), tokenizer="byte"), tmp_path / "cache")
    ids = np.asarray(corpus.ids)
    texts = np.where(ids == corpus.tokenizer.end_of_text, ord("\n"), ids).astype(np.uint8).tobytes().decode()
    assert texts.splitlines() == [f"message {second}" for second in range(60)]
    assert corpus.report["rejected_first"] == [[str(sources[0]), 61, "'no time' has no message: add one after |"]]


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        (b"id,name,bio\n1,Ann,a painter of ships\n2,Bo,a poet\n", " bio"),
        (b"id,my text,note\n1,some words,x\n", " 'my text'"),
        ("编号,正文\n1,床前明月光\n".encode(), " 正文"),
        (b"a,null\n1,some words\n", " a"),
        (b"a,#\n1,some words\n", " a"),
        (b"a,a,b\nlong,longer,x\n", " b"),
        (b"a,b\n", ""),
        (b'a,b\n1,"never closed\n', ""),
    ],
)
def test_table_of_several_columns_proposes_the_one_with_the_most_text(
    content: bytes, columns: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"choose with --data.columns{columns} or --data.template")):
        read_documents(path)


def test_parquet_table_of_several_columns_proposes_the_one_with_the_most_text(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"id": range(99), "name": ["Ann"] * 99, "bio": ["painter" * 9] * 99}), path
    )
    with pytest.raises(UserError, match=r"choose with --data\.columns bio or --data\.template"):
        read_documents(path)


BAD_FILES: dict[str, tuple[str, bytes, dict[str, object], str]] = {
    "empty": ("t.csv", b"", {}, "is empty: give a file with text"),
    "unknown format": (
        "t.docx",
        b"x",
        {},
        r"unknown file format .docx: give one of .csv, .tsv, .txt, .jsonl, .parquet, name the format",
    ),
    "no column chosen": (
        "t.csv",
        b"id,name\n1,x\n",
        {},
        "has columns id, name: choose with --data.columns name or --data.template",
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
    "too many fields": (
        "t.csv",
        b"a,b\n1,2\n3,4,5\n",
        {"columns": ("a",)},
        "line 3: 3 fields where there are 2 columns",
    ),
    "open quote": (
        "t.csv",
        b'a\n"never closed\nmore\n',
        {},
        "line 2: a quote is opened and never closed: correct the quotes of that row",
    ),
    "not utf-8": (
        "t.csv",
        "name\nfirst\n中文\n".encode("gb18030"),
        {"encoding": "utf-8"},
        "line 3: bytes d6 d0 ce c4 are not utf-8: correct them, or give the encoding of the file,",
    ),
    "utf-16 read as utf-8": ("t.csv", "name\nx\n".encode("utf-16"), {"encoding": "utf-8"}, "line 1: bytes ff fe are"),
    "not json": ("t.jsonl", b'{"a": 1}\n{"a": \n', {}, r"line 2: not JSON \(Expecting value\)"),
    "deep json": ("t.jsonl", b'{"a": ' + b"[" * 100_000, {}, r"line 1: not JSON \(maximum recursion depth"),
    "no object": (
        "t.jsonl",
        b"[1, 2]\n",
        {},
        r"line 1: an array, not an object: write one .* per line, as jq -c '\.\[\]'",
    ),
    "no object but a text": (
        "t.jsonl",
        b'"a"\n',
        {},
        "line 1: a string, not an object: write one JSON object per line$",
    ),
    "no object but null": ("t.jsonl", b"null\n", {}, "line 1: null, not an object"),
    "no fields": ("t.jsonl", b"{}\n", {}, "line 1: the object has no columns: give one with text"),
    "array over several lines": (
        "t.jsonl",
        b'[\n{"text": 1},\n]\n',
        {},
        r"line 1: not JSON .*, as jq -c '\.\[\]' FILE",
    ),
    "JSON": ("t.json", b'{"text": 1}\n', {}, r"unknown file format .json: .* as --data.format jsonl"),
    "missing field": (
        "t.jsonl",
        b'{"a": 1}\n{"b": 2}\n',
        {"columns": ("a",)},
        "line 2: the object has no column 'a'; it has b",
    ),
    "duplicate column": ("t.csv", b"a,a\n1,2\n", {"columns": ("a",)}, "has 2 columns called 'a'"),
    "format in template": ("t.csv", b"a,b\n1,2\n", {"template": "{a:.2f}"}, "no column 'a:.2f'; it has a, b"),
    "lone surrogate": ("t.jsonl", rb'{"a": "\ud83d"}', {}, "line 1: a lone surrogate"),
    "no byte order mark": (
        "t.csv",
        b"name\nabcd\n",
        {"encoding": "utf-16"},
        r"t\.csv: UTF-16 stream does not start with BOM: give its encoding, as --data.encoding utf-8",
    ),
    "a table named as parquet": ("t.parquet", b"text\na\n", {}, "is not a Parquet table: name its format, as --data"),
    "not parquet": ("t.parquet", b"PAR1 but not", {}, "cannot be read as a Parquet table of text"),
}


@pytest.mark.parametrize(("name", "content", "options", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_unreadable_file_is_a_user_error(
    tmp_path: Path, name: str, content: bytes, options: dict[str, object], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_documents(tmp_path / name, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "utf-9"}, "--data.encoding utf-9 is unknown"),
        ({"delimiter": ", "}, "--data.delimiter ', ' is not one character"),
        ({"delimiter": ";", "format": "tsv"}, "--data.format tsv has tabs between columns, not --data.delimiter ';'"),
        ({"template": "no column"}, "--data.template 'no column' names no column"),
        ({"template": "{open"}, "expected '}' before end of string"),
    ],
    ids=["encoding", "delimiter", "format and delimiter", "template without a column", "open brace"],
)
def test_invalid_read_options_are_user_errors(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        ReadOptions(**options)  # type: ignore[arg-type]
