"""Files -> rows: CSV, TSV, TXT, JSONL and Parquet, one row a document, or a whole file as one text.

Text comes out as it stands in the file (a price "12.50" stays "12.50"), but for its line ends, which become `\\n`.
Nothing is left out unreported: a row that cannot be read comes out as `RejectedRow`, with its line and the reason.
"""

import csv
import functools
import itertools
import json
import re
import string
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import TextIOBase
from typing import Any, BinaryIO, Literal, NamedTuple

from lit_gpt.data.sources import Source, detect_encoding, open_text
from lit_gpt.errors import UserError, did_you_mean

Mode = Literal["rows", "raw"]

RAW_BLOCK = 2**20  # characters read at once in raw mode
LONGEST_BLOCK = 2**24  # past that a text without lines is cut where it stands
LONGEST_ROW = 2**26  # characters; past that a quote was never closed


class Row(NamedTuple):
    """A document as it comes out of a file.

    Attributes:
        line: where it begins, from 1; in Parquet the number of the row.
        text: of the document.
        split_key: what stands in the column `ReadOptions.split_key_column`.
    """

    line: int
    text: str
    split_key: str = ""


class RejectedRow(NamedTuple):
    """A row that cannot be read: where it begins, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class ReadOptions:
    """How files are read; the `data.*` flags of the same names.

    Attributes:
        mode: "rows": every row is a document; "raw": a file is one text.
        columns: of a table, which (JSONL: fields) a document takes, joined by line ends; not needed where there is one.
        template: how they are put together instead, as `"{title}\\n{text}"`; `\\n` and `\\t` may be typed as two
            characters, `{{` and `}}` are braces.
        delimiter: between columns; None: a comma, in .tsv a tab.
        quote: what a field may stand in, to hold delimiters and line ends; "none": quotes are text.
        header: whether the first row names the columns; without it they are c1, c2, …
        encoding: of text files, or "auto"; a byte order mark is no part of the text.
        split_key_column: a column that is read beside the text.
    """

    mode: Mode = "rows"
    columns: tuple[str, ...] | None = None
    template: str | None = None
    delimiter: str | None = None
    quote: str = '"'
    header: bool = True
    encoding: str = "auto"
    split_key_column: str | None = None

    def __post_init__(self) -> None:
        try:
            if self.encoding != "auto":
                "".encode(self.encoding)
        except (LookupError, ValueError):
            raise UserError(f"--data.encoding {self.encoding} is unknown: give auto, utf-8, gb18030, …") from None
        if self.delimiter is not None and len(_unescaped(self.delimiter)) != 1:
            raise UserError(f"--data.delimiter {self.delimiter!r} is not one character: give ',' ';' '|' or '\\t'")
        if self.quote != "none" and len(self.quote) != 1:
            raise UserError(f"--data.quote {self.quote!r} is not one character: give '\"', \"'\" or none")
        if self.template is not None and not _parse_template(self.template):
            raise UserError(f"--data.template {self.template!r} names no column: write one in braces, as '{{text}}'")


def with_detected_encoding(source: Source, reading: ReadOptions) -> tuple[ReadOptions, float]:
    """`reading` with the encoding of that file found out where it is "auto", and how sure it is, from 0 to 1.

    Raises:
        UserError: the file is empty, cannot be read, or its encoding is none that is known.
    """
    with source.said(), source.open() as (file, _):
        start = file.read(4)
    if b"\xef\xbb\xbf".startswith(start):  # a byte order mark, or part of one, at most
        raise UserError(f"{source} is empty: give a file with text in it")
    if source.suffix == ".parquet":
        return replace(reading, encoding="utf-8"), 1.0
    if reading.encoding != "auto":
        return reading, 1.0
    encoding, sure = detect_encoding(source)
    return replace(reading, encoding=encoding), sure


@contextmanager
def open_rows(source: Source, reading: ReadOptions) -> Iterator[tuple[Iterator[Row | RejectedRow], BinaryIO]]:
    """The rows of one file, blank ones too, and the file itself, whose `tell` says how far reading has come.

    Args:
        source: the file.
        reading: with its encoding known.

    Raises:
        UserError: the file's kind is unknown, it is damaged, or a column is not there.
    """
    kind = source.suffix
    if kind not in (*READERS, ".parquet"):
        raise UserError(
            f"{source}: unknown kind of file {kind or '(no suffix)'}; {', '.join(READERS)}, .parquet can be read "
            "by rows, any text with --data.mode raw"
        )
    if kind == ".parquet":
        if source.compression:
            raise UserError(f"{source}: a Parquet table packed once more: unpack it")
        with source.open_raw() as raw:
            yield _sound(source, reading, _read_parquet(source, raw, reading)), raw
    else:
        newline = "" if READERS[kind] is _read_csv else None
        with open_text(source, reading.encoding, newline) as (file, raw):
            yield _sound(source, reading, READERS[kind](source, file, reading)), raw


def _sound(source: Source, reading: ReadOptions, rows: Iterator[Row | RejectedRow]) -> Iterator[Row | RejectedRow]:
    """Rows with line ends as they should be, without those that are no text."""
    with source.said():
        for row in rows:
            if isinstance(row, Row):
                if "\r" in row.text:
                    row = row._replace(text=row.text.replace("\r\n", "\n").replace("\r", "\n"))
                if not _is_text(row.text):
                    row = RejectedRow(row.line, _no_text(row.text, reading.encoding))
            yield row


def _is_text(text: str) -> bool:
    """Whether there is no surrogate in it, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_text(text: str, encoding: str) -> str:
    """What is wrong with the first surrogates: bytes they stand in for, or half a character."""
    first = re.search("[\ud800-\udfff]{1,4}", text)
    assert first is not None
    codes = list(itertools.takewhile(lambda code: 0xDC80 <= code <= 0xDCFF, map(ord, first.group())))
    if not codes:
        return "half a character, as \\ud83d: write characters whole"
    found = bytes(code - 0xDC00 for code in codes).hex(" ")
    return f"bytes {found} are not {encoding}: mend that row, or give the file's own encoding, as --data.encoding auto"


