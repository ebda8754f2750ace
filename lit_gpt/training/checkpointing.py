"""Save and resume runs: checkpoints at whole optimizer steps, and early stopping."""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any
from weakref import proxy

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lit_gpt import compat
from lit_gpt.checkpoint.runs import remove_unfinished, set_aside_later_checkpoints
from lit_gpt.checkpoint.store import Checkpoint, copy_checkpoint
from lit_gpt.errors import Stopped, UserError
from lit_gpt.files import remove, temporary_path, write_error
from lit_gpt.sharding import full_tensor, is_sharded
from lit_gpt.training.logger import step_logger
from lit_gpt.training.module import LitGPT, module_and_data


def has_finite_weights(module: LitGPT) -> bool:
    """Return whether no weight is infinite or NaN; collective if the model is sharded."""
    return all(bool(full_tensor(p.isfinite().all())) for p in module.gpt.parameters())


class StepCheckpoint(ModelCheckpoint):
    """Write best.ckpt (lowest `loss/val`), step_<n>.ckpt and last.ckpt into the run's folder, at whole optimizer steps.

    To Lightning this is a ModelCheckpoint: `best_model_path`, `ckpt_path="best"` and `ckpt_path="last"` work. When and
    how it saves is decided here, because runs that resume from a ModelCheckpoint do not equal runs that never stopped:

    - It saves in `on_train_batch_end`, before Lightning has written the points of the step, and before the validation
      of the step, which the resumed run then skips.
    - It forgets the step of the checkpoint it resumed from, and saves again within the next step, with gradient
      accumulation after a part of its batches.
    - If best and last checkpoints are written by two of them, last.ckpt may hold a stale best score, so that the
      resumed run overwrites best.ckpt with a worse model.

    Here each optimizer step is updated, then completed, then saved::

        updated     the optimizer has moved the weights, and `trainer.global_step` counts the step
        completed   its points are logged, and its validation and its samples are done if it has any; this is known at
                    the end of its validation, when the next step begins, or at the end of the run
        saved       it is in the files; this happens when the next step begins, or at the end of the run

    The first save is that of step 0, so that a folder that cannot be written to is reported before the first step.

    Args:
        every_n_steps: Optimizer steps between two periodic checkpoints, step_<n>.ckpt. last.ckpt is written then, and
            after every validation.
        keep: How many periodic checkpoints to keep.

    Attributes:
        dirpath: The run's folder; the command line sets it.
        best_model_score: The lowest `loss/val` so far, in nats per token; None before the first validation. The
            untrained model is no candidate.
        best_step: The optimizer step that reached it, -1 before the first validation.
        best_model_path: The checkpoint of that step; empty before the first.
        last_model_path: The newest complete checkpoint of this run: the last one written, or the one resumed from.
        save_seconds: Time spent saving in this command.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 2) -> None:
        if every_n_steps < 1 or keep < 0:
            raise UserError(
                f"--checkpoint.every_n_steps is {every_n_steps} and --checkpoint.keep {keep}: give 1 or more, 0 or more"
            )
        # without an interval, and with this last argument, ModelCheckpoint saves in none of its hooks that remain
        super().__init__(monitor="loss/val", mode="min", save_last=True, save_on_train_epoch_end=False)
        self.every_n_steps, self.keep = every_n_steps, keep
        self.best_step = -1
        self.save_seconds = 0.0
        self._completed_step = self._validated_step = self._saved_step = -1  # the last one of each
        self._last_save_failed = False  # then an exception does not try to save again
        self._start_step: int | None = None  # where this command began, until its first save
        self._event_file_sizes: dict[str, int] = {}  # bytes, when the checkpoint resumed from was written
        self._resumed_metrics: dict[str, float] = {}  # of the Trainer at that time

    # ------------------------------------------------------------------------------------------ state in a checkpoint

    @property
    def state_key(self) -> str:
        return "StepCheckpoint"

    def state_dict(self) -> dict[str, Any]:
        # numbers, because the tensors of a checkpoint are not read where only its metadata are needed
        loss = float("inf") if self.best_model_score is None else float(self.best_model_score)
        return {"best_loss": loss, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_step = state_dict["best_step"]
        has_best = self.best_step >= 0
        self.best_model_score = torch.tensor(state_dict["best_loss"], dtype=torch.float64) if has_best else None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        logger = step_logger(trainer)
        if trainer.is_global_zero:
            # Where a run is resumed at an earlier step, its later checkpoints and events give way at its first save,
            # and not at its start: a process that is killed before leaves them as they were. The checkpoints come
            # first, because they need the events.
            self._set_aside_later_checkpoints()
            if logger is not None:
                logger.truncate_event_files(self._event_file_sizes)
                checkpoint["events"] = logger.event_file_sizes()
        # EarlyStopping may monitor a metric that was logged before the checkpoint
        checkpoint["callback_metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._event_file_sizes = checkpoint.get("events", {})
        self._resumed_metrics = checkpoint.get("callback_metrics", {})

    # -------------------------------------------------------------------------------------------- hooks of the Trainer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:
            super().setup(trainer, pl_module, stage)  # chooses a folder below that of the logger
        self.dirpath = str(trainer.strategy.broadcast(self.dirpath))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_step = trainer.global_step
        if trainer.ckpt_path is None:
            return
        self._completed_step = self._saved_step = trainer.global_step
        self.last_model_path = str(trainer.ckpt_path)
        best = Path(trainer.ckpt_path).with_name("best.ckpt")
        with contextlib.suppress(UserError):  # the checkpoint was copied without it
            if Checkpoint.open(best, verify=False).step == self.best_step:
                self.best_model_path = str(best)
        metrics = {name: torch.tensor(value) for name, value in self._resumed_metrics.items()}
        trainer.callback_metrics.update(metrics)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self._completed_step = trainer.global_step  # training has gone on to the next step
        if self._saved_step != trainer.global_step:
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the loss with the lowest one so far; the next step, or the end of the run, saves."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validated_step = step = trainer.global_step
        self.current_score = loss = trainer.callback_metrics["loss/val"].cpu()
        if step > 0 and (self.best_model_score is None or loss < self.best_model_score):
            self.best_model_score, self.best_step = loss, step
            if (logger := step_logger(trainer)) is not None:
                logger.log_metrics({"best/loss_val": float(loss)}, step - 1)
        self._completed_step = step  # only now, when its last point is written

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_last_step(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the last completed step where that is possible, and add to the exception which checkpoints exist."""
        if isinstance(exception, Stopped) or self._completed_step < 0 or not trainer.is_global_zero:
            return
        if self._can_save_after_exception(trainer):
            path = self._folder / "last.ckpt"
            try:
                # trainer.save_checkpoint would then wait for the other ranks, which may never come
                trainer.strategy.save_checkpoint(compat.dump_checkpoint(trainer), path)
                self.last_model_path = str(path)
            except Exception as error:
                exception.add_note(f"step {trainer.global_step:,} could not be saved: {error}")
        for description, existing in (("last good", self.last_model_path), ("best", self._folder / "best.ckpt")):
            if existing:
                with contextlib.suppress(UserError):  # there may be none
                    saved_step = Checkpoint.open(existing, verify=False).step
                    exception.add_note(f"the {description} checkpoint is {existing}, step {saved_step:,}")

    # ---------------------------------------------------------------------------------------------------------- saving

    @property
    def _folder(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath)

    def save_last_step(self, trainer: Trainer) -> None:
        """Save the current step as the last one of this command."""
        self._completed_step = trainer.global_step
        self._save_if_due(trainer)
        self._save(trainer)

    def is_validated(self, step: int) -> bool:
        """Return whether the model was validated after a step of this command."""
        return self._validated_step == step

    def save_best_of_ending(self, trainer: Trainer) -> None:
        """Write best.ckpt, if the validation after the last step of this command had the lowest loss.

        last.ckpt is of the same step, before that validation, and a run that resumes continues from it. best.ckpt
        therefore gets its time, and its sizes of the event files.

        Raises:
            UserError: It cannot be written.
        """
        if self.best_step == trainer.global_step:
            last = Checkpoint.open(self._folder / "last.ckpt", verify=False)
            contents = compat.dump_checkpoint(trainer)
            contents |= {key: last.contents[key] for key in ("saved_at", "events") if key in last.contents}
            trainer.strategy.save_checkpoint(contents, self._folder / "best.ckpt")

    def restore_copies(self, checkpoint: Checkpoint) -> None:
        """Complete the save that wrote `checkpoint`, in case the process was killed between two of its files.

        Writes the missing copies under the other names of the step, and removes unfinished files.

        Raises:
            UserError: A copy cannot be written.
        """
        state = checkpoint.callbacks.get(self.state_key)
        if state is None:  # written by another checkpoint callback
            return
        self.load_state_dict(state)
        remove_unfinished(checkpoint.path.parent)
        self._restore_best()
        for name in (*self._due_names(checkpoint.step), "last.ckpt"):
            copy = checkpoint.path.with_name(name)
            try:
                is_current = Checkpoint.open(copy, verify=False).step >= checkpoint.step
            except UserError:  # missing or damaged
                is_current = False
            if not is_current:
                copy_checkpoint(checkpoint.path, copy)

    def _set_aside_later_checkpoints(self) -> None:
        """At the first save, move checkpoints of later steps than that at which this command began out of the way.

        They are of a future that this run does not have. If one of them was best.ckpt, the best checkpoint so far gets
        this name again, if it is still there.

        Raises:
            UserError: One cannot be moved.
        """
        if self._start_step is not None:
            try:
                set_aside_later_checkpoints(self._folder, self._start_step)
            except OSError as error:
                raise write_error(self._folder, error) from error
            self._start_step = None
            self._restore_best()

    def _restore_best(self) -> None:
        """Write best.ckpt again if it is missing, from the periodic checkpoint of its step.

        Raises:
            UserError: It cannot be written.
        """
        source, best = self._folder / f"step_{self.best_step:08d}.ckpt", self._folder / "best.ckpt"
        if source.exists() and not best.exists():
            copy_checkpoint(source, best)

    def _can_save_after_exception(self, trainer: Trainer) -> bool:
        """Return whether the state is that of a completed step, is not yet saved, and one rank alone can save it."""
        module, _ = module_and_data(trainer)
        step = trainer.global_step
        is_completed = step == self._completed_step and not module.updating
        needs_save = step != self._saved_step and not self._last_save_failed
        if not is_completed or not needs_save or is_sharded(module.gpt):  # all ranks have to save a sharded model
            return False
        return bool(module.finite) and has_finite_weights(module)

    def _due_names(self, step: int) -> list[str]:
        """Return the names under which a step is saved, besides last.ckpt."""
        names = ["best.ckpt"] if step == self.best_step else []
        return names + ([f"step_{step:08d}.ckpt"] if step % self.every_n_steps == 0 and step else [])

    def _save_if_due(self, trainer: Trainer) -> None:
        names = self._due_names(trainer.global_step)
        is_first_save = self._saved_step < 0
        if names or is_first_save or trainer.global_step == self._validated_step:
            self._save(trainer, *names)

    def _save(self, trainer: Trainer, *names: str) -> None:
        """Write the state of the current step, once, to files of these names, and to last.ckpt after them; collective.

        Raises:
            UserError: The weights are not finite, or a file could not be written. Every rank raises it. The files that
                were there before are unchanged.
        """
        step = trainer.global_step
        if step == self._saved_step:
            return
        start = time.perf_counter()
        module, _ = module_and_data(trainer)
        module.check_finite(step)
        if not has_finite_weights(module):
            raise UserError(f"after step {step:,} the weights are not finite, and not saved: {module.nonfinite_remedy}")
        first, *copies = [self._folder / name for name in (*names, "last.ckpt")]
        failure: UserError | None = None
        try:
            self._write(trainer, first)
            self.last_model_path = str(first)
            if trainer.is_global_zero:
                for copy in copies:
                    copy_checkpoint(first, copy)
                self._remove_old_checkpoints(step)
        except UserError as error:  # on the rank that writes; the others learn of it by the broadcast
            failure = error
        failure = trainer.strategy.broadcast(failure)
        self._last_save_failed = failure is not None
        if failure is not None:
            raise failure
        self._saved_step, self.last_model_path = step, str(self._folder / "last.ckpt")
        if "best.ckpt" in names:
            assert self.best_model_score is not None
            self.best_model_path = str(first)
            self.best_k_models = {self.best_model_path: self.best_model_score}
        for logger in trainer.loggers if trainer.is_global_zero else []:
            logger.after_save_checkpoint(proxy(self))  # some loggers upload it
        self.save_seconds += time.perf_counter() - start

    def _write(self, trainer: Trainer, path: Path) -> None:
        """Call `trainer.save_checkpoint`, at whose end all ranks wait for each other, also if this rank fails."""
        try:
            trainer.save_checkpoint(path)
        except UserError:
            trainer.strategy.barrier("Trainer.save_checkpoint")
            raise

    def _remove_old_checkpoints(self, step: int) -> None:
        """Remove the oldest periodic checkpoints up to `step`, so that `keep` of them remain."""
        newest_name = f"step_{step:08d}.ckpt"
        periodic = sorted(path for path in self._folder.glob("step_*.ckpt") if path.name <= newest_name)
        for path in periodic[: max(0, len(periodic) - self.keep)]:
            with contextlib.suppress(OSError):  # an extra checkpoint is no reason to end a run
                remove(temporary_path(path))
                path.rename(temporary_path(path))  # so that a folder removed in part is not taken for a checkpoint
        remove_unfinished(self._folder)


