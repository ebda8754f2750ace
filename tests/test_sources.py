"""Tests of lit_gpt.data.sources."""

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

from lit_gpt.data.config import CorpusConfig
from lit_gpt.data.corpus import corpus_key, open_corpus
from lit_gpt.data.read_options import ReadOptions
from lit_gpt.data.sources import Source, find_sources, open_text
from lit_gpt.errors import UserError

POEMS = [
    {"title": "靜夜思", "text": "床前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。"},
    {"title": "登鸛雀樓", "text": "白日依山盡，黃河入海流。\n欲窮千里目，更上一層樓。"},
    {"title": "春曉", "text": '春眠不覺曉，處處聞啼鳥。\n"夜來風雨聲"，花落知多少。'},
] * 40


def csv_text(newline: str = "\n", delimiter: str = ",") -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["title", "text"], lineterminator=newline, delimiter=delimiter)
    writer.writeheader()
    writer.writerows({key: value.replace("\n", newline) for key, value in row.items()} for row in POEMS)
    return file.getvalue()


def parquet_bytes() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(POEMS), file)
    return file.getvalue()


FILES: dict[str, bytes] = {
    "gb18030.csv": csv_text().encode("gb18030"),
    "big5.csv": csv_text().encode("big5"),
    "utf16.csv": csv_text().encode("utf-16"),
    "utf16 without byte order mark.csv": csv_text().encode("utf-16-le"),
    "utf32.csv": csv_text().encode("utf-32"),
    "byte order mark.csv": csv_text().encode("utf-8-sig"),
    "crlf.csv": csv_text("\r\n").encode(),
    "cr.csv": csv_text("\r").encode(),
    "tabs.tsv": csv_text(delimiter="\t").encode(),
    "compressed.csv.gz": gzip.compress(csv_text().encode()),
    "concatenated.csv.GZ": b"".join(gzip.compress(part.encode()) for part in csv_text().splitlines(keepends=True)),
    "compressed.csv.zst": pyarrow.compress(csv_text("\r\n").encode("gb18030"), codec="zstd", asbytes=True),
    "lines.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in POEMS).encode(),
    "escaped.jsonl.gz": gzip.compress("\r\n".join(map(json.dumps, POEMS)).encode()),
    "table.parquet": parquet_bytes(),
}


def read_ids(source: Source, folder: Path) -> np.ndarray:
    config = CorpusConfig(ReadOptions(template="{title}\\n{text}"), tokenizer="byte")
    return np.asarray(open_corpus([source], config, folder / "cache").ids)


@pytest.mark.parametrize("name", FILES)
def test_encoding_and_compression_do_not_change_the_ids(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    expected = b"\xff".join(f"{row['title']}\n{row['text']}".encode() for row in POEMS) + b"\xff"
    ids = read_ids(Source(str(tmp_path / name)), tmp_path)
    assert np.where(ids == 256, 255, ids).astype(np.uint8).tobytes() == expected


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """URL of a web server that serves `tmp_path`."""

    class SilentHandler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(SilentHandler, directory=tmp_path)) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


