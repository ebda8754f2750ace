"""Read files into rows, each the text of a document, or into the chunks of one long text.

The text of a row is that of the file (a price "12.50" stays "12.50"), except for line ends, which become `\\n`. A row
that cannot be read is returned as a `RejectedRow` with its line and the reason.

To read another format, write a function like `read_lines` and add it to `READERS`.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import StringIO, TextIOBase
from typing import Any, BinaryIO, NamedTuple

from lit_gpt.data.contents import check_content
from lit_gpt.data.csv_tables import MAX_ROW_CHARACTERS, read_csv
from lit_gpt.data.encodings import DetectedEncoding, detect_encoding
from lit_gpt.data.lines import (
    LONG_LINE,
    LongLine,
    describe_surrogates,
    is_valid_text,
    read_limited_lines,
    skip_lines,
)
from lit_gpt.data.parquet import read_parquet
from lit_gpt.data.read_options import JSONNumber, ReadOptions, field_to_text, make_formatter, select_columns, text_sizes
from lit_gpt.data.rows import Chunk, RejectedRow, Row
from lit_gpt.data.sources import Source, open_text
from lit_gpt.errors import UserError, shorten

CHUNK_CHARACTERS = 2**20  # read at once in raw mode
MAX_CHUNK_CHARACTERS = 2**24  # a text without line ends is cut after so many


def with_detected_encoding(source: Source, options: ReadOptions) -> tuple[ReadOptions, DetectedEncoding]:
    """Check that a file is of the format that its suffix names, and replace the encoding "auto" by that of the file.

    Returns:
        The options, and the encoding with what else was found out about it.

    Raises:
        UserError: The file is empty, cannot be read or is no text, its format is unknown, or its encoding cannot be
            detected.
    """
    suffix = options.suffix_of(source)
    check_content(source, suffix, is_table=options.mode == "rows" and suffix != ".txt")
    if options.mode == "rows":
        _reader_of(source, options)
    if suffix in READERS and READERS[suffix].binary:
        return replace(options, encoding="utf-8"), DetectedEncoding("utf-8")
    if options.encoding != "auto":
        return options, DetectedEncoding(options.encoding)
    detected = detect_encoding(source)
    return replace(options, encoding=detected.name, is_encoding_detected=True), detected


def _reader_of(source: Source, options: ReadOptions) -> "Reader":
    """Return how a file is read in rows.

    Raises:
        UserError: Neither its suffix nor the options name a format.
    """
    suffix = options.suffix_of(source)
    if suffix not in READERS:
        raise UserError(
            f"{source}: unknown file format {suffix or '(no suffix)'}: give one of {', '.join(READERS)}, "
            f"name the format, as --data.format {LIKELY_FORMATS.get(suffix, 'csv')}, or read any text with "
            "--data.mode raw"
        )
    return READERS[suffix]


@contextmanager
def open_rows(source: Source, options: ReadOptions) -> Iterator[tuple[Iterator[Row | RejectedRow], BinaryIO]]:
    """Open a file and read its rows, including blank ones.

    Args:
        source: The file.
        options: How to read it, with a known encoding.

    Yields:
        The rows, and the stored file, whose `tell()` measures progress in bytes.

    Raises:
        UserError: The format is unknown, the file is damaged, or a column is missing.
    """
    reader, size = _reader_of(source, options), source.size()
    if not reader.binary:
        with open_text(source, options.encoding, reader.newline) as (file, stored):
            yield normalize_rows(source, options, size, reader.read(source, file, options)), stored
    elif source.compression:
        raise UserError(f"{source}: a compressed {options.suffix_of(source)} file: decompress it")
    else:
        with source.open_stored() as stored:
            yield normalize_rows(source, options, size, reader.read(source, stored, options)), stored


def normalize_rows(
    source: Source, options: ReadOptions, stored_size: int, rows: Iterator[Row | RejectedRow]
) -> Iterator[Row | RejectedRow]:
    """Convert line ends to `\\n`, reject rows with invalid characters, and name the file in errors.

    Raises:
        UserError: See `Source.check_expansion`. A text that a Parquet file stores once may be in many rows.
    """
    characters = 0
    with source.translate_errors():
        for row in rows:
            if isinstance(row, Row):
                characters += len(row.text)
                source.check_expansion(stored_size, characters)
                if "\r" in row.text:
                    row = Row(row.line, row.text.replace("\r\n", "\n").replace("\r", "\n"), row.split_key)
                if len(row.text) > MAX_ROW_CHARACTERS:
                    row = RejectedRow(row.line, f"more than {MAX_ROW_CHARACTERS:,} characters: shorten that text")
                elif not is_valid_text(row.text):
                    row = RejectedRow(row.line, describe_surrogates(row.text, options))
            yield row


# ----------------------------------------------------------------------------------------------------- raw text


@contextmanager
def open_text_chunks(source: Source, options: ReadOptions) -> Iterator[tuple[Iterator[Chunk], BinaryIO]]:
    """Open a file and read its whole text in chunks, without the lines that contain invalid characters.

    A chunk ends with a line end between two characters that are not whitespace. No byte-pair vocabulary in use merges
    such a line end with what follows it, so that the chunks have the same token ids as the whole text.

    Args:
        source: The file.
        options: How to read it, with a known encoding.

    Yields:
        The chunks, and the stored file, whose `tell()` measures progress in bytes.

    Raises:
        UserError: The file is a Parquet table or is damaged.
    """
    if source.suffix in READERS and READERS[source.suffix].binary:
        raise UserError(f"{source} is a table, not text: use --data.mode rows")
    with open_text(source, options.encoding, newline=None) as (file, stored):  # newline=None: line ends become \n
        yield _read_chunks(source, options, file), stored


def _read_chunks(source: Source, options: ReadOptions, file: TextIOBase) -> Iterator[Chunk]:
    pending, lines, rejected = "", 0, []  # what is not yet returned
    line, has_open_line = options.skip_rows + 1, False  # the next one to read; whether its beginning was read
    last_cut = re.compile(r"(?s).*\S\n(?=\S)")
    with source.translate_errors():
        skip_lines(source, file, options.skip_rows)
        while text := file.read(CHUNK_CHARACTERS):
            text += "" if text.endswith("\n") else file.readline(MAX_CHUNK_CHARACTERS)
            num_lines, has_open_line = text.count("\n"), not text.endswith("\n")
            if not is_valid_text(text):
                text, invalid = _remove_invalid_lines(text, line, options)
                rejected += invalid
            searched = max(0, len(pending) - 2)  # a cut before would have been found
            pending, lines, line = pending + text, lines + num_lines, line + num_lines
            cut = last_cut.match(pending, searched)
            if cut or len(pending) > MAX_CHUNK_CHARACTERS:
                end = cut.end() if cut else len(pending)
                yield Chunk(pending[:end], lines, rejected)
                pending, lines, rejected = pending[end:], 0, []
    if pending or lines or has_open_line:
        yield Chunk(pending, lines + has_open_line, rejected)


def _remove_invalid_lines(text: str, first_line: int, options: ReadOptions) -> tuple[str, list[RejectedRow]]:
    """Return a text without the lines that contain invalid characters, and these."""
    valid: list[str] = []
    rejected: list[RejectedRow] = []
    for number, line in enumerate(StringIO(text, newline="\n"), start=first_line):
        if is_valid_text(line):
            valid.append(line)
        else:
            rejected.append(RejectedRow(number, describe_surrogates(line, options)))
    return "".join(valid), rejected


# ------------------------------------------------------------------------------------------------------- formats


def read_lines(source: Source, file: TextIOBase, options: ReadOptions) -> Iterator[Row | RejectedRow]:
    """Read a plain text, in which every line is a document."""
    if options.split_key_column is not None:
        raise UserError(
            f"{source} has no columns, so no column {options.split_key_column!r}: give a table, "
            "or read it as one with --data.format csv"
        )
    lines = read_limited_lines(source, file, options.skip_rows)
    for number, line in enumerate(lines, start=options.skip_rows + 1):
        yield RejectedRow(number, LONG_LINE) if isinstance(line, LongLine) else Row(number, line.removesuffix("\n"))


def read_jsonl(source: Source, file: TextIOBase, options: ReadOptions) -> Iterator[Row | RejectedRow]:
    """Read JSON Lines: one object per line, whose fields are the columns."""
    named_columns, format_row = dict.fromkeys(options.named_columns()), make_formatter(options)
    decoder = json.JSONDecoder(  # numbers stay as they are written
        object_pairs_hook=_object_with_unique_fields,
        parse_int=JSONNumber,
        parse_float=JSONNumber,
        parse_constant=JSONNumber,
    )
    lines = read_limited_lines(source, file, options.skip_rows)
    for number, line in enumerate(lines, start=options.skip_rows + 1):
        if isinstance(line, LongLine):
            yield RejectedRow(number, LONG_LINE)
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
            if not isinstance(row, dict):
                raise UserError(f"{_json_type(row)}, not an object: {_json_remedy(line)}")
            has_all = named_columns and named_columns.keys() <= row.keys()
            sizes = partial(text_sizes, [row.values()])
            columns = named_columns if has_all else select_columns("the object", options, list(row), sizes)
            key = "" if options.split_key_column is None else field_to_text(row[options.split_key_column])
            yield Row(number, format_row([row[name] for name in columns]), key)
        except UserError as error:
            yield RejectedRow(number, str(error))
        except KeyError:
            yield RejectedRow(number, f"the object has no field {options.split_key_column!r}: add it")
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            yield RejectedRow(number, f"not JSON ({reason}): {_json_remedy(line)}")


def _json_type(value: Any) -> str:
    if isinstance(value, JSONNumber):
        return "a number"
    return {str: "a string", list: "an array", bool: "true or false"}.get(type(value), "null")


def _json_remedy(line: str) -> str:
    """Say what to do about a line that is no JSON object. A file that begins with a bracket is one array."""
    return "write one JSON object per line" + (", as jq -c '.[]' FILE does" if line.lstrip().startswith("[") else "")


def _object_with_unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; raise UserError if a field is there twice, where `json` keeps the last."""
    row: dict[str, Any] = {}
    for name, value in pairs:
        if name in row:
            raise UserError(f"two fields called {shorten(name)!r}: rename or remove one")
        row[name] = value
    return row


