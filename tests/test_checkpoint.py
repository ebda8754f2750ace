"""Files appear whole or not at all, open without running anything, and are enough by themselves."""

import os
import pickle
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from conftest import Fit

from lit_gpt.checkpoint import load_model, newest_checkpoint, open_checkpoint, write_whole
from lit_gpt.errors import UserError
from lit_gpt.module import LitGPT


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, lambda file: file.write(b"first"))

    def half(file: BinaryIO) -> None:
        file.write(b"sec")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, half)
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


class Harmful:
    def __reduce__(self) -> tuple:
        return os.system, ("echo harm > harmed",)


def test_what_is_no_checkpoint_is_said_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Harmful()}, "harmful.ckpt")
    Path("plain.ckpt").write_bytes(pickle.dumps({"a": Harmful()}))
    Path("text.ckpt").write_text("not a checkpoint")
    Path("empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": {}}, "foreign.ckpt")
    torch.save([1, 2], "list.ckpt")
    for name, message in {
        "harmful.ckpt": "it holds code",
        "plain.ckpt": "damaged, or no checkpoint",
        "text.ckpt": "damaged, or no checkpoint",
        "empty.ckpt": "damaged, or no checkpoint",
        "foreign.ckpt": "is not a checkpoint of lit_gpt",
        "list.ckpt": "is not a checkpoint of lit_gpt",
        "missing.ckpt": "no such checkpoint file",
    }.items():
        with pytest.raises(UserError, match=message):
            open_checkpoint(Path(name))
    assert not Path("harmed").exists()


def test_a_truncated_checkpoint_is_said(fit: Fit) -> None:
    assert fit().status == 0
    path = Path("logs/small/version_0/last.ckpt")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="damaged, or no checkpoint"):
        open_checkpoint(path)


def test_a_checkpoint_is_enough_by_itself(fit: Fit, folder: Path) -> None:
    assert fit("--model.config.num_blocks", 1).status == 0
    moved = folder / "elsewhere.ckpt"
    (folder / "logs/small/version_0/last.ckpt").rename(moved)
    (folder / "rows.txt").unlink()
    model, tokenizer, rows = load_model(moved)
    assert (model.config.num_blocks, model.config.vocab_size, rows) == (1, tokenizer.vocab_size, True)
    assert not model.training
    again = LitGPT.load_from_checkpoint(moved, weights_only=True)
    for one, other in zip(model.parameters(), again.gpt.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_newest_checkpoint_that_opens_is_taken(fit: Fit, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = folder / "logs"
    assert newest_checkpoint(logs) is None
    assert fit("--trainer.max_steps", 1).status == 0
    content = (logs / "small/version_0/last.ckpt").read_bytes()
    for age, name in enumerate(["b/version_10/step_1.ckpt", "a/version_1/last.ckpt", "a/version_0/best.ckpt"]):
        path = logs / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        os.utime(path, (4e9 - age, 4e9 - age))
    assert newest_checkpoint(logs) == logs / "b/version_10/step_1.ckpt"
    assert newest_checkpoint(logs, "a") == logs / "a/version_1/last.ckpt"
    assert newest_checkpoint(logs, "c") is None
    (logs / "a/version_1/last.ckpt").write_bytes(content[:-100])
    os.utime(logs / "a/version_1/last.ckpt", (5e9, 5e9))
    assert newest_checkpoint(logs, "a") == logs / "a/version_0/best.ckpt"
    assert "passed over: " in capsys.readouterr().err
