"""How fast this is, and how fast others are at the same work.

Every contender lives in a process of its own, so that each has its own peak of memory. They are told in turn to work
and to wait, so that a noisy machine treats all alike; compared are medians over the turns.
"""

import argparse
import importlib.util
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import Profiler
from torch.nn import functional as F

from lit_gpt.benchmark.peers import PEERS, Task, load_nanogpt
from lit_gpt.cli.arguments import CommandLine
from lit_gpt.cli.exit_status import exit_status
from lit_gpt.cli.experiment import Experiment, build_experiment
from lit_gpt.cli.messages import LineParser, quiet_lightning
from lit_gpt.cli.table import print_rows
from lit_gpt.data.batches import EvaluationBatches
from lit_gpt.data.corpus import open_corpus
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.data.tokenize import read_texts
from lit_gpt.data.windows import evaluation_starts
from lit_gpt.device import available_cores, configure_malloc, peak_flops, peak_memory, synchronize
from lit_gpt.errors import UserError
from lit_gpt.inference.generate import prepare_for_inference
from lit_gpt.model import GPT
from lit_gpt.training.stop import GracefulStop
from lit_gpt.training.throughput import flops_per_token

Row = dict[str, Any]
PARTS = {  # of a step, and what the Trainer calls them
    "data_ms": ".train_dataloader_next",
    "forward_ms": "Strategy.training_step",
    "backward_ms": "Strategy.backward",
    "optimizer_ms": ".optimizer_step",
}


def build_run(words: list[str], default_config: Path) -> Experiment:
    """Build what fit.py would run, and do not run it."""
    return build_experiment(CommandLine(words, default_config), GracefulStop())


def build_task(run: Experiment, nanogpt: Path | None) -> Task:
    """Return the work of one training step, which every contender does."""
    run.datamodule.trainer = run.model.trainer = run.trainer
    return Task(
        module=run.model,
        data=run.datamodule,
        device=run.trainer.strategy.root_device,
        precision=str(run.trainer.precision),
        clip=run.trainer.gradient_clip_val or 0.0,
        nanogpt=nanogpt,
    )


# ------------------------------------------------------------------------------------------------ taking turns


class Turns:
    """The side of one that trains: it asks before every step, and waits here while others work."""

    def __init__(self, pipe: Connection, device: torch.device) -> None:
        self.pipe, self.device = pipe, device
        self.left = self.taken = 0
        self.since = 0.0
        self.split: Callable[[], dict[str, float]] = dict  # what else is known of a turn

    def before_step(self) -> None:
        """Ends a turn that is over, and waits for the next; leaves the process when there is none."""
        if self.left == 0:
            if self.taken:
                synchronize(self.device)
                seconds = time.perf_counter() - self.since
                parts = {name: 1e3 * value / self.taken for name, value in self.split().items()}
                self.pipe.send({"seconds": seconds / self.taken, "peak_mb": peak_memory(self.device) / 1e6, **parts})
            self.left = self.taken = self.pipe.recv()
            if self.left == 0:
                sys.exit(0)
            self.since = time.perf_counter()
        self.left -= 1


def alternate(workers: dict[str, tuple[Any, ...]], messages: list[Any]) -> dict[str, list[Row]]:
    """Lets processes work in turn: the answers of each, one a message.

    Args:
        workers: by name, a function and what follows the connection it is called with; it answers messages until 0.
        messages: what to do. The first is for getting ready, one process after the other.

    Raises:
        UserError: a contender could not do the work.
    """
    context = multiprocessing.get_context("spawn")
    answers: dict[str, list[Row]] = {name: [] for name in workers}
    pipes, processes = {}, {}
    try:
        for name, (function, *arguments) in workers.items():
            pipes[name], theirs = context.Pipe()
            processes[name] = context.Process(target=_worker, args=(theirs, function, *arguments))
            processes[name].start()
            theirs.close()
            answers[name].append(_ask(name, pipes[name], messages[0]))
        for message in messages[1:]:
            for name, pipe in pipes.items():
                answers[name].append(_ask(name, pipe, message))
        for pipe in pipes.values():
            pipe.send(0)
        return answers
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes.values():
            process.join(timeout=5)
            process.kill()


