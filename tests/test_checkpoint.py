"""Files appear whole or not at all, open without running anything, and are enough by themselves."""

import os
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from conftest import Fit
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.checkpoint.store import CONTENTS, load_model, newest_checkpoint, open_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.files import atomic_write, write_error
from lit_gpt.model import GPT
from lit_gpt.training.module import LitGPT


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, lambda file: file.write(b"first"))

    def half(file: BinaryIO) -> None:
        file.write(b"sec")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, half)
    assert "(disk full); the previous file is unchanged" in str(write_error(path, OSError("disk full")))
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
    content = open_checkpoint(moved)
    content["hyper_parameters"]["compile"] = True  # which is for training
    torch.save(content, "compiled.ckpt")
    for path in (moved, "compiled.ckpt"):
        again = LitGPT.load_from_checkpoint(path, weights_only=True)
        for one, other in zip(model.parameters(), again.gpt.parameters(), strict=True):
            assert torch.equal(one, other)


def test_the_newest_checkpoint_that_is_whole_is_taken(
    fit: Fit, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = folder / "logs"
    assert newest_checkpoint(logs) is None
    assert fit("--trainer.max_steps", 1).status == 0
    content = open_checkpoint(logs / "small/version_0/last.ckpt")
    names = ["b/version_10/step_1.ckpt", "a/version_1/last.ckpt", "a/version_1/best.ckpt", "a/version_0/best.ckpt"]
    for age, name in zip([0, 1, 1, 2], names):
        path = logs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**content, "saved_at": content["saved_at"] + 1000 - age}, path)
        os.utime(path, (age, age))  # what the disk says of it may be anything
    assert newest_checkpoint(logs) == logs / "b/version_10/step_1.ckpt"
    assert newest_checkpoint(logs, "a") == logs / "a/version_1/last.ckpt"
    assert newest_checkpoint(logs, "c") is None
    assert capsys.readouterr().err == ""
    for name, damage in {"last": cut, "best": flip}.items():
        damage(logs / f"a/version_1/{name}.ckpt")
    assert newest_checkpoint(logs, "a") == logs / "a/version_0/best.ckpt"
    bad = f"{logs}/a/version_1/best.ckpt, {logs}/a/version_1/last.ckpt"
    line = f"warning: cannot be used: {bad}; {logs}/a/version_0/best.ckpt"
    assert capsys.readouterr().err == f"{line} is taken\n"


def test_a_model_that_is_loaded_is_not_drawn_before(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit("--trainer.max_steps", 1, "--trainer.precision", "bf16-true").status == 0
    saved = Path("logs/small/version_0/last.ckpt")
    expected = LitGPT.load_from_checkpoint(saved).gpt  # draws, and puts what it reads over it
    monkeypatch.delattr(GPT, "initialise")
    model, *_ = load_model(saved)
    assert model.head.weight is model.embedding.weight
    assert dict(model.named_buffers()).keys() == {"position.cos", "position.sin"}
    for name, value in (*expected.named_parameters(), *expected.named_buffers()):
        got = model.get_buffer(name) if name.startswith("position") else model.get_parameter(name)
        assert got.dtype == value.dtype == torch.float32
        assert got.requires_grad == value.requires_grad
        assert torch.equal(got, value), name


def test_weights_of_another_shape_are_said_in_one_line(fit: Fit) -> None:
    assert fit("--trainer.max_steps", 1).status == 0
    checkpoint = torch.load("logs/small/version_0/last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["config"]["d_model"] = 32
    torch.save(checkpoint, "wide.ckpt")
    with pytest.raises(
        UserError, match=r"^wide\.ckpt describes no model of lit_gpt \(.*size mismatch.*\): give a .ckpt"
    ):
        load_model("wide.ckpt")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    """Changes one bit in the middle of the file, of a weight that is."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as parts:
        largest = max(parts.infolist(), key=lambda part: part.file_size)
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(content)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_flipped_bit_goes_unnoticed(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "last.ckpt")
        torch.manual_seed(0)
        contents: dict = {name: kind(1) if kind is not dict else {} for name, kind in CONTENTS.items()}
        contents["state_dict"] = {"weight": torch.randn(20, 20), "bias": torch.randn(20)}
        torch.save(contents, path)
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, 8 * len(content) - 1))
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            opened = open_checkpoint(path)
        except UserError:
            return
        for name, value in contents["state_dict"].items():  # a bit that means nothing
            assert torch.equal(opened["state_dict"][name], value)
        assert opened.keys() == contents.keys()


def test_no_flipped_bit_of_the_directory_goes_unnoticed(tmp_path: Path) -> None:
    """Where a checkpoint's parts are listed; no checksum covers that."""
    contents: dict = {name: kind(1) if kind is not dict else {} for name, kind in CONTENTS.items()}
    contents["state_dict"] = {"weight": torch.arange(50.0)}
    path = tmp_path / "last.ckpt"
    torch.save(contents, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as parts:
        start = parts.start_dir
    unnoticed = 0
    for place in range(8 * start, 8 * len(content)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            opened = open_checkpoint(path)
        except UserError:
            continue
        unnoticed += 1
        assert torch.equal(opened["state_dict"]["weight"], contents["state_dict"]["weight"])
    assert unnoticed > 0  # dates and the like mean nothing
