"""Correct the number of steps of a run that has to fit into a time, when steps have shown how long they take."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_gpt.device import synchronize
from lit_gpt.figures import format_duration
from lit_gpt.training.module import LitGPT, module_and_data
from lit_gpt.training.pace import Pace

# Parts of the run after which the number of steps is corrected: before the first forecast, at a tenth of it, and once
# more, when steps have been timed for longer, before the learning rate falls in planned runs.
TIMED_SHARES = (0.095, 0.43)
UNTIMED_STEPS = 2  # the first ones allocate memory
MAX_TIMED_STEPS = 1000
LEAST_CHANGE = 0.01  # of the number of steps


class StepsInTime(Callback):
    """Change the number of steps of a run to what fits into its time, when a tenth and two fifths of it have passed.

    A plan is made from a step that was timed for a second or two on a machine whose speed changes; the steps of the run
    itself say more. What was trained so far must not depend on the number of steps: the run then equals one that has
    had the final number from its first step. So the number stays where the learning rate would have been another one,
    as with a cosine over the whole run. It has to come before all callbacks that look at the last step.

    Args:
        end: When the last checkpoint should be written, as time.perf_counter().
        step_seconds: How long a step is expected to take.
        validation_seconds: How long a validation is expected to take, with its texts and its checkpoint.

    Attributes:
        on_change: A function that is called with the new number of steps.
    """

    def __init__(self, end: float, step_seconds: float, validation_seconds: float) -> None:
        self.end, self.step_seconds, self.validation_seconds = end, step_seconds, validation_seconds
        self.on_change: Callable[[int], Any] = lambda steps: None
        self._pace, self._shares = Pace(MAX_TIMED_STEPS), list(TIMED_SHARES)
        self._step = -1  # that has begun
        self._begin: float | None = None  # of the first timed step
        self._validation_start: float | None = None  # None: no validation since the last step
        self._validation_seconds: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if not self._shares or trainer.global_step in (self._step, *range(UNTIMED_STEPS)):
            return
        module, data = module_and_data(trainer)
        synchronize(module.device)
        step, now = trainer.global_step, time.perf_counter()
        if self._validation_start is not None:
            self._validation_seconds.append(now - self._validation_start)
            self._validation_start = None
        self._begin = now if self._begin is None else self._begin
        self._pace.record(step, now - sum(self._validation_seconds))
        self._step, planned = step, data.plan.last_step
        assert planned is not None
        passed = max((now - self._begin) / (self.end - self._begin), step / planned)
        if passed >= self._shares[0] and self._pace.mean_step_seconds is not None and not trainer.should_stop:
            del self._shares[0]
            self._correct(trainer, module, planned, self._pace.mean_step_seconds, now)
            self._pace = Pace(MAX_TIMED_STEPS)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_start = time.perf_counter()

    def _correct(self, trainer: Trainer, module: LitGPT, planned: int, step_seconds: float, now: float) -> None:
        wanted = trainer.global_step + self._steps_left(trainer, step_seconds, now)
        if abs(wanted - planned) < LEAST_CHANGE * planned:
            return
        last_step = change_last_step(trainer, module, wanted)
        if last_step != planned:
            if trainer.progress_bar_callback is not None:
                took = f"a step takes {format_duration(step_seconds)}, and {format_duration(self.end - now)} are left"
                trainer.progress_bar_callback.print(f"steps       {last_step:,}, not {planned:,}: {took}")
            self.on_change(last_step)

    def _steps_left(self, trainer: Trainer, step_seconds: float, now: float) -> int:
        """Return how many steps fit into the rest of the time with their validations, 1 or more."""
        _, data = module_and_data(trainer)
        interval = data.plan.validation_interval if trainer.enable_validation else None
        validation_seconds = self.validation_seconds * max(1.0, step_seconds / self.step_seconds) if interval else 0.0
        if self._validation_seconds:
            validation_seconds = statistics.fmean(self._validation_seconds)
        left = self.end - now - validation_seconds  # the last validation
        per_step = step_seconds + (validation_seconds / interval if interval else 0.0)
        return max(1, int(left / per_step))


def change_last_step(trainer: Trainer, module: LitGPT, wanted: int) -> int:
    """Change the last step of a run that trains to `wanted`, as far as the steps taken so far do not depend on it.

    Returns:
        The last step: the nearest one to `wanted`, between it and the present one, with which all learning rates so far
        are what they were.
    """
    present = module.max_steps
    assert present is not None
    so_far = range(trainer.global_step + 1)  # the learning rate of the next step is set already
    factors = [module.learning_rate_factor(step) for step in so_far]

    def is_possible(last_step: int) -> bool:
        module.max_steps = last_step
        return factors == [module.learning_rate_factor(step) for step in so_far]

    possible, impossible = present, wanted
    if is_possible(wanted):
        possible = wanted
    while abs(impossible - possible) > 1:
        middle = (possible + impossible) // 2
        if is_possible(middle):
            possible = middle
        else:
            impossible = middle
    module.max_steps = trainer.fit_loop.epoch_loop.max_steps = possible
    return possible
