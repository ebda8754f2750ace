"""Read files into rows, each the text of a document, or into the chunks of one long text.

The text of a row is that of the file (a price "12.50" stays "12.50"), except for line ends, which become `\\n`. A row
that cannot be read is returned as a `RejectedRow` with its line and the reason.

To read another format, write a function like `read_lines` and add it to `READERS`.
"""

import csv
import itertools
import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import TextIOBase
from typing import Any, BinaryIO, NamedTuple

from lit_gpt.data.parquet import read_parquet
from lit_gpt.data.read_options import ReadOptions, field_to_text, join_names, make_formatter, select_columns, unescape
from lit_gpt.data.rows import RejectedRow, Row
from lit_gpt.data.sources import Source, detect_encoding, open_text
from lit_gpt.errors import UserError, shorten

CHUNK_CHARACTERS = 2**20  # read at once in raw mode
MAX_CHUNK_CHARACTERS = 2**24  # a text without line ends is cut after so many
MAX_LINE_CHARACTERS = 2**24  # a longer line is no row of a table
MAX_ROW_CHARACTERS, MAX_ROW_LINES = 2**25, 2**20  # in a longer row a quote was not closed
MAX_READ_AGAIN = 2**26  # characters, after quotes that were not closed; in a long file four times what was read


def with_detected_encoding(source: Source, options: ReadOptions) -> tuple[ReadOptions, float]:
    """Replace the encoding "auto" by the encoding of a file.

    Returns:
        The options, and the confidence in their encoding, from 0 to 1.

    Raises:
        UserError: The file is empty or cannot be read, or its encoding cannot be detected.
    """
    with source.translate_errors(), source.open() as (file, _):
        head = file.read(4)
    if b"\xef\xbb\xbf".startswith(head):  # nothing, or at most a byte order mark
        raise UserError(f"{source} is empty: give a file with text in it")
    if source.suffix in READERS and READERS[source.suffix].binary:
        return replace(options, encoding="utf-8"), 1.0
    if options.encoding != "auto":
        return options, 1.0
    encoding, confidence = detect_encoding(source)
    return replace(options, encoding=encoding), confidence


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
    suffix = source.suffix
    if suffix not in READERS:
        raise UserError(
            f"{source}: unknown file format {suffix or '(no suffix)'}: give one of {', '.join(READERS)}, "
            "or any text with --data.mode raw"
        )
    reader, size = READERS[suffix], source.size()
    if not reader.binary:
        with open_text(source, options.encoding, reader.newline) as (file, stored):
            yield normalize_rows(source, options, size, reader.read(source, file, options)), stored
    elif source.compression:
        raise UserError(f"{source}: a compressed {suffix} file: decompress it")
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
                elif not _is_valid_text(row.text):
                    row = RejectedRow(row.line, _describe_surrogates(row.text, options.encoding))
            yield row