@contextmanager
def open_text_chunks(source: Source, reading: ReadOptions) -> Iterator[tuple[Iterator[str], BinaryIO]]:
    """One file's whole text in blocks that end before the first character of a line; and the file itself.

    The line before ends in no blank. No byte-pair vocabulary here joins such a line end to a word after it, so that the
    blocks encode as the whole text does.

    Raises:
        UserError: the file is a Parquet table, damaged, or not of that encoding.
    """
    if source.suffix == ".parquet":
        raise UserError(f"{source} is a table, not text: use --data.mode rows")
    with open_text(source, reading.encoding, newline=None) as (file, raw):  # which turns every line end into \n
        yield _pieces(source, reading, file), raw


def _pieces(source: Source, reading: ReadOptions, file: TextIOBase) -> Iterator[str]:
    waiting, lines = "", 0
    with source.said():
        while block := file.read(RAW_BLOCK):
            if not _is_text(block):
                first = re.search("[\ud800-\udfff]", block)
                assert first is not None
                line = lines + waiting.count("\n") + block.count("\n", 0, first.start()) + 1
                raise UserError(f"{source} line {line}: {_no_text(block, reading.encoding)}")
            waiting += block
            cut = re.match(r"(?s).*\S\n(?=\S)", waiting)
            if cut or len(waiting) > LONGEST_BLOCK:
                end = cut.end() if cut else len(waiting)
                yield waiting[:end]
                lines += waiting.count("\n", 0, end)
                waiting = waiting[end:]
    if waiting:
        yield waiting


# ------------------------------------------------------------------------------------------------------- formats


class Unclosed(Exception):
    """A row that goes on and on."""


class _Lines:
    """The lines of a file, those of the row being read remembered, so that they can be read anew."""

    def __init__(self, file: Iterable[str]) -> None:
        self.file = iter(file)
        self.again: deque[str] = deque()
        self.taken: list[str] = []
        self.size = 0  # characters taken
        self.number = 1  # of the line the row begins in

    def __iter__(self) -> Iterator[str]:
        while line := self.again.popleft() if self.again else next(self.file, ""):
            self.size += len(line)
            if self.size > LONGEST_ROW:
                raise Unclosed
            self.taken.append(line)
            yield line

    def done(self) -> None:
        """The row is whole."""
        self.number += len(self.taken)
        self.taken.clear()
        self.size = 0

    def skip(self) -> None:
        """The row's first line is to be left out, those after it begin rows of their own."""
        self.again.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]
        self.done()


