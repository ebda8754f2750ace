"""Short training runs on a part of the text, to compare candidates by what they reach and not by rules alone."""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from lit_gpt.data.batches import EvaluationBatches, TrainBatches
from lit_gpt.data.windows import evaluation_starts
from lit_gpt.model import GPTConfig
from lit_gpt.ops import IGNORE_INDEX
from lit_gpt.optim import learning_rate_factor
from lit_gpt.planning.bare_training import BareTraining, Recipe

EVALUATION_TOKENS = 2**14  # of the validation text, in a pilot


@dataclass(frozen=True)
class EncodedText:
    """A text that a tokenizer has encoded, in memory.

    Attributes:
        train_ids: Token ids to train on, (tokens,).
        val_ids: Token ids to validate on, (tokens,).
        bytes_per_token: The UTF-8 bytes of each id, (V,) int64.
    """

    train_ids: np.ndarray
    val_ids: np.ndarray
    bytes_per_token: np.ndarray


def run_pilot(
    text: EncodedText,
    config: GPTConfig,
    recipe: Recipe,
    batch_size: int,
    steps: int,
    seconds: float,
    precision: str,
    device: torch.device,
) -> float:
    """Train a new model briefly and return its loss on the validation text in bits per byte.

    Args:
        text: The text.
        config: The shape of the model.
        recipe: How it is trained; its schedule ends with the last of the steps.
        batch_size: B, windows in a step.
        steps: Optimizer steps.
        seconds: A limit: a pilot that is slower than expected ends with fewer steps, at a higher loss.
        precision: "bf16-mixed" or "32-true".
        device: Where it is trained.
    """
    training = BareTraining(config, recipe, precision, device)
    batches = TrainBatches(text.train_ids, config.context_length, "random", 0, batch_size, 1)
    end, warmup_steps = time.perf_counter() + seconds, min(recipe.warmup_steps, steps // 10)
    for step in range(steps):
        factor = learning_rate_factor(step, "linear", warmup_steps, steps, 0.0, recipe.decay_share)
        tokens, targets = batches.get_batch(step)
        training.step(tokens, targets, factor)
        if time.perf_counter() > end:
            break
    return bits_per_byte(training, text, batch_size)


def bits_per_byte(
    training: BareTraining, text: EncodedText, batch_size: int, max_tokens: int = EVALUATION_TOKENS
) -> float:
    """Return the loss of a model on the first `max_tokens` tokens of the validation text in bits per byte."""
    length, ids = training.gpt.config.context_length, text.val_ids[: max_tokens + 1]
    batches = EvaluationBatches(ids, evaluation_starts(len(ids), length, None), length, batch_size)
    nats, num_bytes = 0.0, 0
    for index in range(len(batches)):
        tokens, targets = batches[index]
        nats += training.evaluate(tokens, targets)
        num_bytes += int(text.bytes_per_token[targets[targets != IGNORE_INDEX].numpy()].sum())
    return nats / math.log(2) / num_bytes
