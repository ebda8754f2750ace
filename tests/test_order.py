"""The newest of many runs is found by the comments of its files; a damaged or forged comment does no harm."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt import UserError
from lit_gpt.checkpoint.contents import REQUIRED_KEYS
from lit_gpt.checkpoint.order import read_comment
from lit_gpt.checkpoint.runs import newest_checkpoint
from lit_gpt.checkpoint.store import Checkpoint, save_checkpoint

CONTENTS = {name: {} if kind is dict else kind(1) for name, kind in REQUIRED_KEYS.items()}
CONTENTS["state_dict"] = {"weight": torch.ones(3)}


@pytest.mark.parametrize("gap", [0.0, 7.0], ids=["copies of one run", "distinct times"])
def test_only_the_newest_of_many_checkpoints_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gap: float
) -> None:
    for number in range(50):
        path = tmp_path / "a" / f"version_{number}" / "last.ckpt"
        save_checkpoint({**CONTENTS, "saved_at": 1e9 + gap * (number * 17 % 50)}, path)
        shutil.copy(path, path.with_name("best.ckpt"))
    opened: list[Any] = []
    open_checkpoint = Checkpoint.open
    monkeypatch.setattr(Checkpoint, "open", lambda path: opened.append(path) or open_checkpoint(path))
    newest, _ = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.saved_at == 1e9 + gap * 49
    assert newest.path.name == "last.ckpt"
    assert len(opened) == 1


def test_any_flipped_bit_of_a_comment_is_found_and_the_contents_decide(tmp_path: Path) -> None:
    path = tmp_path / "a" / "version_0" / "last.ckpt"
    save_checkpoint(CONTENTS, path)
    assert read_comment(path) == (1, 1.0)
    content = path.read_bytes()
    start = content.index(b"global_step=1 ")
    for position in range(8 * start, 8 * len(content)):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert read_comment(path) in (None, (1, 1.0))
        newest, _ = newest_checkpoint(tmp_path)
        assert newest is not None
        assert (newest.step, newest.saved_at) == (1, 1.0)


def test_comment_that_contradicts_the_contents_is_refused(tmp_path: Path) -> None:
    for step, name in ((1, "a"), (2, "b")):
        save_checkpoint({**CONTENTS, "global_step": step}, tmp_path / f"{name}.ckpt")
    one, other = ((tmp_path / f"{name}.ckpt").read_bytes() for name in "ab")
    forged = one[: one.index(b"global_step=1 ")] + other[other.index(b"global_step=2 ") :]
    (tmp_path / "a.ckpt").write_bytes(forged)
    with pytest.raises(UserError, match="its comment contradicts its contents"):
        Checkpoint.open(tmp_path / "a.ckpt")
