"""Compare runs: which settings differ, and the rows of a table, sorted and filtered."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from lit_gpt.errors import UserError, did_you_mean
from lit_gpt.printable import one_line
from lit_gpt.runs.find import what_became
from lit_gpt.runs.summary import DamagedSummaryError, RunSummary, read_summary

# Settings that decide about neither the model nor its training: a difference in them says nothing about two losses.
LEFT_OUT = (
    "generate.",
    "checkpoint.",
    "visualize",
    "timeout",
    "trainer.default_root_dir",
    "trainer.enable_checkpointing",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.logger",
)

# The columns of a table, which --sort and --where take beside settings.
COLUMNS: dict[str, Callable[["Run"], Any]] = {
    "run": lambda run: run.label,
    "parameters": lambda run: run.summary.parameters,
    "tokens": lambda run: run.summary.tokens,
    "loss": lambda run: run.summary.best_loss,
    "step": lambda run: run.summary.best_step,
    "bits_per_byte": lambda run: run.summary.bits_per_byte,
    "seconds": lambda run: run.summary.seconds,
    "tokens_per_second": lambda run: run.summary.tokens_per_second,
    "status": lambda run: run.status,
    "started": lambda run: run.summary.started,
}

CONDITION = re.compile(r"\s*([\w.]+)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*", re.DOTALL)


@dataclass
class Run:
    """A run in a comparison.

    Attributes:
        folder: Its folder.
        summary: Its summary.
        status: As in the summary, but "killed", "running" or "unknown" for a run that did not record its end.
        name: The name of its folder under logs/, which may have been renamed since the run.
        label: How it is called in a table: its name, with v and its version if several runs have the name.
        differences: The settings in which it differs from the other runs.
    """

    folder: str
    summary: RunSummary
    status: str
    name: str = ""
    label: str = ""
    differences: dict[str, Any] = field(default_factory=dict)


def read_runs(folders: Iterable[str]) -> tuple[list[Run], dict[str, str]]:
    """Read the summaries in the folders of runs.

    Returns:
        The runs, and why the summaries of other folders cannot be used, by folder.
    """
    runs, damaged = [], {}
    for folder in folders:
        try:
            summary = read_summary(folder)
        except (DamagedSummaryError, FileNotFoundError) as error:
            damaged[folder] = str(error)
            continue
        status = what_became(folder) if summary.status == "running" else summary.status
        runs.append(Run(folder, summary, status, _name(folder, summary)))
    names = Counter(run.name for run in runs)
    for run in runs:
        run.label = run.name
        if names[run.name] > 1:
            run.label += f" {os.path.basename(run.folder).replace('version_', 'v', 1)}"
    return runs, damaged


def _name(folder: str, summary: RunSummary) -> str:
    """Return the name of a run: of its folder if that is <name>/version_<n>, else the one it was given."""
    parent, version = os.path.split(os.path.abspath(folder))
    return os.path.basename(parent) if version.startswith("version_") else summary.name


# ------------------------------------------------------------------------------------------------------- differences


def find_differences(runs: list[Run]) -> dict[str, Any]:
    """Set `differences` of each run, and return what the runs without a difference have.

    A setting that is equal in all runs is left out. If more than half of the runs have the same value, only the others
    differ; else all of them do. A setting that only some summaries have is null in the others.
    """
    keys = dict.fromkeys(key for run in runs for key in run.summary.settings if not key.startswith(LEFT_OUT))
    usual: dict[str, Any] = {}
    for run in runs:
        run.differences = {}
    for key in keys:
        values = [run.summary.settings.get(key) for run in runs]
        if values.count(values[0]) == len(values):
            continue
        values = [_plain(value) for value in values]
        value, count = Counter(values).most_common(1)[0]
        has_usual = count > len(runs) / 2
        if has_usual:
            usual[key] = value
        for run, own in zip(runs, values):
            if not has_usual or own != value:
                run.differences[key] = own
    return usual


def _plain(value: Any) -> Any:
    """Return a value that can be counted."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the shortest ends of dotted names that tell them apart: `model.learning_rate` -> `learning_rate`."""
    keys = list(keys)
    ends = Counter(end for key in keys for end in _ends(key))
    return {key: next((end for end in _ends(key) if ends[end] == 1), key) for key in keys}


