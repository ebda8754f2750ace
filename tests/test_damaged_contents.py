"""A checkpoint whose contents have the wrong types is refused in one line, by everything that opens it."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Fit

from lit_gpt import UserError
from lit_gpt.checkpoint.store import Checkpoint, save_checkpoint
from lit_gpt.cli.generate import main as generate

LAST = Path("logs/small/version_0/last.ckpt")
OTHERS: list[Any] = [
    None,
    7,
    -1,
    1.5,
    float("nan"),
    "text",
    [],
    {},
    [1],
    {"a": 1},
    (1, 2),
    True,
    torch.zeros(2),
    10**18,
]

# Fields that a resumed run reads. Without them, or with another type, it cannot be exact.
READ_BY_FIT = [
    ("callbacks", "StepCheckpoint", "best_step"),
    ("callbacks", "StepCheckpoint", "best_loss"),
    ("optimizer_states",),
    ("optimizer_states", 0, "state"),
    ("optimizer_states", 0, "state", 0),
    ("optimizer_states", 0, "state", 0, "step"),
    ("optimizer_states", 0, "state", 0, "exp_avg"),
    ("lr_schedulers",),
    ("lr_schedulers", 0, "lr_lambdas"),
    ("hyper_parameters", "config"),
    ("hyper_parameters", "config", "d_model"),
    ("tokenizer", "name"),
    ("data", "train tokens"),
]


def fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all values, of the weights only the first one."""
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value))) if type(value) is list else []
    for key in keys[:1] if path == ("state_dict",) else keys:
        yield (*path, key)
        yield from fields(value[key], (*path, key))


def with_field(contents: dict[str, Any], path: tuple[Any, ...], values: list[Any]) -> dict[str, Any]:
    """Return contents with another value at `path`; without one, if `values` is empty."""
    changed = copy.deepcopy(contents)
    parent: Any = changed
    for key in path[:-1]:
        parent = parent[key]
    if values:
        parent[path[-1]] = values[0]
    else:
        del parent[path[-1]]
    return changed


def message_of(path: Path) -> str:
    """Return the message of the UserError with which a checkpoint is refused; "" if its model loads."""
    try:
        Checkpoint.open(path).load_model()
    except UserError as error:
        return str(error)
    return ""


def test_any_field_may_be_missing_or_of_another_type(fit: Fit) -> None:
    """A checkpoint is refused with a UserError, or its model loads."""
    assert fit("--trainer.max_steps", 1).status == 0
    contents, rng, changed = torch.load(LAST, weights_only=True), random.Random(0), Path("changed.ckpt")
    messages = []
    for path in [(key,) for key in contents] + rng.sample([*fields(contents)], 30):
        torch.save(with_field(contents, path, rng.choice([[], [rng.choice(OTHERS)]])), changed)
        messages.append(message_of(changed))
        assert "\n" not in messages[-1], path
        assert messages[-1] == "" or "changed.ckpt" in messages[-1], path
    assert len([*filter(None, messages)]) > 5


def test_damaged_field_ends_a_resume_in_one_line(fit: Fit) -> None:
    assert fit("--trainer.max_steps", 1).status == 0
    contents = torch.load(LAST, weights_only=True)
    for number, path in enumerate(READ_BY_FIT):
        torch.save(with_field(contents, path, ([], [[1]])[number % 2]), "changed.ckpt")
        result = fit("--trainer.max_steps", 2, "--ckpt_path", "changed.ckpt", "--name", "resumed")
        assert (result.status, result.err.count("\n")) == (2, 1), (path, result.err)
        assert not Path("logs/resumed").exists(), path


def test_value_that_no_run_writes_ends_a_resume_in_one_line(fit: Fit) -> None:
    """Names that would replace a method or the optimizer of the schedule, and a metric that is no float."""
    assert fit("--trainer.max_steps", 1).status == 0
    contents = torch.load(LAST, weights_only=True)
    names = [("lr_schedulers", 0, "step"), ("lr_schedulers", 0, "optimizer"), ("callback_metrics", "loss/val")]
    for path in names:
        torch.save(with_field(contents, path, [2**63]), "changed.ckpt")
        result = fit("--trainer.max_steps", 2, "--ckpt_path", "changed.ckpt", "--name", "resumed")
        assert (result.status, result.err.count("\n")) == (2, 1), (path, result.err)
    torch.save(with_field(contents, ("lr_schedulers", 0, "get_lr"), [[]]), "changed.ckpt")
    assert "its lr_schedulers is damaged" in message_of(Path("changed.ckpt"))


def test_score_of_early_stopping_that_is_no_number_ends_a_resume_in_one_line(fit: Fit) -> None:
    flags = ("--early_stopping.patience", 3)
    assert fit("--trainer.max_steps", 1, *flags).status == 0
    contents = torch.load(LAST, weights_only=True)
    key = next(key for key in contents["callbacks"] if key.startswith("StopEarly"))
    torch.save(with_field(contents, ("callbacks", key, "best_score"), [torch.zeros(5)]), "changed.ckpt")
    result = fit("--trainer.max_steps", 2, "--ckpt_path", "changed.ckpt", "--name", "resumed", *flags)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "has a damaged state of StopEarly" in result.err


def test_damaged_tokenizer_is_named(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.max_steps", 1).status == 0
    contents = torch.load(LAST, weights_only=True)
    for state in ({}, {"name": "char", "characters": "aa"}, {"name": "/dev/zero", "pieces": None}):
        save_checkpoint({**contents, "tokenizer": state}, Path("changed.ckpt"))
        assert generate(["--ckpt_path", "changed.ckpt"]) == 2
        assert capsys.readouterr().err.startswith("error: changed.ckpt has a damaged tokenizer: give a .ckpt file")
    result = fit("validate", "--ckpt_path", "changed.ckpt")
    assert (result.status, result.err.count("\n")) == (2, 1)
