"""Fix the number of steps of a run that has to fit into a time, when its first steps have shown how long they take."""

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.figures import format_duration
from lit_gpt.training.module import LitGPT, module_and_data

TIMED_SHARE = 0.095  # of the time: the first forecast, at a tenth of the run, is about the final number of steps
UNTIMED_STEPS = 2  # the first ones allocate memory


class StepsInTime(Callback):
    """Change the number of steps of a run to what fits into its time, once, before a tenth of it has passed.

    A plan is made from a step that was timed for a second or two on a machine whose speed changes; the steps of the run
    itself say more. What was trained so far must not depend on the number of steps: the run then equals one that has
    had the final number from its first step. So the number stays where the learning rate would have been another one,
    as with a cosine over the whole run.

    Args:
        end: When the last checkpoint should be written, as time.perf_counter().
        step_seconds: How long a step is expected to take.
        validation_seconds: How long a validation is expected to take, with its texts and its checkpoint.

    Attributes:
        on_fixed: A function that is called with the final number of steps, whether it has changed or not.
    """

    def __init__(self, end: float, step_seconds: float, validation_seconds: float) -> None:
        self.end, self.step_seconds, self.validation_seconds = end, step_seconds, validation_seconds
        self.on_fixed: Callable[[int], Any] = lambda steps: None
        self._is_fixed = False
        self._step = -1  # that has begun
        self._begin = 0.0  # of the first step, as time.perf_counter()
        self._timing_start: float | None = None  # of the steps that are timed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self._step:  # another batch of the same step
            return
        self._step, now = trainer.global_step, time.perf_counter()
        if self._step == UNTIMED_STEPS:
            self._timing_start = now
        elif now - self._begin >= TIMED_SHARE * (self.end - self._begin):
            self._fix(trainer, now)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the number before the first validation, which would count as time of the steps."""
        if trainer.global_step > 0:
            self._fix(trainer, time.perf_counter())

    def _fix(self, trainer: Trainer, now: float) -> None:
        """Fix the number of steps; it stays if no step has been timed."""
        if self._is_fixed:
            return
        self._is_fixed = True
        timed_steps = trainer.global_step - UNTIMED_STEPS
        if self._timing_start is not None and timed_steps > 0:
            step_seconds = (now - self._timing_start) / timed_steps
            module, data = module_and_data(trainer)
            planned, last_step = data.plan.last_step, self._last_step(trainer, data, step_seconds, now)
            if last_step != planned and change_last_step(trainer, module, last_step):
                took = format_duration(step_seconds)
                self._print(trainer, f"steps       {last_step:,}, not {planned:,}: a step takes {took}")
        self.on_fixed(trainer.max_steps)

    def _last_step(self, trainer: Trainer, data: TextDataModule, step_seconds: float, now: float) -> int:
        """Return the last step that fits into the time."""
        interval = data.plan.validation_interval if trainer.enable_validation else None
        validation_seconds = self.validation_seconds * step_seconds / self.step_seconds if interval else 0.0
        left = self.end - now - validation_seconds  # the last validation
        per_step = step_seconds + (validation_seconds / interval if interval else 0.0)
        return trainer.global_step + max(1, int(left / per_step))

    def _print(self, trainer: Trainer, text: str) -> None:
        if trainer.progress_bar_callback is not None:
            trainer.progress_bar_callback.print(text)


def change_last_step(trainer: Trainer, module: LitGPT, last_step: int) -> bool:
    """Change the last step of a run that trains, unless the steps taken so far depend on it.

    Returns:
        Whether it was changed.
    """
    before = module.max_steps
    so_far = range(trainer.global_step + 1)  # the learning rate of the next step is set already
    factors = [module.learning_rate_factor(step) for step in so_far]
    module.max_steps = last_step
    if factors != [module.learning_rate_factor(step) for step in so_far]:
        module.max_steps = before
        return False
    trainer.fit_loop.epoch_loop.max_steps = last_step
    return True
