"""Progress on the console: a bar over optimizer steps, lines for each validation, the estimated remaining time.

A pipe gets the same lines as a terminal, without the bars.
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from tqdm import tqdm

from lit_gpt.device import synchronize
from lit_gpt.figures import format_duration
from lit_gpt.lines import INDENT, wrap_line
from lit_gpt.printable import escape_controls
from lit_gpt.training.checkpointing import StepCheckpoint, StopEarly
from lit_gpt.training.metrics import is_logging_step
from lit_gpt.training.module import LitGPT, module_and_data
from lit_gpt.training.pace import Pace, format_eta, remaining_validations

Item = TypeVar("Item")


def step_line(step: int, text: str) -> str:
    """Return a line about an optimizer step; its label takes 12 columns up to step 999,999."""
    return f"step {step:>6,} {text}"


def validation_lines(step: int, metrics: dict[str, Any]) -> list[str]:
    """Return the lines with the losses of a validation, in nats per token, and in bits per byte where it is known."""
    text = f"loss/train_eval {metrics['loss/train_eval']:.4f}   loss/val {metrics['loss/val']:.4f} nats"
    if "val/bits_per_byte" in metrics:
        text += f", {metrics['val/bits_per_byte']:.3f} bits/byte"
    return wrap_line(step_line(step, text))


def describe_start(module: LitGPT) -> str:
    """Return what to compare the loss before the first step with: that of a uniform guess over the vocabulary."""
    vocab_size = module.gpt.config.vocab_size
    start = "untrained" if module.hparams["init_from"] is None else "before training"
    return f"{start}; a uniform guess has ln({vocab_size:,}) = {math.log(vocab_size):.4f} nats"


def format_bar(
    step: int, last_step: int | None, loss: float | None, tokens_per_second: float | None, seconds: float | None
) -> str:
    """Return what tqdm takes as `bar_format`: `step 120/300  40%|███   | loss 4.1200  9,752 tokens/s  21.0 s left`.

    Args:
        step: Completed optimizer steps.
        last_step: None if the run has no end.
        loss: The training loss of the last logging step; None before.
        tokens_per_second: None before enough steps are timed.
        seconds: The remaining time; None where it is unknown.
    """
    left = f"step {step:,} |" if last_step is None else f"step {step:,}/{last_step:,} {{percentage:3.0f}}%|{{bar}}|"
    shown = ["" if loss is None else f" loss {loss:.4f}"]
    shown += [] if tokens_per_second is None else [f"{tokens_per_second:,.0f} tokens/s"]
    shown += [] if not seconds else [f"{format_duration(seconds)} left"]
    return left + "  ".join(shown)


class Overfitting:
    """Notices once when loss/val rises while loss/train_eval falls: the model then memorizes its training text.

    Attributes:
        MARGIN: How far loss/val must be above its lowest value, as a fraction of it.
    """

    MARGIN = 0.01

    def __init__(self) -> None:
        self._best_step, self._lowest = -1, math.inf  # step and value of the lowest loss/val
        self._train_loss_then: float | None = None  # loss/train_eval at that step; None if it is not known
        self._is_reported = False

    def resume(self, best_step: int, lowest: float) -> None:
        """Take over the lowest loss/val of a run that is resumed."""
        self._best_step, self._lowest, self._train_loss_then = best_step, lowest, None

    def check(self, step: int, val_loss: float, train_loss: float) -> str:
        """Return a text to print after a validation, or an empty string."""
        if val_loss < self._lowest:
            self._best_step, self._lowest, self._train_loss_then = step, val_loss, train_loss
        if self._train_loss_then is None:  # the first validation after a resume stands for the one at the best step
            self._train_loss_then = train_loss
        rise = val_loss / self._lowest - 1 if self._lowest > 0 else 0.0
        if self._is_reported or rise <= self.MARGIN or train_loss >= self._train_loss_then:
            return ""
        self._is_reported = True
        return (
            f"loss/val is {rise:.1%} above its lowest value, {self._lowest:.4f} at step {self._best_step:,}, while "
            "loss/train_eval falls: the model memorizes its text"
        )


class StepProgress(TQDMProgressBar):
    """Lightning's progress bar, over the optimizer steps of the whole run, with lines for each validation.

    Lightning's own bar counts the batches of an epoch. Where the output is no terminal, there are lines only. The bar
    waits for the device on logging steps only, where the logger waits too.

    Once some steps have been timed, it prints an estimate of the remaining time, and again at each validation. Until
    the run has validated, the estimate takes a validation for a third of the training time on the same number of
    tokens, because a forward pass is a third of the operations of a forward and a backward pass (Kaplan et al. 2020).

    Args:
        has_bars: Draw bars in a terminal; False: print lines only.

    Attributes:
        WARM_UP_STEPS: Steps before the first timed step.
        TIMED_SECONDS: Least time from the first timed step to the first estimate.
        LEAST_REMAINING_SECONDS: If less time remains, the first estimate is not printed.
        DRAWING_SECONDS: Time between two updates of the bar.
        LINE_SECONDS: Time between two lines about a long validation, where there is no bar.
    """

    WARM_UP_STEPS, TIMED_SECONDS, LEAST_REMAINING_SECONDS = 5, 2.0, 20.0
    DRAWING_SECONDS, LINE_SECONDS = 1.0, 60.0

    def __init__(self, has_bars: bool = True) -> None:
        super().__init__(refresh_rate=1 if has_bars and sys.stdout.isatty() else 0)
        self._pace, self._overfitting = Pace(), Overfitting()
        self._first_timed_step = 0
        self._timing_start: float | None = None  # time.perf_counter() at that step; None before it
        self._estimate_is_due = True
        self._train_loss: float | None = None  # of the last logging step
        self._loss_step = 0
        self._drawn = 0.0  # time.perf_counter() when the bar was updated
        self._validation_start: float | None = None  # None: no validation since the last batch
        self._validation_seconds: float | None = None  # of the last validation, with its texts and its checkpoint
        self._evaluated, self._line_time = 0, 0.0  # batches of the current validation; when a line about it was due

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line above the bar, also where there is no bar."""
        if self.trainer.is_global_zero:
            tqdm.write(escape_controls(" ".join(map(str, args)), keep="\n\t"), file=sys.stdout)
            sys.stdout.flush()

    # --------------------------------------------------------------------------------------------------------- bars

    def init_train_tqdm(self) -> Tqdm:
        step, steps = self.trainer.global_step, self.trainer.estimated_stepping_batches
        total = None if steps == math.inf else int(steps)
        return self._new_bar(format_bar(step, total, None, None, None), total=total, initial=step, unit="step")

    def init_validation_tqdm(self) -> Tqdm:
        """Return one bar over the batches of all splits."""
        return self._evaluation_bar(self.trainer.num_val_batches)

    def init_test_tqdm(self) -> Tqdm:
        return self._evaluation_bar(self.trainer.num_test_batches)

    def _evaluation_bar(self, num_batches: list[int | float]) -> Tqdm:
        self._evaluated, self._line_time = 0, time.perf_counter()
        name = "testing" if self.trainer.testing else "validating"
        bar_format = f"{name} {{n_fmt}}/{{total_fmt}} {{percentage:3.0f}}%|{{bar}}| {{remaining}} left"
        return self._new_bar(bar_format, total=sum(num_batches), position=int(self.trainer.state.fn == "fit"))

    def track_sampling(self, tokens: Iterable[Item], total: int) -> Iterator[Item]:
        """Yield what `tokens` yields, `total` times at most, with a bar below that of the steps."""
        bar_format = "sampling {n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}| {remaining} left"
        with self._new_bar(bar_format, total=total, position=1) as bar:
            for token in tokens:
                yield token
                bar.update()

    def _new_bar(self, bar_format: str, **options: Any) -> Tqdm:
        return Tqdm(
            disable=self.is_disabled, leave=False, dynamic_ncols=True, file=sys.stdout, bar_format=bar_format, **options
        )

    # ----------------------------------------------------------------------------------------------------- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path is not None:
            self.print(step_line(trainer.global_step, "resumed"))
            checkpointing = trainer.checkpoint_callback
            if isinstance(checkpointing, StepCheckpoint) and checkpointing.best_model_score is not None:
                self._overfitting.resume(checkpointing.best_step, float(checkpointing.best_model_score))
        self._first_timed_step = trainer.global_step + self.WARM_UP_STEPS

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Go on with the same bar, which counts the steps of all epochs."""
        is_new_run = trainer.global_step == 0 and trainer.ckpt_path is None
        if is_new_run and "loss/val" not in trainer.callback_metrics:  # otherwise there are lines with the losses
            module, _ = module_and_data(trainer)
            self.print(step_line(0, describe_start(module)))

    def on_train_epoch_end(self, *args: Any) -> None:
        """Go on with the same bar."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self._validation_start is not None:
            self._validation_seconds = time.perf_counter() - self._validation_start
            self._validation_start = None
            self._pace.pause()
        step = trainer.global_step
        if self.is_enabled and step != self._loss_step and is_logging_step(trainer, step):
            loss = trainer.callback_metrics.get("loss/train")  # computed already: the logger has waited for it
            self._train_loss, self._loss_step = None if loss is None else float(loss), step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        step = trainer.global_step
        if not is_step or step < self._first_timed_step:
            return
        is_synchronous = pl_module.device.type == "cpu"
        if is_synchronous or self._estimate_is_due or is_logging_step(trainer, step):
            synchronize(pl_module.device)  # on logging steps the logger waits too
            now = time.perf_counter()
            self._pace.record(step, now)
            self._timing_start = self._timing_start or now
            if self._estimate_is_due and now > self._timing_start + self.TIMED_SECONDS:
                self._print_estimate(trainer)
        if self.is_enabled and time.perf_counter() > self._drawn + self.DRAWING_SECONDS:
            self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        self._drawn = time.perf_counter()
        _, data = module_and_data(trainer)
        bar, step = self.train_progress_bar, trainer.global_step
        speed, seconds = self._tokens_per_second(trainer), self._remaining_seconds(trainer)
        bar.bar_format = format_bar(step, data.plan.last_step, self._train_loss, speed, seconds)
        bar.n, bar.total = step, data.plan.last_step  # which a run with a budget may change
        bar.refresh()

    # ---------------------------------------------------------------------------------------------- remaining time

    def _remaining_validations(self, trainer: Trainer) -> tuple[int, float]:
        """Return how many validations remain and how long one takes; before the first, it is computed from a step."""
        _, data = module_and_data(trainer)
        interval, last_step, step_seconds = data.plan.validation_interval, data.plan.last_step, self._pace.step_seconds
        if not trainer.enable_validation or interval is None or last_step is None or step_seconds is None:
            return 0, 0.0
        seconds = self._validation_seconds
        if seconds is None:
            windows = sum(len(loader.dataset.starts) for loader in trainer.val_dataloaders or [])
            seconds = windows / (data.batch_size * data.plan.accumulate_grad_batches) * step_seconds / 3
        return remaining_validations(trainer.global_step, last_step, interval), seconds

    def _remaining_seconds(self, trainer: Trainer) -> float | None:
        """Return the estimated time to the end of the run; None where it is unknown."""
        _, data = module_and_data(trainer)
        if self._pace.step_seconds is None or data.plan.last_step is None:
            return None
        validations, validation_seconds = self._remaining_validations(trainer)
        steps = data.plan.last_step - trainer.global_step
        return steps * self._pace.step_seconds + validations * validation_seconds

    def _tokens_per_second(self, trainer: Trainer) -> float | None:
        """Return the speed over all devices; None before enough steps are timed."""
        _, data = module_and_data(trainer)
        step_seconds = self._pace.step_seconds
        return None if step_seconds is None else data.plan.windows_per_step * data.context_length / step_seconds

    def _print_estimate(self, trainer: Trainer) -> None:
        _, data = module_and_data(trainer)
        step_seconds, last_step = self._pace.step_seconds, data.plan.last_step
        if step_seconds is None:
            return
        self._estimate_is_due = False
        if last_step is not None and (last_step - trainer.global_step) * step_seconds >= self.LEAST_REMAINING_SECONDS:
            eta = format_eta(last_step - trainer.global_step, step_seconds, *self._remaining_validations(trainer))
            self.print("\n".join(wrap_line(f"time        {eta}")))

    # --------------------------------------------------------------------------------------------------- evaluation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._validation_start = time.perf_counter()

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Go on with the same bar, which counts the batches of all splits."""

    def on_test_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Go on with the same bar."""

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._count_evaluated(self.val_progress_bar, trainer.num_val_batches)

    def on_test_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._count_evaluated(self.test_progress_bar, trainer.num_test_batches)

    def _count_evaluated(self, bar: Tqdm, num_batches: list[int | float]) -> None:
        """Draw the bar; where there is none, print a line now and then."""
        self._evaluated += 1
        bar.update()
        if self.is_disabled and time.perf_counter() > self._line_time + self.LINE_SECONDS:
            self._line_time = time.perf_counter()
            self.print(f"evaluated   {self._evaluated:,} of {sum(num_batches):,} batches")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.val_progress_bar.close()
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        step, metrics = trainer.global_step, trainer.callback_metrics
        lines = validation_lines(step, metrics)
        if step == 0:
            module, _ = module_and_data(trainer)
            lines += [INDENT + describe_start(module)]
        elif (tokens_per_second := self._tokens_per_second(trainer)) is not None:
            lines += [INDENT + f"{tokens_per_second:,.0f} tokens/s{self._time_left(trainer)}"]
        if reason := self._overfitting.check(step, float(metrics["loss/val"]), float(metrics["loss/train_eval"])):
            is_kept = isinstance(trainer.checkpoint_callback, StepCheckpoint)
            kept = "; best.ckpt keeps that step" if is_kept else ""
            stops_early = any(isinstance(callback, StopEarly) for callback in trainer.callbacks)  # type: ignore[attr-defined]
            remedy = "give " + ("" if stops_early else "--early_stopping.patience 5, ")
            remedy += "more --model.config.dropout, a smaller model or more text"
            lines += wrap_line(f"overfitting {reason}{kept}: {remedy}")
        self.print("\n".join(lines))

    def _time_left(self, trainer: Trainer) -> str:
        """Return the end of a line about speed; an empty string after the last step or where there is none."""
        seconds = self._remaining_seconds(trainer)
        return f", about {format_duration(seconds)} left" if seconds else ""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.test_progress_bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        for name in ("val_progress_bar", "test_progress_bar", "train_progress_bar"):
            with contextlib.suppress(TypeError):  # there is no such bar yet
                getattr(self, name).close()
