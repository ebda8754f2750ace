"""The command of scripts/compare.py: all runs as one table, which may also be written to files.

It imports neither torch nor Lightning, which take seconds.
"""

import csv
import io
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_gpt.cli.exit_status import exit_status
from lit_gpt.cli.messages import LineParser, print_lines, print_page
from lit_gpt.errors import UserError
from lit_gpt.figures import format_count, format_duration
from lit_gpt.files import atomic_write, expand_path
from lit_gpt.lines import cut_line, display_width, pad_line
from lit_gpt.printable import one_line
from lit_gpt.runs import comparison
from lit_gpt.runs.comparison import Run, describe_settings, find_differences, read_runs, short_names
from lit_gpt.runs.find import find_runs

DESCRIPTION = """Show runs in one table, the best one first: what differs between their settings,
and what came out. bits/byte compares runs with different tokenizers, the loss
does not. KEY is a setting, as learning_rate or model.config.num_heads, or one
of run, parameters, tokens, loss, step, bits_per_byte, seconds,
tokens_per_second, status, started."""
EXAMPLES = [
    "python scripts/compare.py",
    "python scripts/compare.py course poems --sort started --reverse",
    "python scripts/compare.py --where 'num_heads>=4' --where status=finished",
    "python scripts/compare.py --png runs.png --csv runs.csv",
]

LEAST_NAME = 12  # columns of a name, however narrow the terminal is
INDENT = "    "
MAX_DAMAGED = 3  # damaged summaries that are named

# The columns of the table: the heading, and how a run's value is shown.
CELLS: list[tuple[str, Callable[[Run], str]]] = [
    ("run", lambda run: run.label),
    ("params", lambda run: format_count(run.summary.parameters)),
    ("tokens", lambda run: format_count(run.summary.tokens)),
    ("loss", lambda run: _decimals(run.summary.best_loss, 4)),
    ("step", lambda run: "" if run.summary.best_step is None else f"{run.summary.best_step:,}"),
    ("bits/byte", lambda run: _decimals(run.summary.bits_per_byte, 3)),
    ("time", lambda run: format_duration(run.summary.seconds)),
    ("tok/s", lambda run: "" if (speed := run.summary.tokens_per_second) is None else format_count(speed)),
    ("status", lambda run: run.status),
]
DIFFERS = "differs in"


def main(args: list[str]) -> int:
    """Run the command; return its exit status (see `classify`).

    Args:
        args: The arguments, without the program's name.
    """
    return exit_status(lambda: run(args))


def run(args: list[str]) -> None:
    """Print the table, and write the files that the flags name.

    Raises:
        UserError: A flag is wrong, there is no run, or a file cannot be written.
    """
    options = build_parser().parse_args(args)
    files = {flag: expand_path(path) for flag in ("md", "csv", "png") if (path := getattr(options, flag)) is not None}
    for flag, path in files.items():
        check_new_file(flag, path)
    if len(set(map(os.path.abspath, files.values()))) < len(files):
        raise UserError(f"--{' and --'.join(files)} name one file: give different ones")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit is {options.limit}: give 1 or more")
    folders, without = find_runs(options.runs)
    runs, damaged = read_runs(folders)
    found = len(runs)
    if runs:  # else no key is known
        conditions = [comparison.parse_condition(condition, runs) for condition in options.where]
        ordered = comparison.sort_runs(runs, options.sort, options.reverse)
        runs = [run for run in ordered if all(passes(run) for passes in conditions)][: options.limit]
    usual = find_differences(runs)
    names = short_names(dict.fromkeys([*usual, *(key for run in runs for key in run.differences)]))
    if runs:
        width = shutil.get_terminal_size().columns
        print_page([*table_lines(runs, names, width), *usual_lines(usual, names, width)])
    print_lines(*note_lines(found, len(runs), without, damaged))
    if not runs:
        if files:
            raise UserError(f"there is no run to write to --{' and --'.join(files)}: choose other runs")
        return
    writers: dict[str, Callable[[], bytes]] = {
        "md": lambda: markdown(runs, names).encode("utf-8"),
        "csv": lambda: comma_separated(runs, names).encode("utf-8", "backslashreplace"),
        "png": lambda: draw(runs, names),
    }
    for flag, path in files.items():
        write_new_file(flag, path, writers[flag]())
        print_lines(f"{flag:11} {path}")


def build_parser() -> LineParser:
    """Return the parser of the flags."""
    parser = LineParser("python scripts/compare.py [flags] [RUN ...]", DESCRIPTION, EXAMPLES)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names of runs, or folders; default: all in logs")
    choice = parser.add_argument_group("which runs, in which order")
    choice.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="'KEY=VALUE'",
        help="only these; also != < <= > >=. All of several",
    )
    choice.add_argument("--sort", metavar="KEY", help="order by this, ascending; default: bits_per_byte")
    choice.add_argument("--reverse", action="store_true", help="the largest first")
    choice.add_argument("--limit", type=int, metavar="N", help="the first N only")
    output = parser.add_argument_group("new files to write")
    output.add_argument("--png", metavar="FILE", help="the curves as a picture; needs matplotlib")
    output.add_argument("--md", metavar="FILE", help="the table in Markdown")
    output.add_argument("--csv", metavar="FILE", help="the exact values, each setting in a column")
    return parser


# ------------------------------------------------------------------------------------------------------ the terminal


