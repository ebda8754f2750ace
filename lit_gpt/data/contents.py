"""Recognize files that are no text by their first bytes, and say what to do with them."""

import codecs
import os
import re

from lit_gpt.data.sources import Source
from lit_gpt.errors import UserError

HEAD_BYTES = 2**12  # read from the start
TAIL_BYTES = 2**16  # read from the end of zip archives and Parquet tables, which have their index there

UNPACK = "unpack it and give the files in it"
AS_CSV = "save it as CSV UTF-8 and give that file"
AS_TEXT = "save it as plain text in UTF-8 and give that file"
EXPORT = "export its text as CSV or JSONL and give that file"
NO_TEXT = "give a file with text in it"

SIGNATURES: tuple[tuple[bytes, str, str], ...] = (  # first bytes, what the file is, what to do
    *((b"BZh%d1AY&SY" % level, "compressed with bzip2", "unpack it with bunzip2") for level in range(1, 10)),
    (b"\xfd7zXZ\x00", "compressed with xz", "unpack it with unxz"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "unpack it with unlz4"),
    (b"\x1f\x9d", "compressed with compress", "unpack it with gunzip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office file (a workbook .xls or a document .doc)", AS_CSV),
    *(
        (b"%%PDF-%d." % version, "a PDF", "extract its text, as with pdftotext, and give that file")
        for version in (1, 2)
    ),
    (b"{\\rtf", "a document in RTF", AS_TEXT),
    (b"SQLite format 3\x00", "an SQLite database", EXPORT),
    (b"ARROW1\x00\x00", "an Arrow (Feather) table", "save it as Parquet or CSV and give that file"),
    (b"\xff\xff\xff\xff", "an Arrow table", "save it as Parquet or CSV and give that file"),
    (b"FEA1\x00\x00\x00\x00", "a Feather table", "save it as Parquet or CSV and give that file"),
    (b"Obj\x01", "an Avro table", "save it as Parquet or CSV and give that file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", EXPORT),
    (b"\x93NUMPY", "a NumPy array", EXPORT),
    (b"\x80\x04\x95", "a Python pickle", EXPORT),
    (b"\x80\x05\x95", "a Python pickle", EXPORT),
    (b"\x89PNG\r\n\x1a\n", "an image", NO_TEXT),
    (b"\xff\xd8\xff", "an image", NO_TEXT),
    (b"II*\x00", "an image", NO_TEXT),
    (b"MM\x00*", "an image", NO_TEXT),
    (b"OggS\x00", "a sound or video file", NO_TEXT),
    (b"fLaC\x00", "a sound file", NO_TEXT),
    (b"ID3\x03\x00", "a sound file", NO_TEXT),
    (b"ID3\x04\x00", "a sound file", NO_TEXT),
    (b"\x7fELF", "a program", NO_TEXT),
    (
        b"version https://git-lfs.github.com/spec/",
        "a pointer of Git LFS, without the contents of the file",
        "fetch them with git lfs pull",
    ),
)
# What a zip archive holds that is one of these: a name in it or its type, what the file is, what to do.
ZIPPED: tuple[tuple[bytes, str, str], ...] = (
    (b"opendocument.spreadsheet", "a workbook", AS_CSV),
    (b"Index/Tables", "a workbook", AS_CSV),
    (b"opendocument.text", "a document", AS_TEXT),
    (b"application/epub+zip", "a document", AS_TEXT),
    (b"opendocument.presentation", "a presentation", AS_TEXT),
)
OFFICE: tuple[tuple[bytes, str, str], ...] = (  # the same of an archive that also has CONTENT_TYPES
    (b"xl/", "a workbook", AS_CSV),
    (b"word/", "a document", AS_TEXT),
    (b"ppt/", "a presentation", AS_TEXT),
)
CONTENT_TYPES = b"[Content_Types].xml"  # in all files of Microsoft Office


