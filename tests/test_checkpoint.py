"""Checkpoints are written atomically, are read without running code, and are complete by themselves."""

import errno
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

from lit_gpt.checkpoint import store
from lit_gpt.checkpoint.contents import REQUIRED_KEYS
from lit_gpt.checkpoint.runs import newest_checkpoint
from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.convert.load import load_model
from lit_gpt.errors import UserError
from lit_gpt.files import atomic_write, write_error
from lit_gpt.model import GPT
from lit_gpt.training.module import LitGPT

LAST = Path("logs/small/version_0/last.ckpt")


def test_failed_atomic_write_leaves_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, lambda file: file.write(b"first"))

    def write_half(file: BinaryIO) -> None:
        file.write(b"sec")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full") as raised:
        atomic_write(path, write_half)
    assert "(disk full); the previous file is unchanged" in str(write_error(path, raised.value))
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_concurrent_atomic_writes_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path, work = tmp_path / "file", tmp_path / "work"
    work.mkdir()

    def write_while_another_process_does(file: BinaryIO) -> None:
        file.write(b"out")
        atomic_write(path, lambda other: other.write(b"inner"), temporary_folder=work)
        assert path.read_bytes() == b"inner"
        file.write(b"er")

    atomic_write(path, write_while_another_process_does, temporary_folder=work)
    assert path.read_bytes() == b"outer"
    assert os.listdir(work) == []


def test_atomic_write_raises_the_os_error_behind_torch_save(tmp_path: Path) -> None:
    class FullDisk:
        """Accepts 1,000 bytes; torch.save reports a later failure as a RuntimeError."""

        room = 1000

        def write(self, content: bytes) -> int:
            self.room -= len(content)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(content)

        def flush(self) -> None:
            pass

    with pytest.raises(RuntimeError, match="unexpected pos"):
        torch.save(torch.zeros(9000), FullDisk())  # type: ignore[arg-type]
    with pytest.raises(OSError, match="No space left"):
        atomic_write(tmp_path / "x.ckpt", lambda file: torch.save(torch.zeros(9000), FullDisk()))  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


class Harmful:
    def __reduce__(self) -> tuple:
        return os.system, ("echo harm > harmed",)


def test_open_refuses_other_files_and_never_runs_their_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Harmful()}, "harmful.ckpt")
    Path("plain.ckpt").write_bytes(pickle.dumps({"a": Harmful()}))
    Path("text.ckpt").write_text("not a checkpoint")
    Path("empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": {}}, "foreign.ckpt")
    torch.save([1, 2], "list.ckpt")
    for name, message in {
        "harmful.ckpt": "it holds code",
        "plain.ckpt": "damaged, or not a checkpoint",
        "text.ckpt": "damaged, or not a checkpoint",
        "empty.ckpt": "damaged, or not a checkpoint",
        "foreign.ckpt": "is not a checkpoint of lit_gpt",
        "list.ckpt": "is not a checkpoint of lit_gpt",
        "missing.ckpt": "does not exist",
    }.items():
        with pytest.raises(UserError, match=message):
            Checkpoint.open(name)
    assert not Path("harmed").exists()


def test_open_refuses_truncated_file(fit: Fit) -> None:
    assert fit().status == 0
    LAST.write_bytes(LAST.read_bytes()[:-1000])
    with pytest.raises(UserError, match="damaged, or not a checkpoint"):
        Checkpoint.open(LAST)


def test_checkpoint_is_complete_by_itself(fit: Fit, folder: Path) -> None:
    assert fit("--model.config.num_blocks", 1).status == 0
    moved = folder / "elsewhere.ckpt"
    LAST.rename(moved)
    (folder / "rows.txt").unlink()
    model, tokenizer, mode = load_model(moved)
    assert (model.config.num_blocks, model.config.vocab_size, mode) == (1, tokenizer.vocab_size, "rows")
    assert not model.training
    contents = Checkpoint.open(moved).read()
    contents["hyper_parameters"]["compile"] = True  # concerns training only
    torch.save(contents, "compiled.ckpt")
    for path in (moved, "compiled.ckpt"):
        loaded = LitGPT.load_from_checkpoint(path, weights_only=True)
        for expected, actual in zip(model.parameters(), loaded.gpt.parameters(), strict=True):
            assert torch.equal(expected, actual)


def test_open_checkpoint_describes_its_contents_without_tensor_values(fit: Fit) -> None:
    assert fit().status == 0
    checkpoint, contents = Checkpoint.open(LAST), torch.load(LAST, weights_only=True)
    assert checkpoint.step == contents["global_step"]
    assert checkpoint.saved_at == contents["saved_at"]
    assert checkpoint.config_text == contents["config"]
    assert checkpoint.hyper_parameters == contents["hyper_parameters"]
    assert checkpoint.tokenizer.state() == contents["tokenizer"]
    assert checkpoint.data_fingerprint == contents["data"]
    assert checkpoint.callbacks.keys() == contents["callbacks"].keys()
    optimizer_state = contents["optimizer_states"][0]["state"]
    assert checkpoint.optimizer_state is not None
    assert checkpoint.optimizer_state.keys() == optimizer_state.keys()
    assert checkpoint.state_dict.keys() == contents["state_dict"].keys()
    for name, value in checkpoint.state_dict.items():
        assert value.is_meta
        assert (value.shape, value.dtype) == (contents["state_dict"][name].shape, contents["state_dict"][name].dtype)
    for mmap in (False, True):
        values = checkpoint.read(mmap)["state_dict"]
        assert all(torch.equal(values[name], value) for name, value in contents["state_dict"].items())