def _ask(name: str, pipe: Connection, message: Any) -> Row:
    try:
        pipe.send(message)
        answer: Row = pipe.recv()
    except (EOFError, ConnectionError):
        raise UserError(f"{name} ended without a result: run it alone to see why") from None
    if "error" in answer:
        raise UserError(f"{name}: {answer['error']}")
    return answer


def _worker(pipe: Connection, function: Callable[..., None], *arguments: Any) -> None:
    quiet_lightning()
    try:
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
            function(pipe, *arguments)
    except EOFError:  # another contender could not do the work
        return
    except (UserError, ImportError) as error:
        pipe.send({"error": str(error)})


# ---------------------------------------------------------------------------------------------------- training


class Split(Profiler):
    """Adds up the time of the parts of a step, as the Trainer names them."""

    def __init__(self) -> None:
        super().__init__()
        self.part_of: dict[str, str | None] = {}  # by the Trainer's name
        self.begun: dict[str, float] = {}
        self.spent = dict.fromkeys(PARTS, 0.0)

    def part(self, action_name: str) -> str | None:
        if action_name not in self.part_of:
            self.part_of[action_name] = next((part for part, end in PARTS.items() if action_name.endswith(end)), None)
        return self.part_of[action_name]

    def profile(self, action_name: str) -> AbstractContextManager[Any]:  # type: ignore[override]
        return super().profile(action_name) if self.part(action_name) else nullcontext()

    def start(self, action_name: str) -> None:
        if part := self.part(action_name):
            self.begun[part] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if part := self.part(action_name):
            seconds = time.perf_counter() - self.begun.pop(part)
            self.spent[part] += seconds
            if "optimizer_ms" in self.begun:  # in which the Trainer takes the last forward and backward pass of a step
                self.spent["optimizer_ms"] -= seconds

    def take(self) -> dict[str, float]:
        """Seconds since it was last asked."""
        spent, self.spent = self.spent, dict.fromkeys(PARTS, 0.0)
        return spent


class TakeTurns(Callback):
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.turns.before_step()


def train_ours(pipe: Connection, words: list[str], default_config: Path) -> None:
    """Our training as fit.py runs it, logging included; without validations, texts and checkpoints."""
    configure_malloc()
    with tempfile.TemporaryDirectory() as folder:
        off = ("limit_val_batches=0", "enable_checkpointing=false", "enable_progress_bar=false", "max_steps=1000000000")
        flags = [f"--trainer.{flag}" for flag in (*off, f"default_root_dir={folder}")]
        run = build_run([*words, *flags, "--generate.prompts=[]"], default_config)
        turns = Turns(pipe, run.trainer.strategy.root_device)
        run.trainer.callbacks.insert(0, TakeTurns(turns))  # type: ignore[attr-defined]
        if turns.device.type == "cpu":  # elsewhere work goes on while the clock of a part stands
            split = Split()
            run.trainer.profiler, turns.split = split, split.take  # type: ignore[attr-defined]
        run.trainer.fit(run.model, run.datamodule)


def train_peer(pipe: Connection, name: str, words: list[str], default_config: Path, nanogpt: Path | None) -> None:
    if name == "bare":
        configure_malloc()
    task = build_task(build_run([*words, "--trainer.logger=false"], default_config), nanogpt)
    task.data.setup("fit")
    turns, step = Turns(pipe, task.device), PEERS[name](task).trainer()
    while True:
        turns.before_step()
        step()