def _is_valid_text(text: str) -> bool:
    """Return whether a text contains no surrogates, which are not characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _describe_surrogates(text: str, encoding: str) -> str:
    """Say what the first surrogates in a text are: invalid bytes of the file, or half a character in JSON."""
    first = re.search("[\ud800-\udfff]{1,4}", text)
    assert first is not None
    codes = list(itertools.takewhile(lambda code: 0xDC80 <= code <= 0xDCFF, map(ord, first.group())))
    if not codes:
        return "a lone surrogate, as \\ud83d, is no character: write both halves of a surrogate pair"
    invalid = bytes(code - 0xDC00 for code in codes).hex(" ")
    return (
        f"bytes {invalid} are not {encoding}: correct that row, or give the encoding of the file, as "
        "--data.encoding auto"
    )


# ----------------------------------------------------------------------------------------------------- raw text


@contextmanager
def open_text_chunks(source: Source, options: ReadOptions) -> Iterator[tuple[Iterator[str], BinaryIO]]:
    """Open a file and read its whole text in chunks.

    A chunk ends with a line end between two characters that are not whitespace. No byte-pair vocabulary in use merges
    such a line end with what follows it, so that the chunks have the same token ids as the whole text.

    Args:
        source: The file.
        options: How to read it, with a known encoding.

    Yields:
        The chunks, and the stored file, whose `tell()` measures progress in bytes.

    Raises:
        UserError: The file is a Parquet table, is damaged, or has another encoding.
    """
    if source.suffix in READERS and READERS[source.suffix].binary:
        raise UserError(f"{source} is a table, not text: use --data.mode rows")
    with open_text(source, options.encoding, newline=None) as (file, stored):  # newline=None: line ends become \n
        yield _read_chunks(source, options, file), stored


def _read_chunks(source: Source, options: ReadOptions, file: TextIOBase) -> Iterator[str]:
    pending, lines = "", 0  # text not yet returned, and the number of lines before it
    last_cut = re.compile(r"(?s).*\S\n(?=\S)")
    with source.translate_errors():
        while text := file.read(CHUNK_CHARACTERS):
            if not _is_valid_text(text):
                first = re.search("[\ud800-\udfff]", text)
                assert first is not None
                line = lines + pending.count("\n") + text.count("\n", 0, first.start()) + 1
                raise UserError(f"{source} line {line}: {_describe_surrogates(text, options.encoding)}")
            searched = max(0, len(pending) - 2)  # a cut before would have been found
            pending += text
            cut = last_cut.match(pending, searched)
            if cut or len(pending) > MAX_CHUNK_CHARACTERS:
                end = cut.end() if cut else len(pending)
                yield pending[:end]
                lines += pending.count("\n", 0, end)
                pending = pending[end:]
    if pending:
        yield pending


# ------------------------------------------------------------------------------------------------------- formats


def read_limited_lines(source: Source, file: TextIOBase) -> Iterator[str]:
    """Yield the lines of a file.

    Raises:
        UserError: A line is so long that the file is no table: it may be compressed, and not fit into memory.
    """
    for number, line in enumerate(iter(partial(file.readline, MAX_LINE_CHARACTERS), ""), start=1):
        if len(line) == MAX_LINE_CHARACTERS and not line.endswith(("\n", "\r")):
            raise UserError(
                f"{source} line {number} has more than {MAX_LINE_CHARACTERS:,} characters, which is no row of a table: "
                "give --data.mode raw if the file is one text"
            )
        yield line


class UnclosedQuoteError(Exception):
    """A row is so long that a quote in it must have been left open."""


class _RewindableLines:
    """The lines of a file, of which those of the current row can be read again.

    Attributes:
        row_line: Number of the line in which the current row begins, from 1.
    """

    def __init__(self, file: Iterable[str]) -> None:
        self.file = iter(file)
        self.row_line = 1
        self._rewound: deque[str] = deque()  # to be read before the rest of the file
        self._row: list[str] = []  # lines of the current row
        self._row_characters = 0
        self._characters = 0  # returned, those that were read again included
        self._characters_again = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._rewound.popleft() if self._rewound else next(self.file, ""):
            self._row_characters += len(line)
            self._characters += len(line)
            self._row.append(line)  # before the error, after which it is read again
            if self._row_characters > MAX_ROW_CHARACTERS or len(self._row) > MAX_ROW_LINES:
                raise UnclosedQuoteError
            yield line

    def end_row(self) -> None:
        """Begin a new row with the next line."""
        self.row_line += len(self._row)
        self._row.clear()
        self._row_characters = 0

    def skip_first_line(self) -> bool:
        """Skip the first line of the current row and read the others again, as rows of their own.

        Returns:
            Whether that may go on. The next quote mostly ends a row whose quote was not closed, so that a file is read
            hardly more than twice; but in a table of other quotes every line could begin a row up to the end.
        """
        self._characters_again += sum(map(len, self._row[1:]))
        self._rewound.extendleft(reversed(self._row[1:]))
        del self._row[1:]
        self.end_row()
        return self._characters_again <= MAX_READ_AGAIN + 4 * (self._characters - self._characters_again)


def read_csv(source: Source, file: TextIOBase, options: ReadOptions) -> Iterator[Row | RejectedRow]:
    """Read a CSV or TSV table. After a quote that is not closed, reading continues with the next line."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # Python's own limit is 128 KiB
    delimiter = unescape(options.delimiter or ("\t" if source.suffix == ".tsv" else ","))
    dialect: dict[str, Any] = {"delimiter": delimiter, "strict": True, "quotechar": options.quote}
    if options.quote == "none":
        dialect |= {"quotechar": None, "quoting": csv.QUOTE_NONE}
    lines = _RewindableLines(read_limited_lines(source, file))
    rows = csv.reader(lines, **dialect)
    format_row = make_formatter(options)
    names: list[str] = []  # of all columns; empty until the first row is read
    indices: list[int] = []  # of the columns that make a document
    while True:
        try:
            row = next(rows, None)
        except (csv.Error, UnclosedQuoteError) as error:
            unclosed = isinstance(error, UnclosedQuoteError) or "end of data" in str(error)
            reason = "a quote is opened and never closed" if unclosed else str(error)
            reason += ": correct the quotes of that row, or give --data.quote none"
            if not names:
                raise UserError(f"{source} line {lines.row_line}: {reason}") from None
            yield RejectedRow(lines.row_line, reason)
            if not lines.skip_first_line():
                raise UserError(f"{source} line {lines.row_line}: too many quotes: give --data.quote none") from None
            rows = csv.reader(lines, **dialect)
            continue
        if row is None:
            return
        line = lines.row_line
        lines.end_row()
        if not row:  # a blank line
            continue
        if not names:
            names = _column_names(source, line, row, options)
            index_of = {name: index for index, name in enumerate(names)}
            indices = [index_of[name] for name in select_columns(source, options, names)]
            key_index = None if options.split_key_column is None else index_of[options.split_key_column]
            if options.header:
                continue
        if len(row) != len(names):
            yield RejectedRow(
                line,
                f"{len(row)} fields where there are {len(names)} columns ({join_names(names)}): correct that row, or "
                "give --data.delimiter",
            )
        else:
            yield Row(line, format_row([row[i] for i in indices]), "" if key_index is None else row[key_index])