def table_lines(runs: list[Run], names: dict[str, str], width: int) -> list[str]:
    """Return the table in at most `width` columns, where that is possible.

    What differs stands in a last column if there is room for it, else in lines below its run.

    Args:
        runs: The runs.
        names: The short name of each setting that differs.
        width: Columns of the terminal.
    """
    rows = [[heading for heading, _ in CELLS], *([one_line(show(run)) for _, show in CELLS] for run in runs)]
    widths = [max(map(display_width, column)) for column in zip(*rows)]
    widths[0] = max(LEAST_NAME, min(widths[0], width - sum(widths[1:]) - 2 * (len(widths) - 1)))
    lines = [_align(row, widths) for row in rows]
    differences = [describe_settings(run.differences, names) for run in runs]
    if not any(differences):
        return lines
    texts = [DIFFERS, *map(", ".join, differences)]
    start = sum(widths) + 2 * len(widths)
    if start + max(map(display_width, texts)) <= width:
        return [f"{pad_line(line, start)}{text}".rstrip() for line, text in zip(lines, texts)]
    found = lines[:1]
    for line, parts in zip(lines[1:], differences):
        found += [line, *(INDENT + text for text in pack(parts, width - len(INDENT)))]
    return found


def _align(row: list[str], widths: list[int]) -> str:
    """Return the cells of a row in columns: the first and the last one to the left, the others to the right."""
    cells = [pad_line(cut_line(row[0], widths[0]), widths[0])]
    cells += [pad_line("", width - display_width(cell)) + cell for cell, width in zip(row[1:-1], widths[1:-1])]
    return "  ".join([*cells, row[-1]]).rstrip()


def pack(parts: list[str], width: int) -> list[str]:
    """Return parts with commas between them, as many in each line as fit into some columns."""
    lines: list[str] = []
    for part in parts:
        if lines and display_width(f"{lines[-1]}, {part}") < width:
            lines[-1] += f", {part}"
        else:
            lines[-1:] = [f"{line}," for line in lines[-1:]]
            lines.append(part)
    return [cut_line(line, width) for line in lines]


def usual_lines(usual: dict[str, Any], names: dict[str, str], width: int) -> list[str]:
    """Return the lines about the values that most runs have."""
    parts = describe_settings(usual, names)
    return ["", "the other runs have", *(INDENT + text for text in pack(parts, width - len(INDENT)))] if parts else []


def note_lines(found: int, shown: int, without: int, damaged: dict[str, str]) -> list[str]:
    """Return the lines about runs that are not in the table.

    Args:
        found: Runs with a summary.
        shown: Runs in the table.
        without: Runs without a summary.
        damaged: Why a summary cannot be used, by folder.
    """
    lines = []
    if shown < found:
        lines.append(f"shown       {shown:,} of {found:,} runs")
    if not found and not without and not damaged:
        lines.append("no runs     train one with scripts/fit.py, or give the folder of runs")
    if without:
        lines.append(f"left out    {without:,} without summary.json (older versions, other loggers)")
    for folder, reason in list(damaged.items())[:MAX_DAMAGED]:
        lines.append(f"damaged     {folder}/summary.json: {reason}")
    if len(damaged) > MAX_DAMAGED:
        lines.append(f"            and {len(damaged) - MAX_DAMAGED:,} more")
    return lines


def _decimals(value: float | None, count: int) -> str:
    return "" if value is None else f"{value:.{count}f}"


# ------------------------------------------------------------------------------------------------------------- files


def check_new_file(flag: str, path: Path) -> None:
    """Check that a file does not exist and that its folder does.

    Raises:
        UserError: It is not so.
    """
    if path.exists() or path.is_symlink():
        raise UserError(f"--{flag} {path} {'is a folder' if path.is_dir() else 'exists'}: give the name of a new file")
    if not path.parent.is_dir():
        raise UserError(f"--{flag} {path} cannot be written (there is no folder {path.parent}): give another path")


def write_new_file(flag: str, path: Path, content: bytes) -> None:
    """Write a file as a whole.

    Raises:
        UserError: It cannot be written.
    """
    try:
        atomic_write(path, lambda file: file.write(content))
    except OSError as error:
        raise UserError(f"--{flag} {path} cannot be written ({error.strerror}): give another path") from None


def markdown(runs: list[Run], names: dict[str, str]) -> str:
    """Return the table in Markdown."""
    rows = [[*(heading for heading, _ in CELLS), DIFFERS], ["---", *["---:"] * (len(CELLS) - 2), "---", "---"]]
    rows += [[*(show(run) for _, show in CELLS), ", ".join(describe_settings(run.differences, names))] for run in runs]
    cells = ([re.sub(r"[\\|<*\[`]", r"\\\g<0>", one_line(cell)) for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def comma_separated(runs: list[Run], names: dict[str, str]) -> str:
    """Return the exact values as CSV: the columns, and each setting that differs.

    A text that a spreadsheet would run as a formula has an apostrophe before it.
    """
    keys = [key for key in names if any(key in run.summary.settings for run in runs)]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*comparison.COLUMNS, *map(_no_formula, keys)])
    for run in runs:
        settings = (run.summary.settings.get(key) for key in keys)
        writer.writerow(map(_no_formula, [*(value(run) for value in comparison.COLUMNS.values()), *settings]))
    return text.getvalue()


def _no_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def draw(runs: list[Run], names: dict[str, str]) -> bytes:
    """Return the picture of the runs."""
    from lit_gpt.runs.charts import draw_runs

    differences = (", ".join(describe_settings(run.differences, names)) for run in runs)
    labels = [f"{run.label}: {text}" if text else run.label for run, text in zip(runs, differences)]
    return draw_runs(runs, [one_line(cut_line(label, 60)) for label in labels])
