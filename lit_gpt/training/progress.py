"""Progress on the console: a bar over optimizer steps, a line for each validation, the estimated remaining time."""

import contextlib
import math
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from tqdm import tqdm

from lit_gpt.device import synchronize
from lit_gpt.printable import escape_controls
from lit_gpt.training.module import module_and_data


def remaining_validations(step: int, last_step: int, interval: int) -> int:
    """Return the number of validations after optimizer step `step`: one every `interval` steps, one at `last_step`."""
    if step >= last_step:
        return 0
    up_to_last_step = -(-last_step // interval)  # rounded up: the last step validates
    return up_to_last_step - step // interval


def format_duration(seconds: float) -> str:
    """Return `33.1 ms`, `1.3 s`, `2.0 min`, `2.0 h` or `2.3 days`: a larger unit from two of that unit on."""
    for unit, unit_seconds in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * unit_seconds:
            return f"{seconds / unit_seconds:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


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


class StepProgress(TQDMProgressBar):
    """Lightning's progress bar, over the optimizer steps of the whole run, with a line for each validation.

    Lightning's own bar counts the batches of an epoch. Where the output is no terminal, there are lines only.

    Once some steps have been timed, it prints one estimate of the remaining time. The estimate takes a validation for a
    third of the training time on the same number of tokens, because a forward pass is a third of the operations of a
    forward and a backward pass (Kaplan et al. 2020).

    Attributes:
        WARM_UP_STEPS: Steps before the first timed step.
        TIMED_SECONDS: Least total time of the timed steps.
        LEAST_REMAINING_SECONDS: If less time remains, no estimate is printed.
    """

    WARM_UP_STEPS, TIMED_SECONDS, LEAST_REMAINING_SECONDS = 5, 2.0, 20.0

    def __init__(self) -> None:
        super().__init__(refresh_rate=10 if sys.stdout.isatty() else 0)  # validation batches between two refreshes
        self._timing_start_step: int | None = None  # None: the estimate has been made
        self._timing_start = 0.0  # time.perf_counter() at the end of that step

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line above the bar, also where there is no bar."""
        if self.trainer.is_global_zero:
            tqdm.write(escape_controls(" ".join(map(str, args)), keep="\n\t"), file=sys.stdout)
            sys.stdout.flush()

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.set_description("Step", refresh=False)
        steps = self.trainer.estimated_stepping_batches
        bar.unit, bar.total = "step", None if steps == math.inf else steps
        bar.n = bar.initial = self.trainer.global_step
        return bar

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what the bar shows after its figures; the end of the run folder's name is among it."""
        metrics = super().get_metrics(trainer, pl_module)
        return {
            escape_controls(name): escape_controls(f"{value}") if isinstance(value, str) else value
            for name, value in metrics.items()
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path is not None:
            self.print(f"step {trainer.global_step:>6,}   resumed")
        self._timing_start_step = trainer.global_step + self.WARM_UP_STEPS

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Go on with the same bar, which counts the steps of all epochs."""
        is_new_run = trainer.global_step == 0 and trainer.ckpt_path is None
        if is_new_run and "loss/val" not in trainer.callback_metrics:  # otherwise there is a line with the losses
            self.print(f"step {trainer.global_step:>6,}   untrained")

    def on_train_epoch_end(self, *args: Any) -> None:
        """Go on with the same bar."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.train_progress_bar.update(trainer.global_step - self.train_progress_bar.n)  # draws at most every 0.1 s
        if self._timing_start_step is not None and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._time_steps(trainer, trainer.global_step - self._timing_start_step)

    def _time_steps(self, trainer: Trainer, timed_steps: int) -> None:
        """Start the clock, or after `TIMED_SECONDS` print the estimate.

        Args:
            trainer: the Trainer, at the end of an optimizer step.
            timed_steps: steps since the clock started; 0 or less: start it now.
        """
        if timed_steps <= 0:
            self._timing_start = time.perf_counter()
        elif time.perf_counter() > self._timing_start + self.TIMED_SECONDS:
            module, _ = module_and_data(trainer)
            synchronize(module.device)  # only here: the work queued when the clock started is negligible
            step_seconds = (time.perf_counter() - self._timing_start) / timed_steps
            self._timing_start_step = None
            self._print_eta(trainer, step_seconds)

    def _print_eta(self, trainer: Trainer, step_seconds: float) -> None:
        _, data = module_and_data(trainer)
        step, last_step = trainer.global_step, data.plan.last_step
        if last_step is None or (last_step - step) * step_seconds < self.LEAST_REMAINING_SECONDS:
            return
        validations, validation_seconds = 0, 0.0
        if trainer.enable_validation and data.plan.validation_interval is not None:
            validations = remaining_validations(step, last_step, data.plan.validation_interval)
            windows = sum(len(loader.dataset.starts) for loader in trainer.val_dataloaders or [])
            validation_seconds = windows / (data.batch_size * data.plan.accumulate_grad_batches) * step_seconds / 3
        self.print(f"time        {format_eta(last_step - step, step_seconds, validations, validation_seconds)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self._timing_start_step is not None:  # restart the clock, so that it does not count this validation
            self._timing_start_step = max(self._timing_start_step, trainer.global_step + 1)
        metrics = trainer.callback_metrics
        line = f"step {trainer.global_step:>6,}"
        line += f"   loss/train_eval {metrics['loss/train_eval']:.4f}   loss/val {metrics['loss/val']:.4f}"
        if "speed/tokens_per_second" in metrics:
            line += f"   {metrics['speed/tokens_per_second']:,.0f} tokens/s"
        self.print(line)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with contextlib.suppress(TypeError):  # there is no bar before training
            self.train_progress_bar.close()
