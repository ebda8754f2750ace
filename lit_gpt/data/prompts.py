"""Prompts made of columns: a document of training, up to a column that the model is to write."""

from collections.abc import Mapping

from lit_gpt.data.read_options import ReadOptions, join_names, make_formatter
from lit_gpt.errors import UserError, did_you_mean, shorten

PLACEHOLDER = "\0"  # stands for the columns that are not given; no field of a table contains it


def parse_given(texts: list[str], columns: list[str]) -> dict[str, str]:
    """Parse `COLUMN=TEXT` pairs. A column may have a `=` in its name, and a text as well.

    Args:
        texts: The pairs.
        columns: The columns of a document.

    Raises:
        UserError: A pair has no `=`, its column is unknown, or a column is given twice.
    """
    given: dict[str, str] = {}
    for text in texts:
        if "=" not in text:
            raise UserError(f"--given {shorten(text)!r} names no column: write COLUMN=TEXT, as {columns[0]}=TEXT")
        matches = [column for column in columns if text.startswith(f"{column}=")]
        if not matches:
            name = text.partition("=")[0]
            raise UserError(
                f"--given {shorten(name)!r} is no column of the training documents; they have {join_names(columns)}"
                f"{did_you_mean(name, columns)}"
            )
        column = max(matches, key=len)
        if column in given:
            raise UserError(f"--given {column} is there twice: leave one out")
        given[column] = text.removeprefix(f"{column}=")
    return given


def start_of_document(options: ReadOptions, given: Mapping[str, str]) -> str:
    r"""Return the text of a document up to the first column that is not given.

    Example:
        >>> start_of_document(ReadOptions(template=r"{title}\n{text}"), {"title": "静夜思"})
        '静夜思\n'

    Args:
        options: How the documents of training were read.
        given: The text of some columns. In the order of a document they come before all others.

    Raises:
        UserError: All columns are given, or one that comes after a column that is not given.
    """
    columns = options.named_columns()
    missing = [column for column in columns if column not in given]
    if not missing:
        raise UserError(
            f"--given has all columns of a document, {join_names(columns)}, and nothing is left to write: leave out "
            f"{shorten(columns[-1])}, or give the beginning of the document as a prompt"
        )
    late = [column for column in columns[columns.index(missing[0]) :] if column in given]
    if late:
        raise UserError(
            f"--given {shorten(late[0])}: a document is {join_names(columns)} in this order, and "
            f"{shorten(missing[0])} is not given: give {shorten(missing[0])} too, or leave out {shorten(late[0])}"
        )
    document = make_formatter(options)([given.get(column, PLACEHOLDER) for column in columns])
    return document.partition(PLACEHOLDER)[0]
