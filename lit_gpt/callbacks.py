"""What watches a run: its logger, its progress and speed, its checkpoints and end, and the text it writes."""

import contextlib
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from filelock import BaseFileLock, FileLock, Timeout
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar, Timer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from lit_gpt.checkpoint import copy_whole, open_checkpoint, write_whole
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.generate import check_sampling, shown, stream_text
from lit_gpt.module import LitGPT, logs_at

# dense bfloat16 operations a second, as the makers state them
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}

OVERLAY = {"loss": {"train and validation": ["Multiline", ["loss/train$", "loss/train_eval", "loss/val"]]}}


def parts(trainer: Trainer) -> tuple[LitGPT, TextDataModule]:
    """The module and the data of a run."""
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(module, LitGPT)
    assert isinstance(data, TextDataModule)
    return module, data


class RunLogger(TensorBoardLogger):
    """TensorBoard events whose x axis counts optimizer steps, with one chart of both losses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._earlier = {path.name for path in Path(self.log_dir).glob("events.*")}  # of a run that is resumed

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.log_dir}: the curves cannot be written ({error.strerror}): make room") from error

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes step N at N, where Lightning counts N - 1, and leaves its `epoch` out."""
        values = {tag: value for tag, value in metrics.items() if tag != "epoch"}
        with self._writing():
            super().log_metrics(values, None if step is None else step + 1)

    @rank_zero_only
    def start(self, settings: dict[str, Any]) -> None:
        """Writes the chart that overlays the losses, and the settings, tied to `best/loss_val`."""
        self.experiment.add_custom_scalars(OVERLAY)
        for summary in hparams(settings, {"best/loss_val": 0.0}):
            self.experiment._get_file_writer().add_summary(summary)

    @rank_zero_only
    def save(self) -> None:
        """Flushes; config.yaml holds the settings already."""
        with self._writing():
            self.experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        with contextlib.suppress(OSError) if status == "failed" else self._writing():
            super().finalize(status)

    def sizes(self) -> dict[str, int]:
        """The bytes of every event file of the run, once all points so far are in them.

        Raises:
            UserError: they could not be written.
        """
        self.save()
        sizes = {}
        for path in Path(self.log_dir).glob("events.*"):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())  # a power cut must not leave less than the checkpoint says
            sizes[path.name] = path.stat().st_size
        return sizes

    @rank_zero_only
    def cut_back(self, sizes: dict[str, int]) -> None:
        """Takes out what an earlier process wrote after a checkpoint with these `sizes`: it will be written again."""
        if self._earlier & sizes.keys():  # else they are not the files of the run the checkpoint is of
            for path in (Path(self.log_dir, name) for name in self._earlier):
                if path.name not in sizes:
                    path.unlink()
                elif path.stat().st_size > sizes[path.name]:
                    os.truncate(path, sizes[path.name])
        self._earlier = set()


