"""Compare a checkpoint with the model, the optimizer and the data of the command that loads it."""

from typing import Any

import torch
from lightning.pytorch import Trainer

from lit_gpt.checkpoint.runs import later_checkpoints
from lit_gpt.checkpoint.store import REMEDY, Checkpoint
from lit_gpt.cli.config_values import flatten
from lit_gpt.cli.experiment import Experiment
from lit_gpt.cli.parser import differences, other_model_error, saved_shape
from lit_gpt.cli.saved_config import read_saved_config
from lit_gpt.cli.yaml_text import load_yaml
from lit_gpt.data.datamodule import TextDataModule, fingerprint
from lit_gpt.errors import UserError
from lit_gpt.optim import state_names
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.training.checkpointing import StopEarly
from lit_gpt.training.module import LitGPT


def check_same_model(checkpoint: Checkpoint, model: LitGPT, tokenizer: Tokenizer) -> None:
    """Check that the checkpoint's model has the shape, the vocabulary and the parameters of `model`.

    Raises:
        UserError: It does not. The message names the differences.
    """
    config: Any = model.hparams["config"]
    found = differences(saved_shape(checkpoint), config)
    if any(difference.startswith("vocab_size") for difference in found):
        found.append("so --data.files is not the text it was trained on")
    if not found and checkpoint.tokenizer != tokenizer:
        found = ["its tokenizer has other tokens than the tokenizer of this data"]
    saved_shapes, shapes = (
        {name: tuple(value.shape) for name, value in weights.items() if isinstance(value, torch.Tensor)}
        for weights in (checkpoint.state_dict, model.state_dict())
    )
    if not found and saved_shapes != shapes:
        names = sorted(saved_shapes.keys() | shapes.keys())
        different = [name for name in names if saved_shapes.get(name) != shapes.get(name)]
        found = [f"{name} {saved_shapes.get(name)} in the checkpoint, {shapes.get(name)} now" for name in different[:3]]
    if found:
        raise other_model_error(checkpoint, found)


def check_same_optimizer(checkpoint: Checkpoint, model: LitGPT) -> None:
    """Check that the checkpoint has optimizer state, and that it fits the model's optimizer.

    Raises:
        UserError: It has none, or it does not fit.
    """
    saved = checkpoint.hyper_parameters.get("optimizer")
    if checkpoint.optimizer_state is None:
        raise UserError(
            f"{checkpoint.path} has no optimizer state to resume: use it with validate or scripts/generate.py"
        )
    optimizer = model.hparams["optimizer"]
    if saved != optimizer:
        raise UserError(
            f"--model.optimizer {optimizer}: {checkpoint.path} was trained with {saved}: give --model.optimizer {saved}"
        )
    if any(not isinstance(state.get("step"), torch.Tensor) for state in checkpoint.optimizer_state.values()):
        raise UserError(
            f"{checkpoint.path} has the optimizer state of an earlier version of lit_gpt: use it with validate or "
            "scripts/generate.py"
        )
    parameters = [(group["name"], p) for group in model.parameter_groups() for p in group["params"]]
    expected = {
        i: {name: () if name == "step" else tuple(p.shape) for name in state_names(optimizer, group)}
        for i, (group, p) in enumerate(parameters)
    }
    found = {
        i: {name: tuple(value.shape) if isinstance(value, torch.Tensor) else None for name, value in state.items()}
        for i, state in checkpoint.optimizer_state.items()
    }
    if found not in ({}, expected):  # it has none before the first step
        raise UserError(
            f"{checkpoint.path} has the optimizer state of another model: use it with validate or scripts/generate.py"
        )


def check_same_callbacks(checkpoint: Checkpoint, trainer: Trainer) -> None:
    """Check that the states of callbacks in the checkpoint have the types of those of this run's callbacks.

    Raises:
        UserError: They do not.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        saved = checkpoint.callbacks.get(callback.state_key)
        if callback.state_key in checkpoint.callbacks and not has_types_of(callback.state_dict(), saved):
            raise UserError(f"{checkpoint.path} has a damaged state of {type(callback).__name__}: {REMEDY}")


def has_types_of(own: Any, saved: Any) -> bool:
    """Return whether `saved` has the type of `own`, and in a dictionary all its keys, each with a value of its type.

    An integer is accepted as a float; anything is accepted in the place of None. A tensor has as many dimensions.
    """
    if isinstance(own, dict):
        return isinstance(saved, dict) and all(k in saved and has_types_of(own[k], saved[k]) for k in own)
    if isinstance(own, float):
        return type(saved) in (int, float) and saved == saved
    if isinstance(own, torch.Tensor):
        return isinstance(saved, torch.Tensor) and saved.ndim == own.ndim
    if isinstance(own, bool | int | str | list):
        return type(saved) is type(own)
    return True


def check_same_data(checkpoint: Checkpoint, datamodule: TextDataModule) -> None:
    """Check that the checkpoint's run was trained on the same tokens, in the same split.

    Raises:
        UserError: It was not. The message names the differences.
    """
    found = differences(checkpoint.data_fingerprint, fingerprint(datamodule))
    if found:
        readable = [text for text in found if not text.startswith("key ")] or ["the text itself"]
        raise UserError(
            f"{checkpoint.path} was trained on other data ({'; '.join(readable)}): give the same data, or "
            "--allow_data_change true to continue with this data"
        )


def describe_resume(experiment: Experiment, checkpoint: Checkpoint) -> list[str]:
    """Return the lines that say from where a run resumes, which settings changed, and whether it is complete."""
    step, max_steps = checkpoint.step, experiment.datamodule.plan.last_step
    lines = [f"resumed     {checkpoint.path}, step {step:,}"]
    if experiment.save_config is not None and checkpoint.config_text is not None:
        before, now = flatten(read_saved_config(checkpoint)), flatten(load_yaml(experiment.save_config.text))
        lines += [
            f"changed     {key} {before.get(key)} -> {now.get(key)}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
    if experiment.resumes_in_place and (later := later_checkpoints(checkpoint.path.parent, step)):
        names = ", ".join(path.name for path in later)
        lines += [f"later       {names}: they move to a subfolder abandoned_<n> when the next checkpoint is written"]
    for callback in experiment.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StopEarly):
            waited = checkpoint.callbacks.get(callback.state_key, {}).get("wait_count", 0)
            if waited >= callback.patience:
                lines += [f"already complete: {callback.reason(waited)}; raise --early_stopping.patience to continue"]
    if max_steps is not None and step >= max_steps:
        lines += [f"already complete at step {step:,}: raise --trainer.max_steps to continue"]
    return lines