class StopEarly(EarlyStopping):
    """Stop a run whose `loss/val` no longer decreases: Lightning's EarlyStopping with flags of its own.

    Its name is a key in checkpoints and must not change.

    Args:
        patience: Validations in a row without a lower `loss/val` after which the run stops; None: it never does.
        min_delta: By how many nats per token `loss/val` has to decrease to count as lower.
    """

    def __init__(self, patience: int | None = None, min_delta: float = 0.0) -> None:
        if (patience is not None and patience < 1) or not 0 <= min_delta < float("inf"):
            raise UserError(
                f"--early_stopping.patience is {patience} and --early_stopping.min_delta {min_delta}: "
                "give 1 or more validations, or null for none, and 0 or more nats"
            )
        if patience is None and min_delta > 0:
            raise UserError(
                f"--early_stopping.min_delta is {min_delta}, but nothing stops early without "
                "--early_stopping.patience: give both"
            )
        super().__init__("loss/val", min_delta, patience or sys.maxsize, check_on_train_epoch_end=False)

    @property
    def is_exhausted(self) -> bool:
        """Whether none of the last `patience` validations had a lower loss."""
        return self.wait_count >= self.patience

    @staticmethod
    def reason(wait_count: int) -> str:
        """Return why the run stops after `wait_count` validations without a lower loss."""
        return f"loss/val has not fallen for {wait_count} validation{'s' if wait_count != 1 else ''}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop |= self.is_exhausted  # a run that was stopped stays stopped when it is resumed
