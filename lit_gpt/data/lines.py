"""The lines of a text file, and the bytes in it that are not text."""

import itertools
import re
from collections.abc import Iterator
from functools import partial
from io import TextIOBase

from lit_gpt.data.read_options import ReadOptions
from lit_gpt.data.sources import Source
from lit_gpt.errors import UserError

MAX_LINE_CHARACTERS = 2**24  # a longer line is no row of a table
LONG_LINE = (
    f"more than {MAX_LINE_CHARACTERS:,} characters, which is no row of a table: shorten that line, or give "
    "--data.mode raw if the file is one text"
)


class LongLine(str):
    """A line end in the place of a line of more than `MAX_LINE_CHARACTERS`, which may not fit into memory."""


def read_limited_lines(source: Source, file: TextIOBase, skip_rows: int = 0) -> Iterator[str]:
    """Yield the lines of a file, and a `LongLine` in the place of one that is too long.

    Args:
        source: The file, as error messages name it.
        file: The file, opened.
        skip_rows: Number of lines at its start that are left out.

    Raises:
        UserError: There are fewer lines than `skip_rows`.
    """
    skip_lines(source, file, skip_rows)
    for line in iter(partial(file.readline, MAX_LINE_CHARACTERS), ""):
        is_whole = len(line) < MAX_LINE_CHARACTERS or line.endswith(("\n", "\r"))
        if not is_whole:
            _skip_rest(file, line)
        yield line if is_whole else LongLine("\n")


def skip_lines(source: Source, file: TextIOBase, count: int) -> None:
    """Skip lines at the start of a file.

    Raises:
        UserError: It does not have so many.
    """
    for number in range(count):
        line = file.readline(MAX_LINE_CHARACTERS)
        if not line:
            raise UserError(f"--data.skip_rows {count} leaves nothing of {source}, which has {number} lines: give less")
        _skip_rest(file, line)


def _skip_rest(file: TextIOBase, line: str) -> None:
    """Skip the rest of a line whose first characters have been read."""
    while line and not line.endswith(("\n", "\r")):
        line = file.readline(MAX_LINE_CHARACTERS)


def is_valid_text(text: str) -> bool:
    """Return whether a text contains no surrogates, which are not characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def describe_surrogates(text: str, options: ReadOptions) -> str:
    """Say what the first surrogates in a text are: invalid bytes of the file, or half a character in JSON.

    Args:
        text: The text.
        options: How the file is read, with a known encoding.
    """
    first = re.search("[\ud800-\udfff]{1,4}", text)
    assert first is not None
    codes = list(itertools.takewhile(lambda code: 0xDC80 <= code <= 0xDCFF, map(ord, first.group())))
    if not codes:
        return "a lone surrogate, as \\ud83d, is no character: write both halves of a surrogate pair"
    invalid = bytes(code - 0xDC00 for code in codes).hex(" ")
    other = "utf-8" if options.encoding.lower() == "gb18030" else "gb18030"
    return (
        f"bytes {invalid} are not {options.encoding}: correct them, or give the encoding of the file, as "
        f"--data.encoding {other if options.is_encoding_detected else 'auto'}"
    )
