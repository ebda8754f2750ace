"""Flags of the Trainer that decide how long an epoch is and when a run validates, as fit.py counts them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Fit, points, weights

import lit_gpt.data.batches
from lit_gpt import load_model
from lit_gpt.cli.parser import build_parser
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.training.module import LitGPT

RUN = Path("logs/small/version_0")


def validated_steps(folder: Path = RUN) -> list[int]:
    return [step for step, _ in points(folder)["loss/val"] if step > 0]


def saved_trainer() -> dict[str, object]:
    return yaml.safe_load((RUN / "config.yaml").read_text())["trainer"]


@pytest.fixture
def small_evaluation_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the 8 windows of an evaluated split of small.yaml two batches."""
    monkeypatch.setattr(lit_gpt.data.batches, "MIN_EVALUATION_TOKENS", 16)


def test_default_validation_interval_is_saved(fit: Fit) -> None:
    assert fit("--trainer.val_check_interval", "null").status == 0
    assert (saved_trainer()["val_check_interval"], saved_trainer()["check_val_every_n_epoch"]) == (200, None)


def test_help_names_the_default_validation_interval() -> None:
    text = " ".join(build_parser("fit", "name").format_help().split())
    assert "Optimizer steps between validations if int, part of an epoch if float. null: 200, or the end of" in text


@pytest.mark.parametrize(("value", "expected"), [("1", int), ("1.0", float), ("0.5", float), ("4", int)])
def test_number_of_batches_and_part_are_told_apart(value: str, expected: type) -> None:
    names = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches", "val_check_interval")
    flags = [word for name in names for word in (f"--trainer.{name}", value)]
    trainer = build_parser("fit", "name").parse_args(flags).trainer
    assert [(type(trainer[name]), trainer[name]) for name in names] == [(expected, float(value))] * len(names)


@pytest.mark.parametrize("batches", [1, 3])
def test_fast_dev_run_trains_and_validates_that_many_batches(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    found: list[str] = []
    for name in ("training_step", "on_validation_epoch_end"):
        original = getattr(LitGPT, name)

        def patched(module: LitGPT, *args: object, name: str = name, original: Any = original) -> object:
            found.append(name)
            return original(module, *args)

        monkeypatch.setattr(LitGPT, name, patched)
    assert fit("--trainer.fast_dev_run", batches, "--data.global_batch_size", 8).status == 0
    assert found == ["training_step"] * batches + ["on_validation_epoch_end"]


@pytest.mark.parametrize("flags", [[], ["--data.global_batch_size", 8]], ids=["one batch a step", "two"])
def test_check_val_every_n_epoch_validates_at_the_end_of_every_nth_epoch(fit: Fit, flags: list[object]) -> None:
    flags = [*flags, "--trainer.limit_train_batches", 4, "--trainer.val_check_interval", "null"]
    every = ["--trainer.check_val_every_n_epoch", 2, "--trainer.max_steps", 9]
    assert fit(*flags, *every).status == 0
    assert validated_steps() == ([8, 9] if len(flags) == 4 else [4, 8, 9])
    assert (saved_trainer()["val_check_interval"], saved_trainer()["check_val_every_n_epoch"]) == (1.0, 2)
    curves = points(RUN)["loss/val"]
    resumed = fit("--ckpt_path", "last", "--name", "small", "--trainer.max_steps", 10, config=None)
    assert resumed.status == 0, resumed.err
    assert points(RUN)["loss/val"][: len(curves)] == curves


@pytest.mark.parametrize(("limit", "steps"), [(4, 2), (0.1, 1)])
def test_limit_train_batches_shortens_the_epochs_and_draws_the_same_windows(
    fit: Fit, limit: int | float, steps: int
) -> None:
    epochs = ["--trainer.max_epochs", 3, "--trainer.max_steps", 20, "--model.schedule", "constant"]
    limited = ["--trainer.limit_train_batches", limit, "--trainer.val_check_interval", 0.5]
    batch_size = ["--data.global_batch_size", 8 if steps == 2 else 12]
    result = fit(*epochs, *limited, *batch_size)
    assert f"steps       {3 * steps} of " in result.out
    assert f", {steps} to an epoch, 3.0 epochs" in result.out
    assert validated_steps() == list(range(1, 3 * steps + 1))
    straight = fit("--trainer.max_steps", 3 * steps, "--model.schedule", "constant", *batch_size, "--name", "straight")
    assert straight.status == 0
    assert points(RUN)["loss/train"] == points(Path("logs/straight/version_0"))["loss/train"]


@pytest.mark.parametrize("sampling", ["random", "shuffled"])
def test_resume_with_limit_train_batches_is_exact(fit: Fit, drawn: list[int], sampling: str) -> None:
    flags = ["--trainer.limit_train_batches", 6, "--data.global_batch_size", 8, "--trainer.max_epochs", 3]
    flags += ["--model.config.dropout", 0.1, "--data.sampling", sampling, "--trainer.max_steps", -1]
    every = ["--checkpoint.every_n_steps", 1, "--checkpoint.keep", 9]
    assert fit(*flags, *every).status == 0
    assert drawn == list(range(18))
    for step in (2, 3, 7):  # an epoch has 3 steps
        drawn.clear()
        name = f"from_{step}"
        resumed = fit(*flags, "--ckpt_path", RUN / f"step_{step:08d}.ckpt", "--name", name)
        assert resumed.status == 0, resumed.err
        assert drawn == list(range(2 * step, 18))
        one, other = (weights(Path(f"logs/{run}/version_0/last.ckpt")) for run in ("small", name))
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("limit", [1, 0.5])
def test_limit_val_batches_evaluates_the_first_batches(
    fit: Fit, small_evaluation_batches: None, limit: int | float
) -> None:
    assert fit("--trainer.limit_val_batches", limit).status == 0
    gpt, _, _ = load_model(RUN / "last.ckpt")
    data = TextDataModule("rows.txt", tokenizer="byte", context_length=16, batch_size=4, eval_windows=8)
    for tag, loader in zip(("loss/train_eval", "loss/val"), data.val_dataloader(), strict=True):
        tokens, targets = next(iter(loader))
        assert len(tokens) == 4
        assert dict(points(RUN)[tag])[6] == pytest.approx(gpt.loss(tokens, targets).item(), rel=1e-5)


@pytest.mark.parametrize(("overfit_batches", "epoch"), [(4, 4), (0.5, 17)])
def test_overfit_batches_resumes_exactly(
    fit: Fit, small_evaluation_batches: None, overfit_batches: int | float, epoch: int
) -> None:
    flags = ["--trainer.overfit_batches", overfit_batches, "--trainer.max_steps", 20]
    result = fit(*flags, "--checkpoint.every_n_steps", 5, "--checkpoint.keep", 9)
    assert f", {epoch} to an epoch" in result.out
    resumed = fit(*flags, "--name", "b", "--ckpt_path", RUN / "step_00000005.ckpt")
    assert resumed.status == 0, resumed.err
    one, other = (weights(Path(f"logs/{run}/version_0/last.ckpt")) for run in ("small", "b"))
    assert all(torch.equal(one[key], other[key]) for key in one)
