"""Stop a run on Ctrl-C, SIGTERM or a time limit, on all ranks after the same optimizer step, with its state saved."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_only

from lit_gpt import compat
from lit_gpt.errors import Stopped, UserError
from lit_gpt.training.checkpointing import StepCheckpoint
from lit_gpt.training.deadline import Deadline
from lit_gpt.training.module import module_and_data
from lit_gpt.training.run_folder import RunFolder
from lit_gpt.training.signals import SignalListener
from lit_gpt.training.validation import validate_between_steps

NO_STOP = -1  # the status of a rank that was not asked to stop; less than every exit status


def global_rank() -> int:
    """Return the rank of this process as its environment states it, also before the ranks are connected."""
    return getattr(rank_zero_only, "rank", 0)


def check_ranks_agree(trainer: Trainer) -> None:
    """Check that all ranks, on all machines, read the same text and resume from the same checkpoint; collective.

    Raises:
        UserError: They do not. Every rank raises it.
    """
    _, data = module_and_data(trainer)
    # the last three parts of a checkpoint's path: machines may have logs/ in different places
    inputs = Path(trainer.ckpt_path or "").parts[-3:], data.corpus.key
    differs = torch.tensor(int(trainer.strategy.broadcast(inputs) != inputs), device=trainer.strategy.root_device)
    if trainer.strategy.reduce(differs, reduce_op="max"):
        raise UserError(
            "the processes of this run do not all find the same text, or the same checkpoint: share the files and "
            "logs/ among the machines"
        )


class GracefulStop(Callback):
    """Stop a run between two optimizer steps, after its state is saved.

    A run has three phases::

        phase                  effect of a signal, or of the end of --trainer.max_time
        before the first step  a signal ends the command and its other ranks at once; nothing is saved
        training               all ranks finish the current step, save it and raise `Stopped`
        after the last step    a signal ends the command at once; everything is saved already

    `SignalListener` receives the signals: it raises `Stopped` in the first and the last phase, and records them in
    the second. The ranks must stop after the same step, or those that go on would wait for the others forever. Each
    rank therefore contributes its own stop status to an all-reduce once per step. The all-reduce runs while the
    optimizer works, and its result is read when the next step begins.

    Attributes:
        started: Whether training has begun; it stays True after the end.
        trainer: The Trainer of the run, as soon as there is one.
        checkpointing: The callback that saves the last step; None if the run saves nothing.
        timer: How long this command may train; None without a limit.
        deadline: When a command with a budget must have ended; None without one.
        resume_command: What a person types to resume the run.
        run_folder: The folder of the run and its lock.
        signals: Receives SIGINT and SIGTERM.
    """

    def __init__(self) -> None:
        self.started = False
        self.trainer: Trainer | None = None
        self.checkpointing: StepCheckpoint | None = None
        self.timer: Timer | None = None
        self.deadline: Deadline | None = None
        self.resume_command = ""
        self.run_folder = RunFolder()
        self.signals = SignalListener(is_nonzero_rank=global_rank() != 0, before_exit=self._before_exit)
        self._last_step = -1  # the step whose beginning was seen last
        self._pending: tuple[torch.distributed.Work, torch.Tensor] | None = None  # all-reduce, its buffer

    def clean_up(self) -> None:
        """Release the run's folder, and remove it where the run has left nothing in it."""
        # a run that saves has written its first checkpoint before the first step
        self.run_folder.release(keep=self.started and self.checkpointing is None)

    def kill_child_processes(self) -> None:
        """Kill the ranks that Lightning has started from this process."""
        if self.trainer is not None and (launcher := self.trainer.strategy.launcher) is not None:
            launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))

    def _before_exit(self, signum: int) -> None:
        """Do what must be done before the process exits at once."""
        self.kill_child_processes()
        if not self.started:
            os.write(2, f"stopped by {signal.Signals(signum).name}\n".encode())
            self.clean_up()

    # ------------------------------------------------------------------------------------------ hooks of the Trainer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.signals.raised is not None:  # where Python discarded it
            raise self.signals.raised
        if trainer.world_size > 1:
            check_ranks_agree(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = True
        self.signals.defer()
        compat.disable_sigterm_broadcast(trainer)
        if self.timer is not None:
            self.timer.on_train_start(trainer, pl_module)
        self._all_reduce_stop(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        self._all_reduce_stop(trainer)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self._last_step != trainer.global_step:
            self._last_step = trainer.global_step
            self._stop_if_requested(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the Trainer calls checkpoint callbacks last, but signals must stay deferred until the last step is saved
        if self.checkpointing is not None:
            self.checkpointing.save_last_step(trainer)
        self.timer = self.deadline = None  # the run is complete, whether or not the time is up
        self._all_reduce_stop(trainer)
        self._stop_if_requested(trainer)
        self.signals.stop_deferring()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not self.started:
            self.kill_child_processes()
        compat.disable_child_process_observer()
        self.signals.stop_deferring()

    # -------------------------------------------------------------------------------------- agreement between the ranks

    def _stop_status(self) -> int:
        """Return the exit status with which this rank was asked to stop, or `NO_STOP`."""
        if self.signals.request is not None:
            return 128 + self.signals.request
        if self.deadline is not None and self.deadline.is_reached():
            return 0
        remaining = self.timer.time_remaining() if self.timer is not None else None
        return 0 if remaining is not None and remaining <= 0 else NO_STOP

    def _all_reduce_stop(self, trainer: Trainer) -> None:
        """Start an asynchronous all-reduce of the stop status: the highest one of all ranks counts."""
        if trainer.world_size > 1:
            status = torch.tensor(self._stop_status(), device=trainer.strategy.root_device)
            self._pending = torch.distributed.all_reduce(status, torch.distributed.ReduceOp.MAX, async_op=True), status

    def _stop_if_requested(self, trainer: Trainer) -> None:
        """Save the last step and stop, if any rank was asked to when the last all-reduce started.

        Raises:
            Stopped: On every rank.
        """
        if self._pending is None:
            status = self._stop_status()
        else:
            work, reduced = self._pending
            work.wait()
            status = int(reduced)
        if status == NO_STOP:
            return
        if status == 0 and self.deadline is not None:
            self._end_before_deadline(trainer, self.deadline)
        reason = f"by {signal.Signals(status - 128).name}" if status else "by --trainer.max_time"
        message = f"stopped at step {trainer.global_step:,} {reason}"
        if self.checkpointing is None:
            raise Stopped(status, f"{message}; nothing is saved, because the flags say so")
        self.checkpointing.save_last_step(trainer)
        saved = self.checkpointing.last_model_path
        raise Stopped(status, f"{message}; the run is saved in {saved}; resume it with: {self.resume_command}")

    def _end_before_deadline(self, trainer: Trainer, deadline: Deadline) -> None:
        """Save the last step, validate it, save it as the best one where it is, and stop.

        A run that resumes continues from the state before the validation, so it equals one that was never stopped.

        Raises:
            Stopped: Always.
        """
        step, (_, data) = trainer.global_step, module_and_data(trainer)
        message = (
            f"stopped at step {step:,} of {data.plan.last_step or 0:,}, because --budget {deadline.text} ends and the "
            "steps took longer than expected"
        )
        if self.checkpointing is None:
            raise Stopped(0, f"{message}; nothing is saved, because the flags say so")
        self.checkpointing.save_last_step(trainer)
        if step > 0 and trainer.enable_validation and not self.checkpointing.is_validated(step):
            validate_between_steps(trainer)
            self.checkpointing.save_best_of_ending(trainer)
        saved = self.checkpointing.dirpath
        raise Stopped(0, f"{message}; the run is saved in {saved}/last.ckpt; complete it with: {self.resume_command}")
