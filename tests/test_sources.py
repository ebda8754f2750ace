"""Wherever a table lies, however it is packed and encoded, the same text comes out; or it is said why not."""

import csv
import functools
import gzip
import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lit_gpt.data import readers
from lit_gpt.data.config import CorpusConfig
from lit_gpt.data.corpus import open_corpus
from lit_gpt.data.readers import ReadOptions, RejectedRow, Row, open_rows, with_detected_encoding
from lit_gpt.data.sources import Source, detect_encoding, find_sources
from lit_gpt.errors import UserError

POEMS = [
    {"title": "靜夜思", "text": "床前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。"},
    {"title": "登鸛雀樓", "text": "白日依山盡，黃河入海流。\n欲窮千里目，更上一層樓。"},
    {"title": "春曉", "text": '春眠不覺曉，處處聞啼鳥。\n"夜來風雨聲"，花落知多少。'},
] * 40


def as_csv(newline: str = "\n", delimiter: str = ",") -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["title", "text"], lineterminator=newline, delimiter=delimiter)
    writer.writeheader()
    writer.writerows({key: value.replace("\n", newline) for key, value in row.items()} for row in POEMS)
    return file.getvalue()


def as_parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(POEMS), file)
    return file.getvalue()


FORMS: dict[str, bytes] = {
    "gb18030.csv": as_csv().encode("gb18030"),
    "big5.csv": as_csv().encode("big5"),
    "utf16.csv": as_csv().encode("utf-16"),
    "utf16 without mark.csv": as_csv().encode("utf-16-le"),
    "utf32.csv": as_csv().encode("utf-32"),
    "mark.csv": as_csv().encode("utf-8-sig"),
    "windows.csv": as_csv("\r\n").encode(),
    "old mac.csv": as_csv("\r").encode(),
    "tabs.tsv": as_csv(delimiter="\t").encode(),
    "packed.csv.gz": gzip.compress(as_csv().encode()),
    "packed in parts.csv.GZ": b"".join(gzip.compress(part.encode()) for part in as_csv().splitlines(keepends=True)),
    "packed.csv.zst": pyarrow.compress(as_csv("\r\n").encode("gb18030"), codec="zstd", asbytes=True),
    "lines.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in POEMS).encode(),
    "escaped.jsonl.gz": gzip.compress("\r\n".join(map(json.dumps, POEMS)).encode()),
    "table.parquet": as_parquet(),
}


def ids(source: Source, folder: Path) -> np.ndarray:
    recipe = CorpusConfig(ReadOptions(template="{title}\\n{text}"), tokenizer="byte")
    return np.asarray(open_corpus([source], recipe, folder / "cache").ids)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_table_gives_the_same_ids(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMS[name])
    expected = b"\xff".join(f"{row['title']}\n{row['text']}".encode() for row in POEMS) + b"\xff"
    found = ids(Source(str(tmp_path / name)), tmp_path)
    assert np.where(found == 256, 255, found).astype(np.uint8).tobytes() == expected


SENTENCES = {
    "cp932": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n",
    "euc_kr": "한국어 문장은 이렇게 생겼습니다. 오늘은 날씨가 좋습니다.\n",
    "gb18030": "今天天气很好，我们一起去公园散步吧。\n",
    "big5": "今天天氣很好，我們一起去公園散步吧。\n",
    "cp1252": "L'été dernier, à Besançon, les garçons mangeaient des pâtés.\n",
    "cp1251": "Сегодня хорошая погода, и мы пойдём гулять в парк.\n",
    "utf-16-be": "今天天气很好，我们一起去公园散步吧。\n",
    "utf-8": "今天天气很好 🙂 שלום\n",
}


@pytest.mark.parametrize("encoding", SENTENCES)
def test_an_encoding_is_found(tmp_path: Path, encoding: str) -> None:
    text = "id,text\n" + SENTENCES[encoding] * 20
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    found, sure = detect_encoding(Source(str(tmp_path / "t.csv")))
    assert text.encode(encoding).decode(found) == text
    assert 0.8 < sure <= 1


