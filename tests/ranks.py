"""For tests of runs with two ranks: ranks that start as forks, and kills of one rank at a boundary of a step."""

import os
import pickle
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch.strategies.launchers.subprocess_script as launcher
import torch
from conftest import DEFAULT
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only

import lit_gpt.training.checkpointing
import lit_gpt.training.module
from lit_gpt.cli.main import main
from lit_gpt.data.batches import TrainBatches
from lit_gpt.model import GPT
from lit_gpt.training.checkpointing import StepCheckpoint, StopEarly
from lit_gpt.training.logger import StepLogger
from lit_gpt.training.module import LitGPT
from lit_gpt.training.progress import StepProgress
from lit_gpt.training.samples import GenerateText
from lit_gpt.training.stop import GracefulStop
from lit_gpt.training.throughput import StepThroughput
from lit_gpt.training.validation import StartEndValidation

TWO_RANKS = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]

# ------------------------------------------------------------------------------------------------- starting the ranks


class ForkedRank:
    """Stands in for the `subprocess.Popen` with which Lightning starts rank 1.

    The process is forked by `prepare`, before the command of rank 0 runs, so that it need not import anything. It waits
    until Lightning starts it.
    """

    waiting: "ForkedRank"  # the process that the next call of `start` starts

    def __init__(self, pid: int, pipe: int) -> None:
        self.pid, self.returncode = pid, None
        self._pipe = pipe

    @classmethod
    def prepare(cls, in_child: Callable[[], object] = lambda: None) -> None:
        """Fork the process, in which `in_child` is called before the command, and let Lightning start it."""
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(write_end)
            cls._run(read_end, in_child)
        os.close(read_end)
        cls.waiting = cls(pid, write_end)
        launcher.subprocess = SimpleNamespace(Popen=cls.start)  # type: ignore[attr-defined]

    @classmethod
    def start(cls, command: list[str], env: dict[str, str], cwd: str | None) -> "ForkedRank":
        os.write(cls.waiting._pipe, pickle.dumps((command, env)))
        os.close(cls.waiting._pipe)
        return cls.waiting

    @staticmethod
    def _run(pipe: int, in_child: Callable[[], object]) -> None:
        status = 1
        try:
            with os.fdopen(pipe, "rb") as file:
                content = file.read()
            if not content:  # rank 0 has ended before it started other ranks
                os._exit(0)
            (_, *sys.argv), environment = pickle.loads(content)
            os.environ.update(environment)
            rank_zero_only.rank = int(environment["LOCAL_RANK"])
            for signum in (signal.SIGINT, signal.SIGTERM):  # as scripts/fit.py
                signal.signal(signum, signal.SIG_IGN)
            in_child()
            status = main(DEFAULT)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None  # type: ignore[assignment]
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)


# --------------------------------------------------------------------------------------------- boundaries of a step

CLASSES = (
    *(LitGPT, StartEndValidation, GenerateText, StepThroughput, StepProgress, StopEarly, GracefulStop, StepCheckpoint),
)
HOOKS = (
    *("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_optimizer_step"),
    *("on_train_batch_end", "on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end"),
    *("on_validation_end", "on_train_end"),
)


