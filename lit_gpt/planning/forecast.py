"""Forecast the last validation loss of a run from the part of its curves that is known.

The loss of a run falls about like a power of the number of steps (Hestness et al. 2017), and it falls once more where
the learning rate does. The slope of the training loss over the logarithm of the steps says how fast. A linear
regression on a few such features gives the logarithm of the last loss divided by the loss now, and a second one the
usual size of its error. Both are fitted on measured runs by docs/planning_forecast.py, which
prints the coefficients below. docs/planning.md says how good the forecasts are.
"""

import math
from dataclasses import dataclass
from operator import mul

from lit_gpt.optim import OptimizerName

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
        recent_loss: The mean training loss in the last quarter of the steps so far.
        earlier_loss: The mean training loss in the quarter before.
        rate: The learning rate of the next step, as a fraction of the highest one.
        last_rate: That of the last step.
        epochs: Passes over the training text in the whole run.
        optimizer: Of the model.
    """

    step: int
    last_step: int
    val_loss: float | None
    recent_loss: float
    earlier_loss: float
    rate: float
    last_rate: float
    epochs: float
    optimizer: OptimizerName


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
        change: Of ln(last validation loss / loss now), one for each of `features`.
        error: Of the size of its error, one for each of `error_features`, none below zero.
        low: The lower end of the interval of the errors, divided by that size.
        high: Its upper end.
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


def quarter_losses(curve: Curve, step: int) -> tuple[float, float] | None:
    """Return the mean training loss in the last quarter of the steps so far, and in the one before; None if unknown."""
    recent, earlier = mean_loss(curve, step * 3 // 4, step), mean_loss(curve, step // 2, step * 3 // 4)
    return (recent, earlier) if recent and earlier else None  # none is 0: the logarithm of their ratio is taken


def features(known: KnownCurves) -> tuple[float, ...]:
    """Return what the change of the loss until the end of the run depends on; all are zero at the last step.

    The loss falls with the slope of the training loss, but less where the text is read again, and it may rise again
    where the text is read many times.
    """
    remaining = 2 * (1 - math.sqrt(known.step / known.last_step))  # the fall of a power law with the exponent 0.5
    fall = remaining * math.log(known.recent_loss / known.earlier_loss)
    second_pass = min(1.0, max(0.0, math.log(known.epochs)))  # up to 2.7 passes
    more_passes = max(0.0, math.log(known.epochs / 3))
    return fall, remaining * fall, second_pass * fall, remaining * more_passes, known.rate - known.last_rate


def error_features(known: KnownCurves) -> tuple[float, ...]:
    """Return what the size of the error depends on; all are zero at the last step, none is negative."""
    remaining = 2 * (1 - math.sqrt(known.step / known.last_step))
    fall = remaining * abs(math.log(known.recent_loss / known.earlier_loss))
    return fall, fall * math.sqrt(100 / known.step), remaining, remaining * max(0.0, math.log(known.epochs))


def forecast(known: KnownCurves, regression: Regression | None = None) -> Forecast:
    """Return the expected validation loss at the last step.

    Args:
        known: The curves so far.
        regression: The coefficients. None: those that are fitted for the optimizer, with or without a validation.
    """
    loss = known.recent_loss if known.val_loss is None else known.val_loss
    regression = regression or REGRESSIONS[known.optimizer, known.val_loss is not None]
    change = sum(map(mul, regression.change, features(known)))
    error = sum(map(mul, regression.error, error_features(known)))
    quantiles = (change, change + regression.low * error, change + regression.high * error)
    return Forecast(*(loss * math.exp(quantile) for quantile in quantiles))


# (optimizer, whether there is a validation loss) -> coefficients, as `python docs/planning_forecast.py` prints them.
REGRESSIONS: dict[tuple[OptimizerName, bool], Regression] = {
    ("muon", True): Regression(
        (1.0181, 1.4247, -2.4034, -0.0601, -0.0679), (0.337, 0.0, 0.0958, 0.0326), low=-0.691, high=0.523
    ),
    ("adamw", True): Regression(
        (1.6981, 1.2478, -2.305, -0.0644, -0.0191), (0.3484, 0.0, 0.0963, 0.0287), low=-2.048, high=0.713
    ),
    ("muon", False): Regression(
        (0.3585, 0.5778, -2.0361, -0.0215, -0.1483), (0.0, 0.0, 0.211, 0.0), low=-0.448, high=0.234
    ),
    ("adamw", False): Regression(
        (1.2379, 1.0775, -1.4865, -0.107, -0.1396), (0.0, 0.0, 0.2121, 0.0), low=-5.426, high=0.882
    ),
}