class StepProgress(ProgressBar):
    """A bar over the optimizer steps of the whole run, and a line at every validation."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm | None = None
        self.enabled = True

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

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.bar is not None and logs_at(trainer, trainer.global_step):
            self.bar.update(trainer.global_step - self.bar.n)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is None or trainer.sanity_checking:
            return
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


class Throughput(Callback):
    """Logs `speed/tokens_per_second` over all devices, `speed/mfu` where the device's peak is known, `memory/peak_gb`.

    The clock stands still while the run validates, writes texts and saves what follows a validation.
    """

    def __init__(self) -> None:
        self._since: float | None = None  # training has run since then, but for
        self._paused_at: float | None = None  # a pause that began then
        self._step = 0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self._since is None:
            self._since, self._step = time.perf_counter(), trainer.global_step
        elif self._paused_at is not None:
            self._since += time.perf_counter() - self._paused_at
        self._paused_at = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused_at = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        steps = trainer.global_step - self._step
        if steps == 0 or not logs_at(trainer, trainer.global_step):
            return
        assert self._since is not None
        module, data = parts(trainer)
        now = time.perf_counter()
        seconds = now - self._since
        self._since, self._step = now, trainer.global_step
        tokens_per_second = steps * data.windows_per_step * data.context_length / seconds
        values = {"speed/tokens_per_second": tokens_per_second, "memory/peak_gb": peak_memory(module.device) / 1e9}
        peak = peak_flops(module.device)
        if peak is not None:
            values["speed/mfu"] = tokens_per_second * flops_per_token(module) / (peak * trainer.world_size)
        module.log_dict(values)


def flops_per_token(module: LitGPT) -> float:
    """Operations a trained token costs: 6 a multiplied weight, and causal attention (Kaplan et al. 2020)."""
    config = module.gpt.config
    weights = sum(p.numel() for p in module.gpt.blocks.parameters()) + module.gpt.head.weight.numel()
    return 6 * weights + 6 * config.num_blocks * config.context_length * config.d_model


def peak_flops(device: torch.device) -> float | None:
    """The most bfloat16 operations a second `device` can do, where known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in PEAK_FLOPS.items() if model in name), None)


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: on the device, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
        self._events: dict[str, int] = {}  # the sizes of the event files when the checkpoint resumed from was written

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss, self.best_step = state_dict["best_loss"], state_dict["best_step"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if isinstance(trainer.logger, RunLogger):
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
        if isinstance(exception, Stopped) or self._done_step < 0:
            return
        if whole and step != self._saved_step and all(p.isfinite().all() for p in module.gpt.parameters()):
            path = self.folder / "last.ckpt"
            try:
                # without trainer.save_checkpoint's barrier: the other ranks may never come
                trainer.strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(), path)
                self.last_good = path
            except Exception as error:
                exception.add_note(f"step {step:,} could not be saved: {error}")
        for kind, good in {"last": self.last_good, "best": self.folder / "best.ckpt"}.items():
            with contextlib.suppress(UserError):  # there may be none
                if good is None:
                    continue
                saved_step = open_checkpoint(good, mmap=True)["global_step"]
                exception.add_note(f"the {kind} good checkpoint is {good}, step {saved_step:,}")

    def _due(self, step: int) -> list[str]:
        names = ["best.ckpt"] if step == self.best_step else []
        return names + ([f"step_{step:08d}.ckpt"] if step % self.every_n_steps == 0 and step else [])

    def _save_if_due(self, trainer: Trainer) -> None:
        names = self._due(trainer.global_step)
        if names or trainer.global_step == self._validated_step:
            self._save(trainer, *names)

    def mend(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Writes the copies of the checkpoint at `path` that a process killed among its saves did not come to.

        Raises:
            UserError: it cannot be written.
        """
        self.load_state_dict(checkpoint["callbacks"][self.state_key])
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
            old.unlink()


def rank_zero_rank() -> int:
    """The rank of this process, as far as its environment tells."""
    return getattr(rank_zero_only, "rank", 0)


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

    Signals only leave a note; the ranks agree on it once a step, so that all of them leave at the same one. A second
    Ctrl-C leaves at once. Before the first step a signal ends the command where it is, and its other ranks with it.

    A thread hears them too: the handler of a process that waits in a library for another one never gets its turn.

    Attributes:
        started: whether training has begun.
        trainer: of the run, as soon as there is one.
        checkpoint: what saves the last step; None: nothing does.
        timer: how long a command may train; None: as long as it takes.
        go_on: the command that resumes.
    """

    def __init__(self) -> None:
        self.started = False
        self.checkpoint: StepCheckpoint | None = None
        self.timer: Timer | None = None
        self.go_on = ""
        self.trainer: Trainer | None = None
        self._training = self._stopping = self._leaving = False
        self._asked: tuple[int, float] | None = None  # which signal came, and when
        self._helps = rank_zero_rank() != 0  # whether this process was started by the one a person started
        self._made: Path | None = None  # the folder of a new run
        self._lock: BaseFileLock | None = None
        self._step = -1

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
            self._lock.acquire(timeout=8)  # workers of a process that was killed notice within five seconds
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
        """Hears signals until the end of the block."""
        before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        heard, told = os.pipe()
        os.set_blocking(told, False)
        wakeup = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(heard,), daemon=True).start()
        self._listen()
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
            signal.set_wakeup_fd(wakeup)
            os.close(told)  # ends the thread

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
                    if again or not self._stopping:
                        self._leave_at_once(signum[0])

    def _leave_at_once(self, signum: int) -> NoReturn:
        self._leaving = True
        self._end_children()
        if not self.started:
            os.write(2, f"stopped before the first step by {signal.Signals(signum).name}\n".encode())
            self.clean_up()
        os._exit(128 + signum)

    def _listen(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._hear)

    def _hear(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        if self._leaving:  # the thread was quicker
            return
        if not self._training and not self._helps:
            self._stopping = True
            place = "after the last step" if self.started else "before the first step"
            raise Stopped(128 + signum, f"stopped {place} by {signal.Signals(signum).name}")
        if self._asked is None:  # one that helps waits: the first process ends it, or agrees with it at the next step
            self._asked = (signum, now)
            if not self._helps:  # not by print, which this may have interrupted
                os.write(2, b"\nstopping when this step is done and saved; Ctrl-C again leaves at once\n")
        elif signum == signal.SIGINT and now - self._asked[1] > 0.5:  # sooner it is the same key, passed on
            self._leave_at_once(signum)

    def _end_children(self) -> None:
        """Kills the processes Lightning started beside this one."""
        if self.trainer is not None and (launcher := self.trainer.strategy.launcher) is not None:
            launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = self._training = True
        self._listen()  # in place of the Trainer's handler, which would end with status 0, or hang
        if self.timer is not None:
            self.timer.on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self._step != trainer.global_step:
            self._step = trainer.global_step
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.checkpoint is not None:  # the Trainer puts it after this callback; a signal must not disturb it
            self.checkpoint.finish(trainer)
        self.timer = None  # the work is done
        self._stop_if_asked(trainer)
        self._training = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not self.started:
            self._end_children()
        self._training = False

    def _stop_if_asked(self, trainer: Trainer) -> None:
        """Raises `Stopped` on every rank, if any of them was asked to."""
        remaining = self.timer.time_remaining() if self.timer is not None else None
        status = (
            128 + self._asked[0] if self._asked is not None else 0 if remaining is not None and remaining <= 0 else -1
        )
        if trainer.world_size > 1:
            told = torch.tensor(status, device=trainer.strategy.root_device)
            status = int(trainer.strategy.reduce(told, reduce_op="max"))
        if status < 0:
            return
        place = f"at step {trainer.global_step:,}"
        reason = f"by {signal.Signals(status - 128).name}" if status else "by --trainer.max_time"
        if self.checkpoint is None:
            raise Stopped(status, f"stopped {place} {reason}; nothing is saved, as the flags say")
        self.checkpoint.finish(trainer)
        saved = self.checkpoint.last_good
        raise Stopped(status, f"stopped {place} {reason}; all of it is in {saved}; to go on: {self.go_on}")


class GenerateText(Callback):
    """Writes text at the start, at validations and at the end: to the console and to TensorBoard, under `samples/`.

    It draws from a generator of its own, so that a run's losses are the same with and without it.

    Args:
        prompts: what to go on from; [] for no text at all.
        num_samples: texts a prompt.
        max_new_tokens: their length at most.
        temperature: 0 takes the likeliest token always.
        top_k: draw among the k likeliest tokens only.
    """

    def __init__(
        self,
        prompts: list[str] | str = "",
        num_samples: int = 3,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        top_k: int | None = None,
    ) -> None:
        if num_samples < 1 or max_new_tokens < 1:
            raise UserError(
                f"--generate.num_samples is {num_samples} and --generate.max_new_tokens {max_new_tokens}: "
                "give 1 or more; --generate.prompts [] turns the texts off"
            )
        check_sampling(temperature, top_k)
        self.prompts = [prompts] if isinstance(prompts, str) else prompts
        self.num_samples = num_samples
        self.sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
        self._written_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is None:
            self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _, data = parts(trainer)
        if self._written_step != trainer.global_step == data.max_steps:  # not where a run is only interrupted
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        """Every rank draws the same texts, since the model may be spread over them; the first one shows them."""
        step = self._written_step = trainer.global_step
        for number, prompt in enumerate(self.prompts, start=1):
            texts = [shown(text) for text in self.texts(trainer, prompt)]
            if not trainer.is_global_zero:
                continue
            between = "\n\n" if any("\n" in text for text in texts) else "\n"
            bar = trainer.progress_bar_callback
            (print if bar is None else bar.print)(between.join(textwrap.indent(text, "  | ", bool) for text in texts))
            if isinstance(trainer.logger, RunLogger):
                markdown = "\n\n".join(f"```\n{text}\n```" for text in texts)
                trainer.logger.experiment.add_text(f"samples/prompt_{number}", markdown, step)

    def texts(self, trainer: Trainer, prompt: str) -> list[str]:
        """`num_samples` texts, prompts included; they depend on the weights, the seed and the step alone."""
        module, data = parts(trainer)
        generator = torch.Generator(device=module.device).manual_seed(data.seed + trainer.global_step)
        rows = data.reading.mode == "rows"
        # compiled blocks would be compiled anew for every length of the cache, and in the end for training no more
        with torch.compiler.set_stance("force_eager"):
            return [
                prompt
                + "".join(stream_text(module.gpt, data.tokenizer, prompt, rows, generator=generator, **self.sampling))
                for _ in range(self.num_samples)
            ]
