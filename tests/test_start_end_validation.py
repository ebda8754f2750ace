"""StartEndValidation: validations before the first step of a run and after its last one."""

import math
import re
from pathlib import Path

import pytest
import torch
from conftest import Fit, points, texts

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.data.batches import Batch
from lit_gpt.training.module import LitGPT

RUN = Path("logs/small/version_0")
VALIDATION_TAGS = ("loss/train_eval", "loss/val", "val/perplexity", "val/bits_per_byte")


def test_losses_at_step_0_are_those_of_the_untrained_model(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: LitGPT, batch: Batch, batch_idx: int) -> torch.Tensor:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(LitGPT, "training_step", fail)
        assert fit().status == 1
    assert Checkpoint.open(RUN / "last.ckpt").step == 0
    logged = points(RUN)
    assert all([step for step, _ in logged[tag]] == [0] for tag in VALIDATION_TAGS)
    printed = fit("validate", "--ckpt_path", RUN / "last.ckpt", config=None).out
    for tag in VALIDATION_TAGS:
        (value,) = re.findall(rf"^{tag} +([\d.]+)\b", printed, re.MULTILINE)
        assert f"{logged[tag][0][1]:.4f}" == value
    assert fit("--ckpt_path", "last").status == 0  # does not validate the untrained model again
    assert [step for step, _ in points(RUN)["loss/val"]] == [0, 3, 6]


def test_validation_at_start_is_printed_with_one_text_and_is_not_the_best(fit: Fit) -> None:
    result = fit("--model.learning_rate", 1.0, "--model.schedule", "constant")
    losses = dict(points(RUN)["loss/val"])
    bits = dict(points(RUN)["val/bits_per_byte"])
    line = re.search(r"^step +0 loss/train_eval [\d.]+   loss/val (.+)$", result.out, re.MULTILINE)
    assert line is not None
    uniform = f"untrained; a uniform guess has ln(257) = {math.log(257):.4f} nats"
    assert line[1] == f"{losses[0]:.4f} nats, {bits[0]:.3f} bits/byte {uniform}"
    assert result.out.count("\nstep      0") == 1
    assert sorted(texts(RUN)) == [0, 3, 6]
    assert result.out.count("\n  | ") == 3
    assert losses[0] < min(losses[3], losses[6])
    assert Checkpoint.open(RUN / "best.ckpt").step > 0
    assert points(RUN)["best/loss_val"][0][0] == 3


@pytest.mark.parametrize(
    ("flags", "validations"),
    [(["--validate_at_start", "false"], [3, 6]), (["--trainer.limit_val_batches", 0], [])],
    ids=["flag", "no validations"],
)
def test_run_without_validation_at_start_writes_a_text_at_start(
    fit: Fit, flags: list[object], validations: list[int]
) -> None:
    result = fit(*flags)
    assert result.status == 0, result.err
    assert [step for step, _ in points(RUN).get("loss/val", [])] == validations
    assert (
        f"\nstep      0 untrained; a uniform guess has ln(257) = {math.log(257):.4f} nats\nsamples     " in result.out
    )
    assert sorted(texts(RUN)) == sorted({0, *validations, 6})


def test_validation_at_start_does_not_change_training(fit: Fit) -> None:
    dropout = ["--model.config.dropout", 0.2, "--name"]
    assert fit(*dropout, "with").status == 0
    assert fit(*dropout, "without", "--validate_at_start", "false").status == 0
    one, other = (points(Path(f"logs/{name}/version_0")) for name in ("with", "without"))
    for tag in ("loss/train", "optim/grad_norm"):
        assert one[tag] == other[tag]
    assert one["loss/val"][1:] == other["loss/val"]


def test_last_step_is_validated_and_logged_whatever_the_intervals(fit: Fit) -> None:
    flags = ["--data.global_batch_size", 12, "--trainer.max_steps", 7, "--trainer.log_every_n_steps"]
    assert fit(*flags, 4, "--name", "rarely").status == 0
    assert fit(*flags, 1).status == 0
    rarely, every_step = points(Path("logs/rarely/version_0")), points(RUN)
    assert [step for step, _ in rarely["loss/val"]] == [0, 3, 6, 7]
    for tag in ("loss/train", "optim/lr", "optim/grad_norm"):
        assert rarely[tag] == [point for point in every_step[tag] if point[0] in (4, 7)]
    assert [step for step, _ in rarely["speed/tokens_per_second"]] == [4, 7]


def test_last_step_of_the_epochs_is_validated(fit: Fit) -> None:
    flags = ["--data.batch_size", 16, "--trainer.max_steps", -1, "--trainer.max_epochs", 1]
    result = fit(*flags, "--trainer.val_check_interval", 5)
    steps = int(re.findall(r"steps +(\d+) of", result.out)[0])
    assert steps % 5 != 0
    assert [step for step, _ in points(RUN)["loss/val"]] == [0, *range(5, steps, 5), steps]
