"""report.html: a run on one page, in one file that needs no network.

`SECTIONS` lists its parts; each is a function that turns a `Run` into HTML, or into "" where it has nothing to show.
Texts come from files, prompts and models: `escaped` makes them harmless. What differs between two equal runs, times and
speeds, has the class `measured`.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lit_gpt.figures import format_bytes, format_count, format_duration
from lit_gpt.files import atomic_write
from lit_gpt.printable import escape_controls, one_line
from lit_gpt.runs.curves import Curve, Events, read_events
from lit_gpt.runs.style import STYLE
from lit_gpt.runs.summary import RunSummary
from lit_gpt.runs.svg import Line, line_chart

REPORT_FILE = "report.html"
MAX_CELL = 300  # characters of a setting
MAX_SAMPLE_STEPS = 12
MAX_SAMPLE_BYTES = 300_000  # of all sample texts in a report
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the page runs and loads nothing


@dataclass(frozen=True)
class Run:
    """What a report shows.

    Attributes:
        summary: The summary of the run.
        events: Its curves and texts.
    """

    summary: RunSummary
    events: Events


def write_report(summary: RunSummary, folder: Path) -> None:
    """Write report.html into the folder of a run.

    Raises:
        OSError: It cannot be written.
    """
    text = render(Run(summary, read_events(folder)))
    atomic_write(folder / REPORT_FILE, lambda file: file.write(text.encode("utf-8", "replace")), durable=False)


def render(run: Run) -> str:
    """Return the page."""
    title = escaped(f"{run.summary.name} · lit_gpt")
    body = "\n".join(filter(None, (section(run) for section in SECTIONS)))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


# ------------------------------------------------------------------------------------------------------ HTML of values


def escaped(value: Any, limit: int = MAX_CELL) -> str:
    """Return a value as the HTML of one line; a long one is cut off."""
    text = one_line(str(value))
    return escape(text if len(text) <= limit else f"{text[: limit - 1]}…")


def measured(html: str) -> str:
    """Mark what differs between equal runs."""
    return f'<span class="measured">{html}</span>'


def table(rows: Iterable[Iterable[str]], header: Iterable[str] = ()) -> str:
    """Return a table. Its cells are HTML; the first one of each row names the row."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    lines = [f"<tr>{head}</tr>"] if head else []
    for first, *cells in rows:
        lines.append(f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _date(iso: str) -> str:
    return escaped(iso.replace("T", " "))


# ------------------------------------------------------------------------------------------------------------ sections


def heading(run: Run) -> str:
    """The name of the run, how it ended, its figures, and advice on the learning rate."""
    summary = run.summary
    step = f"{summary.step:,}" + ("" if summary.max_steps is None else f" of {summary.max_steps:,}")
    speed = summary.tokens_per_second
    at = "" if summary.best_step is None else f"at step {summary.best_step:,}"
    tiles = [
        ("best loss/val", _loss(summary.best_loss), at or "nats per token"),
        ("bits per byte", "–" if summary.bits_per_byte is None else f"{summary.bits_per_byte:.3f}", at),
        ("last loss/val", _loss(summary.last_loss), f"loss/train_eval {_loss(summary.last_train_loss)}"),
        ("steps", step, f"{format_count(summary.tokens)} tokens"),
        ("parameters", format_count(summary.parameters), f"{summary.parameters:,}"),
        ("time", measured(format_duration(summary.seconds)), "of training, over all resumes"),
        ("speed", measured("–" if speed is None else f"{speed:,.0f}"), "tokens per second"),
    ]
    shown = "".join(
        f'<div class="tile"><div>{label}</div><b>{value}</b><small>{note}</small></div>' for label, value, note in tiles
    )
    status = f'<span class="status {summary.status}">{summary.status}</span>'
    advice = f"<p>{escaped(summary.advice)}</p>\n" if summary.advice else ""
    dates = measured(f"{_date(summary.started)} to {_date(summary.ended)}")
    return (
        f"<header><h1>{escaped(summary.name)} {status}</h1><p>{escaped(summary.folder)} · {dates}</p></header>\n"
        f'<div class="tiles">{shown}</div>\n{advice}<pre class="command">{escaped(summary.command, 5_000)}</pre>'
    )


# title, unit, the tags of the curves with the class that gives the color, whether it differs between equal runs
CHARTS: list[tuple[str, str, dict[str, str], bool]] = [
    ("loss", "nats per token", {"loss/train": "faint", "loss/train_eval": "train", "loss/val": "val"}, False),
    ("learning rate", "", {"optim/lr": "train"}, False),
    ("gradient norm", "", {"optim/grad_norm": "train"}, False),
    ("speed", "tokens per second", {"speed/tokens_per_second": "train"}, True),
]


def curves(run: Run) -> str:
    """The curves over optimizer steps."""
    figures = [_figure(run, *chart) for chart in CHARTS]
    shown = "\n".join(filter(None, figures))
    return f'<h2>Curves</h2>\n<div class="charts">{shown}</div>' if shown else ""


def _figure(run: Run, title: str, unit: str, tags: dict[str, str], is_measured: bool) -> str:
    summary = run.summary
    found: dict[str, Curve] = {tag: run.events.curves[tag] for tag in tags if tag in run.events.curves}
    mark = None
    if "loss/val" in found and summary.best_loss is not None and summary.best_step is not None:
        mark = (summary.best_step, summary.best_loss)
    svg = line_chart([Line(tag, tags[tag], points) for tag, points in found.items()], title, mark)
    if not svg:
        return ""
    shown = [(tag, style, _last(tag, found[tag])) for tag, style in tags.items() if tag in found]
    keys = "".join(f'<span class="key {style}">{tag} {value}</span>' for tag, style, value in shown)
    keys += '<span class="key mark">best</span>' if mark else ""
    kind = ' class="measured"' if is_measured else ""
    legend = f"<b>{title}</b>{f', {unit}' if unit else ''} {keys}"
    return f"<figure{kind}><figcaption>{legend}</figcaption>{svg}</figure>"


def _last(tag: str, points: Curve) -> str:
    value = points[-1][1]
    return f"{value:.4f}" if tag.startswith("loss/") else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


FORECAST_TAGS = ("forecast/loss_val_low", "forecast/loss_val", "forecast/loss_val_high")
FORECAST_SHARES = (0.1, 0.3)  # of a run: the first forecasts from there on are compared with its end


def forecasts(run: Run) -> str:
    """The forecasts of the last loss, and how good they were."""
    low, expected, high = (run.events.curves.get(tag, []) for tag in FORECAST_TAGS)
    last_step = run.summary.max_steps
    if not expected or last_step is None:
        return ""
    losses = [point for point in run.events.curves.get("loss/val", []) if point[0] >= expected[0][0]]
    end = losses[-1][1] if losses and losses[-1][0] == last_step else None
    intervals = [(step, loss, dict(low)[step], dict(high)[step]) for step, loss in expected]
    first = [next((row for row in intervals if row[0] >= share * last_step), intervals[0]) for share in FORECAST_SHARES]
    sentences = [_verdict(*row, last_step, end) for row in sorted(set(first))]
    lines = [Line("80% interval", "faint", low), Line("80% interval", "faint", high)]
    lines += [Line("forecast", "train", expected), Line("loss/val", "val", losses)]
    keys = "".join(f'<span class="key {line.style}">{line.label}</span>' for line in lines[1:])
    svg = line_chart(lines, "forecast of the last loss/val")
    figure = f"<figure><figcaption><b>last loss/val</b>, nats per token {keys}</figcaption>{svg}</figure>"
    return f'<h2>Forecast</h2>\n<p>{" ".join(sentences)}</p>\n<div class="charts">{figure}</div>'


def _verdict(step: int, loss: float, low: float, high: float, last_step: int, end: float | None) -> str:
    """Return what the forecast at a step said, and the loss with which the run ended; None: it has not."""
    said = f"At {step / last_step:.0%} of the run the forecast was {loss:.3f} ({low:.3f} to {high:.3f})"
    if end is None:
        return f"{said}; the run did not reach step {last_step:,}."
    place = "below the interval" if end < low else "above the interval" if end > high else "inside"
    return f"{said}; the run ended at {end:.3f}, {place}."


def samples(run: Run) -> str:
    """The sample texts by step, the newest first; where there are many steps, some of them."""
    steps = sorted({step for texts in run.events.texts.values() for step in texts})
    if len(steps) > MAX_SAMPLE_STEPS:
        last = len(steps) - 1
        steps = [steps[round(number * last / (MAX_SAMPLE_STEPS - 1))] for number in range(MAX_SAMPLE_STEPS)]
    parts, size = [], 0
    for step in reversed(steps):
        texts = [texts[step] for tag, texts in sorted(run.events.texts.items()) if step in texts]
        shown = "".join(f'<pre class="sample">{_sample(text)}</pre>' for markdown in texts for text in _texts(markdown))
        size += len(shown.encode("utf-8", "replace"))
        if size > MAX_SAMPLE_BYTES:
            parts.append("<p>Earlier samples are left out; TensorBoard shows all of them.</p>")
            break
        is_open = " open" if step == steps[-1] else ""
        parts.append(f"<details{is_open}><summary>step {step:,}</summary>{shown}</details>")
    return "\n".join(["<h2>Samples</h2>", *parts]) if parts else ""


def _texts(markdown: str) -> list[str]:
    """Return the texts of a group of samples, which are code blocks."""
    blocks = re.findall(r"^(`{3,})\n(.*?)\n\1$", markdown, re.DOTALL | re.MULTILINE)
    return [text for _, text in blocks] or [markdown]


def _sample(text: str, limit: int = 3_000) -> str:
    text = escape_controls(text if len(text) <= limit else f"{text[:limit]}…", keep="\n\t")
    return escape(text)


def data(run: Run) -> str:
    """What the text was."""
    report = run.summary.data
    if not report:
        return ""
    rows = []
    for file in report["files"]:
        sure = "" if file["sure"] else ", a guess"
        size = f"{file['bytes'] / 1e6:,.1f} MB, " if file["bytes"] >= 1e5 else f"{file['bytes']:,} bytes, "
        rows.append([escaped(file["name"]), f"{size}{escaped(file['encoding'])}{sure}"])
    if report["num_files"] > len(report["files"]):
        rows.append(["more files", f"{report['num_files'] - len(report['files']):,}"])
    counts = f"{report['documents']:,} documents, {report['characters']:,} characters, {report['bytes']:,} bytes"
    rows.append(["text", counts])
    tokens = f"{report['tokens']:,}, {report['tokens_per_character']:.2f} a character"
    rows.append(["tokens", tokens])
    vocabulary = f"{report['vocab_size']:,} tokens, of which {report['vocabulary_in_use']:,} occur"
    rows.append(["tokenizer", f"{escaped(report['tokenizer'])}: {vocabulary}"])
    for split, part in report["parts"].items():
        if part["tokens"]:
            rows.append([f"{escaped(split)} split", f"{part['documents']:,} documents, {part['tokens']:,} tokens"])
    rows.append(["left out", f"{report['empty_rows']:,} empty rows, {report['rejected']:,} that cannot be read"])
    duplicates = f"{report['duplicates']:,}, of which {report['duplicates_left_out']:,} are left out"
    across = f"{report['duplicates_across']:,} outside the training split are also in it"
    rows.append(["duplicates", f"{duplicates}; {across}"])
    return f"<h2>Data</h2>\n{table(rows)}"


def settings(run: Run) -> str:
    """The settings that differ from their defaults, and all others folded."""
    values, defaults = run.summary.settings, run.summary.defaults
    differing = [[escaped(key), _setting(values.get(key)), _setting(defaults[key])] for key in sorted(defaults)]
    others = [[escaped(key), _setting(values[key])] for key in sorted(values) if key not in defaults]
    shown = (
        table(differing, ("setting", "value", "default")) if differing else "<p>All settings have their defaults.</p>"
    )
    folded = f"<details><summary>{len(others)} settings with their defaults</summary>{table(others)}</details>"
    return f"<h2>Settings</h2>\n{shown}\n{folded if others else ''}"


def _setting(value: Any) -> str:
    """Return the value of a setting as in a config."""
    words = {"None": "null", "True": "true", "False": "false"}
    return escaped(value if isinstance(value, str) else words.get(str(value), value))


def machine(run: Run) -> str:
    """The computer, the versions, and the state of the checkout."""
    summary = run.summary
    facts = dict(summary.machine)
    memory = facts.pop("memory", None)
    rows = [[escaped(key), escaped(value)] for key, value in facts.items()]
    rows += [["memory", format_bytes(memory)]] if memory else []
    rows.append(["versions", escaped(", ".join(f"{name} {version}" for name, version in summary.versions.items()))])
    commit = "unknown"
    if summary.git:
        commit = escaped(summary.git["commit"]) + (", with changed files" if summary.git["changed"] else "")
    rows.append(["git commit of lit_gpt", commit])
    return f"<h2>Machine</h2>\n{table(rows)}"


SECTIONS: list[Callable[[Run], str]] = [heading, curves, forecasts, samples, data, settings, machine]
