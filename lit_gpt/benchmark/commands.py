"""`bench.py loss`, `prepare` and `startup`: the time of whole commands."""

import argparse
import pickle
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from lit_gpt.benchmark.peers import PEERS, load_nanogpt
from lit_gpt.benchmark.task import Row, Task, build_run, build_task
from lit_gpt.data.batches import EvaluationBatches
from lit_gpt.data.corpus import open_corpus
from lit_gpt.data.shards import TokenIds
from lit_gpt.data.tokenize import read_texts
from lit_gpt.data.windows import evaluation_starts
from lit_gpt.device import available_cores
from lit_gpt.errors import UserError

# What nanoGPT's README recommends for a CPU. On a GPU its defaults are GPT-2 with 124M parameters, compiled.
NANOGPT_CPU_ARGS = [
    *("config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1"),
    *("--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"),
    *("--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
]
NANOGPT_MAX_VOCAB = 2**16  # its files of ids are uint16
NANOGPT_FOLDER, NANOGPT_DATASET = "out-benchmark", "benchmark"
README_TARGET = 1.898  # the loss of the run on a CPU, in nats per character of Shakespeare

# ------------------------------------------------------------------------------------------------ time to a loss


def benchmark_time_to_loss(options: argparse.Namespace, args: list[str], default_config: Path) -> Iterator[Row]:
    """Measure the seconds from the start of the command until the loss on the validation split reaches the target.

    nanoGPT trains once, on the token ids of the same splits, and its loss is the target unless one is given. That loss
    is computed afterwards and takes no time of the measurement. Then fit.py makes one run for each seed.
    """
    run = build_run(args, default_config)
    target = options.target
    if options.nanogpt:
        row = _run_nanogpt(options.nanogpt, shlex.split(options.nanogpt_args), build_task(run))
        yield {"who": "nanogpt", "seed": 1337, **row}
        target = target or row["loss"]
    target = target or README_TARGET
    tokens_per_step = run.datamodule.plan.windows_per_step * run.model.gpt.config.context_length
    script = str(default_config.parents[1] / "scripts" / "fit.py")
    fit = [sys.executable, script, "--validate_at_start=false", *args, "--data.eval_windows=null"]
    for seed in range(options.first_seed, options.first_seed + options.turns):
        with tempfile.TemporaryDirectory() as folder:
            command = [*fit, f"--trainer.default_root_dir={folder}", f"--seed_everything={seed}"]
            yield {"who": "lit_gpt", "seed": seed, **_run_fit(command, target, tokens_per_step)}


def _run_fit(command: list[str], target: float, tokens_per_step: int) -> Row:
    """Run fit.py until a validation reaches the target loss, or to its end."""
    result: Row = {}
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.match(r"step +([\d,]+) .*loss/val ([\d.]+)", line):
                steps, loss = int(match[1].replace(",", "")), float(match[2])
                result = {"loss": loss, "seconds": time.perf_counter() - start, "steps": steps}
                if loss <= target:
                    process.terminate()  # fit.py saves a checkpoint and exits
                    break
        _, errors = process.communicate()
    if not result:
        raise UserError(f"fit.py ended before its first validation: {errors.strip()}")
    return {**result, "tokens": result["steps"] * tokens_per_step, "reached": result["loss"] <= target}


def _run_nanogpt(checkout: Path, arguments: list[str], task: Task) -> Row:
    """Run nanoGPT's train.py on the token ids of a task, with these arguments after those of its own recipe."""
    ids = {"train": task.data.train_ids, "val": task.data.val_ids}
    vocab_size = PEERS["nanogpt"](task).vocab_size
    if vocab_size > NANOGPT_MAX_VOCAB:
        raise UserError(
            f"nanoGPT reads vocabularies of up to {NANOGPT_MAX_VOCAB:,} ids, this one has {vocab_size:,}: give another "
            "--data.tokenizer"
        )
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(checkout, Path(folder, "nanogpt"), ignore=shutil.ignore_patterns(".git", "*.bin")))
        dataset = copy / "data" / NANOGPT_DATASET
        dataset.mkdir(parents=True)
        for split, array in ids.items():
            np.asarray(array[:]).astype(np.uint16).tofile(dataset / f"{split}.bin")
        (dataset / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
        recipe = NANOGPT_CPU_ARGS if task.device.type == "cpu" else []
        command = [sys.executable, "train.py", *recipe, f"--dataset={NANOGPT_DATASET}", f"--out_dir={NANOGPT_FOLDER}"]
        start = time.perf_counter()
        ended = subprocess.run([*command, *arguments], cwd=copy, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if ended.returncode:
            last_line = (ended.stderr.strip() or f"status {ended.returncode}").splitlines()[-1]
            raise UserError(f"nanoGPT's train.py ended with an error ({last_line}): check --nanogpt_args")
        checkpoint = torch.load(copy / NANOGPT_FOLDER / "ckpt.pt", map_location="cpu", weights_only=True)
    config, steps = checkpoint["config"], checkpoint["iter_num"]
    tokens_per_step = config["batch_size"] * config["gradient_accumulation_steps"] * config["block_size"]
    loss = _nanogpt_loss(checkout, checkpoint, ids["val"], task.device)
    return {"loss": loss, "seconds": seconds, "steps": steps, "tokens": steps * tokens_per_step}


def _nanogpt_loss(checkout: Path, checkpoint: dict[str, Any], ids: TokenIds, device: torch.device) -> float:
    """Return nanoGPT's loss on all tokens of a split, in nats per token."""
    nanogpt = load_nanogpt(checkout)
    model = nanogpt.GPT(nanogpt.GPTConfig(**checkpoint["model_args"]))
    weights = {name.removeprefix("_orig_mod."): weight for name, weight in checkpoint["model"].items()}  # compiled
    model.load_state_dict(weights)
    model.eval().to(device)
    length = checkpoint["model_args"]["block_size"]
    batches = EvaluationBatches(ids, evaluation_starts(len(ids), length, None), length, batch_size=16)
    nats = 0.0
    with torch.no_grad():
        for batch in (batches[i] for i in range(len(batches))):
            tokens, targets = (part.to(device) for part in batch)  # (B, T) each
            logits, _ = model(tokens, targets.clamp(min=0))  # (B, T, V); without targets only of the last position
            nats += float(F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"))
    return nats / (len(ids) - 1)


# ----------------------------------------------------------------------------------------- preparation and startup


def benchmark_preparation(options: argparse.Namespace, args: list[str], default_config: Path) -> Iterator[Row]:
    """Measure megabytes and rows per second from files to the token cache, next to the tokenizer alone."""
    data = build_run(args, default_config).datamodule
    corpus, sources = data.corpus, data.sources()
    megabytes = sum(source.size() for source in sources) / 1e6
    documents = list(read_texts(sources, data.corpus_config.read_options))

    def build_corpus(processes: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            open_corpus(sources, data.corpus_config, Path(folder), processes)

    def tokenize() -> None:
        for document in documents:
            corpus.tokenizer.encode(document)

    measured: dict[tuple[str, int], Callable[[], None]] = {("tokenizer", 1): tokenize}
    for processes in sorted({1, available_cores()}):
        measured["lit_gpt", processes] = partial(build_corpus, processes)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in measured}
    for _ in range(options.turns):
        for key, function in measured.items():
            start = time.perf_counter()
            function()
            seconds[key].append(time.perf_counter() - start)
    for (name, processes), turns in seconds.items():
        median = statistics.median(turns)
        yield {
            "who": name,
            "processes": processes,
            "seconds": median,
            "mb_per_second": megabytes / median,
            "rows_per_second": len(documents) / median,
            "tokens_per_second": len(corpus.ids) / median,
        }


def benchmark_startup(options: argparse.Namespace, args: list[str], default_config: Path) -> Iterator[Row]:
    """Measure the seconds of short commands: --version, --help, one training step and its checkpoint, one token.

    `over_import` is their ratio to the time of importing Lightning.
    """
    scripts = default_config.parents[1] / "scripts"
    with tempfile.TemporaryDirectory() as folder:
        run_folder = ["--name", "bench", "--trainer.default_root_dir", folder]
        one_step = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--generate.prompts", "[]"]
        checkpoint = str(Path(folder, "bench", "version_0", "last.ckpt"))
        commands = {
            "import lightning.pytorch.cli": ["-c", "import lightning.pytorch.cli"],
            "fit.py --version": [str(scripts / "fit.py"), "--version"],
            "fit.py --help": [str(scripts / "fit.py"), "--help"],
            "first step": [str(scripts / "fit.py"), *args, *run_folder, *one_step],
            "first token": [str(scripts / "generate.py"), "--ckpt_path", checkpoint, "--max_new_tokens", "1"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(options.turns + 1):
            for name, command in commands.items():
                start = time.perf_counter()
                ended = subprocess.run([sys.executable, *command], capture_output=True, text=True)
                if ended.returncode:
                    raise UserError(f"{name}: {ended.stderr.strip()}")
                if turn > 0:  # the first turn fills the file system's cache
                    seconds[name].append(time.perf_counter() - start)
    import_seconds = statistics.median(seconds["import lightning.pytorch.cli"])
    for name, turns in seconds.items():
        median = statistics.median(turns)
        yield {"who": "lit_gpt", "what": name, "seconds": median, "over_import": median / import_seconds}