def test_checkpoint_is_verified_once(fit: Fit) -> None:
    assert fit("--trainer.max_steps", 1).status == 0
    checkpoint = Checkpoint.open(LAST, verify=False)
    content = LAST.read_bytes()
    flip_bit_of_weight(LAST)
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.verify()
    LAST.write_bytes(content)
    checkpoint.verify()
    flip_bit_of_weight(LAST)
    checkpoint.verify()  # does not read the file again


@pytest.mark.parametrize("path", ["last", LAST])
def test_resumed_run_verifies_its_checkpoint_once(fit: Fit, monkeypatch: pytest.MonkeyPatch, path: str | Path) -> None:
    assert fit("--trainer.max_steps", 1, "--checkpoint.keep", 0).status == 0
    verified: list[Path] = []

    def count(path: Path) -> None:
        verified.append(path)
        verify_checksums(path)

    verify_checksums = store._verify_checksums
    monkeypatch.setattr(store, "_verify_checksums", count)
    assert fit("--trainer.max_steps", 2, "--ckpt_path", path).status == 0
    assert verified == [LAST]


def test_newest_checkpoint_is_found_by_stored_time_and_skips_damaged_ones(fit: Fit, folder: Path) -> None:
    logs = folder / "logs"
    assert newest_checkpoint(logs) == (None, "")
    assert fit("--trainer.max_steps", 1).status == 0
    contents = Checkpoint.open(LAST).read()
    names = ["b/version_10/step_1.ckpt", "a/version_1/last.ckpt", "a/version_1/best.ckpt", "a/version_0/best.ckpt"]
    for age, name in zip([0, 1, 1, 2], names):
        path = logs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**contents, "saved_at": contents["saved_at"] + 1000 - age}, path)
        os.utime(path, (age, age))  # the file times do not count

    def newest(name: str | None = None) -> tuple[Path | None, str]:
        checkpoint, warning = newest_checkpoint(logs, name)
        return checkpoint and checkpoint.path, warning

    assert newest() == (logs / "b/version_10/step_1.ckpt", "")
    assert newest("a") == (logs / "a/version_1/last.ckpt", "")
    assert newest("c") == (None, "")
    truncate(logs / "a/version_1/last.ckpt")
    flip_bit_of_weight(logs / "a/version_1/best.ckpt")
    damaged = f"{logs}/a/version_1/best.ckpt, {logs}/a/version_1/last.ckpt"
    used = logs / "a/version_0/best.ckpt"
    assert newest("a") == (used, f"skipped damaged checkpoints {damaged}; using {used}")
    truncate(used)
    with pytest.raises(UserError, match=r"no checkpoint can be used: .*version_0/best.ckpt.*version_1/best.ckpt"):
        newest("a")


def test_load_model_does_not_initialize_weights(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit("--trainer.max_steps", 1, "--trainer.precision", "bf16-true").status == 0
    expected = LitGPT.load_from_checkpoint(LAST).gpt  # initializes all weights before it loads them
    monkeypatch.delattr(GPT, "init_weights")
    model, *_ = load_model(LAST)
    assert model.head.weight is model.embedding.weight
    assert dict(model.named_buffers()).keys() == {"position.cos", "position.sin"}
    for name, value in (*expected.named_parameters(), *expected.named_buffers()):
        actual = model.get_buffer(name) if name.startswith("position") else model.get_parameter(name)
        assert actual.dtype == value.dtype == torch.float32
        assert actual.requires_grad == value.requires_grad
        assert torch.equal(actual, value), name


def test_load_model_reports_wrong_shapes_in_one_line(fit: Fit) -> None:
    assert fit("--trainer.max_steps", 1).status == 0
    contents = torch.load(LAST, weights_only=True)
    contents["hyper_parameters"]["config"]["d_model"] = 32
    torch.save(contents, "wide.ckpt")
    with pytest.raises(
        UserError, match=r"^wide\.ckpt describes no model of lit_gpt \(.*size mismatch.*\): give a .ckpt"
    ):
        load_model("wide.ckpt")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_bit_of_weight(path: Path) -> None:
    """Flip one bit in the middle of the largest tensor of the file."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(content)


def minimal_contents(**state_dict: torch.Tensor) -> dict:
    """Return the least that `Checkpoint.open` accepts."""
    return {name: kind(1) if kind is not dict else {} for name, kind in REQUIRED_KEYS.items()} | {
        "state_dict": state_dict
    }


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_verify_detects_any_flipped_bit(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "last.ckpt")
        torch.manual_seed(0)
        expected = minimal_contents(weight=torch.randn(20, 20), bias=torch.randn(20))
        torch.save(expected, path)
        content = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, 8 * len(content) - 1))
        content[position // 8] ^= 1 << position % 8
        path.write_bytes(content)
        try:
            contents = Checkpoint.open(path).read()
        except UserError:
            return
        for name, value in expected["state_dict"].items():  # the bit has no meaning, a date for example
            assert torch.equal(contents["state_dict"][name], value)
        assert contents.keys() == expected.keys()


def test_verify_detects_harmful_bits_in_the_zip_directory(tmp_path: Path) -> None:
    """The directory lists the entries of the file, and no checksum covers it."""
    expected = minimal_contents(weight=torch.arange(50.0))
    path = tmp_path / "last.ckpt"
    torch.save(expected, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    undetected = 0
    for position in range(8 * start, 8 * len(content), 3):  # every bit of a byte occurs
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            contents = Checkpoint.open(path).read()
        except UserError:
            continue
        undetected += 1
        assert torch.equal(contents["state_dict"]["weight"], expected["state_dict"]["weight"])
    assert undetected > 0  # dates and the like have no meaning
