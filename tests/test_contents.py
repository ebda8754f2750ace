"""Tests of lit_gpt.data.contents."""

import bz2
import gzip
import io
import lzma
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from lit_gpt.data.contents import SIGNATURES
from lit_gpt.data.read_options import ReadOptions
from lit_gpt.data.readers import with_detected_encoding
from lit_gpt.data.sources import Source
from lit_gpt.errors import UserError

TABLE = b"text\nhello\n"


def zipped(*names: str, content: bytes = TABLE) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("t.csv"), io.BytesIO())
    return file.getvalue()


def parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["hello"]}), file)
    return file.getvalue()


def feather() -> bytes:
    file = io.BytesIO()
    pyarrow.feather.write_feather(pyarrow.table({"text": ["hello"]}), file)
    return file.getvalue()


def arrow_stream() -> bytes:
    file = io.BytesIO()
    table = pyarrow.table({"text": ["hello"]})
    with pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return file.getvalue()


def sqlite(folder: Path) -> bytes:
    database = sqlite3.connect(folder / "t.db")
    database.execute("create table poems (text)")
    database.commit()
    database.close()
    return (folder / "t.db").read_bytes()


FILES = {  # name: content, and what is said about it
    "t.xlsx": (zipped("[Content_Types].xml", "xl/workbook.xml"), "a workbook: save it as CSV UTF-8"),
    "part.xlsx": (zipped("[Content_Types].xml", "xl/sharedStrings.xml"), "a workbook: save it as CSV UTF-8"),
    "renamed.csv": (
        zipped("[Content_Types].xml", "xl/workbook.bin", "xl/sharedStrings.bin"),
        "a workbook: save it as CSV UTF-8",
    ),
    "t.ods": (zipped("mimetype", content=b"application/vnd.oasis.opendocument.spreadsheet"), "a workbook"),
    "t.docx": (zipped("[Content_Types].xml", "word/document.xml"), "a document: save it as plain text"),
    "t.csv": (zipped("poems/t.csv"), "a zip archive: unpack it"),
    "packed.csv": (gzip.compress(TABLE), "compressed with gzip: rename it to packed.csv.gz"),
    "zst.csv": (pyarrow.compress(TABLE, codec="zstd", asbytes=True), "compressed with zstd: rename it to zst.csv.zst"),
    "wrong.csv.gz": (pyarrow.compress(TABLE, codec="zstd", asbytes=True), "with zstd: rename it to wrong.csv.zst"),
    "twice.csv.gz": (gzip.compress(gzip.compress(TABLE)), "compressed twice: unpack it once"),
    "book.csv.gz": (gzip.compress(zipped("[Content_Types].xml", "xl/workbook.xml")), "a workbook"),
    "t.csv.bz2": (bz2.compress(TABLE), "compressed with bzip2: unpack it with bunzip2"),
    "t.csv.xz": (lzma.compress(TABLE), "compressed with xz: unpack it with unxz"),
    "t.tar": (tarred(), "a tar archive: unpack it"),
    "t.xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "a workbook .xls or a document .doc"),
    "t.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF: extract its text"),
    "p.csv": (parquet(), "a Parquet table: give --data.format parquet"),
    "f.csv": (feather(), "an Arrow .Feather. table: save it as Parquet"),
    "page.csv": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page: download the file itself"),
    "page.xls": (b"<html><table><tr><td>hello</td></tr></table></html>", "a workbook in HTML: save it as CSV UTF-8"),
    "folder.csv": (zipped("docs-xl/password/t.txt"), "a zip archive: unpack it"),
    "plain.csv.gz": (TABLE, "not compressed: rename it to plain.csv, or download it again"),
    "stream.csv": (arrow_stream(), "an Arrow table: save it as Parquet"),
    "small.txt": (b"GIF89a\x01\x00\x01\x00\x80\x00\x00;", "an image: give a file with text"),
    "t.tar.gz": (gzip.compress(tarred()), "a tar archive: unpack it"),
    "pointer.csv": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
    "photo.txt": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "an image: give a file with text"),
    "empty.csv.gz": (gzip.compress(b""), "is empty"),
    "mark.csv": (b"\xef\xbb\xbf", "is empty"),
    "mark16.csv": (b"\xff\xfe", "is empty"),
}


def read(path: Path, mode: str) -> None:
    with_detected_encoding(Source(str(path)), ReadOptions(mode=mode))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FILES)
def test_file_without_text_is_refused_in_one_line_that_says_what_it_is(tmp_path: Path, name: str) -> None:
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    for mode in ("rows", "raw"):
        if name.startswith("page") and mode == "raw":
            read(tmp_path / name, mode)  # somebody may train on web pages
            continue
        with pytest.raises(UserError, match=message) as caught:
            read(tmp_path / name, mode)
        assert "\n" not in str(caught.value)


def test_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(sqlite(tmp_path))
    with pytest.raises(UserError, match=r"an SQLite database: export its text as CSV"):
        read(tmp_path / "t.csv", "rows")


@pytest.mark.parametrize("signature", [signature for signature, _, _ in SIGNATURES])
def test_text_that_mentions_a_signature_is_read(tmp_path: Path, signature: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(TABLE * 100 + signature + b"\n")
    read(tmp_path / "t.csv", "rows")


@pytest.mark.parametrize(
    "start",
    ["BZhang,b", "PAR1,b", "ORC", "FEA1,b", "PK,b", "GIF,b", "ID3,b", "7z", "<b>,c", "II*,b", "GIF89a,b", "%PDF-,b"],
)
def test_text_that_begins_like_a_signature_is_read(tmp_path: Path, start: str) -> None:
    (tmp_path / "t.csv").write_bytes(f"{start}\nhello,world\n".encode())
    read(tmp_path / "t.csv", "rows")


def test_unknown_suffix_is_refused_before_the_encoding_is_detected(tmp_path: Path) -> None:
    (tmp_path / "t.dat").write_bytes(bytes(range(1, 256)) * 10)
    with pytest.raises(UserError, match=r"unknown file format \.dat"):
        read(tmp_path / "t.dat", "rows")
