"""How long optimizer steps and validations take, and how long the rest of a run takes."""

import statistics
from collections import deque

from lit_gpt.figures import format_duration


def remaining_validations(step: int, last_step: int, interval: int) -> int:
    """Return the number of validations after optimizer step `step`: one every `interval` steps, one at `last_step`."""
    if step >= last_step:
        return 0
    up_to_last_step = -(-last_step // interval)  # rounded up: the last step validates
    return up_to_last_step - step // interval


def format_eta(
    steps: int, step_seconds: float, validations: int, validation_seconds: float, other_seconds: float = 0.0
) -> str:
    """Return the remaining time as `about 35.0 s: 1,000 steps of 33 ms, 5 validations of 400 ms`.

    Args:
        steps: remaining optimizer steps.
        step_seconds: of one optimizer step.
        validations: remaining validations.
        validation_seconds: of one validation.
        other_seconds: added to the sum and not listed.
    """
    seconds = steps * step_seconds + validations * validation_seconds + other_seconds
    eta = f"about {format_duration(seconds)}: {steps:,} steps of {format_duration(step_seconds)}"
    if validations:
        plural = "s" if validations != 1 else ""
        eta += f", {validations:,} validation{plural} of {format_duration(validation_seconds)}"
    return eta


class Pace:
    """The time of an optimizer step, of which the last ones are kept.

    Args:
        max_steps: Steps that are kept.

    Attributes:
        MIN_STEPS: Steps that are timed before the time of a step is known.
        SLOWEST: A step counts in `mean_step_seconds` with at most this many times the median.
    """

    MIN_STEPS, SLOWEST = 10, 3.0

    def __init__(self, max_steps: int = 100) -> None:
        self.max_steps = max_steps
        self._step_seconds: deque[float] = deque(maxlen=max_steps)
        self._last: tuple[int, float] | None = None  # step and time of the last call of `record`; None after a pause

    @property
    def step_seconds(self) -> float | None:
        """The median time of a step, so that single slow steps do not count; None before `MIN_STEPS` are timed."""
        return statistics.median(self._step_seconds) if len(self._step_seconds) >= self.MIN_STEPS else None

    @property
    def mean_step_seconds(self) -> float | None:
        """The mean time of a step, for the time of many of them; None where the median is None."""
        median = self.step_seconds
        return None if median is None else statistics.fmean(min(s, self.SLOWEST * median) for s in self._step_seconds)

    def record(self, step: int, time: float) -> None:
        """Note that optimizer step `step` ended at `time`, in seconds. Steps between two calls share the time."""
        if self._last is not None:
            last_step, last_time = self._last
            steps = step - last_step
            self._step_seconds.extend([(time - last_time) / steps] * min(steps, self.max_steps))
        self._last = step, time

    def pause(self) -> None:
        """Leave out the time until the next call of `record`."""
        self._last = None
