"""What saves a run and ends it: checkpoints, early stopping, signals, time."""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping

from lit_gpt.checkpoint.store import copy_checkpoint, open_checkpoint, remove_unfinished, save_checkpoint
from lit_gpt.errors import Stopped, UserError
from lit_gpt.files import temporary_path
from lit_gpt.sharding import full_tensor, is_sharded
from lit_gpt.training.logger import StepLogger
from lit_gpt.training.module import LitGPT, module_and_data


class WholeFileIO(CheckpointIO):
    """How the Trainer writes and opens checkpoints: by `save_checkpoint` and `open_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return open_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class StepCheckpoint(Checkpoint):
    """Writes best.ckpt (by `loss/val`), step_<n>.ckpt and last.ckpt into the run's folder, at whole optimizer steps.

    A step is saved when everything about it is done: its points written, its validation and its texts too. That is when
    the next one begins.

    Args:
        every_n_steps: optimizer steps between periodic checkpoints; last.ckpt is written then, and at validations.
        keep: how many periodic checkpoints stay.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 2) -> None:
        if every_n_steps < 1 or keep < 0:
            raise UserError(
                f"--checkpoint.every_n_steps is {every_n_steps} and --checkpoint.keep {keep}: give 1 or more, 0 or more"
            )
        self.every_n_steps, self.keep = every_n_steps, keep
        self.folder = Path()  # of the run; the command line sets it
        self.best_loss, self.best_step = float("inf"), -1
        self.last_good: Path | None = None  # the last file written, or resumed from
        self._saved_step = self._done_step = self._validated_step = -1
        self._failed = False  # to save, the last time
        self.seconds = 0.0  # spent saving
        self._events: dict[str, int] = {}  # the sizes of the event files when the checkpoint resumed from was written

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss, self.best_step = state_dict["best_loss"], state_dict["best_step"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero and isinstance(trainer.logger, StepLogger):
            # now, and not earlier: until something new is saved, the points belong to what was saved before
            trainer.logger.truncate_event_files(self._events)
            checkpoint["events"] = trainer.logger.event_file_sizes()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._events = checkpoint.get("events", {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done_step = trainer.global_step
        if trainer.ckpt_path is None:
            self._save(trainer)  # a folder that takes no checkpoint says so now, not after hours
            return
        self._saved_step, self.last_good = trainer.global_step, Path(trainer.ckpt_path)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self._done_step == trainer.global_step != self._saved_step:
            self._save_if_due(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._done_step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._done_step = self._validated_step = trainer.global_step
        loss = float(trainer.callback_metrics["loss/val"])
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, trainer.global_step
            if isinstance(trainer.logger, StepLogger):
                trainer.logger.log_metrics({"best/loss_val": loss}, trainer.global_step - 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finish(trainer)

    def finish(self, trainer: Trainer) -> None:
        """Saves this step as the last of the command."""
        self._save_if_due(trainer)
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves the last whole step, unless its update, its validation or its weights are not whole."""
        module, _ = module_and_data(trainer)
        step = trainer.global_step
        whole = step == self._done_step and not module.updating and not self._failed
        if isinstance(exception, Stopped) or self._done_step < 0 or not trainer.is_global_zero:
            return
        alone = not is_sharded(module.gpt)  # else it takes all ranks to save
        if alone and whole and step != self._saved_step and module.finite and finite(module):
            path = self.folder / "last.ckpt"
            try:
                # without trainer.save_checkpoint's barrier: the other ranks may never come
                trainer.strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(), path)
                self.last_good = path
            except Exception as error:
                exception.add_note(f"step {step:,} could not be saved: {error}")
        for kind, good in {"last good": self.last_good, "best": self.folder / "best.ckpt"}.items():
            with contextlib.suppress(UserError):  # there may be none
                if good is None:
                    continue
                saved_step = open_checkpoint(good, mmap=True)["global_step"]
                exception.add_note(f"the {kind} checkpoint is {good}, step {saved_step:,}")

    def _due(self, step: int) -> list[str]:
        names = ["best.ckpt"] if step == self.best_step else []
        return names + ([f"step_{step:08d}.ckpt"] if step % self.every_n_steps == 0 and step else [])

    def _save_if_due(self, trainer: Trainer) -> None:
        names = self._due(trainer.global_step)
        if names or trainer.global_step == self._validated_step:
            self._save(trainer, *names)

    def mend(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Clears up after a process killed among its saves: writes what copies it did not come to of `path`.

        Raises:
            UserError: it cannot be written.
        """
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is None:  # another callback wrote it
            return
        self.load_state_dict(state)
        remove_unfinished(path.parent)
        for name in (*self._due(checkpoint["global_step"]), "last.ckpt"):
            copy = path.with_name(name)
            try:
                newer = open_checkpoint(copy, mmap=True)["saved_at"] >= checkpoint["saved_at"]
            except UserError:  # there is none, or it is damaged
                newer = False
            if not newer:
                copy_checkpoint(path, copy)

    def _save(self, trainer: Trainer, *names: str) -> None:
        """Writes the state of this step, once, to files of these names, and to last.ckpt after them.

        Raises:
            UserError: on every rank: a file could not be written. Those that were there are whole.
        """
        step = trainer.global_step
        if step == self._saved_step:
            return
        since = time.perf_counter()
        module, _ = module_and_data(trainer)
        module.check_finite(step)
        if not finite(module):
            raise UserError(
                f"after step {step:,} the weights are not finite, and not saved: "
                "go on from a checkpoint with a smaller --model.learning_rate"
            )
        first, *others = [self.folder / name for name in (*names, "last.ckpt")]
        failure: UserError | None = None
        try:
            self._write(trainer, first)
            self.last_good = first
            if trainer.is_global_zero:
                for other in others:
                    copy_checkpoint(first, other)
                self._prune(step)
        except UserError as error:  # on the one rank that writes
            failure = error
        failure = trainer.strategy.broadcast(failure)
        self._failed = failure is not None
        if failure is not None:
            raise failure
        self._saved_step, self.last_good = step, self.folder / "last.ckpt"
        self.seconds += time.perf_counter() - since

    def _write(self, trainer: Trainer, path: Path) -> None:
        try:
            trainer.save_checkpoint(path)
        except UserError:
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait
            raise

    def _prune(self, step: int) -> None:
        # of a run resumed further back, later steps are another future's: they stay
        periodic = sorted(old for old in self.folder.glob("step_*.ckpt") if old.name <= f"step_{step:08d}.ckpt")
        for old in periodic[: max(0, len(periodic) - self.keep)]:
            with contextlib.suppress(OSError):  # one too many is no reason to end a run
                old.rename(temporary_path(old))  # a folder half removed is no checkpoint
        remove_unfinished(self.folder)


def finite(module: LitGPT) -> bool:
    """Whether all weights are numbers."""
    return all(bool(full_tensor(p.isfinite().all())) for p in module.gpt.parameters())


class StopEarly(EarlyStopping):
    """Ends a run whose `loss/val` no longer falls: Lightning's EarlyStopping under flags of its own.

    Args:
        patience: validations in a row without a lower `loss/val` that end the run; None: none do.
        min_delta: by how many nats per token it has to be lower.
    """

    def __init__(self, patience: int | None = None, min_delta: float = 0.0) -> None:
        if (patience is not None and patience < 1) or not 0 <= min_delta < float("inf"):
            raise UserError(
                f"--early_stopping.patience is {patience} and --early_stopping.min_delta {min_delta}: "
                "give 1 or more validations, or null for none, and 0 or more nats"
            )
        super().__init__("loss/val", min_delta, patience or sys.maxsize, check_on_train_epoch_end=False)

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` validations brought no lower loss."""
        return self.wait_count >= self.patience

    @staticmethod
    def reason(waited: int) -> str:
        return f"loss/val has not fallen for {waited} validation{'s'[: waited != 1]}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop |= self.exhausted  # one that had stopped stays so when it is resumed
