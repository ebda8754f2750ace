"""Kill runs with SIGKILL, resume them, and compare them with a run that was never stopped.

    python tests/torture.py --runs 5 --kills 10              # 50 kills, one process
    python tests/torture.py --runs 1 --kills 10 --devices 2  # 10 kills, two processes
    python tests/torture.py --runs 4 --kills 5 --devices 2 --strategy fsdp  # 20 kills, sharded checkpoints
    python tests/torture.py --kill_rank 1 --kills 40 --steps 30  # one rank of two is killed, also at every boundary
    python tests/torture.py --lose_rank --steps 30  # rank 0 loses the connection to rank 1, at every boundary

Each run is killed `--kills` times and resumed each time: at random moments, during saves (between any two bytes, before
and after every fsync, rename and removal), during validations, and while samples are generated. At its end it must have
the weights, the optimizer state, the checkpoints, every point and every sample of the uninterrupted run, bit for bit,
and no unfinished file.
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
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT, forked, points, texts, visualized
from ranks import TWO_RANKS, ForkedRank, RankKill, kills_at_boundaries
from torch.distributed.checkpoint.filesystem import FileSystem

import lit_gpt.files
from lit_gpt.checkpoint.runs import newest_checkpoint
from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.runs.summary import read_summary
from lit_gpt.training.logger import SUB_RUNS
from lit_gpt.training.module import LitGPT
from lit_gpt.training.samples import GenerateText

KILLS = ("time", "bytes", "fsync", "rename", "remove", "validation", "samples")  # where SIGKILL comes
SIGNALS = ("interrupt", "terminate")  # SIGINT and SIGTERM, at a random time
STRATEGIES = {"ddp": ["--trainer.strategy", "ddp"], "fsdp": ["--config", str(ROOT / "configs" / "fsdp.yaml")]}
MEASURED_TAGS = {"speed/tokens_per_second", "memory/peak_gb"}  # these values differ between any two runs
# What a summary says, without times
FIGURES = (
    *("status", "parameters", "tokens", "step", "max_steps", "best_loss", "best_step", "bits_per_byte"),
    *("last_loss", "last_train_loss"),
)

CONFIG = """
data: {files: rows.txt, tokenizer: byte, batch_size: 4, global_batch_size: 24, eval_windows: 8}
model: {config: {context_length: 16, d_model: 16, num_blocks: 2, num_heads: 2, dropout: 0.1}, warmup_steps: 5}
trainer: {max_steps: 30, val_check_interval: 10, log_every_n_steps: 3, accelerator: cpu}
checkpoint: {every_n_steps: 7}
generate: {max_new_tokens: 8, num_samples: 2}
visualize: true
"""


# --------------------------------------------------------------------------------------------------- killing a process


def kill_process_group() -> None:
    """Send SIGKILL to this process and to those it started."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def kill_at_call(count: int, function: Callable[..., Any], after: bool = False) -> Callable[..., Any]:
    """Return `function`, but call number `count` of it, from 1, kills the process: before it, or after it."""
    calls = 0

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            kill_process_group()
        result = function(*args, **kwargs)
        if calls == count:
            kill_process_group()
        return result

    return patched


def kill_after_bytes(size: int) -> None:
    """Patch the writing of checkpoints, so that this process is killed when it has written `size` bytes."""
    remaining = size

    class KillingFile(io.FileIO):
        def write(self, content: Any) -> int:
            nonlocal remaining
            if remaining < len(content):
                super().write(content[:remaining])
                kill_process_group()
            remaining -= len(content)
            return super().write(content)

    def patched_open(path: Path, mode: str) -> Any:
        return KillingFile(path, mode) if mode == "wb" else open(path, mode)

    lit_gpt.files.open = patched_open  # type: ignore[attr-defined]
    FileSystem.create_stream = lambda self, path, mode: patched_open(path, mode)  # type: ignore[assignment, method-assign]


