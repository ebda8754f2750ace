"""Fit the forecasts of lit_gpt/planning/forecast.py on measured runs, and measure them on texts that are left out.

    python docs/planning_forecast.py        # prints the tables of docs/planning.md and the coefficients of the module
    python docs/planning_forecast.py check  # measures the module's coefficients on runs that were not used to fit them

docs/planning_curves.json holds the runs of the fit, docs/planning_held_out.json those of the check. Each has the name
of its text and of its tokenizer, its schedule, how often it reads its text, and its training and validation losses with
their steps. A training loss is the mean since the point before, or that of a single step.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.optim import learning_rate_factor
from lit_gpt.planning.forecast import KnownCurves, Regression, error_features, features, forecast, quarter_losses

CURVES = Path(__file__).with_name("planning_curves.json")
HELD_OUT = Path(__file__).with_name("planning_held_out.json")
SHARES = (0.1, 0.2, 0.3, 0.5, 0.6, 0.8)  # of a run
# Part of the errors that is outside an interval at each end. The texts are few, so that parts of 0.1 would hold less
# than 80% of the runs on texts that are left out.
TAIL = 0.07
PENALTIES = (0.001, 0.01)  # on shared coefficients, on differences between the optimizers


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
    """Return what was known at each validation of a run; without validations: at its training losses."""
    steps, end = run["steps"], run["val_curve"][-1][1]
    curve = [(step, loss) for step, loss in run["train_curve"]]

    def rate(step: int) -> float:
        schedule, warmup_steps, min_factor, decay_share = run["schedule"]
        return learning_rate_factor(step, schedule, warmup_steps, steps, min_factor, decay_share)

    points: list[tuple[int, float | None]] = [(step, loss) for step, loss in run["val_curve"][:-1]]
    if not has_validations:
        points = [(step, None) for step, _ in curve if 0.1 * steps <= step <= 0.15 * steps]
    found = []
    for step, val_loss in points:
        losses = quarter_losses(curve, step)
        if losses is not None and step >= 0.09 * steps:
            rates, epochs, optimizer = (rate(step), rate(steps - 1)), run["epochs"], run["optimizer"]
            known = KnownCurves(step, steps, val_loss, *losses, *rates, epochs, optimizer)
            found.append(Example(run["text"], known, end))
    return found


# ------------------------------------------------------------------------------------------------------------- fitting


def fit(data: Sequence[Example], optimizer: str) -> Regression:
    """Return the regression of the change and of its error for runs with an optimizer.

    Runs with the other optimizer count too: the coefficients of the change differ as little as the runs allow, and
    those of the error only in their scale, which is in the percentiles. The errors are those of texts that are left out
    of the fit, because those of fitted texts would be too small.
    Later points of a run are more certain, so they have more weight. Each text has the same weight.
    """
    x = np.array([features(example.known) for example in data])  # (N, F)
    y = np.array([example.change for example in data])  # (N,)
    texts = np.array([example.text for example in data])
    is_own = np.array([example.known.optimizer == optimizer for example in data])
    weights = 1 / (0.3 + np.array([math.log(example.known.last_step / example.known.step) for example in data]))
    for text in set(texts):
        weights[texts == text] /= math.sqrt((texts == text).sum())
    both = np.concatenate([x, x * is_own[:, None]], axis=1)  # (N, 2F): shared, and the difference of this optimizer
    errors = np.empty_like(y)
    for text in set(texts):
        kept = texts != text
        errors[~kept] = y[~kept] - both[~kept] @ robust(both[kept], y[kept], weights[kept])
    sizes = np.array([error_features(example.known) for example in data])
    error = nonnegative(sizes, np.abs(errors), weights)
    shares = np.array([1 / (is_own & (texts == text)).sum() for text in texts[is_own]])
    low, high = weighted_quantiles((errors / np.maximum(sizes @ error, 1e-9))[is_own], shares, (TAIL, 1 - TAIL))
    shared, difference = np.split(robust(both, y, weights), 2)
    return Regression(tuple(shared + difference), tuple(error), low, high)


def robust(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the coefficients (F,) of a fit with the least sum of weighted absolute errors, by reweighted squares.

    A few runs fall by a factor of five after long plateaus. Squared errors would count hardly anything else. A small
    penalty on each coefficient, larger on the second half of them, keeps them small where the data do not decide.
    """
    scale = np.sqrt((x**2).mean(axis=0)) + 1e-12
    scaled, found = x / scale, np.zeros(x.shape[1])
    for _ in range(30):
        row_weights = weights / np.maximum(np.abs(y - scaled @ found), 0.01)
        weighted = scaled * row_weights[:, None]
        penalty = row_weights.sum() * np.diag(np.repeat(PENALTIES, x.shape[1] // 2))
        found = np.linalg.solve(weighted.T @ scaled + penalty, weighted.T @ y)
    return found / scale


def nonnegative(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return coefficients (F,) of a weighted least-squares fit, none below zero, by coordinate descent."""
    x, y = x * weights[:, None], y * weights
    found = np.zeros(x.shape[1])
    for _ in range(500):
        for column in range(x.shape[1]):
            rest = y - x @ found + x[:, column] * found[column]
            found[column] = max(0.0, x[:, column] @ rest / (x[:, column] @ x[:, column] + 1e-12))
    return found


def weighted_quantiles(values: np.ndarray, weights: np.ndarray, parts: Sequence[float]) -> list[float]:
    """Return the values below which parts of the weight lie."""
    order = np.argsort(values)
    middles = np.cumsum(weights[order]) - weights[order] / 2
    return [float(np.interp(part * weights.sum(), middles, values[order])) for part in parts]


# ------------------------------------------------------------------------------------------------------------- figures


def cross_validate(data: Sequence[Example], optimizer: str) -> list[tuple[Example, float, bool]]:
    """Return the examples of an optimizer with the error of each forecast, and whether its interval holds the end.

    The error is relative. The coefficients of a forecast are fitted without any run on its text.
    """
    rows = []
    own = [example for example in data if example.known.optimizer == optimizer]
    for text in sorted({example.text for example in own}):
        regression = fit([example for example in data if example.text != text], optimizer)
        for example in [example for example in own if example.text == text]:
            expected = forecast(example.known, regression)
            is_inside = expected.low <= example.end <= expected.high
            rows.append((example, expected.loss / example.end - 1, is_inside))
    return rows


def table(rows: Sequence[tuple[Example, float, bool]]) -> list[str]:
    """Return the lines of a table of docs/planning.md."""
    lines = ["| part of the run | forecasts | mean error | median | inside the interval |", "|---|---|---|---|---|"]
    for share in SHARES:
        near = [row for row in rows if abs(row[0].known.step / row[0].known.last_step - share) < 0.03]
        if near:
            errors = [abs(error) for _, error, _ in near]
            inside = np.mean([is_inside for _, _, is_inside in near])
            lines.append(
                f"| {share:.0%} | {len(near)} | {np.mean(errors):.1%} | {np.median(errors):.1%} | {inside:.0%} |"
            )
    return lines


def check() -> None:
    """Print how good the forecasts of the package are on runs that were not used to fit them."""
    runs = json.loads(HELD_OUT.read_text(encoding="utf-8"))
    print(f"{len(runs)} runs on {len({run['text'] for run in runs})} texts\n")
    rows = []
    for example in [example for run in runs for example in examples(run, has_validations=True)]:
        expected = forecast(example.known)
        rows.append((example, expected.loss / example.end - 1, expected.low <= example.end <= expected.high))
    print(*table(rows), sep="\n")


def main() -> None:
    runs = json.loads(CURVES.read_text(encoding="utf-8"))
    print(f"{len(runs)} runs on {len({run['text'] for run in runs})} texts\n")
    entries = []
    for has_validations in (True, False):
        data = [example for run in runs for example in examples(run, has_validations)]
        for optimizer in ("muon", "adamw"):
            print(f"{optimizer}, {'with' if has_validations else 'without'} validation", end="\n\n")
            print(*table(cross_validate(data, optimizer)), "", sep="\n")
            found = fit(data, optimizer)
            change, error = (tuple(round(float(number), 4) for number in row) for row in (found.change, found.error))
            quantiles = f"low={found.low:.3f}, high={found.high:.3f}"
            entries.append(f'    ("{optimizer}", {has_validations}): Regression({change}, {error}, {quantiles}),')
    print(*entries, sep="\n")


if __name__ == "__main__":
    check() if sys.argv[1:] == ["check"] else main()
