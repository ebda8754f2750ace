"""Notice when a run has to end for its last validation, its texts and its checkpoints to fit into a time."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_gpt.training.checkpointing import StepCheckpoint

MARGIN = 1.3  # factor on the longest ending seen so far


class Deadline(Callback):
    """The time at which a command must have ended, and what its ending takes.

    `GracefulStop` asks `is_reached` before each step. The ending is expected to take as long as the longest validation
    so far, with its texts, two checkpoints and the report. Before the first validation, an estimate stands for it.

    Args:
        end: When the command must have ended, as time.perf_counter().
        ending_seconds: An estimate of the ending.
        report_seconds: The part of it after the last checkpoint.
        text: The time for the command as the user gave it.
    """

    def __init__(self, end: float, ending_seconds: float, report_seconds: float, text: str) -> None:
        self.end, self.report_seconds, self.text = end, report_seconds, text
        self._estimate = ending_seconds
        self._validation_seconds: float | None = None  # the longest one, with its texts and its checkpoint
        self._validation_start: float | None = None
        self._step, self._step_start = -1, 0.0  # the step that has begun, and when
        self._step_seconds = 0.0  # of the last step
        self._save_seconds = self._longest_save = 0.0

    @property
    def ending_seconds(self) -> float:
        """What the ending is expected to take."""
        if self._validation_seconds is None:
            return self._estimate
        return MARGIN * (self._validation_seconds + 2 * self._longest_save + self.report_seconds)

    def is_reached(self) -> bool:
        """Return whether another step would leave too little time for the ending."""
        return time.perf_counter() + self._step_seconds + self.ending_seconds > self.end

    # -------------------------------------------------------------------------------------------- hooks of the Trainer

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_start = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self._step:  # another batch of the same step
            return
        now = time.perf_counter()
        if self._validation_start is not None:
            self._validation_seconds = max(self._validation_seconds or 0.0, now - self._validation_start)
        elif self._step >= 0:
            self._step_seconds = now - self._step_start
        self._validation_start, self._step, self._step_start = None, trainer.global_step, now
        if isinstance(checkpointing := trainer.checkpoint_callback, StepCheckpoint):
            self._longest_save = max(self._longest_save, checkpointing.save_seconds - self._save_seconds)
            self._save_seconds = checkpointing.save_seconds