def _ends(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def describe_settings(settings: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Return each setting as `learning_rate 0.001`.

    Args:
        settings: The settings.
        names: The short name of each.
    """
    return [f"{names[key]} {describe_value(value)}" for key, value in settings.items()]


def describe_value(value: Any) -> str:
    """Return the value of a setting in at most 40 characters."""
    text = f"{value:.6g}" if isinstance(value, float) else _text(value)
    text = text if text.strip() else repr(text)
    return one_line(text if len(text) <= 40 else f"{text[:19]}…{text[-20:]}")


# -------------------------------------------------------------------------------------------------- sorting, filtering


def find_key(word: str, runs: list[Run]) -> Callable[[Run], Any]:
    """Return the function that takes the value of a column or of a setting from a run.

    Args:
        word: The name of a column, or of a setting, of which the last parts suffice: `learning_rate`.
        runs: The runs.

    Raises:
        UserError: No run has such a setting, or several settings end like this.
    """
    if word in COLUMNS:
        return COLUMNS[word]
    known = dict.fromkeys(key for run in runs for key in run.summary.settings)
    found = [word] if word in known else [key for key in known if key.endswith(f".{word}")]
    if len(found) == 1:
        (key,) = found
        return lambda run: run.summary.settings.get(key)
    if found:
        raise UserError(f"{word} stands for {', '.join(found)}: give one of them")
    names = [*COLUMNS, *known, *(key.rpartition(".")[2] for key in known)]
    raise UserError(
        f"{word} is no setting of these runs{did_you_mean(word, names)}: give a setting, or {', '.join(COLUMNS)}"
    )


def sort_runs(runs: list[Run], key: str | None, reverse: bool = False) -> list[Run]:
    """Return the runs in the order of a column or a setting; those without a value come last.

    Args:
        runs: The runs.
        key: The column or setting; None: bits per byte, which compares across tokenizers, and where it is not known the
            loss.
        reverse: Whether the largest come first.

    Raises:
        UserError: There is no such column or setting.
    """
    values = [find_key(name, runs) for name in ([key] if key else ["bits_per_byte", "loss"])]

    def order(run: Run) -> list[tuple[bool, bool, float, str]]:
        return [_rank(value(run), reverse) for value in values]

    ordered = sorted(runs, key=lambda run: run.label)
    return sorted(ordered, key=order, reverse=reverse)


def _rank(value: Any, reverse: bool) -> tuple[bool, bool, float, str]:
    """Return what numbers, then texts, then missing values are sorted by."""
    number = None if isinstance(value, str) else _number(value)
    is_number = number is not None
    return (value is None) != reverse, not is_number, number or 0.0, "" if is_number else str(value)


def parse_condition(text: str, runs: list[Run]) -> Callable[[Run], bool]:
    """Return the test of `--where`, for example `num_heads=1`, `learning_rate<=1e-3` or `status!=failed`.

    Values that are both numbers are compared as numbers. A run without the value passes only `!=`, and `=null`.

    Raises:
        UserError: The text is no condition.
    """
    match = CONDITION.fullmatch(text)
    if match is None or not match[3]:
        raise UserError(f"--where {text!r}: give KEY=VALUE, or another of != < <= > >=, as --where 'num_heads>=4'")
    key, operator, typed = find_key(match[1], runs), match[2], match[3]
    number = _number(typed)
    if operator in ("<", "<=", ">", ">=") and number is None and match[1] != "started":
        raise UserError(f"--where {text!r}: {typed} is no number: give one, or compare with = or !=")

    def passes(run: Run) -> bool:
        value = key(run)
        if operator in ("=", "!="):
            is_equal = _number(value) == number if None not in (_number(value), number) else _text(value) == typed
            return is_equal == (operator == "=")
        if value is None:
            return False
        pair: tuple[Any, Any] = (_number(value), number)
        if None in pair:
            pair = str(value), typed
        return bool(COMPARE[operator](*pair))

    return passes


COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda one, other: one < other,
    "<=": lambda one, other: one <= other,
    ">": lambda one, other: one > other,
    ">=": lambda one, other: one >= other,
}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _text(value: Any) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