class Reader(NamedTuple):
    """How files of one format are read.

    Attributes:
        read: Function of the source, its opened file and the options that returns the rows. It may raise UserError.
        binary: Whether the file is opened as bytes. Such files have no encoding and must not be compressed.
        newline: Otherwise, how line ends are read, as in Python's `open`; None: as `\\n`.
        settings: The fields of `ReadOptions` that decide how a row becomes a document.
    """

    read: Callable[[Source, Any, ReadOptions], Iterator[Row | RejectedRow]]
    binary: bool = False
    newline: str | None = None
    settings: tuple[str, ...] = ()


COLUMN_SETTINGS = ("columns", "template")
TABLE_SETTINGS = (*COLUMN_SETTINGS, "delimiter", "quote", "header")
TEXT_SETTINGS = ("encoding", "skip_rows")

READERS = {  # by the suffix of the file
    ".csv": Reader(read_csv, newline="", settings=TABLE_SETTINGS),  # the csv module asks for this newline
    ".tsv": Reader(read_csv, newline="", settings=TABLE_SETTINGS),
    ".txt": Reader(read_lines),
    ".jsonl": Reader(read_jsonl, settings=COLUMN_SETTINGS),
    ".parquet": Reader(read_parquet, binary=True, settings=COLUMN_SETTINGS),
}

