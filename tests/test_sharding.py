"""FSDP2: a model sharded over two processes trains, is saved and is resumed like one on a single device."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Fit, forked, points, weights
from torture import compare_runs, kill_at_call

from lit_gpt import UserError
from lit_gpt.checkpoint.runs import newest_checkpoint, remove_unfinished
from lit_gpt.checkpoint.store import copy_checkpoint
from lit_gpt.cli.consolidate import main as consolidate_main
from lit_gpt.convert.load import load_model
from lit_gpt.files import atomic_replace
from lit_gpt.training.module import LitGPT

COMMON = ["--model.schedule", "constant", "--data.global_batch_size", 16, "--model.config.dropout", 0.1]
COMMON += ["--checkpoint.every_n_steps", 4]
SHARDED = ["--config", ROOT / "configs" / "fsdp.yaml", "--trainer.devices", 2]


@pytest.mark.parametrize(
    ("shape", "is_tied"),
    [([], True), (["--model.config.tie_embeddings", "false", "--model.config.position", "sinusoidal"], False)],
    ids=["tied embeddings", "free head"],
)
def test_each_rank_holds_half_of_the_weights_of_the_unsharded_model(
    fit: Fit, folder: Path, shape: list[object], is_tied: bool
) -> None:
    # with this learning rate the checkpoint holds the initial weights
    flags = ["--trainer.max_steps", 1, "--model.learning_rate", 1e-30, "--model.config.d_model", 64, *shape]

    def write_report() -> None:
        configure_model = LitGPT.configure_model

        def patched(module: LitGPT) -> None:
            was_on_meta = all(p.is_meta for p in module.parameters())
            torch.rand(3)  # other random numbers must not change the initial weights
            configure_model(module)
            local_size = sum(p.to_local().numel() for p in module.parameters())
            size = sum(p.numel() for p in module.parameters())
            tied = module.gpt.head.weight is module.gpt.embedding.weight
            buffers = {name: buffer.sum().item() for name, buffer in module.gpt.named_buffers()}
            Path("report.json").write_text(json.dumps([was_on_meta, local_size / size, tied, buffers]))

        LitGPT.configure_model = patched  # type: ignore[method-assign]

    single = fit("--name", "single", *flags)
    assert single.status == 0
    sharded = forked(folder, "--config", "small.yaml", *SHARDED, "--name", "sharded", *flags, prepare=write_report)
    assert sharded.status == 0, sharded.err
    was_on_meta, share, tied, buffers = json.loads(Path("report.json").read_text())
    assert was_on_meta
    assert share == pytest.approx(0.5, abs=0.02)
    assert tied == is_tied
    expected, actual = (weights(Path(f"logs/{name}/version_0/last.ckpt")) for name in ("single", "sharded"))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    loaded, *_ = load_model("logs/single/version_0/last.ckpt")
    assert buffers == {name: buffer.sum().item() for name, buffer in loaded.named_buffers()}
    # the preflight counts the weights of one rank
    memory = [re.search(r"memory +(\S+) MB for weights", printed) for printed in (single.out, sharded.out)]
    single_mb, sharded_mb = (float(match[1]) for match in memory if match)
    assert sharded_mb == pytest.approx(single_mb / 2, abs=0.1)


def train_single_and_sharded(fit: Fit, folder: Path, optimizer: str, tolerance: float) -> list[str]:
    """Train runs `single` and `sharded` and compare their curves; return the flags of both."""
    flags = [*map(str, COMMON), "--model.optimizer", optimizer]
    assert fit("--name", "single", *flags).status == 0
    ended = forked(folder, "--config", "small.yaml", *SHARDED, "--name", "sharded", *flags)
    assert ended.status == 0, ended.err
    assert ended.out.count("parameters") == 1  # only rank 0 prints
    assert "Warning" not in ended.err
    single, sharded = (points(Path(f"logs/{name}/version_0")) for name in ("single", "sharded"))
    for tag in ("loss/train", "loss/val", "loss/train_eval", "optim/grad_norm"):
        torch.testing.assert_close(sharded[tag], single[tag], rtol=0, atol=tolerance)
    return flags


def test_sharded_muon_equals_single_device_and_survives_a_kill_during_a_save(fit: Fit, folder: Path) -> None:
    flags = train_single_and_sharded(fit, folder, "muon", tolerance=1e-3)

    def prepare() -> None:  # killed when two checkpoints are complete and last.ckpt has its temporary name
        os.rename = kill_at_call(3, os.rename, after=True)

    command = ["--config", "small.yaml", *SHARDED, "--name", "killed", *flags]
    assert forked(folder, *command, prepare=prepare).status == -signal.SIGKILL
    straight, killed = Path("logs/sharded/version_0"), Path("logs/killed/version_0")
    assert not (killed / "last.ckpt").exists()
    resumed = forked(folder, *command, "--ckpt_path", "last")
    assert resumed.status == 0, resumed.err
    assert compare_runs(straight, killed) == []


def test_sharded_run_equals_single_device_and_resumes_on_any_number_of_devices(fit: Fit, folder: Path) -> None:
    tolerance = 1e-5
    flags = train_single_and_sharded(fit, folder, "adamw", tolerance)
    run = Path("logs/sharded/version_0")

    # two ranks to step 4, one device to step 8, two ranks to step 10
    assert (run / "step_00000004.ckpt").is_dir()
    one_device = ["--ckpt_path", run / "step_00000004.ckpt", "--trainer.max_steps", 8]
    assert fit("--name", "sharded", *flags, *one_device).status == 0
    assert (run / "step_00000008.ckpt").is_file()
    two_ranks = ["--ckpt_path", run / "step_00000008.ckpt", "--trainer.max_steps", 10]
    ended = forked(folder, "--config", "small.yaml", *SHARDED, "--name", "sharded", *flags, *two_ranks)
    assert ended.status == 0, ended.err
    assert fit("--name", "single", *flags, "--ckpt_path", "last", "--trainer.max_steps", 10).status == 0
    expected, actual = (weights(Path(f"logs/{name}/version_0/last.ckpt")) for name in ("single", "sharded"))
    assert expected.keys() == actual.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance)

    check_consolidate(run / "last.ckpt", actual)
    load_model(run / "last.ckpt")
    summed = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=run / "last.ckpt", capture_output=True)
    assert summed.returncode == 0
    written = {path.name for path in (run / "last.ckpt").iterdir()} - {"SHA256SUMS"}
    assert {line.split(b":")[0].decode() for line in summed.stdout.splitlines()} == written


def check_consolidate(checkpoint: Path, expected: dict[str, torch.Tensor]) -> None:
    """scripts/consolidate.py writes the folder's weights into one file, alone or not, and overwrites none."""
    assert forked(Path.cwd(), checkpoint, "whole.ckpt", script="consolidate.py").status == 0
    for name, value in weights(Path("whole.ckpt")).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    again = forked(Path.cwd(), checkpoint, "whole.ckpt", script="consolidate.py")
    assert again.status == 2
    assert "whole.ckpt already exists" in again.err
    assert consolidate_main(["--weights", str(checkpoint), "model.ckpt"]) == 0
    alone = torch.load("model.ckpt", weights_only=True)
    assert {f"gpt.{name}" for name in alone} == expected.keys()
    for name, value in alone.items():
        torch.testing.assert_close(value, expected[f"gpt.{name}"], rtol=0, atol=0)