def boundaries() -> dict[str, tuple[Any, str]]:
    """Return the functions that a step, its validation, its samples, its save and the end of a run consist of.

    Returns:
        Name -> the object and the name of its attribute. A kill comes before or after a call.
    """
    found: dict[str, tuple[Any, str]] = {
        "drawing the batch": (TrainBatches, "__getitem__"),
        "forward": (GPT, "loss"),
        "log": (LitGPT, "log"),
        "backward": (Strategy, "backward"),
        "gradient norm": (lit_gpt.training.module, "gradient_norm"),
        "clipping": (torch.nn.utils, "clip_grads_with_norm_"),
        "gradient check and clipping": (LitGPT, "configure_gradient_clipping"),
        "optimizer update": (torch.optim.AdamW, "step"),
        "freeing the gradients": (torch.optim.Optimizer, "zero_grad"),
        "logging": (StepLogger, "log_metrics"),
        "flushing the events": (StepLogger, "save"),
        "validation step": (LitGPT, "validation_step"),
        "loss of a validation": (LitGPT, "estimate_loss"),
        "early stopping": (EarlyStopping, "on_validation_end"),
        "samples": (GenerateText, "generate_texts"),
        "saving": (StepCheckpoint, "_save"),
        "sizes of the event files": (StepLogger, "event_file_sizes"),
        "writing the file": (StepCheckpoint, "_write"),
        "barrier after the file": (DDPStrategy, "barrier"),
        "copying the file": (lit_gpt.training.checkpointing, "copy_checkpoint"),
        "broadcast after saving": (DDPStrategy, "broadcast"),
        "last save": (StepCheckpoint, "save_last_step"),
    }
    for cls in CLASSES:
        for hook in HOOKS:
            if any(hook in base.__dict__ for base in cls.__mro__ if base.__module__.startswith("lit_gpt.")):
                found[f"{cls.__name__}.{hook}"] = (cls, hook)
    return found


@dataclass
class RankKill:
    """A SIGKILL of one rank of two.

    Args:
        rank: Which rank. None: no rank is killed, and rank 0 gets the error that it gets where rank 1 is gone. It does
            not meet rank 1 at every boundary, and this shows that it could.
        boundary: One of `boundaries()`, "" for a random time.
        is_after: Whether the kill comes after the call instead of before it.
        step: The first call in this step, or in a later one, is meant; steps count from 0, the start of the run.
        seconds: With no boundary, when the kill comes, after the start of the command.
    """

    rank: int | None
    boundary: str
    is_after: bool
    step: int
    seconds: float = 0.0

    def __str__(self) -> str:
        place = f"{'after' if self.is_after else 'before'} {self.boundary}" if self.boundary else "at random"
        return f"{'error' if self.rank is None else f'rank {self.rank}'} {place}"

    def prepare(self, marker: Path) -> None:
        """Patch this process, which becomes rank 0, and let rank 1 be a fork of it; `forked` calls it.

        Args:
            marker: Is created right before the kill.
        """
        marker.unlink(missing_ok=True)
        ForkedRank.prepare(in_child=lambda: self.schedule(marker) if self.rank == 1 else None)
        if self.rank != 1:
            self.schedule(marker)

    def schedule(self, marker: Path) -> None:
        """Patch this process so that it is killed; it survives if the moment never comes."""

        def kill() -> None:
            if self.rank is None and marker.exists():
                return
            marker.touch()
            if self.rank is None:
                raise RuntimeError(
                    "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1. More text"
                )
            os.kill(os.getpid(), signal.SIGKILL)

        if not self.boundary:
            threading.Thread(target=lambda: (time.sleep(self.seconds), kill()), daemon=True).start()
            return
        step = 0  # of the run, as far as this process knows
        on_train_batch_start = LitGPT.on_train_batch_start

        def start_of_batch(module: LitGPT, *args: Any) -> None:
            nonlocal step
            on_train_batch_start(module, *args)
            step = module.trainer.global_step

        LitGPT.on_train_batch_start = start_of_batch  # type: ignore[method-assign]
        owner, name = boundaries()[self.boundary]
        function = getattr(owner, name)

        def patched(*args: Any, **kwargs: Any) -> Any:
            is_due = step >= self.step
            if is_due and not self.is_after:
                kill()
            result = function(*args, **kwargs)
            if is_due:
                kill()
            return result

        setattr(owner, name, patched)


def kills_at_boundaries(rank: int | None, last_step: int, rng: random.Random) -> list[RankKill]:
    """Return a kill before and one after every boundary, in random steps of a run."""
    starts = ("on_train_start", "on_train_epoch_start")  # a resumed run comes by only once, before its first step
    return [
        RankKill(rank, name, is_after, 0 if name.endswith(starts) else rng.randint(0, last_step - 1))
        for name in boundaries()
        for is_after in (False, True)
    ]