def train(options: argparse.Namespace, words: list[str], default_config: Path) -> Iterator[Row]:
    """Tokens a second, milliseconds a step and where they go, peak memory, beside the others."""
    run = build_run(words, default_config)
    if run.trainer.world_size > 1:
        raise UserError(f"--trainer.devices {run.trainer.num_devices}: one device is measured, leave it out")
    task, gpt = build_task(run, None), run.model.gpt
    tokens = run.datamodule.plan.windows_per_step * gpt.config.context_length
    workers: dict[str, tuple[Any, ...]] = {"lit_gpt": (train_ours, words, default_config)}
    for name in ("bare", *peers(options)):
        workers[name] = (train_peer, name, words, default_config, options.nanogpt)
    measured = {
        name: answers[1:]
        for name, answers in alternate(workers, [options.warm_up] + [options.steps] * options.turns).items()
    }
    ours = statistics.median(turn["seconds"] for turn in measured["lit_gpt"])
    for name, turns in measured.items():
        median = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        seconds = median.pop("seconds")
        row: Row = {"who": name, "tokens_per_second": tokens / seconds, "step_ms": 1e3 * seconds}
        row["over_lit_gpt"] = seconds / ours
        peak = peak_flops(task.device)
        if peak is not None:
            row["mfu"] = tokens / seconds * flops_per_token(run.model) / peak
        row |= median
        if "forward_ms" in row:
            row["else_ms"] = row["step_ms"] - sum(row[part] for part in PARTS)
        precision = PEERS[name](task).precision if name in PEERS else task.precision
        yield row | {"precision": precision}


def peers(options: argparse.Namespace) -> list[str]:
    """Those a person asked for and has."""
    found = ["nanogpt"] if options.nanogpt else []
    return found + [name for name in ("litgpt", "transformers") if options.peers and importlib.util.find_spec(name)]


# -------------------------------------------------------------------------------------------------- generation


def write(
    pipe: Connection, name: str, words: list[str], default_config: Path, nanogpt: Path | None, vocab_size: int | None
) -> None:
    """Answers (rows, prompt, new, cache) with the seconds it took to write `new` tokens after prompts, or none."""
    task = build_task(build_run([*words, "--trainer.logger=false"], default_config), nanogpt)
    if vocab_size is not None:
        task.module.gpt = GPT(replace(task.config, vocab_size=vocab_size))
    peer = PEERS[name](task)
    peer.model.eval()
    if isinstance(peer.model, GPT):
        prepare_for_inference(peer.model)
    while message := pipe.recv():
        rows, prompt, new, cache = message
        tokens = torch.randint(task.config.vocab_size, (rows, prompt), device=task.device)
        since = time.perf_counter()
        try:
            peer.write(tokens, new, cache)
        except NotImplementedError:
            pipe.send({})
            continue
        synchronize(task.device)
        pipe.send({"seconds": time.perf_counter() - since, "peak_mb": peak_memory(task.device) / 1e6})


def generate(options: argparse.Namespace, words: list[str], default_config: Path) -> Iterator[Row]:
    """Tokens a second for reading a prompt and for writing, one text at a time and 16, with and without a cache."""
    workers: dict[str, tuple[Any, ...]] = {
        name: (write, name, words, default_config, options.nanogpt, options.vocab_size)
        for name in ("bare", *peers(options))
    }
    config = build_run(words, default_config).model.gpt.config
    prompt = config.context_length // 2
    new = min(options.steps, config.context_length - prompt)
    kinds = [(rows, cache) for rows in (1, 16) for cache in (True, False)]
    turn = [(rows, prompt, count, cache) for rows, cache in kinds for count in (1, new)]
    answers = alternate(workers, [(1, prompt, 2, True)] + turn * options.turns)
    for (rows, cache), position in zip(kinds, range(0, len(turn), 2)):
        ours = None
        for name in workers:
            reading, writing = (answers[name][1 + position + part :: len(turn)] for part in (0, 1))
            if "seconds" not in reading[0]:  # it knows no such way
                continue
            first, all_of_them = (statistics.median(each["seconds"] for each in part) for part in (reading, writing))
            # nothing, where the machine was so busy that one token took longer than all
            speed = rows * (new - 1) / (all_of_them - first) if all_of_them > first else None
            ours = speed if name == "bare" else ours
            yield {
                "who": "lit_gpt" if name == "bare" else name,
                "rows": rows,
                "cache": cache,
                "tokens_per_second": speed,
                "over_lit_gpt": ours / speed if ours and speed else None,
                "prompt_tokens_per_second": rows * prompt / first,
                "peak_mb": answers[name][-1].get("peak_mb"),
            }


