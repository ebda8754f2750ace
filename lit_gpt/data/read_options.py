"""How input files are read, and how the fields of a row become the text of a document."""

import functools
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from lit_gpt.data.sources import Source
from lit_gpt.errors import UserError, did_you_mean, shorten

Mode = Literal["rows", "raw"]
Format = Literal["csv", "tsv", "txt", "jsonl", "parquet"]

MAX_COMPARED_NAMES = 1000  # names of columns among which a similar one is searched


@dataclass(frozen=True)
class ReadOptions:
    """How files are read; the `data.*` flags of the same names.

    Attributes:
        mode: "rows": every row is a document; "raw": a file is one text.
        format: Format of the files, whatever their suffix. None: the suffix decides.
        columns: Columns of a table (JSONL: fields) that make a document, joined by line ends. None: the only column.
        template: How columns make a document instead, as `"{title}\\n{text}"`. `\\n` and `\\t` may be typed as two
            characters; `{{` and `}}` are braces.
        delimiter: Character between columns. None: the one of a first line `sep=;`, otherwise a comma, in .tsv a tab.
        quote: Character around fields that contain delimiters or line ends; "none": quotes are part of the text.
        header: Whether the first row names the columns. Without it they are named c1, c2, …
        skip_rows: Number of lines at the start of each file that are left out.
        encoding: Encoding of text files, or "auto" to detect it.
        is_encoding_detected: Whether `encoding` was "auto" before.
        split_key_column: The column `split_column`, which names the split of a row, or `group_column`; None: neither.
    """

    mode: Mode = "rows"
    format: Format | None = None
    columns: tuple[str, ...] | None = None
    template: str | None = None
    delimiter: str | None = None
    quote: str = '"'
    header: bool = True
    skip_rows: int = 0
    encoding: str = "auto"
    is_encoding_detected: bool = False
    split_key_column: str | None = None

    def __post_init__(self) -> None:
        self._check_settings_have_effect()
        try:
            if self.encoding != "auto":
                "".encode(self.encoding)
        except (LookupError, ValueError):
            raise UserError(f"--data.encoding {self.encoding} is unknown: give auto, utf-8, gb18030, …") from None
        if self.delimiter is not None and len(unescape(self.delimiter)) != 1:
            raise UserError(f"--data.delimiter {self.delimiter!r} is not one character: give ',' ';' '|' or '\\t'")
        if self.format == "tsv" and self.delimiter is not None and unescape(self.delimiter) != "\t":
            raise UserError(
                f"--data.format tsv has tabs between columns, not --data.delimiter {self.delimiter!r}: give "
                "--data.format csv, or leave one out"
            )
        if self.quote != "none" and len(self.quote) != 1:
            raise UserError(f"--data.quote {self.quote!r} is not one character: give '\"', \"'\" or none")
        if self.skip_rows < 0:
            raise UserError(f"--data.skip_rows is {self.skip_rows}: give 0 or more")
        if self.template is not None and not _parse_template(self.template):
            raise UserError(f"--data.template {self.template!r} names no column: write one in braces, as '{{text}}'")

    def _check_settings_have_effect(self) -> None:
        """Raise UserError if a setting has a value but no effect."""
        if self.columns is not None and self.template is not None:
            raise UserError("--data.columns and --data.template both choose the columns of a document: leave one out")
        given = [
            f"--data.{name}" for name in self.given("format", "columns", "template", "delimiter", "quote", "header")
        ]
        if self.mode == "raw" and given:
            raise UserError(
                f"--data.mode raw reads no tables, each file is one text: leave out {' and '.join(given)}, or give "
                "--data.mode rows"
            )

    def given(self, *names: str) -> list[str]:
        """Return those of some fields that do not have their default."""
        defaults = {field.name: field.default for field in fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def suffix_of(self, source: Source) -> str:
        """Return the suffix of the format as which a file is read."""
        return f".{self.format}" if self.format else source.suffix

    def named_columns(self) -> list[str]:
        """Return the columns of a document in order, each once, or [] if neither `columns` nor `template` names any."""
        if self.template:
            return list(dict.fromkeys(name for _, name in _parse_template(self.template) if name is not None))
        return list(dict.fromkeys(self.columns or ()))


def select_columns(
    source: Source | str, options: ReadOptions, names: list[str], text_sizes: Callable[[], list[int]]
) -> list[str]:
    """Return the columns that make a document, after checking that a table has them and the split key.

    Args:
        source: The table, as error messages name it.
        options: How it is read.
        names: All columns of the table.
        text_sizes: Returns about how much text each of them has; called for the error that proposes one.

    Raises:
        UserError: A column is missing or ambiguous, or none is named and the table has several.
    """
    columns, counts = options.named_columns(), Counter(names)
    if not names:
        raise UserError(f"{source} has no columns: give one with text")
    if not columns:
        columns = [name for name in names if name != options.split_key_column]
        if len(columns) != 1:
            typed = [(size, _typed_column(name)) for size, name in zip(text_sizes(), names) if columns.count(name) == 1]
            _, example = max(filter(lambda pair: pair[1], typed), default=(0, ""))
            raise UserError(
                f"{source} has columns {join_names(names)}: choose with --data.columns{example} or --data.template"
            )
    for name in [*columns, options.split_key_column]:
        if name is not None and name not in counts:
            flag = "--data.template" if options.template else "--data.columns"
            hint = did_you_mean(name, names[:MAX_COMPARED_NAMES]) or (
                f": choose with {flag}" if name in columns else ""
            )
            raise UserError(f"{source} has no column {name!r}; it has {join_names(names)}{hint}")
        if name is not None and counts[name] > 1:
            raise UserError(
                f"{source} has {counts[name]} columns called {shorten(name)!r}: rename all but one in the file"
            )
    return columns


def text_sizes(rows: Iterable[Iterable[Any]]) -> list[int]:
    """Return the number of characters in each column of some rows."""
    return [sum(len(field) for field in column if isinstance(field, str)) for column in zip(*rows)]


def _typed_column(name: str) -> str:
    """Return a column as it is typed after `--data.columns`, after a space; "" if that needs more than quotes."""
    if not re.fullmatch(r"\w[\w .-]{,40}", name) or name == "null":
        return ""
    return f" '{name}'" if " " in name else f" {name}"


def make_formatter(options: ReadOptions) -> Callable[[list[Any]], str]:
    """Return the function that makes the text of a document from the fields of its `select_columns`."""
    if options.template is None:
        return lambda fields: "\n".join(map(field_to_text, fields))
    indices = {name: index for index, name in enumerate(options.named_columns())}
    parts = [(text, None if name is None else indices[name]) for text, name in _parse_template(options.template)]
    return lambda fields: "".join(
        text + (field_to_text(fields[index]) if index is not None else "") for text, index in parts
    )


@functools.cache
def _parse_template(template: str) -> list[tuple[str, str | None]]:
    """Parse a template into pairs of literal text and the column after it.

    Returns:
        For "a{b}c" `[("a", "b"), ("c", None)]`; [] if the template names no column.
    """
    try:
        parsed = list(string.Formatter().parse(unescape(template)))
    except ValueError as error:
        raise UserError(f"--data.template {template!r}: {error}; columns stand in braces, as '{{text}}'") from None
    # a template has no conversions or formats: {price:.2f} is the column "price:.2f"
    parts = [
        (text, name and name + (f"!{conversion}" if conversion else "") + (f":{format_spec}" if format_spec else ""))
        for text, name, format_spec, conversion in parsed
    ]
    return parts if any(name is not None for _, name in parts) else []


def unescape(text: str) -> str:
    r"""Replace a typed `\n` or `\t` by the character. A second backslash keeps it: `\\n` is a backslash and an n."""
    characters = {"\\n": "\n", "\\t": "\t"}
    return re.sub(r"\\(\\?[nt])", lambda match: characters.get(match[0], match[1]), text)


class JSONNumber(str):
    """A number of a JSON file as it is written there: 0.10 is not 0.1, and 1e5 not 100000.0."""


def field_to_text(value: Any) -> str:
    """Return a field as text: None is empty, True is `true`, a list or dict is JSON.

    Raises:
        ValueError: It is bytes that are not UTF-8, or an error in the place of a value: this error.
        ArithmeticError: It is this error.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, ValueError | ArithmeticError):
        raise value
    return _to_json(value) if isinstance(value, bool | dict | list) else str(value)


def _to_json(value: Any) -> str:
    """Return a value as JSON; one that JSON does not have, as a date, is a string."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_to_json(str(name))}: {_to_json(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_to_json, value)) + "]"
    if isinstance(value, JSONNumber):
        return value
    return json.dumps(value, ensure_ascii=False, default=field_to_text)


def join_names(names: list[str]) -> str:
    """Return at most 20 names, each of at most 80 characters, separated by commas."""
    return ", ".join(map(shorten, names[:20])) + (", …" if len(names) > 20 else "")
