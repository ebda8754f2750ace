"""A model in slices over two processes trains, is saved and goes on as one that is whole."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Fit, forked, points, weights
from torture import at_call, differences

from lit_gpt import UserError
from lit_gpt.checkpoint.store import copy_checkpoint, load_model, newest_checkpoint, open_checkpoint, remove_unfinished
from lit_gpt.files import atomic_replace
from lit_gpt.training.module import LitGPT

SHARED = [
    "--model.schedule",
    "constant",
    "--data.global_batch_size",
    16,
    "--model.config.dropout",
    0.1,
    "--checkpoint.every_n_steps",
    4,
]
SLICED = ["--config", ROOT / "configs" / "fsdp.yaml", "--trainer.devices", 2]


def test_no_process_holds_all_of_a_model_in_slices_and_it_starts_as_one_that_is_whole(fit: Fit, folder: Path) -> None:
    start = ["--trainer.max_steps", 1, "--model.learning_rate", 1e-30]  # the weights as they were drawn
    start += ["--model.config.d_model", 64]
    shapes = {
        "tied": [],
        "free": ["--model.config.tie_embeddings", "false", "--model.config.position", "sinusoidal"],
    }

    def look() -> None:
        configure = LitGPT.configure_model

        def configured(module: LitGPT) -> None:
            before = [p.is_meta for p in module.parameters()]
            torch.rand(3)  # what else is drawn changes nothing
            configure(module)
            after = [p.to_local() for p in module.parameters()]
            tied = module.gpt.head.weight is module.gpt.embedding.weight
            tables = {name: table.sum().item() for name, table in module.gpt.named_buffers()}
            whole, held = (sum(p.numel() for p in some) for some in (module.parameters(), after))
            Path("seen.json").write_text(json.dumps([all(before), held / whole, tied, tables]))

        LitGPT.configure_model = configured  # type: ignore[method-assign]

    for name, shape in shapes.items():
        alone = fit("--name", f"{name}-whole", *start, *shape)
        assert alone.status == 0
        words = ["--name", f"{name}-sliced", *start, *shape]
        sliced = forked(folder, "--config", "small.yaml", *SLICED, *words, prepare=look)
        assert sliced.status == 0, sliced.err
        on_meta, share, tied, tables = json.loads(Path("seen.json").read_text())
        assert on_meta
        assert share == pytest.approx(0.5, abs=0.02)
        assert tied == (name == "tied")
        one, two = (f"logs/{name}-{kind}/version_0/last.ckpt" for kind in ("whole", "sliced"))
        expected, got = weights(Path(one)), weights(Path(two))
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected)
        plain, *_ = load_model(one)
        assert tables == {key: table.sum().item() for key, table in plain.named_buffers()}
        # the preflight counts its slices alone
        memory = [re.search(r"memory +(\S+) MB for weights", told) for told in (alone.out, sliced.out)]
        whole, part = (float(found[1]) for found in memory if found)
        assert part == pytest.approx(whole / 2, abs=0.1)


def trained_alike(fit: Fit, folder: Path, optimizer: str, most: float) -> list[str]:
    """Trains as a whole, as `one`, and in slices, as `two`, and compares the curves; returns the flags of both."""
    shared = [*map(str, SHARED), "--model.optimizer", optimizer]
    assert fit("--name", "one", *shared).status == 0
    sliced = forked(folder, "--config", "small.yaml", *SLICED, "--name", "two", *shared)
    assert sliced.status == 0, sliced.err
    assert sliced.out.count("parameters") == 1  # one preflight
    assert "Warning" not in sliced.err
    one, two = (points(Path(f"logs/{name}/version_0")) for name in ("one", "two"))
    for tag in ("loss/train", "loss/val", "loss/train_eval", "optim/grad_norm"):
        torch.testing.assert_close(two[tag], one[tag], rtol=0, atol=most)
    return shared


def test_muon_makes_slices_orthogonal_as_one_and_a_run_killed_amid_a_save_is_the_same(fit: Fit, folder: Path) -> None:
    shared = trained_alike(fit, folder, "muon", 1e-3)

    def prepare() -> None:  # the slices of two checkpoints are whole, then last.ckpt has another name
        os.rename = at_call(3, os.rename, after=True)

    flags = ["--config", "small.yaml", *SLICED, "--name", "killed", *shared]
    assert forked(folder, *flags, prepare=prepare).status == -signal.SIGKILL
    straight, run = Path("logs/two/version_0"), Path("logs/killed/version_0")
    assert not (run / "last.ckpt").exists()
    resumed = forked(folder, *flags, "--ckpt_path", "last")
    assert resumed.status == 0, resumed.err
    assert differences(straight, run) == []


def test_in_slices_a_run_is_the_same_and_goes_on_anywhere(fit: Fit, folder: Path) -> None:
    most = 1e-5
    shared = trained_alike(fit, folder, "adamw", most)

    # from slices to one device, and from one device to slices
    saved = Path("logs/two/version_0/step_00000004.ckpt")
    assert saved.is_dir()
    later = saved.with_name("step_00000008.ckpt")
    assert fit("--name", "two", *shared, "--ckpt_path", saved, "--trainer.max_steps", 8).status == 0
    assert later.is_file()
    words = ["--name", "two", *shared, "--ckpt_path", later, "--trainer.max_steps", 10]
    back = forked(folder, "--config", "small.yaml", *SLICED, *words)
    assert back.status == 0, back.err
    assert fit("--name", "one", *shared, "--ckpt_path", "last", "--trainer.max_steps", 10).status == 0
    expected, got = (weights(Path(f"logs/{name}/version_0/last.ckpt")) for name in ("one", "two"))
    assert expected.keys() == got.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=most)

    # into one file
    command = [sys.executable, ROOT / "scripts" / "consolidate.py", "logs/two/version_0/last.ckpt", "whole.ckpt"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    for name, value in weights(Path("whole.ckpt")).items():
        torch.testing.assert_close(value, got[name], rtol=0, atol=0)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "whole.ckpt is there already" in again.stderr
    load_model(Path("logs/two/version_0/last.ckpt"))

    # nothing in a folder is run, and what is missing is said
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path("harmed"),)  # type: ignore[return-value]

    copy = Path(shutil.copytree("logs/two/version_0/last.ckpt", "copy.ckpt"))
    (copy / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match="it holds code"):
        open_checkpoint(copy)
    assert not Path("harmed").exists()
    (copy / ".metadata").unlink()
    with pytest.raises(UserError, match="damaged"):
        open_checkpoint(copy)


def test_a_folder_is_there_whenever_its_process_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path("logs/small/version_0")
    for name in ("new", "last.ckpt"):
        (run / name).mkdir(parents=True)
        (run / name / "rest.pt").write_text(name)
    real = Path.rename

    def killed(self: Path, target: Path) -> Path:
        real(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        atomic_replace(run / "new", run / "last.ckpt")
    assert not (run / "last.ckpt").exists()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"last\.ckpt"):  # what this test wrote is no checkpoint, but it was found
        newest_checkpoint(Path("logs"), "small")
    assert (run / "last.ckpt" / "rest.pt").read_text() == "last.ckpt"
    atomic_replace(run / "new", run / "last.ckpt")
    assert (run / "last.ckpt" / "rest.pt").read_text() == "new"
    assert [path.name for path in run.iterdir()] == ["last.ckpt"]

    # what has no other name gets its own back, what is half there goes
    (run / "last.ckpt").rename(run / ".last.ckpt.old")
    shutil.copytree(run / ".last.ckpt.old", run / ".step_00000002.ckpt.unfinished")
    remove_unfinished(run)
    assert [path.name for path in run.iterdir()] == ["last.ckpt"]
    assert (run / "last.ckpt" / "rest.pt").read_text() == "new"


def test_a_folder_that_finds_no_room_is_said_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, last = tmp_path / "new", tmp_path / "last.ckpt"
    for folder in (new, last):
        folder.mkdir()
        (folder / "rest.pt").write_text(folder.name)

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"last.ckpt cannot be written \(No space left on device\); the previous file"):
        copy_checkpoint(new, last)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "new"]
    assert (last / "rest.pt").read_text() == "last.ckpt"
    monkeypatch.undo()
    copy_checkpoint(new, last)
    assert (last / "rest.pt").read_text() == "new"
