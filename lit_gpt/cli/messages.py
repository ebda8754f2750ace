"""Console output. Whatever a command prints goes through this module, which makes it printable.

A value in a line may come from a file, a checkpoint or the environment. `lit_gpt.printable` says which of its
characters are replaced by escapes, so that no value can control the terminal or look like another line.
"""

import argparse
import json
import logging
import shlex
import shutil
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn, TextIO

from lit_gpt.errors import UserError
from lit_gpt.lines import COLUMNS, wrap_command, wrap_line
from lit_gpt.printable import UNPRINTABLE, escape_controls

# ------------------------------------------------------------------------------------------------------------- printing


def print_lines(*lines: str, to_stderr: bool = False) -> None:
    """Print lines; a line end inside a line is a control character and is escaped.

    Lines are broken so that they fit into 80 columns, in a pipe too. Errors, to stderr, stay one line.
    """
    for line in map(escape_controls, lines):
        if to_stderr:
            print(line, file=sys.stderr)
        else:
            print(*wrap_line(line), sep="\n")


def print_command(label: str, *parts: list[str]) -> None:
    """Print a command that a person can copy into a shell.

    Args:
        label: What the command does.
        parts: Its words; the words of a part, such as a flag and its value, stay on one line.
    """
    for line in wrap_command(label, map(shlex.join, parts)):
        print(escape_controls(line))


def print_page(lines: Iterable[str]) -> None:
    """Print lines as they are, for example those of a table: they have their width already."""
    for line in lines:
        print(escape_controls(line))


def print_text(text: str) -> None:
    """Print a part of a generated text at once, with its line ends and tabs.

    Only a terminal needs the escapes: a file or another program receives the text as it was generated.
    """
    print(escape_controls(text, keep="\n\t") if is_terminal(sys.stdout) else text, end="", flush=True)


def can_print(text: str) -> bool:
    """Return whether the encoding of stdout has all characters of a text. It has `?` for the others."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8", errors="strict")
    except UnicodeEncodeError:
        return False
    return True


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a standard stream is a terminal; Python has None for one that is closed."""
    return stream is not None and stream.isatty()


def read_line(prompt: str) -> str | None:
    """Ask for a line and return it without its line end; None at the end of stdin.

    Without a terminal `prompt` is not printed, and on a terminal it is no part of what is piped on from stdout.
    """
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    try:
        if sys.stdout.isatty():
            return input(prompt)  # with readline, if that is imported
        print(prompt, end="", file=sys.stderr, flush=True)
        return input()
    except EOFError:
        print(file=sys.stderr)
        return None


def print_traceback(error: BaseException) -> None:
    """Print the traceback of a bug to stderr."""
    print(format_traceback(error), file=sys.stderr)


def format_traceback(error: BaseException) -> str:
    """Return the traceback as Python prints it, with control characters escaped.

    The lines of a message after its first are indented, so that none looks like a line of this program.
    """
    root = traceback.TracebackException.from_exception(error, compact=True)
    errors = [root]
    for found in errors:  # the loop appends the causes and contexts, and so visits them too
        found.__notes__ = [escape_controls(str(note)) for note in found.__notes__ or []]
        errors += [other for other in (found.__cause__, found.__context__) if other is not None]
        errors += found.exceptions or []
    parts = [part if part.startswith((" ", "\n")) else f"{_indent(part)}\n" for part in root.format()]
    return escape_controls("".join(parts).strip(), keep="\n")


