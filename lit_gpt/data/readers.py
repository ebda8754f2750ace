"""Files -> documents: CSV, TSV, TXT, JSONL and Parquet, one row a document, or a whole file as one text.

Text comes out as it stands in the file (a price "12.50" stays "12.50"), but for its line ends, which become `\\n`.
Nothing is left out unreported: a row that cannot be read is an error that names its line.
"""

import codecs
import csv
import functools
import glob
import json
import os
import re
import string
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_gpt.errors import UserError, did_you_mean

Mode = Literal["rows", "raw"]

RAW_BLOCK = 2**20  # characters read at once in raw mode
LONGEST_BLOCK = 2**24  # past that a text without lines is cut where it stands


@dataclass(frozen=True)
class Reading:
    """How files are read; the `data.*` flags of the same names.

    Attributes:
        mode: "rows": every row is a document; "raw": a file is one text.
        columns: of a table, which (JSONL: fields) a document takes, joined by line ends; not needed where there is one.
        template: how they are put together instead, as `"{title}\\n{text}"`; `\\n` and `\\t` may be typed as two
            characters, `{{` and `}}` are braces.
        delimiter: between columns; None: a comma, in .tsv a tab.
        header: whether the first row names the columns; without it they are c1, c2, …
        encoding: of text files; a byte order mark is no part of the text.
    """

    mode: Mode = "rows"
    columns: tuple[str, ...] | None = None
    template: str | None = None
    delimiter: str | None = None
    header: bool = True
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        try:
            "".encode(self.encoding)
        except (LookupError, ValueError):
            raise UserError(f"--data.encoding {self.encoding} is unknown: give utf-8, gb18030, utf-16, …") from None
        if self.delimiter is not None and len(_unescaped(self.delimiter)) != 1:
            raise UserError(f"--data.delimiter {self.delimiter!r} is not one character: give ',' ';' '|' or '\\t'")
        if self.template is not None and not _parse_template(self.template):
            raise UserError(f"--data.template {self.template!r} names no column: write one in braces, as '{{text}}'")


def find_files(patterns: str | Iterable[str]) -> list[Path]:
    """The files a path, a glob or several of them name: in the order given, a glob's in the order of their names.

    Raises:
        UserError: one of them names nothing, or a folder.
    """
    found: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not pattern.strip():
            raise UserError("--data.files is empty: give a path, a list of them or a quoted glob")
        path = Path(os.path.expanduser(pattern))
        if path.is_dir():
            raise UserError(f"{pattern} is a folder: give its files, as --data.files '{pattern.rstrip('/')}/*.csv'")
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if path.exists() and not path.is_file():
            raise UserError(f"{pattern} is no ordinary file: copy its text into one")
        matches = [match for match in matches if match.is_file()]
        if not matches:
            beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"{pattern}: no such file{did_you_mean(path.name, beside)}; give --data.files PATH")
        found.extend(matches)
    if not found:
        raise UserError("no file to read: give --data.files PATH")
    for number, path in enumerate(found):
        if path.resolve() in {other.resolve() for other in found[:number]}:
            raise UserError(f"--data.files names {path} twice: leave one out")
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{os.fsencode(path)!r}: its name is not UTF-8: rename it") from None
        if not os.access(path, os.R_OK):
            raise UserError(f"{path} may not be read: give yourself the right to, as with chmod u+r")
    return found


def read_documents(path: Path, reading: Reading) -> Iterator[str]:
    """The documents of one file, a row each, blank ones too.

    Raises:
        UserError: the file's kind is unknown, it is empty, a column or field is not there, a row is broken, or its
            bytes are not of that encoding.
    """
    kind = path.suffix.lower()
    if kind not in READERS:
        raise UserError(
            f"{path}: unknown kind of file {kind or '(no suffix)'}; {', '.join(READERS)} can be read by rows, "
            "any text with --data.mode raw"
        )
    _refuse_empty(path)
    try:
        for document in READERS[kind](path, reading):
            yield _unix_lines(document)
    except UnicodeError:
        raise _undecodable(path, reading.encoding) from None


def read_text(path: Path, reading: Reading) -> Iterator[str]:
    """One file's whole text in blocks that end before the first character of a line.

    cl100k_base never joins a line end to a word after it, so that the blocks encode as the whole text does.

    Raises:
        UserError: the file is empty, a Parquet table, or not of that encoding.
    """
    if path.suffix.lower() == ".parquet":
        raise UserError(f"{path} is a table, not text: use --data.mode rows")
    _refuse_empty(path)
    waiting = ""
    try:
        with open(path, encoding=_codec(reading.encoding)) as file:  # text mode turns every line end into \n
            while block := file.read(RAW_BLOCK):
                waiting += block
                cut = re.match(r"(?s).*\n(?=\S)", waiting)
                if cut or len(waiting) > LONGEST_BLOCK:
                    end = cut.end() if cut else len(waiting)
                    yield waiting[:end]
                    waiting = waiting[end:]
    except UnicodeError:
        raise _undecodable(path, reading.encoding) from None
    if waiting:
        yield waiting