# --------------------------------------------------------------------------------------------- time to a loss

# what nanoGPT's README runs on a CPU
NANOGPT = [
    *("config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1"),
    *("--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"),
    *("--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
]


def loss(options: argparse.Namespace, words: list[str], default_config: Path) -> Iterator[Row]:
    """Seconds from the command's start until the loss over the whole validation split is at the target, seed by seed.

    nanoGPT takes its README's 2,000 steps on characters of the same file; its loss is taken afterwards, off the clock.
    """
    run = build_run(words, default_config)
    per_step = run.datamodule.plan.windows_per_step * run.model.gpt.config.context_length
    fit = [sys.executable, str(default_config.parents[1] / "scripts" / "fit.py"), *words]
    for seed in range(options.first_seed, options.first_seed + options.turns):
        with tempfile.TemporaryDirectory() as folder:
            flags = (
                "--trainer.default_root_dir",
                folder,
                "--data.eval_windows",
                "null",
                "--seed_everything",
                str(seed),
            )
            yield {"who": "lit_gpt", "seed": seed, **_fit_to(options.target, [*fit, *flags], per_step)}
    if options.nanogpt:
        yield {"who": "nanogpt", "seed": 1337, **_nanogpt_to_its_end(options.nanogpt, run.datamodule)}


def _fit_to(target: float, command: list[str], per_step: int) -> Row:
    """Runs fit.py until a validation reaches `target`, or to its end."""
    found: Row = {}
    since = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.match(r"step +([\d,]+) .*loss/val ([\d.]+)", line):
                steps, value = int(match[1].replace(",", "")), float(match[2])
                found = {"loss": value, "seconds": time.perf_counter() - since, "steps": steps}
                if value <= target:
                    process.terminate()  # it saves, and leaves
                    break
        _, errors = process.communicate()
    if not found:
        raise UserError(f"fit.py did not come to a validation: {errors.strip()}")
    return {**found, "tokens": found["steps"] * per_step, "reached": found["loss"] <= target}


def _nanogpt_to_its_end(checkout: Path, data: TextDataModule) -> Row:
    (text,) = data.sources()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(checkout, Path(folder, "nanogpt"), ignore=shutil.ignore_patterns(".git", "*.bin")))
        shutil.copy(text.name, copy / "data" / "shakespeare_char" / "input.txt")
        quiet: dict[str, Any] = {"cwd": copy, "stdout": subprocess.DEVNULL, "check": True}
        subprocess.run([sys.executable, "data/shakespeare_char/prepare.py"], **quiet)
        since = time.perf_counter()
        subprocess.run([sys.executable, "train.py", *NANOGPT], **quiet)
        seconds = time.perf_counter() - since
        saved = torch.load(copy / "out-shakespeare-char" / "ckpt.pt", map_location="cpu", weights_only=True)
        module = load_nanogpt(checkout)
        model = module.GPT(module.GPTConfig(**saved["model_args"]))
        model.load_state_dict(saved["model"])
        model.eval()
        ids = np.fromfile(copy / "data" / "shakespeare_char" / "val.bin", dtype=np.uint16)
        length = saved["model_args"]["block_size"]
        windows = EvaluationBatches(ids, evaluation_starts(len(ids), length, None), length, batch_size=64)
        nats = 0.0
        with torch.no_grad():
            for tokens, targets in (windows[i] for i in range(len(windows))):
                logits, _ = model(tokens, targets.clamp(min=0))  # without targets it gives the last position only
                nats += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    steps = 2000
    return {"loss": nats / (len(ids) - 1), "seconds": seconds, "steps": steps, "tokens": steps * 12 * length}


# ------------------------------------------------------------------------------------------ preparing, starting