def schedule_kill(kind: str | None, rng: random.Random, seconds: float) -> None:
    """Patch this process so that it is killed at a random moment of a kind; it survives if that moment never comes.

    Rank 1, if there is one, is killed with it.

    Args:
        kind: One of KILLS or SIGNALS; None: no kill.
        rng: Chooses the moment.
        seconds: How long an uninterrupted run takes.
    """
    ForkedRank.prepare()
    count, after = rng.randint(1, 8), rng.random() < 0.5
    if kind in ("time", *SIGNALS):
        delay = rng.uniform(0, seconds)
        signum = {"time": None, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM}[kind]
        end = kill_process_group if signum is None else partial(os.kill, os.getpid(), signum)
        threading.Thread(target=lambda: (time.sleep(delay), end()), daemon=True).start()
    elif kind == "bytes":
        kill_after_bytes(rng.randint(1, 300_000))
    elif kind == "fsync":
        os.fsync = kill_at_call(2 * count - after, os.fsync)  # of a file, or of its folder
    elif kind == "rename":
        move = kill_at_call(rng.randint(1, 16), lambda function, *paths: function(*paths), after)
        os.rename, os.replace = partial(move, os.rename), partial(move, os.replace)
    elif kind == "remove":
        os.unlink = kill_at_call(count, os.unlink, after)
    elif kind == "validation":
        LitGPT.validation_step = kill_at_call(count, LitGPT.validation_step, after)  # type: ignore[method-assign]
    elif kind == "samples":
        GenerateText.generate_texts = kill_at_call(count, GenerateText.generate_texts, after)  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------------------ comparing runs


