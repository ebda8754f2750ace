"""Helpers for console output: one-line usage errors, tables, program names, fewer warnings."""

import argparse
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from lit_gpt.errors import UserError


class LineParser(argparse.ArgumentParser):
    """An argument parser that refuses abbreviated flags, shows defaults in --help, and raises `UserError`."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def program_name(name: str) -> str:
    """Return how to call a program of this Python environment: its name if that is on PATH, else its path."""
    program = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(program):
        return name
    return str(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program)


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


def print_rows(rows: Iterable[dict[str, Any]], as_json: bool) -> None:
    """Print rows of named values.

    Args:
        rows: The values by column; a column may be missing in some rows.
        as_json: Print one JSON object per row, each as soon as the row is computed, instead of an aligned table.
    """
    if as_json:
        for row in rows:
            print(json.dumps(row), flush=True)
        return
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, *([_format_cell(column, row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)).rstrip())


def _format_cell(column: str, value: Any) -> str:
    """Format a value for a table: losses with four decimals, other floats with about three digits."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if column == "loss":
        return f"{value:.4f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
