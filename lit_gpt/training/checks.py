"""What LitGPT checks: its arguments, the callbacks and data it is used with, and that training stays finite."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch import Tensor

from lit_gpt.data.batches import Batch, BatchLoader
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.ops.float8 import FLOAT8_CAPABILITY, FLOAT8_MULTIPLE
from lit_gpt.sharding import full_tensor


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check the arguments of LitGPT.

    Raises:
        UserError: One is out of range, or has no effect with the others.
    """
    learning_rate, min_learning_rate = arguments["learning_rate"], arguments["min_learning_rate"]
    if not 0 < learning_rate < np.inf:
        raise UserError(f"--model.learning_rate is {learning_rate}: give more than 0, as 1e-3")
    for name in (
        "warmup_steps",
        "momentum_warmup_steps",
        "weight_decay",
        "min_learning_rate",
        "embedding_rate",
        "head_rate",
    ):
        value = arguments[name]
        if value is not None and not 0 <= value < np.inf:
            raise UserError(f"--model.{name} is {value}: give 0 or more")
    if min_learning_rate is not None and min_learning_rate > learning_rate:
        raise UserError(
            f"--model.min_learning_rate {min_learning_rate} is above --model.learning_rate {learning_rate}: "
            "the schedule ends there, give less"
        )
    if not 0 < arguments["decay_share"] <= 1:
        raise UserError(
            f"--model.decay_share is {arguments['decay_share']}: give a share of the steps above 0, up to 1"
        )
    if not all(0 <= beta < 1 for beta in arguments["betas"]):
        raise UserError(f"--model.betas is {list(arguments['betas'])}: give two numbers from 0 up to, not including, 1")
    if arguments["schedule"] == "constant" and (min_learning_rate is not None or arguments["decay_share"] != 1):
        raise UserError(
            "--model.schedule constant never lowers the learning rate, but --model.min_learning_rate is "
            f"{'null' if min_learning_rate is None else min_learning_rate} and --model.decay_share "
            f"{arguments['decay_share']}: give null and 1, or another schedule"
        )
    if arguments["momentum_warmup_steps"] and arguments["optimizer"] != "muon":
        raise UserError(
            f"--model.momentum_warmup_steps is {arguments['momentum_warmup_steps']}, but only Muon has this momentum: "
            "give --model.optimizer muon, or 0"
        )
    if arguments["decay_norms_and_biases"] and arguments["weight_decay"] == 0:
        raise UserError(
            "--model.decay_norms_and_biases true has no effect, because --model.weight_decay is 0: change one of them"
        )
    if arguments["config"]["tie_embeddings"] and arguments["head_rate"] != 1:
        raise UserError(
            f"--model.head_rate is {arguments['head_rate']}, but the head is the embedding, whose factor is "
            "--model.embedding_rate: give --model.config.tie_embeddings false, or --model.head_rate 1"
        )


def check_schedule(schedule: str, max_steps: int | float | None) -> None:
    """Check that the run has a last step if the schedule of the learning rate needs one; None and infinity: none.

    Raises:
        UserError: It has none.
    """
    if schedule != "constant" and max_steps in (None, math.inf):
        raise UserError(
            f"--model.schedule {schedule} needs an end: give --trainer.max_steps or --trainer.max_epochs, or "
            "--model.schedule constant"
        )


def check_loaders(loaders: Sequence[Any], data: TextDataModule | None) -> None:
    """Check that dataloaders of a TextDataModule are used with it: they depend on the Trainer it is attached to.

    Raises:
        UserError: They are not.
    """
    if data is None and any(isinstance(loader, BatchLoader) for loader in loaders):
        raise UserError("dataloaders of a TextDataModule do not work alone: give the Trainer datamodule=data")


