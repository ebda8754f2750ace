"""Fit the forecasts of lit_gpt/planning/forecast.py on measured runs, and measure them on texts that are left out.

    python docs/planning_forecast.py  # prints the table of docs/planning.md and the coefficients of the module

docs/planning_curves.json holds the runs. Each has the name of its text and of its tokenizer, its schedule, how often it
reads its text, its mean training losses at 40 steps (each since the step before), and its validation losses.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.optim import learning_rate_factor
from lit_gpt.planning.forecast import KnownCurves, Regression, features, forecast, mean_loss

CURVES = Path(__file__).with_name("planning_curves.json")
SHARES = (0.1, 0.2, 0.3, 0.5, 0.8)  # of a run


@dataclass(frozen=True)
class Example:
    """What was known at one step of a run, and how the run ended."""

    text: str
    known: KnownCurves
    end: float  # the last validation loss

    @property
    def loss(self) -> float:
        """The loss that the forecast starts from."""
        return self.known.recent_loss if self.known.val_loss is None else self.known.val_loss

    @property
    def change(self) -> float:
        return math.log(self.end / self.loss)


def examples(run: dict[str, Any], has_validations: bool) -> list[Example]:
    """Return what was known at each validation of a run; without validations: at its training losses up to a third."""
    steps, end = run["steps"], run["val_curve"][-1][1]
    marks = [round(steps * number / len(run["train_curve"])) for number in range(1, len(run["train_curve"]) + 1)]
    curve = list(zip(marks, run["train_curve"]))

    def rate(step: int) -> float:
        schedule, warmup_steps, min_factor, decay_share = run["schedule"]
        return learning_rate_factor(step, schedule, warmup_steps, steps, min_factor, decay_share)

    points: list[tuple[int, float | None]] = [(step, loss) for step, loss in run["val_curve"][:-1]]
    if not has_validations:
        points = [(step, None) for step in marks if 0.1 * steps <= step <= 0.35 * steps]
    found = []
    for step, val_loss in points:
        recent, earlier = mean_loss(curve, step // 2, step), mean_loss(curve, step // 4, step // 2)
        if recent is not None and earlier is not None and step >= 0.09 * steps:
            known = KnownCurves(step, steps, val_loss, recent, earlier, rate(step), rate(steps - 1), run["epochs"])
            found.append(Example(run["text"], known, end))
    return found


# ------------------------------------------------------------------------------------------------------------- fitting


def fit(data: Sequence[Example]) -> Regression:
    """Return the regression of the change and of its error.

    Later points of a run are more certain, so they have more weight. The errors come from texts that are left out of
    the fit, because those of the fitted texts would be too small.
    """
    x = np.array([features(example.known) for example in data])  # (N, F)
    y = np.array([example.change for example in data])  # (N,)
    texts = np.array([example.text for example in data])
    weights = 1 / (0.02 + np.array([math.log(example.known.last_step / example.known.step) for example in data]))
    for text in set(texts):  # each text counts the same
        weights[texts == text] /= math.sqrt((texts == text).sum())
    errors = np.empty_like(y)
    for text in set(texts):
        kept = texts != text
        errors[~kept] = y[~kept] - x[~kept] @ ridge(x[kept], y[kept], weights[kept])
    error = nonnegative(np.abs(x), np.abs(errors), weights)
    low, high = np.quantile(errors / np.maximum(np.abs(x) @ error, 1e-9), (0.1, 0.9))
    return Regression(tuple(ridge(x, y, weights)), tuple(error), float(low), float(high))


def ridge(x: np.ndarray, y: np.ndarray, weights: np.ndarray, strength: float = 1e-3) -> np.ndarray:
    """Return the coefficients (F,) of a weighted least-squares fit with a small penalty on each."""
    x, y = x * weights[:, None], y * weights
    scale = np.sqrt((x**2).mean(axis=0)) + 1e-12
    x = x / scale
    return np.linalg.solve(x.T @ x + strength * len(y) * np.eye(x.shape[1]), x.T @ y) / scale


def nonnegative(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return coefficients (F,) of a weighted least-squares fit, none below zero, by coordinate descent."""
    x, y = x * weights[:, None], y * weights
    found = np.zeros(x.shape[1])
    for _ in range(500):
        for column in range(x.shape[1]):
            rest = y - x @ found + x[:, column] * found[column]
            found[column] = max(0.0, x[:, column] @ rest / (x[:, column] @ x[:, column] + 1e-12))
    return found


# ------------------------------------------------------------------------------------------------------------- figures


def cross_validate(data: Sequence[Example]) -> list[tuple[Example, float, bool]]:
    """Return each example with the relative error of its forecast, and whether its end was inside the interval.

    The coefficients of a forecast are fitted without any run on its text.
    """
    rows = []
    for text in sorted({example.text for example in data}):
        regression = fit([example for example in data if example.text != text])
        for example in [example for example in data if example.text == text]:
            expected = forecast(example.known, regression)
            is_inside = expected.low <= example.end <= expected.high
            rows.append((example, expected.loss / example.end - 1, is_inside))
    return rows


def table(data: Sequence[Example]) -> list[str]:
    """Return the lines of the table of docs/planning.md."""
    lines = ["| part of the run | forecasts | mean error | inside the 80% interval |", "|---|---|---|---|"]
    rows = cross_validate(data)
    for share in SHARES:
        at_share = [row for row in rows if abs(row[0].known.step / row[0].known.last_step - share) < 0.012]
        if at_share:
            error = np.mean([abs(error) for _, error, _ in at_share])
            inside = np.mean([is_inside for _, _, is_inside in at_share])
            lines.append(f"| {share:.0%} | {len(at_share)} | {error:.1%} | {inside:.0%} |")
    return lines


def main() -> None:
    runs = json.loads(CURVES.read_text(encoding="utf-8"))
    print(f"{len(runs)} runs on {len({run['text'] for run in runs})} texts")
    for name, has_validations in (("WITH_VALIDATION", True), ("WITHOUT_VALIDATION", False)):
        data = [example for run in runs for example in examples(run, has_validations)]
        print(*table(data), sep="\n")
        fitted = fit(data)
        change, error = (tuple(round(float(number), 4) for number in row) for row in (fitted.change, fitted.error))
        print(f"{name} = Regression({change}, {error}, {fitted.low:.3f}, {fitted.high:.3f})\n")


if __name__ == "__main__":
    main()
