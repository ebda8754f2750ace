"""`bench.py train`: the speed of training."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.profilers import Profiler

from lit_gpt.benchmark.peers import PEERS, peer_names
from lit_gpt.benchmark.task import Row, build_run, build_task
from lit_gpt.benchmark.turns import TurnTimer, run_in_turns
from lit_gpt.device import configure_malloc, peak_flops
from lit_gpt.errors import UserError
from lit_gpt.planning.work import flops_per_token

# The phases of a step: column -> end of the Trainer's name for the profiled action.
PHASES = {
    "data_ms": ".train_dataloader_next",
    "forward_ms": "Strategy.training_step",
    "backward_ms": "Strategy.backward",
    "optimizer_ms": ".optimizer_step",
}


class PhaseProfiler(Profiler):
    """Add up the seconds of each phase of the training steps."""

    def __init__(self) -> None:
        super().__init__()
        self._phases: dict[str, str | None] = {}  # cache: action name -> phase
        self._starts: dict[str, float] = {}  # of the phases in progress; time.perf_counter()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def _phase(self, action_name: str) -> str | None:
        if action_name not in self._phases:
            found = (phase for phase, ending in PHASES.items() if action_name.endswith(ending))
            self._phases[action_name] = next(found, None)
        return self._phases[action_name]

    def profile(self, action_name: str) -> AbstractContextManager[Any]:  # type: ignore[override]
        return super().profile(action_name) if self._phase(action_name) else nullcontext()

    def start(self, action_name: str) -> None:
        if phase := self._phase(action_name):
            self._starts[phase] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if phase := self._phase(action_name):
            seconds = time.perf_counter() - self._starts.pop(phase)
            self._seconds[phase] += seconds
            if "optimizer_ms" in self._starts:  # the optimizer step calls the last forward and backward pass
                self._seconds["optimizer_ms"] -= seconds

    def take_seconds(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call."""
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds


class TakeTurns(Callback):
    """Call a `TurnTimer` before every optimizer step."""

    def __init__(self, timer: TurnTimer) -> None:
        self.timer = timer

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.timer.before_step()


def run_lit_gpt(pipe: Connection, args: list[str], default_config: Path) -> None:
    """Worker process: train as fit.py does, with logging, without validations, text generation and checkpoints."""
    configure_malloc()
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "limit_val_batches": 0,
            "enable_checkpointing": "false",
            "max_steps": 10**9,
            "default_root_dir": folder,
        }
        flags = [f"--trainer.{name}={value}" for name, value in options.items()]
        run = build_run([*args, *flags, "--generate.prompts=[]"], default_config)
        timer = TurnTimer(pipe, run.trainer.strategy.root_device)
        callbacks = run.trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [TakeTurns(timer), *(other for other in callbacks if not isinstance(other, ProgressBar))]
        if timer.device.type == "cpu":  # a GPU works asynchronously, so the phases would show only the time to queue it
            profiler = PhaseProfiler()
            run.trainer.profiler = profiler  # type: ignore[attr-defined]
            timer.phase_seconds = profiler.take_seconds
        run.trainer.fit(run.model, run.datamodule)


def run_peer(pipe: Connection, name: str, args: list[str], default_config: Path, nanogpt: Path | None) -> None:
    """Worker process: train with one of `PEERS`."""
    if name == "bare":
        configure_malloc()
    task = build_task(build_run([*args, "--trainer.logger=false"], default_config), nanogpt)
    task.data.setup("fit")
    timer, step = TurnTimer(pipe, task.device), PEERS[name](task).make_step()
    while True:
        timer.before_step()
        step()


def benchmark_training(options: argparse.Namespace, args: list[str], default_config: Path) -> Iterator[Row]:
    """Measure tokens per second, milliseconds per step and per phase of a step, and peak memory."""
    run = build_run(args, default_config)
    if run.trainer.world_size > 1:
        raise UserError(f"--trainer.devices {run.trainer.num_devices}: one device is measured, leave it out")
    task = build_task(run)
    tokens = task.data.plan.windows_per_step * task.config.context_length
    workers: dict[str, tuple[Any, ...]] = {"lit_gpt": (run_lit_gpt, args, default_config)}
    for name in ("bare", *peer_names(options)):
        workers[name] = (run_peer, name, args, default_config, options.nanogpt)
    answers = run_in_turns(workers, [options.warm_up] + [options.steps] * options.turns)
    medians = {}
    for name, (_, *turns) in answers.items():  # the first answer is the warm-up
        medians[name] = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    lit_gpt_seconds = medians["lit_gpt"]["seconds"]
    for name, median in medians.items():
        seconds = median.pop("seconds")
        row: Row = {"who": name, "tokens_per_second": tokens / seconds, "step_ms": 1e3 * seconds}
        row["over_lit_gpt"] = seconds / lit_gpt_seconds
        peak = peak_flops(task.device)
        if peak is not None:
            row["mfu"] = tokens / seconds * flops_per_token(task.module.gpt) / peak
        row |= median
        if "forward_ms" in row:
            row["else_ms"] = row["step_ms"] - sum(row[phase] for phase in PHASES)
        row["precision"] = PEERS[name](task).precision if name in PEERS else task.precision
        yield row