def check_callbacks(trainer: Trainer) -> None:
    """Check that no callback of the Trainer changes what LitGPT or TextDataModule decide.

    Raises:
        UserError: The Trainer has a learning rate finder or a batch size finder.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LearningRateFinder):
            raise UserError(
                "Tuner.lr_find does not work with LitGPT, which sets the learning rate of each step itself: give "
                "learning_rate, compare short runs, and make a new Trainer"
            )
        if isinstance(callback, BatchSizeFinder):
            raise UserError(
                "Tuner.scale_batch_size does not work with LitGPT, whose steps follow from the batch size: give "
                "batch_size (fit.py --preflight finds the largest that fits), and make a new Trainer"
            )


def check_float8(gpt: GPT, device: torch.device) -> None:
    """Check that the head can multiply float8 numbers on the device, if it should.

    Raises:
        UserError: The device or the width does not allow it.
    """
    if not gpt.float8_head:
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        raise UserError(
            "--model.float8_head true needs a GPU of compute capability 8.9 or more, as an RTX 4090 or an H100: "
            "give false"
        )
    if gpt.config.d_model % FLOAT8_MULTIPLE:
        raise UserError(
            f"--model.float8_head true needs a width that {FLOAT8_MULTIPLE} divides, but --model.config.d_model is "
            f"{gpt.config.d_model}: change one of them"
        )


def check_data(config: GPTConfig, data: TextDataModule) -> None:
    """Check that a model fits the data it is trained or evaluated on.

    Raises:
        UserError: Its vocabulary is not the tokenizer's, or its context is shorter than a window.
    """
    if config.vocab_size != data.model_vocab_size:
        raise UserError(
            f"vocab_size is {config.vocab_size}, but the tokenizer {data.corpus_config.tokenizer_name} has "
            f"{data.model_vocab_size} ids: give GPTConfig(vocab_size={data.model_vocab_size})"
        )
    if config.context_length < data.context_length:
        raise UserError(
            f"context_length is {config.context_length} in GPTConfig and {data.context_length} in TextDataModule: "
            "give both the same"
        )


def check_batch(config: GPTConfig, batch: Batch) -> None:
    """Check a batch of any DataLoader.

    Raises:
        UserError: It is not `(tokens, targets)` or `(tokens, targets, documents)` of int64, or has ids that the model
            does not have.
    """
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        raise UserError("a batch is not (tokens, targets) or (tokens, targets, documents): give int64 (B, T) each")
    if any(ids.dtype != torch.int64 for ids in batch):
        raise UserError(f"a batch has tensors of {', '.join(str(ids.dtype) for ids in batch)}: give torch.int64")
    if batch[0].min() < 0:
        raise UserError(f"a batch has the id {int(batch[0].min())}: give tokens of 0 and more")
    largest = max(int(ids.max()) for ids in batch[:2])
    if largest >= config.vocab_size:
        raise UserError(
            f"vocab_size is {config.vocab_size}, but a batch has the id {largest}: give GPTConfig(vocab_size=...) the "
            f"number of ids of your tokenizer, {largest + 1} or more"
        )


def changed_rate(learning_rate: float, factor: float) -> str:
    """Return the flag for a learning rate times a factor, and the factor in words: 1/3, 1/10, 3 or 10."""
    words = {1 / 3: "a third", 1 / 10: "a tenth", 3: "three times as much", 10: "ten times as much"}[factor]
    return f"--model.learning_rate {learning_rate * factor:.2g}, {words}"


def describe_nonfinite(step: str, loss: Tensor | float, gpt: GPT, optimizer: torch.optim.Optimizer, remedy: str) -> str:
    """Return the error message for a step, with the loss or the gradients that are not finite, and what to try."""
    found = [] if torch.isfinite(torch.as_tensor(loss)) else [f"loss {float(loss)}"]
    names = {id(p): name for name, p in gpt.named_parameters()}
    for group in optimizer.param_groups:
        gradients = [(names[id(p)], p.grad) for p in group["params"] if p.grad is not None]
        bad = [name for name, gradient in gradients if not full_tensor(torch.isfinite(gradient).all())]
        if bad:
            found.append(f"gradient of {len(bad)} of {len(group['params'])} {group['name']}, as {bad[0]}")
    return f"{step} not finite ({'; '.join(found) or 'norm of the gradients'}): {remedy}"
