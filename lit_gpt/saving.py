"""What saves a run and ends it: checkpoints, early stopping, signals, time."""

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from filelock import BaseFileLock, FileLock, Timeout
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, Timer
from lightning.pytorch.utilities import rank_zero_only

from lit_gpt.callbacks import RunLogger, parts
from lit_gpt.checkpoint import copy_whole, open_checkpoint, sweep, unfinished, write_whole
from lit_gpt.errors import UserError
from lit_gpt.module import LitGPT
from lit_gpt.sharding import is_sharded, whole

LOCK_SECONDS = 8  # to wait for a run's folder: workers of a process that was killed hold it for up to five


class WholeFileIO(CheckpointIO):
    """How the Trainer writes and opens checkpoints: by `write_whole` and `open_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_whole(Path(path), lambda file: torch.save(checkpoint, file))

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
        if trainer.is_global_zero and isinstance(trainer.logger, RunLogger):
            # now, and not earlier: until something new is saved, the points belong to what was saved before
            trainer.logger.cut_back(self._events)
            checkpoint["events"] = trainer.logger.sizes()

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
            if isinstance(trainer.logger, RunLogger):
                trainer.logger.log_metrics({"best/loss_val": loss}, trainer.global_step - 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finish(trainer)

    def finish(self, trainer: Trainer) -> None:
        """Saves this step as the last of the command."""
        self._save_if_due(trainer)
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves the last whole step, unless its update, its validation or its weights are not whole."""
        module, _ = parts(trainer)
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
        sweep(path.parent)
        for name in (*self._due(checkpoint["global_step"]), "last.ckpt"):
            copy = path.with_name(name)
            try:
                newer = open_checkpoint(copy, mmap=True)["saved_at"] >= checkpoint["saved_at"]
            except UserError:  # there is none, or it is damaged
                newer = False
            if not newer:
                copy_whole(path, copy)

    def _save(self, trainer: Trainer, *names: str) -> None:
        """Writes the state of this step, once, to files of these names, and to last.ckpt after them.

        Raises:
            UserError: on every rank: a file could not be written. Those that were there are whole.
        """
        step = trainer.global_step
        if step == self._saved_step:
            return
        since = time.perf_counter()
        module, _ = parts(trainer)
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
                    copy_whole(first, other)
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
                old.rename(unfinished(old))  # a folder half removed is no checkpoint
        sweep(self.folder)


def finite(module: LitGPT) -> bool:
    """Whether all weights are numbers."""
    return all(bool(whole(p.isfinite().all())) for p in module.gpt.parameters())


def own_rank() -> int:
    """The rank of this process, as far as its environment tells."""
    return getattr(rank_zero_only, "rank", 0)