def _read_csv(source: Source, file: Iterable[str], reading: ReadOptions) -> Iterator[Row | RejectedRow]:
    delimiter = _unescaped(reading.delimiter or ("\t" if source.suffix == ".tsv" else ","))
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # fields of any length; Python's own limit is 128 KiB
    form: dict[str, Any] = {"delimiter": delimiter, "strict": True, "quotechar": reading.quote}
    if reading.quote == "none":
        form |= {"quotechar": None, "quoting": csv.QUOTE_NONE}
    lines = _Lines(file)
    rows = csv.reader(lines, **form)
    names: list[str] = []
    positions: list[int] = []
    combine = _combiner(reading)
    while True:
        try:
            row = next(rows, None)
        except (csv.Error, Unclosed) as error:
            open_quote = isinstance(error, Unclosed) or "end of data" in str(error)
            reason = "a quote is opened and never closed" if open_quote else str(error)
            rejected = RejectedRow(lines.number, f"{reason}: mend that row's quotes, or give --data.quote none")
            if not names:
                raise UserError(f"{source} line {rejected.line}: {rejected.reason}") from None
            yield rejected
            lines.skip()
            rows = csv.reader(lines, **form)
            continue
        if row is None:
            return
        line = lines.number
        lines.done()
        if not row:  # a blank line
            continue
        if not names:
            names = row if reading.header else [f"c{i + 1}" for i in range(len(row))]
            if not _is_text(",".join(names)):
                raise UserError(f"{source} line {line}: {_no_text(','.join(names), reading.encoding)}")
            _suspect(source, reading, row)
            positions = [names.index(name) for name in _chosen(source, reading, names)]
            mark = names.index(reading.split_key_column) if reading.split_key_column is not None else None
            if reading.header:
                continue
        if len(row) != len(names):
            yield RejectedRow(
                line,
                f"{len(row)} fields where there are {len(names)} columns ({_listed(names)}): mend that row, or give "
                "--data.delimiter",
            )
        else:
            yield Row(line, combine([row[i] for i in positions]), "" if mark is None else row[mark])


def _suspect(source: Source, reading: ReadOptions, row: list[str]) -> None:
    """Refuses a first row that is one field with another delimiter in it, which would make whole rows documents."""
    for other, typed in ((";", "';'"), ("\t", "'\\t'"), ("|", "'|'")):
        if reading.delimiter is None and len(row) == 1 and other in row[0]:
            raise UserError(
                f"{source}: its one column is {row[0]!r}: give --data.delimiter {typed} if that parts it, else ','"
            )


def _read_lines(source: Source, file: Iterable[str], reading: ReadOptions) -> Iterator[Row | RejectedRow]:
    """A plain text has no columns to choose: a line is a document."""
    if reading.split_key_column is not None:
        raise UserError(f"{source} has no columns, so no column {reading.split_key_column!r}: give a table")
    for number, line in enumerate(file, start=1):
        yield Row(number, line.removesuffix("\n"))


def _read_jsonl(source: Source, file: Iterable[str], reading: ReadOptions) -> Iterator[Row | RejectedRow]:
    wanted, combine = _wanted(reading), _combiner(reading)
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_once)
            if not isinstance(row, dict):
                raise UserError(f"a {type(row).__name__}; one JSON object a line is needed")
            chosen = wanted if wanted and wanted.keys() <= row.keys() else _chosen("it", reading, list(row))
            mark = "" if reading.split_key_column is None else _text(row[reading.split_key_column])
            yield Row(number, combine([row[name] for name in chosen]), mark)
        except UserError as error:
            yield RejectedRow(number, str(error))
        except KeyError:
            yield RejectedRow(number, f"it has no field {reading.split_key_column!r}: add it")
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            yield RejectedRow(number, f"not JSON ({reason}): one object a line is needed")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, unless it has a field twice, of which the usual reader keeps the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two fields called {twice!r}: rename or remove one")
    return row


