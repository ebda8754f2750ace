"""scripts/consolidate.py writes a checkpoint into one file, or its weights as the course saves them.

Sharded checkpoints are consolidated in test_sharding.py.
"""

import errno
import os
from pathlib import Path

import pytest
import torch
from conftest import Fit, weights

from lit_gpt import GPT, GPTConfig, load_model
from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.consolidate import main

LAST = "logs/small/version_0/last.ckpt"


@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "free head"])
def test_weights_open_with_torch_load_and_load_state_dict(
    fit: Fit, capsys: pytest.CaptureFixture[str], tied: bool
) -> None:
    shape = ["--model.config.position", "learned", "--model.config.tie_embeddings", tied]
    assert fit("--trainer.max_steps", 2, *shape).status == 0
    assert main(["--weights", LAST, "model.ckpt"]) == 0
    assert capsys.readouterr().out.startswith("step 2, ")

    state_dict = torch.load("model.ckpt", weights_only=True)
    model = GPT(GPTConfig(**Checkpoint.open(LAST).hyper_parameters["config"]))
    assert state_dict.keys() == model.state_dict().keys()
    model.load_state_dict(state_dict)
    for name, value in weights(Path(LAST)).items():
        assert torch.equal(model.state_dict()[name.removeprefix("gpt.")], value)
    tokens = torch.arange(10)[None]
    trained, _, _ = load_model(LAST)
    assert torch.equal(model.eval()(tokens)[0], trained(tokens)[0])
    # a shared weight is stored once, and optimizer state not at all
    content = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert content < Path("model.ckpt").stat().st_size < content + 10_000


def test_checkpoint_file_is_copied_whole_without_weights_flag(fit: Fit) -> None:
    assert fit("--trainer.max_steps", 2).status == 0
    assert main([LAST, "whole.ckpt"]) == 0
    expected, actual = Checkpoint.open(LAST).read(), Checkpoint.open("whole.ckpt").read()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected["state_dict"][name], value) for name, value in actual["state_dict"].items())


def test_file_that_exists_or_cannot_be_written_is_refused(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit("--trainer.max_steps", 2).status == 0
    Path("model.ckpt").write_text("mine")
    assert main(["--weights", LAST, "model.ckpt"]) == 2
    assert "error: model.ckpt already exists: give another name, or delete it" in capsys.readouterr().err
    assert Path("model.ckpt").read_text() == "mine"

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    for flags in (["--weights"], []):
        assert main([*flags, LAST, "new/other.ckpt"]) == 2
        assert capsys.readouterr().err == (
            "error: new/other.ckpt cannot be written (No space left on device): free disk space there, or give a file "
            "elsewhere\n"
        )
    assert list(Path("new").iterdir()) == []