@pytest.mark.parametrize("name", ["gb18030.csv", "compressed.csv.zst", "compressed.csv.gz", "table.parquet"])
def test_remote_file_gives_the_same_ids_as_a_local_one(tmp_path: Path, server: str, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    (source,) = find_sources(f"{server}/{name}")
    np.testing.assert_array_equal(
        read_ids(source, tmp_path / "a"), read_ids(Source(str(tmp_path / name)), tmp_path / "b")
    )


def test_globs_match_remote_files(tmp_path: Path) -> None:
    with fsspec.open("memory://poems/b.csv", "wb") as file:
        file.write(FILES["byte order mark.csv"])
    with fsspec.open("memory://poems/a.csv", "wb") as file:
        file.write(FILES["crlf.csv"])
    found = find_sources("memory://poems/*.csv")
    assert [source.name for source in found] == ["memory:///poems/a.csv", "memory:///poems/b.csv"]
    np.testing.assert_array_equal(*(read_ids(source, tmp_path / source.name[-5]) for source in found))


def test_unreachable_and_damaged_files_are_user_errors(tmp_path: Path, server: str) -> None:
    for url, message in (
        (f"{server}/none.csv", "none.csv: no such file; give --data.files URL"),
        ("nothing://here/t.csv", "nothing://here/t.csv cannot be opened"),
        ("http://127.0.0.1:1/t.csv", "t.csv"),
    ):
        with pytest.raises(UserError, match=message):
            find_sources(url)
    for name in ("compressed.csv.gz", "compressed.csv.zst"):
        overwritten = [FILES[name][:50] + bytes(20) + FILES[name][70:]] * name.endswith(".gz")  # zstd may not detect it
        for damage in (FILES[name][:-200], *overwritten):
            (tmp_path / name).write_bytes(damage)
            with pytest.raises(UserError, match=f"{name} is damaged"):
                read_ids(Source(str(tmp_path / name)), tmp_path)
    (tmp_path / "t.parquet.gz").write_bytes(gzip.compress(parquet_bytes()))
    with pytest.raises(UserError, match=r"a compressed \.parquet file: decompress it"):
        read_ids(Source(str(tmp_path / "t.parquet.gz")), tmp_path)


def test_find_sources_keeps_the_order_of_patterns_and_sorts_globs(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "c.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.csv").write_text("x")

    def names(*patterns: str) -> list[str]:
        return [Path(source.name).name for source in find_sources([f"{tmp_path}/{pattern}" for pattern in patterns])]

    assert names("*.csv") == ["a.csv", "b.csv"]
    assert names("c.txt", "*.csv") == ["c.txt", "a.csv", "b.csv"]
    assert names("**/*.csv") == ["a.csv", "b.csv", "d.csv"]


def test_missing_files_are_user_errors(tmp_path: Path) -> None:
    (tmp_path / "poems.csv").write_text("x")
    with pytest.raises(UserError, match=r"poem\.csv: no such file \(did you mean 'poems\.csv'\?\)"):
        find_sources(f"{tmp_path}/poem.csv")
    with pytest.raises(UserError, match=r"is a folder: give its files, as --data\.files '.*/\*\.csv'"):
        find_sources(str(tmp_path))
    with pytest.raises(UserError, match="no file to read"):
        find_sources([])
    with pytest.raises(UserError, match=r"--data\.files is empty"):
        find_sources("")


def test_query_and_fragment_of_a_url_are_no_part_of_its_suffix(tmp_path: Path, server: str) -> None:
    (tmp_path / "p.csv").write_bytes(FILES["crlf.csv"])
    (tmp_path / "p.csv.gz").write_bytes(FILES["compressed.csv.gz"])
    for url in ("p.csv?download=true", "p.csv.gz?x=1&y=[*]", "p.csv#part", "p.csv?from=http://other/p.zip"):
        (source,) = find_sources(f"{server}/{url}")
        assert source.suffix == ".csv"
        np.testing.assert_array_equal(
            read_ids(source, tmp_path / "a"), read_ids(Source(str(tmp_path / "p.csv")), tmp_path / "b")
        )
    for query in ("file=p.csv.gz", "file=a/p.csv&x=1", "id=7&name=p.csv.gz&key=v1.5#top"):
        assert Source(f"https://host/download?{query}").suffix == ".csv"
    assert Source("memory://poems/a#1.csv").suffix == ".csv"


def test_local_name_may_contain_a_question_mark_and_a_hash(tmp_path: Path) -> None:
    for name in ("why?.csv", "a#1.csv"):
        (tmp_path / name).write_bytes(FILES["crlf.csv"])
        (source,) = find_sources(str(tmp_path / name))
        assert (source.name, source.suffix) == (str(tmp_path / name), ".csv")
    assert Source("p.csv?download=true").suffix == ".csv?download=true"
    with fsspec.open("memory://poems/p.csv?download=true", "wb") as file:
        file.write(FILES["crlf.csv"])
    assert find_sources("memory://poems/p.csv?download=true")[0].suffix == ".csv"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32-le", "gb18030"])
def test_no_byte_order_mark_stays_in_the_text(tmp_path: Path, encoding: str) -> None:
    text = csv_text()
    marked = text if encoding in ("utf-16", "utf-8-sig") else f"\ufeff{text}"
    (tmp_path / "t.csv").write_bytes(marked.encode(encoding))
    with open_text(Source(str(tmp_path / "t.csv")), encoding, "") as (file, _):
        assert file.read() == text


def test_key_of_a_corpus_is_that_of_the_decompressed_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(FILES["crlf.csv"])
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(FILES["crlf.csv"]))
    (tmp_path / "t.csv.zst").write_bytes(pyarrow.compress(FILES["crlf.csv"], codec="zstd", asbytes=True))
    (tmp_path / "other.csv").write_bytes(FILES["crlf.csv"] + b"a,b\r\n")
    config = CorpusConfig(ReadOptions(template="{title}\\n{text}"), tokenizer="byte")
    keys = [corpus_key([Source(str(tmp_path / name))], config) for name in ("t.csv", "t.csv.gz", "t.csv.zst")]
    assert len(set(keys)) == 1
    assert corpus_key([Source(str(tmp_path / "other.csv"))], config) != keys[0]
