"""Record a run in summary.json, for scripts/compare.py, and in report.html, for its reader."""

import contextlib
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_gpt.errors import Stopped
from lit_gpt.files import write_error
from lit_gpt.runs.environment import describe_machine, git_state, library_versions
from lit_gpt.runs.report import REPORT_FILE, write_report
from lit_gpt.runs.summary import SUMMARY_FILE, DamagedSummaryError, RunSummary, Status, read_summary
from lit_gpt.training.advice import LearningRateAdvice
from lit_gpt.training.logger import step_logger
from lit_gpt.training.module import module_and_data
from lit_gpt.training.throughput import StepThroughput

WRITE_SECONDS = 2.0  # at least, between two writes of a running run: to replace a file takes milliseconds
CHECKPOINT_KEY = "run_totals"
# The figures of a summary that a checkpoint holds, beside the time at which the run started.
TOTALS: dict[str, type] = {
    "tokens": int,
    "seconds": float,
    "tokens_per_second": float,
    "best_loss": float,
    "best_step": int,
    "bits_per_byte": float,
    "last_loss": float,
    "last_train_loss": float,
}


class RunRecorder(Callback):
    """Write summary.json into the run's folder when the run starts, after validations, and at its end.

    At the end it also writes report.html, of a run that was stopped or failed too.

    What is summed over resumes, and the best loss, is in the checkpoint: a run that was killed goes on from the figures
    of its checkpoint. Only rank 0 writes. A file that cannot be written does not end the run: the checkpoints decide
    whether it can go on. The callback has to come before `GracefulStop`, which lets signals interrupt what follows it.

    Args:
        summary: What the command line knows about the run.

    Attributes:
        summary: What is known so far.
        problem: Why a file could not be written, as a line for the user; "" if all were written.
        first_loss: `loss/val` before the first step, in nats per token; None if this command did not compute it.
    """

    def __init__(self, summary: RunSummary) -> None:
        self.summary = summary
        self.problem = ""
        self.first_loss: float | None = None
        self._totals: dict[str, float] = {}  # of the checkpoint this command resumed from
        self._start = 0.0  # time.perf_counter() when this command began to train
        self._start_step: int | None = None  # its first step; None before
        self._start_tokens = 0
        self._last_write = float("-inf")  # time.perf_counter()

    def move_to(self, folder: Path) -> None:
        """Change the run's folder, before anything is written to it."""
        self.summary.folder = str(folder)

    # ------------------------------------------------------------------------------------------ state in a checkpoint

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._start_step is not None:
            self._update(trainer)
            totals = {name: getattr(self.summary, name) for name in TOTALS}
            totals["started"] = datetime.fromisoformat(self.summary.started).timestamp()
            checkpoint[CHECKPOINT_KEY] = {name: float(value) for name, value in totals.items() if value is not None}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._totals = checkpoint.get(CHECKPOINT_KEY, {})

    # -------------------------------------------------------------------------------------------- hooks of the Trainer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)
        self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        metrics, summary = trainer.callback_metrics, self.summary
        summary.last_loss, summary.last_train_loss = (
            float(metrics[f"loss/{split}"]) for split in ("val", "train_eval")
        )
        if trainer.global_step == 0:
            self.first_loss = summary.last_loss
        elif summary.best_loss is None or summary.last_loss < summary.best_loss:
            summary.best_loss, summary.best_step = summary.last_loss, trainer.global_step
            bits_per_byte = metrics.get("val/bits_per_byte")
            summary.bits_per_byte = None if bits_per_byte is None else float(bits_per_byte)
        self._write(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the end, when the last step is saved."""
        if self._start_step is None:  # a run that is complete has nothing to train
            if not trainer.is_global_zero or _is_finished(Path(self.summary.folder)):
                return
            self._begin(trainer)  # it was killed when its last step was saved
        self._write(trainer, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._start_step is not None and self.summary.status == "running":
            is_stopped = isinstance(exception, Stopped | KeyboardInterrupt)
            with contextlib.suppress(Exception):  # the first error is the one to report
                self._write(trainer, "stopped" if is_stopped else "failed")

    # --------------------------------------------------------------------------------------------------------- writing

    def _begin(self, trainer: Trainer) -> None:
        """Take over the figures of the checkpoint, and what is known since the model is on its device."""
        module, data = module_and_data(trainer)
        self._start, self._start_step = time.perf_counter(), trainer.global_step
        summary, totals = self.summary, self._totals
        for name, kind in TOTALS.items():
            if name in totals:
                setattr(summary, name, kind(totals[name]))
        summary.started = _iso_time(min(totals.get("started", time.time()), time.time()))
        tokens_per_step = data.plan.windows_per_step * data.context_length
        self._start_tokens = int(totals.get("tokens", self._start_step * tokens_per_step))
        summary.parameters = sum(parameter.numel() for parameter in module.gpt.parameters())
        if trainer.is_global_zero:
            summary.machine = describe_machine(trainer.strategy.root_device, trainer.world_size)
            summary.versions, summary.git = library_versions(), git_state()

    def _update(self, trainer: Trainer) -> None:
        """Take over how far the run has come."""
        assert self._start_step is not None
        _, data = module_and_data(trainer)
        summary = self.summary
        summary.step, summary.max_steps = trainer.global_step, data.plan.last_step
        steps = trainer.global_step - self._start_step
        summary.tokens = self._start_tokens + steps * data.plan.windows_per_step * data.context_length
        summary.seconds = self._totals.get("seconds", 0.0) + time.perf_counter() - self._start
        summary.ended = _iso_time(time.time())
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StepThroughput) and callback.mean_tokens_per_second is not None:
                summary.tokens_per_second = callback.mean_tokens_per_second
            if isinstance(callback, LearningRateAdvice):
                summary.advice = callback.given

    def _write(self, trainer: Trainer, status: Status = "running") -> None:
        is_due = status != "running" or time.perf_counter() - self._last_write > WRITE_SECONDS
        if not trainer.is_global_zero or not is_due:
            return
        self._last_write = time.perf_counter()
        self._update(trainer)
        self.summary.status = status
        self.problem, folder = "", Path(self.summary.folder)
        name = SUMMARY_FILE
        try:
            self.summary.write(folder)
            if status != "running":
                name = REPORT_FILE
                if (logger := step_logger(trainer)) is not None:
                    logger.flush()
                write_report(self.summary, folder)
        except OSError as error:
            self.problem = str(write_error(folder / name, error))


def _is_finished(folder: Path) -> bool:
    with contextlib.suppress(DamagedSummaryError, FileNotFoundError):
        return read_summary(folder).status == "finished"
    return False


def _iso_time(seconds: float) -> str:
    """Return a time in seconds since 1970 as ISO 8601 in the time zone of this computer."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