def check_content(source: Source, suffix: str, is_table: bool) -> None:
    """Check that a file is not empty, and is neither a known kind of file without text nor packed unexpectedly.

    Args:
        source: The file.
        suffix: The suffix of the format as which it is read.
        is_table: Whether it is read as a table, which a web page is not.

    Raises:
        UserError: It is. The message says what it is and what to do.
    """
    with source.translate_errors(), source.open_stored() as file:
        head, tail = file.read(HEAD_BYTES), b""
        if head.startswith((b"PK", b"PAR1")):
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            tail = file.read(TAIL_BYTES)
    packed_as = _compression(head)
    if packed_as and packed_as == source.compression:
        with source.translate_errors(), source.open() as (unpacked, _):
            head = unpacked.read(HEAD_BYTES)
        found = ("compressed twice", "unpack it once") if _compression(head) else None
        found = found or _recognize(head, b"", suffix, is_table)
    elif packed_as:
        found = _wrong_compression(source, packed_as)
    else:
        found = _recognize(head, tail, suffix, is_table)
        if source.compression and head and not found:
            found = _wrong_compression(source, packed_as)
    if found:
        raise UserError(f"{source} is {found[0]}: {found[1]}")
    if head in (b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{source} is empty: give a file with text in it")


def _compression(head: bytes) -> str:
    """Return the suffix of the compression that the first bytes show; "" for none."""
    if head.startswith(b"\x1f\x8b\x08"):
        return ".gz"
    if head.startswith(b"\x28\xb5\x2f\xfd") or re.match(rb"[\x50-\x5f]\x2a\x4d\x18", head):  # data, or a part to skip
        return ".zst"
    return ""


def _wrong_compression(source: Source, packed_as: str) -> tuple[str, str]:
    """Say that a file is not compressed as its name says.

    Args:
        source: The file.
        packed_as: The suffix of its compression; "" for none.
    """
    what = {".gz": "compressed with gzip", ".zst": "compressed with zstd", "": "not compressed"}[packed_as]
    name = os.path.basename(source.path[: len(source.path) - len(source.compression)])
    return what, f"rename it to {name}{packed_as}" + ("" if packed_as else ", or download it again")


def _recognize(head: bytes, tail: bytes, suffix: str, is_table: bool) -> tuple[str, str] | None:
    """Return what a file is and what to do; None if it may be what it should be."""
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")):
        is_office = CONTENT_TYPES in head or CONTENT_TYPES in tail
        for name, what, remedy in OFFICE if is_office else ZIPPED:
            if name in head or name in tail:
                return what, remedy
        if is_office:
            return "an Office file", AS_CSV
        return "a zip archive", UNPACK
    for signature, what, remedy in SIGNATURES:
        if head.startswith(signature):
            return what, remedy
    if head.startswith((b"GIF87a", b"GIF89a")) and b"\0" in head[6:13]:
        return "an image", NO_TEXT
    if head.startswith(b"RIFF") and head[8:12] in (b"WEBP", b"WAVE", b"AVI "):
        return "an image, sound or video file", NO_TEXT
    if head[:1] == b"\0" and head[4:8] == b"ftyp":
        return "a video or image file", NO_TEXT
    if head[257:265] in (b"ustar\x0000", b"ustar  \x00"):
        return "a tar archive", UNPACK
    if suffix == ".parquet" and head and not head.startswith((b"PAR1", b"PARE")):  # PARE: it is encrypted
        return "not a Parquet table", "name its format, as --data.format csv"
    if suffix != ".parquet" and head.startswith(b"PAR1") and tail.endswith(b"PAR1"):
        return "a Parquet table", "give --data.format parquet"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:512].lower()
    if is_table and start.startswith((b"<!doctype html", b"<html")):
        if suffix.startswith(".xls"):
            return "a workbook in HTML", AS_CSV
        return "a web page", "download the file itself, whose link that page may show"
    if is_table and start.startswith(b"<?xml") and b"spreadsheet" in head.lower():
        return "a workbook in XML", AS_CSV
    return None
