"""Read CSV and TSV tables into rows."""

import contextlib
import csv
import itertools
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from io import TextIOBase
from typing import Any

from lit_gpt.data.lines import LONG_LINE, LongLine, describe_surrogates, is_valid_text, read_limited_lines
from lit_gpt.data.read_options import ReadOptions, join_names, make_formatter, select_columns, text_sizes, unescape
from lit_gpt.data.rows import RejectedRow, Row
from lit_gpt.data.sources import Source
from lit_gpt.errors import UserError, shorten

MAX_ROW_CHARACTERS, MAX_ROW_LINES = 2**25, 2**20  # in a longer row a quote was not closed
NUM_COMPARED_ROWS = 100  # in which the column with the most text is found, to propose it
MAX_READ_AGAIN = 2**26  # characters, after quotes that were not closed; in a long file four times what was read


class UnclosedQuoteError(Exception):
    """A row is so long that a quote in it must have been left open."""


class LongLineError(Exception):
    """A row has a line that is too long."""


class _RewindableLines:
    """The lines of a file, of which those of the current row can be read again.

    Attributes:
        row_line: Number of the line in which the current row begins, from 1.
        separator: Character between columns, if the first line is Excel's `sep=;`, which is then left out.
    """

    def __init__(self, file: Iterable[str], first_line: int) -> None:
        self.row_line = first_line
        first = list(itertools.islice(file, 1))
        self.separator = separator_of("".join(first))
        self.row_line += self.separator is not None
        self.file = iter(file) if self.separator else itertools.chain(first, file)
        self._rewound: deque[str] = deque()  # to be read before the rest of the file
        self._row: list[str] = []  # lines of the current row
        self._row_characters = 0
        self._characters = 0  # returned, those that were read again included
        self._characters_again = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._rewound.popleft() if self._rewound else next(self.file, ""):
            self._row_characters += len(line)
            self._characters += len(line)
            self._row.append(line)  # before the errors, after which it is read again or skipped
            if isinstance(line, LongLine):
                raise LongLineError
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
    lines = _RewindableLines(read_limited_lines(source, file, options.skip_rows), options.skip_rows + 1)
    dialect = _make_dialect(source, options, lines.separator)
    rows = csv.reader(lines, **dialect)
    format_row = make_formatter(options)
    names: list[str] = []  # of all columns; empty until the first row is read
    indices: list[int] = []  # of the columns that make a document
    while True:
        try:
            row = next(rows, None)
        except (csv.Error, UnclosedQuoteError, LongLineError) as error:
            reason = _describe_error(error)
            if not names:
                raise UserError(f"{source} line {lines.row_line}: {reason}") from None
            yield RejectedRow(lines.row_line, reason)
            if isinstance(error, LongLineError):
                lines.end_row()
            elif not lines.skip_first_line():
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
            names = _column_names(source, line, row, options, dialect)
            index_of = {name: index for index, name in enumerate(names)}
            first_rows = rows if options.header else itertools.chain([row], rows)
            sizes = partial(_first_text_sizes, first_rows, len(row))
            indices = [index_of[name] for name in select_columns(source, options, names, sizes)]
            key_index = None if options.split_key_column is None else index_of[options.split_key_column]
            if options.header:
                continue
        if len(row) != len(names):
            found = f"{len(row)} fields where there are {len(names)} columns ({join_names(names)})"
            other = "give --data.delimiter" if options.delimiter is None else "another --data.delimiter"
            yield RejectedRow(line, f"{found}: correct that row, or {other}")
        else:
            yield Row(line, format_row([row[i] for i in indices]), "" if key_index is None else row[key_index])


def _first_text_sizes(rows: Iterator[list[str]], num_columns: int) -> list[int]:
    """Return the number of characters in each column of the first rows of a table; [] if it has none."""
    read: list[list[str]] = []
    with contextlib.suppress(csv.Error, UnclosedQuoteError, LongLineError):
        read.extend(itertools.islice(rows, NUM_COMPARED_ROWS))
    return text_sizes(row for row in read if len(row) == num_columns)


def _describe_error(error: Exception) -> str:
    if isinstance(error, LongLineError):
        return LONG_LINE
    unclosed = isinstance(error, UnclosedQuoteError) or "end of data" in str(error)
    reason = "a quote is opened and never closed" if unclosed else str(error)
    return f"{reason}: correct the quotes of that row, or give --data.quote none"


def _make_dialect(source: Source, options: ReadOptions, separator: str | None) -> dict[str, Any]:
    """Return the arguments of `csv.reader`.

    Args:
        source: The table.
        options: How it is read.
        separator: The delimiter that the table itself names, if it does.

    Raises:
        UserError: It is another one than that of the options, or a quote.
    """
    delimiter = unescape(options.delimiter or separator or _default_delimiter(source, options))
    if separator not in (None, delimiter):
        line = options.skip_rows + 1
        raise UserError(
            f"{source} line {line} says that {separator!r} separates columns, not --data.delimiter "
            f"{options.delimiter!r}: leave that out, or skip the line with --data.skip_rows {line}"
        )
    if options.quote == "none":
        return {"delimiter": delimiter, "strict": True, "quotechar": None, "quoting": csv.QUOTE_NONE}
    if delimiter == options.quote:
        raise UserError(f"--data.quote {options.quote!r} separates columns: give another character, or none")
    return {"delimiter": delimiter, "strict": True, "quotechar": options.quote}


def _default_delimiter(source: Source, options: ReadOptions) -> str:
    return "\t" if options.suffix_of(source) == ".tsv" else ","


def _column_names(
    source: Source, line: int, first_row: list[str], options: ReadOptions, dialect: dict[str, Any]
) -> list[str]:
    """Return the names of the columns of a CSV table.

    Raises:
        UserError: A name contains invalid characters, or the only column looks like several with another delimiter.
    """
    names = first_row if options.header else [f"c{i + 1}" for i in range(len(first_row))]
    joined = ",".join(names)
    if not is_valid_text(joined):
        raise UserError(f"{source} line {line}: {describe_surrogates(joined, options)}")
    default, is_guess = _default_delimiter(source, options), options.delimiter is None and len(first_row) == 1
    for other in (";", "\t", "|", *("," * options.header)):  # a comma is likely in a text, not in a name
        if is_guess and dialect["delimiter"] == default != other and other in first_row[0]:
            raise UserError(
                f"{source}: its only column is {shorten(first_row[0])!r}: give --data.delimiter {other!r} if that "
                f"separates columns, otherwise {default!r}"
            )
    return names


def separator_of(line: str) -> str | None:
    """Return the delimiter that a line like Excel's `sep=;` names, None if it is another line.

    Spreadsheets write it before the header. Some put it into quotes, type a tab as `\\t`, or fill the line up with
    delimiters as if it were a row.
    """
    named = re.fullmatch(r'(?i)("?)sep=(\\t|[^\w"\r\n])\1\2* *', line.strip("\ufeff\r\n"))
    return None if named is None else unescape(named[2])