def _column_names(source: Source, line: int, first_row: list[str], options: ReadOptions) -> list[str]:
    """Return the names of the columns of a CSV table.

    Raises:
        UserError: A name contains invalid characters, or the only column looks like several with another delimiter.
    """
    names = first_row if options.header else [f"c{i + 1}" for i in range(len(first_row))]
    joined = ",".join(names)
    if not _is_valid_text(joined):
        raise UserError(f"{source} line {line}: {_describe_surrogates(joined, options.encoding)}")
    for delimiter, typed in ((";", "';'"), ("\t", "'\\t'"), ("|", "'|'")):
        if options.delimiter is None and len(first_row) == 1 and delimiter in first_row[0]:
            raise UserError(
                f"{source}: its only column is {shorten(first_row[0])!r}: give --data.delimiter {typed} if that "
                "separates columns, otherwise ','"
            )
    return names


def read_lines(source: Source, file: TextIOBase, options: ReadOptions) -> Iterator[Row | RejectedRow]:
    """Read a plain text, in which every line is a document."""
    if options.split_key_column is not None:
        raise UserError(f"{source} has no columns, so no column {options.split_key_column!r}: give a table")
    for number, line in enumerate(read_limited_lines(source, file), start=1):
        yield Row(number, line.removesuffix("\n"))


def read_jsonl(source: Source, file: TextIOBase, options: ReadOptions) -> Iterator[Row | RejectedRow]:
    """Read JSON Lines: one object per line, whose fields are the columns."""
    named_columns, format_row = dict.fromkeys(options.named_columns()), make_formatter(options)
    for number, line in enumerate(read_limited_lines(source, file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object_with_unique_fields)
            if not isinstance(row, dict):
                raise UserError(f"a {type(row).__name__}, not an object: write one JSON object per line")
            has_all = named_columns and named_columns.keys() <= row.keys()
            columns = named_columns if has_all else select_columns("the object", options, list(row))
            key = "" if options.split_key_column is None else field_to_text(row[options.split_key_column])
            yield Row(number, format_row([row[name] for name in columns]), key)
        except UserError as error:
            yield RejectedRow(number, str(error))
        except KeyError:
            yield RejectedRow(number, f"the object has no field {options.split_key_column!r}: add it")
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            yield RejectedRow(number, f"not JSON ({reason}): write one JSON object per line")


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
    """

    read: Callable[[Source, Any, ReadOptions], Iterator[Row | RejectedRow]]
    binary: bool = False
    newline: str | None = None


READERS = {  # by the suffix of the file
    ".csv": Reader(read_csv, newline=""),  # as the csv module asks for
    ".tsv": Reader(read_csv, newline=""),
    ".txt": Reader(read_lines),
    ".jsonl": Reader(read_jsonl),
    ".parquet": Reader(read_parquet, binary=True),
}
