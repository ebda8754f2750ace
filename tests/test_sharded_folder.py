"""Checkpoint folders: damage is found and named, and nothing in a folder is executed or leads out of it."""

import json
import os
import pickle
import random
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lit_gpt import UserError
from lit_gpt.checkpoint.runs import newest_checkpoint
from lit_gpt.checkpoint.sharded import complete_folder, flatten_state
from lit_gpt.checkpoint.store import Checkpoint, copy_checkpoint, write_contents
from lit_gpt.digests import read_digests, sha256_of_all, write_digests


def contents() -> dict[str, Any]:
    """Return the contents of a small checkpoint."""
    torch.manual_seed(0)
    weight = torch.randn(6, 4)
    state = {"step": torch.tensor(3.0), "exp_avg": torch.randn(6, 4)}
    return {
        "state_dict": {"gpt.embedding.weight": weight, "gpt.head.weight": weight},
        "optimizer_states": [{"state": {0: state}, "param_groups": []}],
        "hyper_parameters": {},
        "tokenizer": {},
        "data": {},
        "global_step": 3,
        "saved_at": 5.0,
    }


def write_folder(folder: Path) -> Path:
    """Write a checkpoint folder as FSDP2 does on a single rank."""
    tensors, rest = flatten_state(contents())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        metadata = dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    complete_folder(folder, metadata, sha256_of_all(folder.glob("*.distcp")), lambda file: write_contents(rest, file))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("written") / "last.ckpt")


@pytest.fixture
def ckpt(written: Path, tmp_path: Path) -> Path:
    """A fresh copy of a checkpoint folder."""
    return Path(shutil.copytree(written, tmp_path / "last.ckpt"))


def update_digests(folder: Path) -> None:
    """Make the digests those of the files as they are: what somebody does who plants a folder."""
    write_digests(folder, sha256_of_all(folder / name for name in read_digests(folder)))


def test_folder_holds_what_was_saved(ckpt: Path) -> None:
    checkpoint, expected = Checkpoint.open(ckpt), contents()
    assert (checkpoint.step, checkpoint.saved_at) == (3, 5.0)
    assert all(value.is_meta and value.shape == (6, 4) for value in checkpoint.state_dict.values())
    read = checkpoint.read()
    for name, weight in expected["state_dict"].items():
        assert torch.equal(read["state_dict"][name], weight)
    for name, value in expected["optimizer_states"][0]["state"][0].items():
        assert torch.equal(read["optimizer_states"][0]["state"][0][name], value)


def test_any_damaged_file_is_named_and_passed_over(tmp_path: Path) -> None:
    """Flipped bits and truncations anywhere in a folder, of which there is an older, undamaged copy."""
    run = tmp_path / "logs" / "a" / "version_0"
    last = write_folder(run / "last.ckpt")
    shutil.copytree(last, run / "step_00000003.ckpt")
    rng = random.Random(0)
    names = sorted(path.name for path in last.iterdir())
    assert names == [".metadata", "SHA256SUMS", "__0_0.distcp", "rest.pt", "shards.json"]
    for name in [*names * 12]:
        content = (last / name).read_bytes()
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        (last / name).write_bytes(damaged if rng.random() < 0.7 else content[: rng.randrange(len(content))])
        with pytest.raises(UserError, match=re.escape(name) if name != "SHA256SUMS" else "damaged"):
            Checkpoint.open(last)
        newest, warning = newest_checkpoint(tmp_path / "logs")
        assert newest is not None
        assert newest.path == run / "step_00000003.ckpt"
        assert str(last) in warning
        (last / name).write_bytes(content)
    (last / "rest.pt").write_bytes(b"")
    (last / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"damaged \(__0_0.distcp, rest.pt\)"):
        Checkpoint.open(last)
    (last / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"SHA256SUMS; an earlier version"):
        Checkpoint.open(last)


def test_damage_after_opening_is_one_line_too(ckpt: Path) -> None:
    checkpoint = Checkpoint.open(ckpt)
    os.truncate(ckpt / "__0_0.distcp", 100)
    with pytest.raises(UserError, match=r"damaged \(__0_0.distcp"):
        checkpoint.read()


def test_copied_folder_keeps_its_digests(ckpt: Path, tmp_path: Path) -> None:
    copy_checkpoint(ckpt, tmp_path / "copy.ckpt")
    assert read_digests(tmp_path / "copy.ckpt") == read_digests(ckpt)
    copied = Checkpoint.open(tmp_path / "copy.ckpt").read()
    assert torch.equal(copied["state_dict"]["gpt.head.weight"], contents()["state_dict"]["gpt.head.weight"])


def test_metadata_of_dcp_is_never_read(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ckpt.parent)

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("touch harmed",)

    (ckpt / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match=r"damaged \(.metadata\)"):
        Checkpoint.open(ckpt)
    update_digests(ckpt)
    Checkpoint.open(ckpt).read()
    assert not Path("harmed").exists()


Edit = Callable[[dict[str, Any]], object]


def edited_chunk(**changes: Any) -> Edit:
    return lambda tensors: tensors["state_dict/gpt.embedding.weight"]["chunks"][0].update(changes)


def edited_tensor(**changes: Any) -> Edit:
    return lambda tensors: tensors["state_dict/gpt.embedding.weight"].update(changes)


@pytest.mark.parametrize(
    "edit",
    [
        edited_chunk(file="../outside"),
        edited_chunk(file="/etc/hostname"),
        edited_chunk(file=".."),
        edited_chunk(file="pipe"),
        edited_chunk(file="link"),
        edited_chunk(file="SHA256SUMS/x"),
        edited_chunk(file=7),
        edited_chunk(start=-1),
        edited_chunk(start=1),
        edited_chunk(length=10**12),
        edited_chunk(offsets=[1, 0]),
        edited_chunk(sizes=[3, 8]),
        edited_chunk(sizes=[True, 4]),
        edited_chunk(more=1),
        edited_tensor(size=[10**9, 10**9]),
        edited_tensor(dtype="float64"),
        edited_tensor(dtype="system"),
        edited_tensor(chunks=[]),
        edited_tensor(chunks=None),
        lambda tensors: tensors.update(x=[]),
        lambda tensors: tensors.update({f"state_dict/{i}": tensors["optimizer/0/exp_avg"] for i in range(10)}),
    ],
)
def test_shards_json_leads_nowhere_else(ckpt: Path, edit: Edit) -> None:
    os.mkfifo(ckpt / "pipe")
    (ckpt / "link").symlink_to("/dev/zero")
    tensors = json.loads((ckpt / "shards.json").read_text())
    edit(tensors)
    (ckpt / "shards.json").write_text(json.dumps(tensors))
    update_digests(ckpt)
    with pytest.raises(UserError) as raised:
        Checkpoint.open(ckpt).read()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["rest.pt", "shards.json", "__0_0.distcp", "SHA256SUMS"])
@pytest.mark.parametrize("kind", ["pipe", "device", "outside", "folder"])
def test_files_of_a_folder_are_regular_files(ckpt: Path, tmp_path: Path, name: str, kind: str) -> None:
    (ckpt / name).rename(tmp_path / "outside")
    if kind == "pipe":
        os.mkfifo(ckpt / name)
    elif kind == "folder":
        (ckpt / name).mkdir()
    else:
        (ckpt / name).symlink_to("/dev/zero" if kind == "device" else tmp_path / "outside")
    for verify in (True, False) if name != "SHA256SUMS" else (True,):
        with pytest.raises(UserError):
            Checkpoint.open(ckpt, verify).read()
