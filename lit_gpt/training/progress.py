"""Progress on the console: a bar over optimizer steps, a line per validation, an estimate of the time left."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from lit_gpt.device import synchronize
from lit_gpt.training.module import logs_at, parts


def remaining_validations(step: int, end: int, interval: int) -> int:
    """How many follow after optimizer step `step`: every `interval` steps, and after the last."""
    return 0 if step >= end else -(-end // interval) - step // interval


def format_eta(
    steps: int, step_seconds: float, validations: int, validation_seconds: float, more_seconds: float = 0.0
) -> str:
    """`about 35 s: 1,000 steps of 33 ms, 5 validations of 400 ms`; `more_seconds` count too."""
    seconds = steps * step_seconds + validations * validation_seconds + more_seconds
    validating = f", {validations:,} validation{'s'[: validations != 1]} of {format_duration(validation_seconds)}"
    return f"about {format_duration(seconds)}: {steps:,} steps of {format_duration(step_seconds)}" + (
        validating if validations else ""
    )


def format_duration(seconds: float) -> str:
    """In the unit of which there are not too many."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


class StepProgress(ProgressBar):
    """A bar over the optimizer steps of the whole run, a line at every validation, and one on the time that is left.

    That one comes once some steps have been timed; a validation yet to come counts as a third of training on so much
    text, a forward pass without its backward pass (Kaplan et al. 2020).
    """

    WARM_UP, TIMED_SECONDS, WORTH_SECONDS = 5, 2.0, 20.0  # steps before the clock, its least time, the least told of

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm | None = None
        self.enabled = True
        self._timed_from: int | None = None  # the step the clock waits for; None: what is left has been told
        self._since = 0.0

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self.enabled:
            tqdm.write(" ".join(map(str, args)), file=sys.stdout)
            sys.stdout.flush()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.max_steps if trainer.max_steps > 0 else None
        quiet = not self.enabled or not sys.stderr.isatty()
        self.bar = tqdm(initial=trainer.global_step, total=steps, unit="step", disable=quiet, dynamic_ncols=True)
        self.print(f"step {trainer.global_step:>6,}   {'untrained' if trainer.global_step == 0 else 'resumed'}")
        self._timed_from = trainer.global_step + self.WARM_UP

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.bar is not None and logs_at(trainer, trainer.global_step):
            self.bar.update(trainer.global_step - self.bar.n)
        if self._timed_from is not None and (args[-1] + 1) % trainer.accumulate_grad_batches == 0:
            self._time(trainer, trainer.global_step - self._timed_from)

    def _time(self, trainer: Trainer, steps: int) -> None:
        """Says what time is left, when `steps` have taken long enough for it to be known."""
        module, data = parts(trainer)
        end, now = data.max_steps, time.perf_counter()
        if steps <= 0:
            self._since = now
        elif now > self._since + self.TIMED_SECONDS:
            synchronize(module.device)  # once: what was queued before the clock was started is little
            step_seconds = (time.perf_counter() - self._since) / steps
            self._timed_from = None
            if end is None or (end - trainer.global_step) * step_seconds < self.WORTH_SECONDS:
                return
            times, seconds = 0, 0.0
            if trainer.enable_validation and data.validation_interval is not None:
                times = remaining_validations(trainer.global_step, end, data.validation_interval)
                windows = sum(len(loader.dataset.starts) for loader in trainer.val_dataloaders or [])
                seconds = windows / (data.batch_size * data.accumulation) * step_seconds / 3
            self.print(f"time        {format_eta(end - trainer.global_step, step_seconds, times, seconds)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is None or trainer.sanity_checking:
            return
        if self._timed_from is not None:  # the clock does not count what has just been done
            self._timed_from = trainer.global_step + 1
        losses = trainer.callback_metrics
        speed = losses.get("speed/tokens_per_second")
        self.print(
            f"step {trainer.global_step:>6,}   loss/train_eval {losses['loss/train_eval']:.4f}   "
            f"loss/val {losses['loss/val']:.4f}" + (f"   {speed:,.0f} tokens/s" if speed is not None else "")
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is not None:
            self.bar.update(trainer.global_step - self.bar.n)
            self.bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.bar is not None:
            self.bar.close()
