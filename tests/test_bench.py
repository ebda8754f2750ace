"""scripts/bench.py: every benchmark gives its rows, and wrong arguments are refused in one line."""

import itertools
import json
import math
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEFAULT, ROOT, forked

from lit_gpt.benchmark import turns
from lit_gpt.benchmark.benchmark import main
from lit_gpt.benchmark.peers import PEERS
from lit_gpt.benchmark.task import build_run, build_task
from lit_gpt.benchmark.training import PhaseProfiler
from lit_gpt.device import available_cores


def measure(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, float | str]]:
    """Run a benchmark and return its rows."""
    status = main([*args, "--json"], DEFAULT)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return [json.loads(line) for line in printed.out.splitlines()]


def test_train_measures_the_phases_of_a_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", "--config", "small.yaml", "--steps=3", "--turns=2", "--warm_up=2"]
    ours, bare = measure(capsys, *args, "--data.num_workers=1")
    assert (ours["who"], bare["who"]) == ("lit_gpt", "bare")
    phases = ("data_ms", "forward_ms", "backward_ms", "optimizer_ms", "else_ms")
    assert all(float(ours[phase]) > 0 for phase in phases)
    assert sum(float(ours[phase]) for phase in phases) == pytest.approx(ours["step_ms"])
    assert ours["tokens_per_second"] == pytest.approx(4 * 16 / float(ours["step_ms"]) * 1000)
    assert float(bare["over_lit_gpt"]) == pytest.approx(float(bare["step_ms"]) / float(ours["step_ms"]))
    assert float(ours["peak_mb"]) > 100
    assert not (folder / "logs").exists()


def test_phase_profiler_excludes_nested_phases_from_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_gpt.benchmark.training.time.perf_counter", iter([0.0, 1.0, 3.0, 10.0]).__next__)
    profiler = PhaseProfiler()
    with (
        profiler.profile("[Module]LitGPT.optimizer_step"),
        profiler.profile("[LightningModule]LitGPT.on_before_batch_transfer"),  # no phase
        profiler.profile("[Strategy]SingleDeviceStrategy.training_step"),
    ):
        pass
    assert profiler.take_seconds() == {"data_ms": 0, "forward_ms": 2.0, "backward_ms": 0, "optimizer_ms": 8.0}
    assert set(profiler.take_seconds().values()) == {0.0}


NANOGPT = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, tokens, targets=None):
        logits = self.embedding(tokens)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)
    def generate(self, tokens, max_new_tokens):
        self.generated = tokens.shape, max_new_tokens
"""


def test_nanogpt_checkout_is_trained_and_generates_only_without_cache(folder: Path) -> None:
    (folder / "nanoGPT").mkdir()
    (folder / "nanoGPT" / "model.py").write_text(NANOGPT)
    task = build_task(build_run(["--config", "small.yaml", "--trainer.logger=false"], DEFAULT), folder / "nanoGPT")
    task.data.setup("fit")
    peer = PEERS["nanogpt"](task)
    before = peer.model.embedding.weight.detach().clone()
    peer.make_step()()
    assert not torch.equal(peer.model.embedding.weight, before)
    prompts = torch.zeros(2, 3, dtype=torch.int64)
    peer.generate(prompts, 5, use_cache=False)
    assert peer.model.generated == ((2, 3), 5)
    with pytest.raises(NotImplementedError):
        peer.generate(prompts, 5, use_cache=True)


def test_generate_measures_with_and_without_a_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "--config", "small.yaml", "--steps=8", "--turns=3", "--vocab_size=50", "--valid_utf8"]
    rows = measure(capsys, *args)
    modes = {(row["rows"], row["cache"], row["valid_utf8"]) for row in rows}
    assert modes == set(itertools.product((1, 16), (True, False), (True, False)))


def test_prepare_measures_each_number_of_processes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, *corpus_rows = measure(capsys, "prepare", "--config", "small.yaml", "--turns=1")
    assert tokenizer["who"] == "tokenizer"
    assert [row["processes"] for row in corpus_rows] == sorted({1, available_cores()})
    for row in corpus_rows:
        assert float(row["rows_per_second"]) * float(row["seconds"]) == pytest.approx(120)


def test_loss_reports_that_the_target_is_not_reached(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = measure(capsys, "loss", "--config", "small.yaml", "--turns=1", "--first_seed=7", "--target", "1")
    assert (row["seed"], row["steps"], row["tokens"], row["reached"]) == (7, 6, 6 * 4 * 16, False)


NANOGPT_TRAIN = """
import pickle, sys
import numpy as np, torch
from model import GPT, GPTConfig