def peer_lost(error: BaseException) -> bool:
    """Whether it is what a process sees of another one of its run that is gone, out of reach, or never came."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


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


class Stopped(BaseException):
    """Ends the command in good order. Like KeyboardInterrupt it passes by `except Exception`.

    Args:
        status: exit status.
        message: what to tell.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class GracefulStop(Callback):
    """Ends a run on Ctrl-C, SIGTERM or after a time, between two optimizer steps, with all of it saved.

    Signals only leave a note; the ranks tell each other once a step, while the optimizer works, so that all of them
    leave at the same one. A second Ctrl-C leaves at once. Before the first step a signal ends the command where it is,
    and its other ranks with it.

    A thread hears them too: the handler of a process that waits in a library for another one never gets its turn.

    Attributes:
        started: whether training has begun.
        trainer: of the run, as soon as there is one.
        checkpoint: what saves the last step; None: nothing does.
        timer: how long a command may train; None: as long as it takes.
        go_on: the command that resumes.
        stopped: what a signal before the first step has raised, which may have been lost on its way.
    """

    def __init__(self) -> None:
        self.started = False
        self.checkpoint: StepCheckpoint | None = None
        self.timer: Timer | None = None
        self.go_on = ""
        self.trainer: Trainer | None = None
        self.stopped: Stopped | None = None
        self._training = self._leaving = False
        self._asked: tuple[int, float] | None = None  # which signal came, and when
        self._helps = own_rank() != 0  # whether this process was started by the one a person started
        self._made: Path | None = None  # the folder of a new run
        self._lock: BaseFileLock | None = None
        self._step = -1
        self._telling: tuple[torch.distributed.Work, torch.Tensor] | None = None

    def take(self, folder: Path, fresh: bool) -> None:
        """Makes the folder of a new run, or sees to it that one can be resumed; keeps other processes out of it.

        Raises:
            UserError: it cannot be made or written to, or another process is at it.
        """
        remedy = "clear its way, or write elsewhere with --trainer.default_root_dir"
        try:
            if fresh:
                folder.mkdir(parents=True)
                self._made = folder
            self._lock = FileLock(folder / ".lock")
            self._lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise UserError(f"{folder}: another process trains there: wait for it, or take another --name") from None
        except OSError as error:
            what = "made" if fresh else "written to"
            raise UserError(f"{folder} cannot be {what} ({error.strerror}): {remedy}") from None

    def clean_up(self) -> None:
        """Takes the folder of a new run away again where nothing came of it, and those it lay in if they are empty."""
        if self._lock is not None and self._lock.is_locked:
            self._lock.release()
            with contextlib.suppress(OSError):
                os.unlink(self._lock.lock_file)
        begun = self.started and self.checkpoint is None  # what saves, does so before the first step
        if self._made is not None and not begun and not any(self._made.glob("*.ckpt")):
            shutil.rmtree(self._made, ignore_errors=True)
            with contextlib.suppress(OSError):
                for folder in list(self._made.parents)[:2]:
                    folder.rmdir()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hears signals until the end of the block; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        self._listen()
        with contextlib.ExitStack() as undo:
            if os.name == "posix":
                heard, told = os.pipe()
                os.set_blocking(told, False)
                threading.Thread(target=self._watch, args=(heard,), daemon=True).start()
                undo.callback(os.close, told)  # ends the thread
                undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(told, warn_on_full_buffer=False))
            for signum, handler in before.items():
                undo.callback(signal.signal, signum, handler)
            yield

    def _watch(self, heard: int) -> None:
        """Does what the handler would, where that has not had its turn for a while."""
        with os.fdopen(heard, "rb", buffering=0) as pipe:
            first: float | None = None
            while signum := pipe.read(1):
                if signum[0] not in (signal.SIGINT, signal.SIGTERM):
                    continue
                now = time.monotonic()
                again = first is not None and signum[0] == signal.SIGINT and now - first > 0.5
                first = first or now
                if again or (not self._training and not self._helps):
                    time.sleep(0.5)  # the handler's turn
                    if again or self.stopped is None:
                        self._leave_at_once(signum[0])

    def _leave_at_once(self, signum: int) -> NoReturn:
        self._leaving = True
        self.end_children()
        if not self.started:
            os.write(2, f"stopped by {signal.Signals(signum).name}\n".encode())
            self.clean_up()
        os._exit(128 + signum)

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._hear)

    def _hear(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        if self._leaving:  # the thread was quicker
            return
        if not self._training and not self._helps:
            self.stopped = Stopped(128 + signum, f"stopped by {signal.Signals(signum).name}")
            raise self.stopped
        if self._asked is None:  # one that helps waits: the first process ends it, or agrees with it at the next step
            self._asked = (signum, now)
            if not self._helps:  # not by print, which this may have interrupted
                os.write(2, b"\nstopping when this step is done and saved; Ctrl-C again leaves at once\n")
        elif signum == signal.SIGINT and now - self._asked[1] > 0.5:  # sooner it is the same key, passed on
            self._leave_at_once(signum)

    def end_children(self) -> None:
        """Kills the processes Lightning started beside this one."""
        if self.trainer is not None and (launcher := self.trainer.strategy.launcher) is not None:
            launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.stopped is not None:  # the handler had its turn where exceptions are only reported, as in a __del__
            raise self.stopped
        if trainer.world_size > 1:
            self._agree(trainer)

    def _agree(self, trainer: Trainer) -> None:
        """Sees to it that all processes, on whichever machine, train on the same text from the same checkpoint.

        Raises:
            UserError: on every rank: they do not.
        """
        _, data = parts(trainer)
        sees = Path(trainer.ckpt_path or "").parts[-3:], data.corpus.key  # wherever logs/ lies
        differs = torch.tensor(int(trainer.strategy.broadcast(sees) != sees), device=trainer.strategy.root_device)
        if trainer.strategy.reduce(differs, reduce_op="max"):
            raise UserError(
                "the processes of this run do not all find the same text, or the same checkpoint: share the files and "
                "logs/ among the machines"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = self._training = True
        if self.stopped is not None:
            self._asked = self.stopped.status - 128, time.monotonic()
        self._listen()  # in place of the Trainer's handler, which would end with status 0, or hang
        # and in place of its asking all ranks, before every forward, whether one has heard a signal
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if self.timer is not None:
            self.timer.on_train_start(trainer, pl_module)
        self._tell(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        self._tell(trainer)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self._step != trainer.global_step:
            self._step = trainer.global_step
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.checkpoint is not None:  # the Trainer puts it after this callback; a signal must not disturb it
            self.checkpoint.finish(trainer)
        self.timer = None  # the work is done
        self._tell(trainer)
        self._stop_if_asked(trainer)
        self._training = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not self.started:
            self.end_children()
        for thread in threading.enumerate():
            if isinstance(thread, _ChildProcessObserver):  # it would kill this process while it saves and says why
                thread._child_processes = []
        self._training = False

    def _wish(self) -> int:
        """The status this process was asked to stop with, below 0 if it was not."""
        if self._asked is not None:
            return 128 + self._asked[0]
        remaining = self.timer.time_remaining() if self.timer is not None else None
        return 0 if remaining is not None and remaining <= 0 else -1

    def _tell(self, trainer: Trainer) -> None:
        """Begins to tell the other ranks what this one was asked; none waits for it here."""
        if trainer.world_size > 1:
            told = torch.tensor(self._wish(), device=trainer.strategy.root_device)
            self._telling = torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, async_op=True), told

    def _stop_if_asked(self, trainer: Trainer) -> None:
        """Raises `Stopped` on every rank, if any of them had been asked to when they last told each other."""
        if self._telling is None:
            status = self._wish()
        else:
            self._telling[0].wait()
            status = int(self._telling[1])
        if status < 0:
            return
        place = f"at step {trainer.global_step:,}"
        reason = f"by {signal.Signals(status - 128).name}" if status else "by --trainer.max_time"
        if self.checkpoint is None:
            raise Stopped(status, f"stopped {place} {reason}; nothing is saved, as the flags say")
        self.checkpoint.finish(trainer)
        saved = self.checkpoint.last_good
        raise Stopped(status, f"stopped {place} {reason}; all of it is in {saved}; to go on: {self.go_on}")