def _read_parquet(source: Source, raw: BinaryIO, reading: ReadOptions) -> Iterator[Row | RejectedRow]:
    from pyarrow import ArrowException  # imported here: nothing else needs it
    from pyarrow.parquet import ParquetFile

    combine, number = _combiner(reading), 0
    try:
        with ParquetFile(raw) as file:
            chosen = _chosen(source, reading, file.schema_arrow.names)
            columns = list(
                dict.fromkeys([*chosen, reading.split_key_column] if reading.split_key_column is not None else chosen)
            )
            for batch in file.iter_batches(batch_size=2**12, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    try:
                        text = combine([row[name] for name in chosen])
                    except UnicodeDecodeError as error:
                        yield RejectedRow(
                            number, f"bytes that are not text in UTF-8 ({error.reason}): choose other columns"
                        )
                        continue
                    yield Row(
                        number, text, "" if reading.split_key_column is None else _text(row[reading.split_key_column])
                    )
    except (ArrowException, ValueError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{source} cannot be read as a Parquet table of text ({reason}): choose other columns"
        ) from None


READERS: dict[str, Callable[[Source, Iterable[str], ReadOptions], Iterator[Row | RejectedRow]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_lines,
    ".jsonl": _read_jsonl,
}


# --------------------------------------------------------------------------------------------------- row -> text


def _chosen(where: Source | str, reading: ReadOptions, names: list[str]) -> list[str]:
    """The columns a document takes, once it is sure that they, and the one read beside, are among `names`."""
    wanted = list(_wanted(reading))
    if not wanted:
        others = [name for name in names if name != reading.split_key_column]
        if len(others) != 1:
            raise UserError(f"{where} has columns {_listed(names)}: choose with --data.columns or --data.template")
        wanted = others
    for name in [*wanted, reading.split_key_column]:
        if name is not None and name not in names:
            flag = "--data.template" if reading.template else "--data.columns"
            hint = did_you_mean(name, names) or (f": choose with {flag}" if name in wanted else "")
            raise UserError(f"{where} has no column {name!r}; it has {_listed(names)}{hint}")
        if name is not None and names.count(name) > 1:
            raise UserError(f"{where} has {names.count(name)} columns called {name!r}: rename all but one in the file")
    return wanted


def _wanted(reading: ReadOptions) -> dict[str, None]:
    """The columns a document takes, in order, or none where that is left to the file."""
    if reading.template:
        return dict.fromkeys(name for _, name in _parse_template(reading.template) if name is not None)
    return dict.fromkeys(reading.columns or ())


def _combiner(reading: ReadOptions) -> Callable[[list[Any]], str]:
    """What puts the fields of a row's chosen columns together as `reading` asks."""
    if reading.template is None:
        return lambda fields: "\n".join(map(_text, fields))
    places = {name: place for place, name in enumerate(_wanted(reading))}
    pieces = [(before, None if name is None else places[name]) for before, name in _parse_template(reading.template)]
    return lambda fields: "".join(
        before + (_text(fields[place]) if place is not None else "") for before, place in pieces
    )


@functools.cache
def _parse_template(template: str) -> list[tuple[str, str | None]]:
    """`"a{b}c"` -> `[("a", "b"), ("c", None)]`; none where no column is named."""
    try:
        parsed = list(string.Formatter().parse(_unescaped(template)))
    except ValueError as error:
        raise UserError(f"--data.template {template!r}: {error}; columns stand in braces, as '{{text}}'") from None
    # a column's name may hold what format would take for a conversion or a format: {price:.2f} is a column so called
    pieces = [
        (literal, name and name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else ""))
        for literal, name, form, conversion in parsed
    ]
    return pieces if any(name is not None for _, name in pieces) else []


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _text(value: Any) -> str:
    """A field as text: a missing one is nothing, a nested one is JSON."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return json.dumps(value, ensure_ascii=False, default=_text) if isinstance(value, dict | list) else str(value)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