def is_equal(one: Any, other: Any) -> bool:
    """Return whether two nested values are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(is_equal(*pair) for pair in zip(one, other))
    return one == other


def compare_runs(expected: Path, actual: Path) -> list[str]:
    """Return what differs between the folders of two runs; [] if nothing does."""
    found = []
    for name in ("last.ckpt", "best.ckpt"):
        one, other = Checkpoint.open(expected / name).read(), Checkpoint.open(actual / name).read()
        parts = ("state_dict", "optimizer_states", "global_step", "callbacks")
        found += [f"{part} of {name}" for part in parts if not is_equal(one[part], other[part])]
    for sub_run in ("", *SUB_RUNS):
        curves, other_curves = points(expected / sub_run), points(actual / sub_run)
        if curves.keys() != other_curves.keys():
            found.append(f"tags {sorted(curves.keys() ^ other_curves.keys())} {sub_run}".rstrip())
        for tag in curves.keys() & other_curves.keys():
            compared = slice(0, 1) if tag in MEASURED_TAGS else slice(None)  # of (step, value)
            if [point[compared] for point in curves[tag]] != [point[compared] for point in other_curves[tag]]:
                found.append(f"points of {tag} {sub_run}".rstrip())
    if texts(expected) != texts(actual):
        found.append("texts")
    if visualized(expected) != visualized(actual):
        found.append("pictures")
    one_summary, other_summary = read_summary(expected), read_summary(actual)
    found += [
        f"{name} of the summary" for name in FIGURES if getattr(one_summary, name) != getattr(other_summary, name)
    ]
    found += [path.name for path in expected.glob("*.ckpt") if not (actual / path.name).exists()]
    found += [path.name for path in actual.glob(".*.ckpt.*")]  # unfinished
    return found


def write_inputs(folder: Path) -> None:
    """Write a small table and the config of a run that takes a second."""
    rows = [f"row {i} 第{i}行: " + "abcdefghij"[i % 10] * (i % 7) for i in range(120)]
    (folder / "rows.txt").write_text("\n".join(rows), encoding="utf-8")
    (folder / "torture.yaml").write_text(CONFIG)


def torture(
    folder: Path, kills: int, flags: list[str], seed: int, kinds: tuple[str, ...] = KILLS
) -> tuple[list[str], list[str]]:
    """Train a run without interruption, and the same run with `kills` kills; compare them.

    A run that ends before it was killed so often is compared, and another one is started.

    Returns:
        The kind of each kill, and what differed.
    """
    rng = random.Random(seed)
    write_inputs(folder)
    flags = ["--config", "torture.yaml", *flags]
    start = time.monotonic()
    straight = forked(folder, *flags, "--name", "straight", prepare=ForkedRank.prepare)
    assert straight.status == 0, straight.err
    assert visualized(folder / "logs" / "straight" / "version_0")
    seconds = time.monotonic() - start
    killed: list[str] = []
    differences: list[str] = []
    kind: str | None = ""
    while kind is not None:
        kind = rng.choice(kinds) if len(killed) < kills else None
        num_workers = int(len(killed) % 4 == 1)  # seldom: a worker takes longer to start than a run takes
        resumed = [*flags, "--name", "killed", "--ckpt_path", "auto", "--data.num_workers", num_workers]
        moment = random.Random(rng.random())
        ended = forked(folder, *resumed, prepare=partial(schedule_kill, kind, moment, seconds))
        assert ended.status in (0, {"interrupt": 130, "terminate": 143}.get(str(kind), -signal.SIGKILL)), ended.err
        if ended.status != 0:
            assert kind is not None
            killed.append(kind)
            continue
        newest, _ = newest_checkpoint(folder / "logs", "killed")
        assert newest is not None
        differences += compare_runs(folder / "logs" / "straight" / "version_0", newest.path.parent)
        shutil.rmtree(folder / "logs" / "killed")
    return killed, differences


def torture_ranks(folder: Path, kills: list[RankKill], flags: list[str]) -> Iterator[str]:
    """Train a run without interruption, and the same run with kills of one of its ranks; compare them.

    A run that ends before it was killed is compared, and another one is started, up to three for each kill.

    Yields:
        A line for each kill and each comparison. It begins with "killed", "equal", "NOT" or "never".
    """
    write_inputs(folder)
    flags = ["--config", "torture.yaml", *flags]
    marker, logs = folder / "marker", folder / "logs"
    straight = forked(folder, *flags, "--name", "straight", prepare=ForkedRank.prepare)
    assert (straight.status, straight.err) == (0, ""), straight.err
    assert visualized(logs / "straight" / "version_0")
    kill: RankKill | None
    for kill in [*kills, None]:
        ended = None
        for _ in range(3):
            prepare = partial(kill.prepare, marker) if kill else ForkedRank.prepare
            ended = forked(folder, *flags, "--name", "killed", "--ckpt_path", "auto", prepare=prepare)
            if kill and ended.status != 0:
                break
            newest, _ = newest_checkpoint(logs, "killed")
            assert newest is not None
            differences = compare_runs(logs / "straight" / "version_0", newest.path.parent)
            if ended.status != 0 or differences:
                yield f"NOT equal: {', '.join(differences)} (status {ended.status}) {ended.err}"
            else:
                yield "equal"
            shutil.rmtree(logs / "killed")
            if kill is None or marker.exists():
                break
        if kill is not None:
            has_come = marker.exists()
            is_reported = ended.status in (0, -signal.SIGKILL) or (ended.status, ended.err.count("\n")) == (1, 1)
            outcome = f"status {ended.status}" if is_reported else f"NOT in one line:\n{ended.err}"
            yield f"{'killed' if has_come else 'never came:'} {kill}: {outcome}"


def kill_one_rank(rank: int | None, kills: int, steps: int, seed: int) -> int:
    """Kill a rank at every boundary of a step and `kills` times at random; print what happened, return the failures."""
    rng = random.Random(seed)
    at_boundaries = kills_at_boundaries(rank, steps, rng)
    rng.shuffle(at_boundaries)
    at_random = [RankKill(rank, "", False, 0, rng.uniform(0.5, 4)) for _ in range(0 if rank is None else kills)]
    flags = ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", "5", "--trainer.log_every_n_steps", "1"]
    flags += [] if rank is None else TWO_RANKS
    flags += ["--early_stopping.patience", "100", "--trainer.gradient_clip_val", "0.1"]
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for line in torture_ranks(Path(folder), [*at_boundaries, *at_random], flags):
            counts[line.split()[0]] += 1
            print(line, flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return counts["NOT"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kills", type=int, default=10, help="per run")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="for several devices")
    parser.add_argument("--signals", action="store_true", help="send SIGINT and SIGTERM instead of SIGKILL")
    parser.add_argument("--kill_rank", type=int, choices=(0, 1), help="kill one rank of two, also at every boundary")
    parser.add_argument(
        "--lose_rank", action="store_true", help="at every boundary the error of a rank that lost another"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.kill_rank is not None or options.lose_rank:
        return kill_one_rank(options.kill_rank, options.kills, options.steps, options.seed)
    unequal = 0
    for run in range(options.runs):
        sampling, optimizer = ("random", "shuffled")[run % 2], ("adamw", "muon")[run // 2 % 2]
        flags = ["--trainer.max_steps", str(options.steps), "--data.sampling", sampling, "--model.optimizer", optimizer]
        flags += ["--trainer.val_check_interval", "25", "--checkpoint.every_n_steps", "20"]
        if options.devices > 1:
            flags += ["--trainer.devices", str(options.devices), *STRATEGIES[options.strategy]]
        with tempfile.TemporaryDirectory() as folder:
            kinds = SIGNALS if options.signals else KILLS
            killed, differences = torture(Path(folder), options.kills, flags, options.seed + run, kinds)
        counts = ", ".join(f"{killed.count(kind)} {kind}" for kind in dict.fromkeys(killed))
        outcome = ", ".join(differences) or "equal"
        print(f"run {run + 1}: {sampling}, {optimizer}: {len(killed)} kills ({counts}), {outcome}", flush=True)
        unequal += bool(differences)
    return unequal


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
