"""data.format, data.skip_rows and Excel's `sep=` line; settings that the format of a file does not use."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from test_readers import read_chunks, read_rows

from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.data.read_options import ReadOptions
from lit_gpt.data.readers import RejectedRow, Row, check_settings_have_effect
from lit_gpt.data.sources import Source
from lit_gpt.errors import UserError


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".dat", ""])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("csv", 'id,text\n1,"a, b"\n', [(2, "a, b")]),
        ("tsv", "id\ttext\n1\ta, b\n", [(2, "a, b")]),
        ("jsonl", '{"text": "a"}\n\n{"text": "b"}\n', [(1, "a"), (3, "b")]),
    ],
)
def test_format_wins_over_suffix(tmp_path: Path, suffix: str, name: str, content: str, expected: list) -> None:
    path = tmp_path / f"t{suffix}"
    path.write_text(content, encoding="utf-8")
    assert [row[:2] for row in read_rows(path, format=name, columns=("text",))] == expected


def test_format_txt_and_parquet_win_over_suffix(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n", encoding="utf-8")
    assert read_rows(tmp_path / "t.csv", format="txt") == [Row(1, "a,b")]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "t.csv")
    assert read_rows(tmp_path / "t.csv", format="parquet") == [Row(1, "a")]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("line", "delimiter"),
    [
        ("sep=;", ";"),
        ("SEP=|", "|"),
        ('"sep=;"', ";"),
        ("sep=\t", "\t"),
        (r"Sep=\t", "\t"),
        ("sep= ", " "),
        ("sep=;;;", ";"),
        ("sep=\t\t", "\t"),
        ("sep=| ", "|"),
    ],
)
def test_sep_line_names_the_delimiter(tmp_path: Path, mark: str, end: str, line: str, delimiter: str) -> None:
    path, table = tmp_path / "t.csv", [line, f"id{delimiter}text", f"1{delimiter}a,b", "", f"2{delimiter}c,d", "bad"]
    path.write_bytes((mark + end.join(table)).encode())
    rows = read_rows(path, columns=("text",))
    assert rows[:2] == [Row(3, "a,b"), Row(5, "c,d")]
    assert [(row.line, type(row)) for row in rows[2:]] == [(6, RejectedRow)]
    again = read_rows(path, columns=("text",), delimiter=delimiter)
    assert (again[:2], [row.line for row in again]) == (rows[:2], [3, 5, 6])
    path.write_bytes((mark + end.join(["a title", *table])).encode())
    assert [row[0] for row in read_rows(path, columns=("text",), skip_rows=1)] == [4, 6, 7]


@pytest.mark.parametrize("line", ["sep=", "sep=ab", "sep=a", "separator", "x sep=;", 'sep="'])
def test_other_first_lines_are_the_header(tmp_path: Path, line: str) -> None:
    (tmp_path / "t.csv").write_text(f"{line}\na\n", encoding="utf-8")
    assert read_rows(tmp_path / "t.csv", quote="none", delimiter=",") == [Row(2, "a")]


def test_sep_line_that_contradicts_the_delimiter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x\nsep=;\nid;text\n1;a\n", encoding="utf-8")
    options = {"columns": ("text",), "skip_rows": 1}
    with pytest.raises(UserError, match=r"line 2 says that ';' separates columns, not .* with --data.skip_rows 2$"):
        read_rows(tmp_path / "t.csv", delimiter=",", **options)
    with pytest.raises(UserError, match=r"--data.quote ';' separates columns"):
        read_rows(tmp_path / "t.csv", quote=";", **options)
    assert read_rows(tmp_path / "t.csv", delimiter=";", columns=("text",), skip_rows=2) == [Row(4, "a")]


def test_skipped_rows_count_in_line_numbers(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('Report "of\n\nid,text\n1,a\n2\n3,"b\n', encoding="utf-8")
    rows = read_rows(tmp_path / "t.csv", columns=("text",), skip_rows=2)
    assert [(row.line, type(row)) for row in rows] == [(4, Row), (5, RejectedRow), (6, RejectedRow)]
    (tmp_path / "t.jsonl").write_text('a line\n{"text": "a"}\n{\n', encoding="utf-8")
    assert [row.line for row in read_rows(tmp_path / "t.jsonl", skip_rows=1)] == [2, 3]
    (tmp_path / "t.txt").write_bytes(b"a line\r\nb\r\nc")
    assert read_rows(tmp_path / "t.txt", skip_rows=1) == [Row(2, "b"), Row(3, "c")]
    assert read_chunks(tmp_path / "t.txt", skip_rows=2) == ["c"]
    for read in (read_rows, read_chunks):
        with pytest.raises(UserError, match=r"--data\.skip_rows 4 leaves nothing of .*t\.txt, which has 3 lines"):
            read(tmp_path / "t.txt", skip_rows=4)
    with pytest.raises(UserError, match=r"--data\.skip_rows is -1: give 0 or more"):
        ReadOptions(skip_rows=-1)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *(("t.txt", setting) for setting in ("columns", "template", "delimiter", "quote", "header")),
        *(("t.jsonl", setting) for setting in ("delimiter", "quote", "header")),
        *(("t.parquet", setting) for setting in ("delimiter", "quote", "header", "encoding", "skip_rows")),
    ],
)
def test_setting_without_effect_is_refused(name: str, setting: str) -> None:
    values: dict[str, object] = {"columns": ("a",), "template": "{a}", "delimiter": ";", "quote": "'", "header": False}
    values |= {"encoding": "utf-8", "skip_rows": 1}
    options = ReadOptions(**{setting: values[setting]})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"^{name} is read as .*, where --data.{setting} has no effect: leave out"):
        check_settings_have_effect([Source(name)], options)
    check_settings_have_effect([Source(name), Source("t.csv")], options)  # one of the files uses it
    check_settings_have_effect([Source(name)], ReadOptions())


def test_txt_with_columns_says_how_to_read_it_as_a_table(tmp_path: Path) -> None:
    path = tmp_path / "unicode.txt"  # what Excel calls Unicode Text
    path.write_bytes("标题\t正文\r\n夜\t床前明月光\r\n".encode("utf-16"))
    with pytest.raises(
        UserError, match=r"where --data.columns has no effect: .* --data.format csv, or --data.format tsv if"
    ):
        TextDataModule(str(path), columns="正文").sources()
    assert read_rows(path, format="tsv", columns=("正文",), encoding="auto") == [Row(2, "床前明月光")]


def test_tsv_of_commas_asks_for_its_delimiter(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("id,text\n1,a\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"give --data\.delimiter ',' if that separates columns, otherwise '\\t'"):
        read_rows(tmp_path / "t.tsv")
    assert read_rows(tmp_path / "t.tsv", delimiter=r"\t") == [Row(2, "1,a")]


@pytest.mark.parametrize(
    ("name", "lines", "rejected", "texts"),
    [
        ("t.csv", ["id,text", "1,a", "2,LONG", '3,"b', 'b"', '4,"c', "LONG", "5,d"], [3, 6], ["a", "b\nb", "d"]),
        ("t.txt", ["a", "LONG", "b", "LONG"], [2, 4], ["a", "b"]),
        ("t.jsonl", ['{"text": "a"}', '{"text": "LONG"}', "", '{"text": "b"}'], [2], ["a", "b"]),
    ],
)
def test_line_that_is_too_long_is_rejected_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lines: list[str], rejected: list[int], texts: list[str]
) -> None:
    monkeypatch.setattr("lit_gpt.data.lines.MAX_LINE_CHARACTERS", 20)
    content = "\n".join(lines).replace("LONG", " " * 1000)
    for end in ("\n", "\r\n"):
        (tmp_path / name).write_bytes(content.replace("\n", end).encode())
        rows = read_rows(tmp_path / name, **({} if name == "t.txt" else {"columns": ("text",)}))
        assert [row.text for row in rows if isinstance(row, Row)] == texts
        assert [row.line for row in rows if isinstance(row, RejectedRow)] == rejected