def print_json(value: Any) -> None:
    """Print a value as one line of JSON, at once."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(json_line(value, ensure_ascii=encoding.lower() != "utf-8"), flush=True)


def json_line(value: Any, ensure_ascii: bool = False) -> str:
    """Return a value as one line of JSON; characters that are not printable become its own escapes."""
    text = json.dumps(value, ensure_ascii=ensure_ascii)
    return UNPRINTABLE.sub(lambda match: json.dumps(match[0])[1:-1], text)


def print_rows(rows: Iterable[dict[str, Any]], as_json: bool) -> None:
    """Print rows of named values; in a table, the words of a column's name stand below each other.

    A table that is wider than 80 columns is turned, if that makes it narrower: a row becomes a column.

    Args:
        rows: The values by column; a column may be missing in some rows.
        as_json: Print one JSON object per row, each as soon as the row is computed, instead of an aligned table.
    """
    if as_json:
        for row in rows:
            print_json(row)
        return
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    names = zip_longest(*(reversed(column.split("_")) for column in columns), fillvalue="")
    lines = [list(words) for words in names][::-1]
    lines += [[_format_cell(column, row.get(column)) for column in columns] for row in rows]
    turned = [[column, *(_format_cell(column, row.get(column)) for row in rows)] for column in columns]
    tables = [_align(lines), _align(turned)]
    fits = max(map(len, tables[0]), default=0) <= COLUMNS
    for line in tables[0] if fits else min(tables, key=lambda table: max(map(len, table))):
        print(line)


def _align(lines: list[list[str]]) -> list[str]:
    """Return the lines of a table; the cells of a column end below each other."""
    lines = [[escape_controls(cell) for cell in line] for line in lines]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]


def _format_cell(column: str, value: Any) -> str:
    """Format a value for a table: losses with four decimals, other floats with about three digits."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if column == "loss":
        return f"{value:.4f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


# ---------------------------------------------------------------------------------- what Python and libraries print


def prepare_console() -> None:
    """Make printable what Python and other libraries print in this process: warnings, log records, tracebacks.

    A terminal whose encoding is not UTF-8 shows `?` for what it cannot show.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None if the stream is closed
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    original_format = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: f"{_indent(original_format(*args, **kwargs))}\n"
    logging.setLogRecordFactory(_PrintableRecord)
    sys.excepthook = lambda error_type, error, where: print_traceback(error)
    sys.unraisablehook = threading.excepthook = _print_lost_error


def _indent(text: str) -> str:
    """Return a message of another library with escapes; its lines after the first are indented."""
    return escape_controls(text.rstrip("\n"), keep="\n").replace("\n", "\n  ")


class _PrintableRecord(logging.LogRecord):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[1] is not None:
            self.exc_text = format_traceback(self.exc_info[1])  # a formatter takes it if it is there

    def getMessage(self) -> str:
        return _indent(super().getMessage())


def _print_lost_error(args: Any) -> None:
    """Print an error that ended a thread, or that Python ignores."""
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        print_traceback(args.exc_value)


TRACKER_OPTION = "ignore:resource_tracker:UserWarning"


def quiet_lightning() -> None:
    """Silence Lightning's announcements, which the preflight replaces, and warnings that do not apply."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "The number of training batches",  # is smaller than the logging interval, which counts across epochs
        "Be aware that when using `ckpt_path`",  # a validation does not need the state of training callbacks
        "The '.*_dataloader' does not have many workers",  # one process prepares a batch in a third of a millisecond
        "It is recommended to use `self.log",  # with sync_dist: the logged values are equal on all devices already
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # lightning 2.6 calls what torch has renamed
    ):
        warnings.filterwarnings("ignore", message=message)
    # Python's resource tracker, a process of its own, warns when it removes the semaphores of a process that ended at
    # once. It takes over these options.
    if TRACKER_OPTION not in sys.warnoptions:
        sys.warnoptions.append(TRACKER_OPTION)


# ----------------------------------------------------------------------------------------------- flags and programs


class LineParser(argparse.ArgumentParser):
    """An argument parser that refuses abbreviated flags and raises `UserError`.

    Args:
        usage: The form of a command line.
        description: What the command does; its lines are kept.
        examples: Command lines.
    """

    def __init__(self, usage: str, description: str, examples: Iterable[str]) -> None:
        super().__init__(
            usage=usage,
            description=description,
            epilog="\n".join(["examples:", *(f"  {example}" for example in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def program_name(name: str) -> str:
    """Return how to call a program of this Python environment: its name if that is on PATH, else its path."""
    program = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(program):
        return name
    return str(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program)
