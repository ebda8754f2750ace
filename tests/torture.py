"""Kills runs with SIGKILL, resumes them, and compares them with one that was never stopped.

    python tests/torture.py --runs 5 --kills 10              # 50 kills, one process
    python tests/torture.py --runs 1 --kills 10 --devices 2  # 10 kills, two processes
    python tests/torture.py --runs 4 --kills 5 --devices 2 --strategy fsdp  # 20 kills, checkpoints in slices

A run is killed `--kills` times: at random moments, inside saves (between any two bytes, before and after every sync,
rename and removal), inside validations, and while texts are written; then it ends. It must leave the weights, the
optimizer state, every point and every text of the straight run, bit for bit, its checkpoints, and nothing half-written.
"""

import argparse
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT, forked, points, texts
from torch.distributed.checkpoint.filesystem import FileSystem

import lit_gpt.files
from lit_gpt.checkpoint.store import newest_checkpoint, open_checkpoint
from lit_gpt.training.module import LitGPT
from lit_gpt.training.samples import GenerateText

KINDS = ("time", "bytes", "sync", "rename", "remove", "validation", "text")
POLITE = ("interrupt", "terminate")
STRATEGIES = {"ddp": ["--trainer.strategy", "ddp"], "fsdp": ["--config", str(ROOT / "configs" / "fsdp.yaml")]}
MEASURED = {"speed/tokens_per_second", "memory/peak_gb"}  # no two runs have these in common

CONFIG = """
data: {files: rows.txt, tokenizer: byte, batch_size: 4, global_batch_size: 24, eval_windows: 8}
model: {config: {context_length: 16, d_model: 16, num_blocks: 2, num_heads: 2, dropout: 0.1}, warmup_steps: 5}
trainer: {max_steps: 30, val_check_interval: 10, log_every_n_steps: 3, accelerator: cpu}
checkpoint: {every_n_steps: 7}
generate: {max_new_tokens: 8, num_samples: 2}
"""


def die() -> None:
    """SIGKILL for this process and those it started."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def tell(signum: int) -> None:
    os.kill(os.getpid(), signum)


def at_call(number: int, before: Callable[..., Any], after: bool = False) -> Callable[..., Any]:
    """`before`, but call `number` of it, from 1, is the last thing the process does, with `after` in full."""
    calls = 0

    def instead(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            die()
        result = before(*args, **kwargs)
        if calls == number:
            die()
        return result

    return instead


def arm(kind: str | None, draw: random.Random, seconds: float) -> None:
    """Lets this process die at a random moment of a kind, or not at all where that moment does not come."""
    number, after = draw.randint(1, 8), draw.random() < 0.5
    if kind in ("time", "interrupt", "terminate"):
        delay = draw.uniform(0, seconds)
        end = {"time": die, "interrupt": lambda: tell(signal.SIGINT), "terminate": lambda: tell(signal.SIGTERM)}[kind]
        threading.Thread(target=lambda: (time.sleep(delay), end()), daemon=True).start()
    elif kind == "bytes":
        left = draw.randint(1, 300_000)

        class Mortal(io.FileIO):
            def write(self, content: Any) -> int:
                nonlocal left
                if left < len(content):
                    super().write(content[:left])
                    die()
                left -= len(content)
                return super().write(content)

        def opened(path: Path, mode: str) -> Any:
            return Mortal(path, mode) if mode == "wb" else open(path, mode)

        lit_gpt.files.open = opened  # type: ignore[attr-defined]
        FileSystem.create_stream = lambda self, path, mode: opened(path, mode)  # type: ignore[assignment, method-assign]
    elif kind == "sync":
        os.fsync = at_call(2 * number - after, os.fsync)  # a file's, or its folder's
    elif kind == "rename":
        moved = at_call(draw.randint(1, 16), lambda move, *paths: move(*paths), after)
        os.rename, os.replace = partial(moved, os.rename), partial(moved, os.replace)
    elif kind == "remove":
        os.unlink = at_call(number, os.unlink, after)
    elif kind == "validation":
        LitGPT.validation_step = at_call(number, LitGPT.validation_step, after)  # type: ignore[method-assign]
    elif kind == "text":
        GenerateText.generate_texts = at_call(number, GenerateText.generate_texts, after)  # type: ignore[method-assign]


def equal(one: Any, other: Any) -> bool:
    """Whether two nested values hold the same, tensors by every bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(*pair) for pair in zip(one, other))
    return one == other


