"""Line charts as SVG texts.

Every run writes its report at its end, also at Ctrl-C. These few lines draw a chart in a millisecond, the same under
every version; matplotlib takes most of a second to be imported.
"""

import math
from dataclasses import dataclass
from html import escape
from operator import itemgetter

from lit_gpt.figures import format_count
from lit_gpt.runs.curves import Curve

WIDTH, HEIGHT = 480, 230  # units of the SVG; the browser scales it
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26  # margins
MAX_POINTS = 600  # drawn of a curve


@dataclass(frozen=True)
class Line:
    """A curve of a chart.

    Attributes:
        label: Its name.
        style: The class that gives its color.
        points: The curve.
    """

    label: str
    style: str
    points: Curve


def thin_out(points: Curve) -> Curve:
    """Return at most `MAX_POINTS` points: the first, the last, and the lowest and the highest one of equal groups."""
    if len(points) <= MAX_POINTS:
        return points
    size = -(-len(points) // (MAX_POINTS // 2 - 1))  # rounded up
    groups = (points[start : start + size] for start in range(0, len(points), size))
    extremes = (sorted({min(group, key=_value), max(group, key=_value)}) for group in groups)
    inner = [point for pair in extremes for point in pair]
    return [*points[: inner[0] != points[0]], *inner, *points[len(points) - (inner[-1] != points[-1]) :]]


_value = itemgetter(1)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers between two numbers."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(lines: list[Line], title: str, mark: tuple[int, float] | None = None) -> str:
    """Return a chart of curves over optimizer steps, or "" if no curve has a finite point.

    Args:
        lines: The curves; the last one is drawn on top.
        title: What a screen reader says.
        mark: A point to mark with a circle.
    """
    finite = [
        Line(line.label, line.style, [point for point in thin_out(line.points) if math.isfinite(point[1])])
        for line in lines
    ]
    points = [point for line in finite for point in line.points]
    if not points:
        return ""
    first, last = min(points)[0], max(points)[0]
    low, high = min(map(_value, points)), max(map(_value, points))
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin

    def x(step: float) -> str:
        return f"{LEFT + (step - first) / max(1, last - first) * (WIDTH - LEFT - RIGHT):.1f}"

    def y(value: float) -> str:
        return f"{TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    values = ticks(low, high)
    for value, label in zip(values, _labels(values)):
        parts.append(f'<path class="grid" d="M{LEFT} {y(value)}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value)}" dy="4" text-anchor="end">{label}</text>')
    for step in ticks(first, last):
        if step == int(step):
            anchor = "end" if float(x(step)) > WIDTH - 40 else "middle"
            parts.append(f'<text x="{x(step)}" y="{HEIGHT - 8}" text-anchor="{anchor}">{int(step):,}</text>')
    for line in finite:
        path = " ".join(f"{x(step)},{y(value)}" for step, value in line.points)
        if len(line.points) == 1:
            (step, value) = line.points[0]
            parts.append(f'<circle class="{line.style}" cx="{x(step)}" cy="{y(value)}" r="2"/>')
        elif line.points:
            parts.append(
                f'<polyline class="{line.style}" points="{path}"><title>{escape(line.label)}</title></polyline>'
            )
    if mark is not None and first <= mark[0] <= last and low <= mark[1] <= high:
        parts.append(f'<circle class="mark" cx="{x(mark[0])}" cy="{y(mark[1])}" r="4.5"/>')
    return "".join([*parts, "</svg>"])


def _labels(values: list[float]) -> list[str]:
    """Return the numbers of the y axis, each in about five characters, or more where they would look equal."""
    labels = [_label(value) for value in values]
    digits = 5
    while len(set(labels)) < len(labels) and digits <= 8:
        labels = [f"{value:.{digits}g}" for value in values]
        digits += 1
    return labels


def _label(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return format_count(value)
    return f"{value:.4g}" if abs(value) >= 0.0001 else f"{value:.1e}".replace("e-0", "e-")