def _refuse_empty(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(len(codecs.BOM_UTF8) + 1)
    if codecs.BOM_UTF8.startswith(start):  # a part of a byte order mark would pass for nothing at all
        raise UserError(f"{path} is empty: give a file with text in it")


def _read_csv(path: Path, reading: Reading) -> Iterator[str]:
    delimiter = _unescaped(reading.delimiter or ("\t" if path.suffix.lower() == ".tsv" else ","))
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # fields of any length; Python's own limit is 128 KiB
    with open(path, encoding=_codec(reading.encoding), newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        names: list[str] = []
        begins = 1  # the line of the row to come
        try:
            for row in rows:
                begins = rows.line_num + 1
                if not row:  # a blank line
                    continue
                if not names:
                    names = row if reading.header else [f"c{i + 1}" for i in range(len(row))]
                    _suspect(path, reading, row)
                    fill = _filler(path, reading, names)
                    if reading.header:
                        continue
                if len(row) != len(names):
                    raise UserError(
                        f"{path} line {rows.line_num}: {len(row)} fields where there are {len(names)} columns "
                        f"({_listed(names)}): mend that row, or give --data.delimiter"
                    )
                yield fill(dict(zip(names, row)))
        except csv.Error as error:
            what = "a quote is opened and never closed" if "end of data" in str(error) else str(error)
            raise UserError(f"{path} line {begins}: {what}: mend that row's quotes") from None


def _suspect(path: Path, reading: Reading, row: list[str]) -> None:
    """Refuses a first row that is one field with another delimiter in it, which would make whole rows documents."""
    for other, typed in ((";", "';'"), ("\t", "'\\t'"), ("|", "'|'")):
        if reading.delimiter is None and len(row) == 1 and other in row[0]:
            raise UserError(
                f"{path}: its one column is {row[0]!r}: give --data.delimiter {typed} if that parts it, else ','"
            )


def _read_lines(path: Path, reading: Reading) -> Iterator[str]:
    """A plain text has no columns to choose: a line is a document."""
    with open(path, encoding=_codec(reading.encoding)) as file:
        for line in file:
            yield line.removesuffix("\n")


def _read_jsonl(path: Path, reading: Reading) -> Iterator[str]:
    with open(path, encoding=_codec(reading.encoding)) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_once)
            except UserError as error:
                raise UserError(f"{path} line {number}: {error}") from None
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise UserError(f"{path} line {number}: not JSON ({reason}): one object a line is needed") from None
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number}: a {type(row).__name__}; one JSON object a line is needed")
            document = _filler(f"{path} line {number}", reading, list(row))(row)
            if _SURROGATE.search(document):
                raise UserError(f"{path} line {number}: half a character, as \\ud83d: write characters whole")
            yield document


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, unless it has a field twice, of which the usual reader keeps the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two fields called {twice!r}: rename or remove one")
    return row


def _read_parquet(path: Path, reading: Reading) -> Iterator[str]:
    from pyarrow import ArrowException  # imported here: nothing else needs it
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            fill = _filler(path, reading, names)
            for batch in file.iter_batches(columns=_wanted(reading) or names):
                for row in batch.to_pylist():
                    yield fill(row)
    except UserError:
        raise
    except (ArrowException, ValueError, ArithmeticError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as a Parquet table of text ({reason}): choose other columns") from None


_SURROGATE = re.compile("[\\ud800-\\udfff]")  # JSON can escape one without its other half

READERS = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_lines,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _filler(where: Path | str, reading: Reading, names: list[str]) -> Callable[[dict[str, Any]], str]:
    """What puts a row's fields together as `reading` asks, once it is sure that they are among `names`."""
    wanted = _wanted(reading)
    if not wanted:
        if len(names) != 1:
            raise UserError(f"{where} has columns {_listed(names)}: choose with --data.columns or --data.template")
        wanted = names
    for name in wanted:
        if name not in names:
            flag = "--data.template" if reading.template else "--data.columns"
            hint = did_you_mean(name, names) or f": choose with {flag}"
            raise UserError(f"{where} has no column {name!r}; it has {_listed(names)}{hint}")
        if names.count(name) > 1:
            raise UserError(f"{where} has {names.count(name)} columns called {name!r}: rename all but one in the file")
    if reading.template is None:
        return lambda row: "\n".join(_text(row[name]) for name in wanted)
    pieces = _parse_template(reading.template)
    return lambda row: "".join(before + (_text(row[name]) if name is not None else "") for before, name in pieces)


def _wanted(reading: Reading) -> list[str]:
    """The columns a document takes, or none where that is left to the file."""
    if reading.template:
        return [name for _, name in _parse_template(reading.template) if name is not None]
    return list(reading.columns or ())


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


def _unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "")


def _codec(encoding: str) -> str:
    """The codec that leaves a byte order mark out."""
    return "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding


def _undecodable(path: Path, encoding: str) -> UserError:
    """The error for a file that is not of that encoding; names the first bad line where lines can be told apart."""
    where = ""
    with open(path, "rb") as file:
        wide = encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32"))  # whose lines end in no single byte
        for number, line in enumerate([] if wide else file, start=1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError as error:
                where = f" line {number}, bytes {line[error.start : error.start + 4].hex(' ')}"
                break
    with open(path, "rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return UserError(f"{path}: not {encoding} but utf-16: give --data.encoding utf-16")
    other = "gb18030" if _codec(encoding) == "utf-8-sig" else "utf-8"
    return UserError(f"{path}{where}: not {encoding}; give its encoding, as --data.encoding {other}")