def prepare(options: argparse.Namespace, words: list[str], default_config: Path) -> Iterator[Row]:
    """Megabytes and rows a second from files to ids on the disk, beside the tokenizer alone on the same documents."""
    data = build_run(words, default_config).datamodule
    corpus, files = data.corpus, data.sources()
    size = sum(source.size() for source in files) / 1e6
    documents = list(read_texts(files, data.corpus_config.read_options))

    def build(processes: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            open_corpus(files, data.corpus_config, Path(folder), processes)

    def encode() -> None:
        for document in documents:
            corpus.tokenizer.encode(document)

    works: dict[tuple[str, int], Callable[[], None]] = {("tokenizer", 1): encode}
    for processes in sorted({1, available_cores()}):
        works["lit_gpt", processes] = partial(build, processes)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in works}
    for _ in range(options.turns):
        for key, work in works.items():
            since = time.perf_counter()
            work()
            seconds[key].append(time.perf_counter() - since)
    for (name, processes), turns in seconds.items():
        median = statistics.median(turns)
        row: Row = {"who": name, "processes": processes, "seconds": median, "mb_per_second": size / median}
        yield row | {"rows_per_second": len(documents) / median, "tokens_per_second": len(corpus.ids) / median}


def startup(options: argparse.Namespace, words: list[str], default_config: Path) -> Iterator[Row]:
    """Seconds of whole commands: to the help, to a first step that is saved, to a first token; beside a bare import."""
    scripts = default_config.parents[1] / "scripts"
    with tempfile.TemporaryDirectory() as folder:
        place = ["--name", "bench", "--trainer.default_root_dir", folder]
        one = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--generate.prompts", "[]"]
        saved = str(Path(folder, "bench", "version_0", "last.ckpt"))
        commands = {
            "import lightning.pytorch.cli": ["-c", "import lightning.pytorch.cli"],
            "fit.py --version": [str(scripts / "fit.py"), "--version"],
            "fit.py --help": [str(scripts / "fit.py"), "--help"],
            "first step": [str(scripts / "fit.py"), *words, *place, *one],
            "first token": [str(scripts / "generate.py"), "--ckpt_path", saved, "--max_new_tokens", "1"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(options.turns + 1):  # the first one fills caches
            for name, command in commands.items():
                since = time.perf_counter()
                ran = subprocess.run([sys.executable, *command], capture_output=True, text=True)
                if ran.returncode:
                    raise UserError(f"{name}: {ran.stderr.strip()}")
                if turn:
                    seconds[name].append(time.perf_counter() - since)
    imports = statistics.median(seconds["import lightning.pytorch.cli"])
    for name, turns in seconds.items():
        median = statistics.median(turns)
        yield {"who": "lit_gpt", "what": name, "seconds": median, "over_import": median / imports}


# ------------------------------------------------------------------------------------------------ what is printed


KINDS = {"train": train, "loss": loss, "generate": generate, "prepare": prepare, "startup": startup}


def main(words: list[str], default_config: Path) -> int:
    """Runs the command line; returns the exit status of `exit_status`."""
    quiet_lightning()
    return exit_status(lambda: measure(words, default_config))


def measure(words: list[str], default_config: Path) -> None:
    parser = LineParser(__doc__)
    parser.add_argument("what", choices=list(KINDS), help="what is measured")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--peers", action="store_true", help="beside what is installed of transformers and litgpt")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="beside nanoGPT: a checkout of it")
    parser.add_argument(
        "--vocab_size", type=int, help="of the untrained model that writes; the tokenizer's if left out"
    )
    parser.add_argument("--steps", type=int, default=20, help="in a turn; or tokens to write")
    parser.add_argument("--turns", type=int, default=10, help="of each contender; or seeds")
    parser.add_argument("--target", type=float, default=1.898, help="loss to reach, in nats per token")
    parser.add_argument("--first_seed", type=int, default=1, help="of the runs to a loss")
    parser.add_argument("--warm_up", type=int, default=10, help="steps before the first turn")
    options, others = parser.parse_known_args(words)
    for name in ("steps", "turns", "warm_up"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}: give 1 or more")
    if options.nanogpt is not None:
        load_nanogpt(options.nanogpt)  # said now, not when its turn comes
    print_rows(KINDS[options.what](options, others, default_config), options.json)