def test_utf8_with_a_few_broken_bytes_is_still_utf8(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("第一行，文字\n".encode() * 100 + b"\xff\xfe\n")
    found, sure = detect_encoding(Source(str(tmp_path / "t.csv")))
    assert found == "utf-8"
    assert 0.99 < sure < 1


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a web server for `tmp_path`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


@pytest.mark.parametrize("name", ["gb18030.csv", "packed.csv.zst", "packed.csv.gz", "table.parquet"])
def test_a_table_behind_a_url_is_the_table_here(tmp_path: Path, server: str, name: str) -> None:
    (tmp_path / name).write_bytes(FORMS[name])
    (source,) = find_sources(f"{server}/{name}")
    np.testing.assert_array_equal(ids(source, tmp_path / "a"), ids(Source(str(tmp_path / name)), tmp_path / "b"))


def test_globs_name_files_behind_urls(tmp_path: Path) -> None:
    with fsspec.open("memory://poems/b.csv", "wb") as file:
        file.write(FORMS["mark.csv"])
    with fsspec.open("memory://poems/a.csv", "wb") as file:
        file.write(FORMS["windows.csv"])
    found = find_sources("memory://poems/*.csv")
    assert [source.name for source in found] == ["memory:///poems/a.csv", "memory:///poems/b.csv"]
    np.testing.assert_array_equal(*(ids(source, tmp_path / source.name[-5]) for source in found))


def test_what_lies_nowhere_or_is_damaged_is_said(tmp_path: Path, server: str) -> None:
    for url, message in (
        (f"{server}/none.csv", "none.csv: no such file; give --data.files URL"),
        ("nothing://here/t.csv", "nothing://here/t.csv cannot be opened"),
        ("http://127.0.0.1:1/t.csv", "t.csv"),
    ):
        with pytest.raises(UserError, match=message):
            find_sources(url)
    for name in ("packed.csv.gz", "packed.csv.zst"):
        amid = [FORMS[name][:50] + bytes(20) + FORMS[name][70:]] * name.endswith(".gz")  # zstd need not notice
        for damage in (FORMS[name][:-200], b"no such thing", *amid):
            (tmp_path / name).write_bytes(damage)
            with pytest.raises(UserError, match=f"{name} is damaged"):
                ids(Source(str(tmp_path / name)), tmp_path)
    (tmp_path / "t.parquet.gz").write_bytes(gzip.compress(as_parquet()))
    with pytest.raises(UserError, match="a Parquet table packed once more: unpack it"):
        ids(Source(str(tmp_path / "t.parquet.gz")), tmp_path)


def rows(path: Path, **reading: object) -> list[Row | RejectedRow]:
    source = Source(str(path))
    known, _ = with_detected_encoding(source, ReadOptions(**reading))  # type: ignore[arg-type]
    with open_rows(source, known) as (found, _):
        return list(found)


def test_after_a_quote_that_stays_open_rows_go_on_with_the_next_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.csv"
    path.write_text('text\nfine\n"open\nalso fine\n"two\nlines"\n"open to the end\nlast\n', encoding="utf-8")
    expected = [(2, "fine"), (4, "also fine"), (5, "two\nlines"), (8, "last")]
    found = rows(path)
    assert [row[:2] for row in found if isinstance(row, Row)] == expected
    assert [row.line for row in found if isinstance(row, RejectedRow)] == [3, 7]
    monkeypatch.setattr(readers, "LONGEST_ROW", 15)  # the quote in line 3 would run up to line 5
    assert rows(path)[1] == RejectedRow(
        3, "a quote is opened and never closed: mend that row's quotes, or give --data.quote none"
    )


def test_quotes_may_be_others_or_text(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("a\ttext\n1\t'with\ttab'\n", encoding="utf-8")
    assert rows(path, quote="'", columns=("text",)) == [Row(2, "with\ttab")]
    path.write_text('a\ttext\n1\t5" wide, "so\n2\t"\n', encoding="utf-8")
    assert rows(path, quote="none", columns=("text",)) == [Row(2, '5" wide, "so'), Row(3, '"')]
    with pytest.raises(UserError, match=r"--data\.quote '\"\"' is not one character"):
        ReadOptions(quote='""')
