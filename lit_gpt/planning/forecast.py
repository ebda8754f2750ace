"""Forecast the last validation loss of a run from the part of its curves that is known.

The loss of a run falls about like a power of the number of steps (Hestness et al. 2017), and it falls once more where
the learning rate does. The slope of the training loss over the logarithm of the steps says how fast. A linear
regression on a few such features gives the logarithm of the last loss divided by the loss now. A second one, on the
same features, gives the usual size of its error. Both are fitted on measured runs by docs/planning_forecast.py, which
prints the coefficients below. docs/planning.md says how good the forecasts are.
"""

import math
from dataclasses import dataclass
from operator import mul

Curve = list[tuple[int, float]]  # (step, loss in nats per token), in ascending order

START_SHARE = 0.1  # of a run: there are no forecasts before
MAX_POINTS = 1_000  # of a training curve that is kept for forecasts


@dataclass(frozen=True)
class KnownCurves:
    """What is known of a run at one of its steps.

    Attributes:
        step: The step, counted from 1.
        last_step: The last step of the run.
        val_loss: The validation loss at `step`, in nats per token; None if there is none at this step.
        recent_loss: The mean training loss in the latter half of the steps so far.
        earlier_loss: The mean training loss in the quarter before.
        rate: The learning rate of the next step, as a fraction of the highest one.
        last_rate: That of the last step.
        epochs: Passes over the training text in the whole run.
    """

    step: int
    last_step: int
    val_loss: float | None
    recent_loss: float
    earlier_loss: float
    rate: float
    last_rate: float
    epochs: float


@dataclass(frozen=True)
class Forecast:
    """The expected validation loss at the last step, in nats per token, and its 80% interval.

    Attributes:
        loss: The median.
        low: With a probability of a tenth the loss is below.
        high: With a probability of a tenth the loss is above.
    """

    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Regression:
    """Coefficients that docs/planning_forecast.py has fitted.

    Attributes:
        change: Of ln(last validation loss / loss now), one for each feature.
        error: Of the mean absolute error of that, one for each feature, none below zero.
        low: The tenth percentile of the errors, in mean absolute errors.
        high: The ninetieth percentile.
    """

    change: tuple[float, ...]
    error: tuple[float, ...]
    low: float
    high: float


def add_point(curve: Curve, step: int, loss: float) -> None:
    """Add a training loss to a curve; of one that has become too long every second point is kept."""
    curve.append((step, loss))
    if len(curve) > MAX_POINTS:
        del curve[-2::-2]


def mean_loss(curve: Curve, after: int, step: int) -> float | None:
    """Return the mean training loss in the steps from `after` + 1 to `step`; None if no point is there.

    A point stands for the steps since the point before it.
    """
    starts = [0, *(other for other, _ in curve)]
    spans = [(end - start, loss) for start, (end, loss) in zip(starts, curve) if after < end <= step]
    return sum(span * loss for span, loss in spans) / sum(span for span, _ in spans) if spans else None


def features(known: KnownCurves) -> tuple[float, ...]:
    """Return what the change of the loss until the end of the run depends on; all are zero at the last step."""
    remaining = 2 * (1 - math.sqrt(known.step / known.last_step))  # the fall of a power law with the exponent 0.5
    slope = math.log(known.recent_loss / known.earlier_loss)
    gap = 0.0 if known.val_loss is None else math.log(known.val_loss / known.recent_loss)
    return (
        remaining * slope,
        remaining,
        known.rate - known.last_rate,
        remaining * gap,
        remaining * max(0.0, math.log(known.epochs)),
    )


def forecast(known: KnownCurves, regression: Regression | None = None) -> Forecast:
    """Return the expected validation loss at the last step.

    Args:
        known: The curves so far.
        regression: The coefficients. None: those that are fitted for a step with or without a validation.
    """
    loss = known.recent_loss if known.val_loss is None else known.val_loss
    regression = regression or (WITHOUT_VALIDATION if known.val_loss is None else WITH_VALIDATION)
    values = features(known)
    change, error = sum(map(mul, regression.change, values)), sum(map(mul, regression.error, map(abs, values)))
    quantiles = (change, change + regression.low * error, change + regression.high * error)
    return Forecast(*(loss * math.exp(quantile) for quantile in quantiles))


# Printed by `python docs/planning_forecast.py`.
WITH_VALIDATION = Regression((1.38, -0.0564, 0.0499, 0.474, 0.0827), (0.2177, 0.0105, 0.0, 1.7117, 0.0), -1.552, 1.197)
WITHOUT_VALIDATION = Regression((3.3254, 0.029, 0.2041, 0.0, -0.1481), (1.7464, 0.0, 0.0, 0.0, 0.0), -1.505, 0.745)