settings = dict(flag.removeprefix("--").split("=") for flag in sys.argv[1:] if flag.startswith("--"))
folder = f"data/{settings['dataset']}"
ids = {split: np.fromfile(f"{folder}/{split}.bin", dtype=np.uint16) for split in ("train", "val")}
vocab_size = pickle.load(open(f"{folder}/meta.pkl", "rb"))["vocab_size"]
assert vocab_size == 257 and ids["train"].max() <= 256 and len(ids["train"]) > 8 * len(ids["val"]) > 0
shape = dict(block_size=8, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=8, dropout=0.0, bias=False)
model = GPT(GPTConfig(**shape))
torch.nn.init.zeros_(model.embedding.weight)
config = {"batch_size": int(settings["batch_size"]), "gradient_accumulation_steps": 2, "block_size": 8}
weights = {f"_orig_mod.{name}": weight for name, weight in model.state_dict().items()}  # as if it was compiled
checkpoint = {"model": weights, "model_args": shape, "iter_num": 5, "config": config}
import os
os.mkdir(settings["out_dir"])
torch.save(checkpoint, settings["out_dir"] + "/ckpt.pt")
"""


def test_loss_of_nanogpt_on_the_same_ids_is_the_target(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "nanoGPT").mkdir()
    (folder / "nanoGPT" / "model.py").write_text(NANOGPT)
    (folder / "nanoGPT" / "train.py").write_text(NANOGPT_TRAIN)
    args = ["loss", "--config", "small.yaml", "--turns=1", "--nanogpt", "nanoGPT", "--nanogpt_args=--batch_size=3"]
    nanogpt, ours = measure(capsys, *args)
    assert (nanogpt["who"], nanogpt["steps"], nanogpt["tokens"]) == ("nanogpt", 5, 5 * 3 * 2 * 8)
    assert nanogpt["loss"] == pytest.approx(math.log(257))  # its weights are zero
    assert (ours["who"], ours["reached"], ours["steps"]) == ("lit_gpt", True, 3)


def test_startup_measures_every_command(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real_run = subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        if command[0] != sys.executable:  # git
            return real_run(command, **options)
        script = Path(command[1])
        if script.parent.name != "scripts" or "--version" in command:
            return subprocess.CompletedProcess(command, 0)
        result = forked(folder, *command[2:], script=script.name)
        return subprocess.CompletedProcess(command, result.status, result.out, result.err)

    monkeypatch.setattr(subprocess, "run", run)
    rows = measure(capsys, "startup", "--config", "small.yaml", "--turns=1")
    commands = ["import lightning.pytorch.cli", "fit.py --version", "fit.py --help", "first step", "first token"]
    assert [row["what"] for row in rows] == commands
    assert all(float(row["seconds"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--config", "small.yaml", "--nanogpt", "nowhere"], "--nanogpt nowhere"),
        (["train", "--config", "none.yaml"], "none.yaml: no such file"),
        (["train", "--model.config.d_mode", "3"], "d_model"),
        (
            ["train", "--config", "small.yaml", "--trainer.devices=2", "--trainer.strategy=ddp"],
            "one device is measured",
        ),
        (["sing"], "invalid choice"),
        (["train", "--steps", "0"], "--steps"),
    ],
    ids=["no checkout", "no config", "unknown flag", "two devices", "unknown benchmark", "no steps"],
)
def test_wrong_arguments_are_refused_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert main(args, DEFAULT) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_version_flag_does_not_import_torch() -> None:
    script = str(ROOT / "scripts" / "fit.py")
    program = (
        "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules)); "
        f"sys.argv = ['fit.py', '--version']; runpy.run_path({script!r}, run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.split() == ["lit_gpt", "0.1.0", "False"]


def test_bug_in_a_contender_is_raised_with_its_traceback() -> None:
    def fail(pipe: Connection) -> None:
        raise ValueError("a bug")

    ours, theirs = Pipe()
    turns._run_worker(theirs, fail)
    with pytest.raises(RuntimeError, match=r"(?s)peer failed:\nTraceback .*ValueError: a bug"):
        turns._ask("peer", ours, 1)
