"""Stop a run on Ctrl-C, SIGTERM or a time limit, at a step boundary, with its state saved."""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from filelock import BaseFileLock, FileLock, Timeout
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_only

from lit_gpt.errors import Stopped, UserError
from lit_gpt.training.checkpointing import StepCheckpoint
from lit_gpt.training.module import module_and_data

LOCK_SECONDS = 8  # to wait for a run's folder: workers of a process that was killed hold it for up to five


def own_rank() -> int:
    """The rank of this process, as far as its environment tells."""
    return getattr(rank_zero_only, "rank", 0)


def peer_lost(error: BaseException) -> bool:
    """Whether it is what a process sees of another one of its run that is gone, out of reach, or never came."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


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
        _, data = module_and_data(trainer)
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
