"""Start a run from the weights of another model."""

import os
from dataclasses import asdict

import torch

from lit_gpt.convert.load import load_model
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.sharding import shard_like

FREE = ("dropout", "context_length")  # what may differ from the model whose weights are taken


@torch.no_grad()
def copy_weights(path: str, gpt: GPT) -> None:
    """Copy the weights of a model into another of the same shape, sharded or not.

    Args:
        path: What `load_model` takes.
        gpt: The model to fill. It may have a shorter context, and another dropout.

    Raises:
        UserError: There is no model at the path, or it has another shape.
    """
    source, _, _ = load_model(os.path.expanduser(path))
    check_shape(path, source.config, gpt.config)
    weights = source.state_dict()
    for name, parameter in gpt.named_parameters():
        full = weights[name]
        if name == "position.table.weight":
            full = full[: gpt.config.context_length]
        parameter.copy_(shard_like(full.to(parameter.device, parameter.dtype), parameter))


def check_shape(path: str, found: GPTConfig, config: GPTConfig) -> None:
    """Check that a model can take the weights of another.

    Args:
        path: Of the other, for the message.
        found: Its shape.
        config: The shape of the model.

    Raises:
        UserError: It cannot.
    """
    theirs, ours = asdict(found), asdict(config)
    different = [
        f"{key} {theirs[key]} there, {ours[key]} here" for key in ours if theirs[key] != ours[key] and key not in FREE
    ]
    if found.position == "learned" and config.context_length > found.context_length:
        different.append(f"context_length {found.context_length} there, {config.context_length} here")
    if different:
        raise UserError(
            f"--model.init_from {path} has another model ({'; '.join(different)}): remove the settings that change it"
        )