def test_kill_during_a_replacement_keeps_the_checkpoint_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path("logs/small/version_0")
    for name in ("new", "last.ckpt"):
        (run / name).mkdir(parents=True)
        (run / name / "rest.pt").write_text(name)
    rename = Path.rename

    def rename_then_stop(self: Path, target: Path) -> Path:
        rename(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", rename_then_stop)
    with pytest.raises(KeyboardInterrupt):
        atomic_replace(run / "new", run / "last.ckpt")
    assert not (run / "last.ckpt").exists()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"last\.ckpt"):  # found under its name, though it is no real checkpoint
        newest_checkpoint(Path("logs"), "small")
    assert (run / "last.ckpt" / "rest.pt").read_text() == "last.ckpt"
    atomic_replace(run / "new", run / "last.ckpt")
    assert (run / "last.ckpt" / "rest.pt").read_text() == "new"
    assert [path.name for path in run.iterdir()] == ["last.ckpt"]

    # a backup without a replacement gets its name back, an unfinished folder is removed
    (run / "last.ckpt").rename(run / ".last.ckpt.old")
    shutil.copytree(run / ".last.ckpt.old", run / ".step_00000002.ckpt.unfinished")
    remove_unfinished(run)
    assert [path.name for path in run.iterdir()] == ["last.ckpt"]
    assert (run / "last.ckpt" / "rest.pt").read_text() == "new"


def test_failed_copy_of_a_folder_keeps_the_previous_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, last = tmp_path / "new", tmp_path / "last.ckpt"
    for folder in (new, last):
        folder.mkdir()
        (folder / "rest.pt").write_text(folder.name)

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"last.ckpt cannot be written \(No space left on device\); the previous file"):
        copy_checkpoint(new, last)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "new"]
    assert (last / "rest.pt").read_text() == "last.ckpt"
    monkeypatch.undo()
    copy_checkpoint(new, last)
    assert (last / "rest.pt").read_text() == "new"
