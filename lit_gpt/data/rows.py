"""A row of a file, as every reader gives it; a part of a file that is one text."""

from typing import NamedTuple


class Row(NamedTuple):
    """A document of a file.

    Attributes:
        line: Line in which it begins, from 1; in Parquet the number of the row.
        text: Text of the document.
        split_key: Field of the column `ReadOptions.split_key_column`.
    """

    line: int
    text: str
    split_key: str = ""


class RejectedRow(NamedTuple):
    """A row that cannot be read.

    Attributes:
        line: Line in which it begins, from 1; in Parquet the number of the row.
        reason: What is wrong and how to correct it.
    """

    line: int
    reason: str


class Chunk(NamedTuple):
    """A part of a text in raw mode.

    Attributes:
        text: The text; "" if nothing is left of it.
        lines: Number of lines that were read for it, those that are left out included.
        rejected: Lines that cannot be read; they are left out.
    """

    text: str
    lines: int
    rejected: list[RejectedRow]