LIKELY_FORMATS = {  # of files with another suffix
    **dict.fromkeys((".json", ".ndjson", ".jsonlines", ".ldjson"), "jsonl"),
    **dict.fromkeys((".tab",), "tsv"),
    **dict.fromkeys((".md", ".text", ".log", ".srt"), "txt"),
    **dict.fromkeys((".pq", ".parq"), "parquet"),
}


def check_settings_have_effect(sources: list[Source], options: ReadOptions) -> None:
    """Check that every setting that is given is used for at least one file.

    Raises:
        UserError: One is not.
    """
    suffixes = sorted({options.suffix_of(source) for source in sources})
    if options.mode == "raw" or not READERS.keys() >= set(suffixes):  # an unknown format is refused when it is read
        return
    used: set[str] = set()
    for reader in map(READERS.__getitem__, suffixes):
        used.update(reader.settings, () if reader.binary else TEXT_SETTINGS)
    unused = [name for name in options.given(*TABLE_SETTINGS, *TEXT_SETTINGS) if name not in used]
    if unused:
        flags = " and ".join(f"--data.{name}" for name in unused)
        is_text = not any(READERS[suffix].binary for suffix in suffixes)
        remedy = (
            " or, if it is a table, give --data.format csv, or --data.format tsv if tabs separate columns"
            if is_text
            else ""
        )
        raise UserError(
            f"{sources[0]} is read as {' and '.join(suffixes)}, where {flags} {'has' if len(unused) == 1 else 'have'} "
            f"no effect: leave out {flags}{remedy}"
        )