def differences(straight: Path, killed: Path) -> list[str]:
    """What of a run's folder is not as in the other's."""
    found = []
    for name in ("last.ckpt", "best.ckpt"):
        one, other = open_checkpoint(straight / name), open_checkpoint(killed / name)
        parts = ("state_dict", "optimizer_states", "global_step", "callbacks")
        found += [f"{part} of {name}" for part in parts if not equal(one[part], other[part])]
    curves, again = points(straight), points(killed)
    if curves.keys() != again.keys():
        found.append(f"tags {sorted(curves.keys() ^ again.keys())}")
    for tag in curves.keys() & again.keys():
        kept = slice(0, 1) if tag in MEASURED else slice(None)
        if [point[kept] for point in curves[tag]] != [point[kept] for point in again[tag]]:
            found.append(f"points of {tag}")
    if texts(straight) != texts(killed):
        found.append("texts")
    found += [path.name for path in straight.glob("*.ckpt") if not (killed / path.name).exists()]
    found += [path.name for path in killed.glob(".*.ckpt.*")]  # left half-written
    return found


def torture(
    folder: Path, kills: int, flags: list[str], seed: int, kinds: tuple[str, ...] = KINDS
) -> tuple[list[str], list[str]]:
    """A run killed `kills` times beside its straight twin: of which kinds the kills were, and what differs in the end.

    Where it gets to its end before it has been killed so often, it is compared, and another is begun.
    """
    draw = random.Random(seed)
    rows = [f"row {i} 第{i}行: " + "abcdefghij"[i % 10] * (i % 7) for i in range(120)]
    (folder / "rows.txt").write_text("\n".join(rows), encoding="utf-8")
    (folder / "torture.yaml").write_text(CONFIG)
    flags = ["--config", "torture.yaml", *flags]
    begun = time.monotonic()
    straight = forked(folder, *flags, "--name", "straight")
    assert straight.status == 0, straight.err
    seconds = time.monotonic() - begun
    came: list[str] = []
    differing: list[str] = []
    kind: str | None = ""
    while kind is not None:
        kind = draw.choice(kinds) if len(came) < kills else None
        worker = int(len(came) % 4 == 1)  # seldom: it takes longer to start than a run to end
        resumed = [*flags, "--name", "killed", "--ckpt_path", "last", "--data.num_workers", worker]
        own = random.Random(draw.random())
        ended = forked(folder, *resumed, prepare=partial(arm, kind, own, seconds))
        assert ended.status in (0, {"interrupt": 130, "terminate": 143}.get(str(kind), -signal.SIGKILL)), ended.err
        if ended.status != 0:
            assert kind is not None
            came.append(kind)
            continue
        newest, _ = newest_checkpoint(folder / "logs", "killed")
        assert newest is not None
        differing += differences(folder / "logs" / "straight" / "version_0", newest.path.parent)
        shutil.rmtree(folder / "logs" / "killed")
    return came, differing


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kills", type=int, default=10, help="of each run")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="of several devices")
    parser.add_argument("--polite", action="store_true", help="with SIGINT and SIGTERM instead")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unequal = 0
    for number in range(options.runs):
        sampling, optimizer = ("random", "shuffled")[number % 2], ("adamw", "muon")[number // 2 % 2]
        flags = ["--trainer.max_steps", str(options.steps), "--data.sampling", sampling, "--model.optimizer", optimizer]
        flags += ["--trainer.val_check_interval", "25", "--checkpoint.every_n_steps", "20"]
        if options.devices > 1:
            flags += ["--trainer.devices", str(options.devices), *STRATEGIES[options.strategy]]
        with tempfile.TemporaryDirectory() as folder:
            kinds = POLITE if options.polite else KINDS
            came, differing = torture(Path(folder), options.kills, flags, options.seed + number, kinds)
        kinds_came = ", ".join(f"{came.count(kind)} {kind}" for kind in dict.fromkeys(came))
        outcome = ", ".join(differing) or "equal"
        print(f"run {number + 1}: {sampling}, {optimizer}: {len(came)} kills ({kinds_came}), {outcome}", flush=True)
        unequal += bool(differing)
    return unequal


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(_main())
