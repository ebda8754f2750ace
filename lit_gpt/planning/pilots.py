"""Short training runs on a part of the text, to compare candidates by what they reach and not by rules alone."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lit_gpt.data.batches import EvaluationBatches, TrainBatches
from lit_gpt.data.windows import evaluation_starts
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.ops import IGNORE_INDEX
from lit_gpt.optim import MuonAdamW, OptimizerName, learning_rate_factor, parameter_groups

EVALUATION_TOKENS = 2**14  # of the validation text, in a pilot


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, in the words of LitGPT's arguments.

    Attributes:
        optimizer: "adamw" or "muon".
        learning_rate: The highest learning rate.
        embedding_rate: A factor on the rate of the embeddings.
        head_rate: A factor on the rate of an untied head.
        weight_decay: Weight decay of the matrices.
        betas: Decay rates of AdamW's moments.
        warmup_steps: Steps in which the rate rises.
        decay_share: The part of the run, at its end, in which the rate falls linearly to 0.
    """

    optimizer: OptimizerName
    learning_rate: float
    embedding_rate: float
    head_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warmup_steps: int
    decay_share: float


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


class BareTraining:
    """A model, its optimizer and its training step, without a Trainer.

    Args:
        config: The shape of the model.
        recipe: How it is trained.
        precision: "bf16-mixed" or "32-true".
        device: Where it is trained.
        seed: Of the initial weights and of dropout.
    """

    def __init__(self, config: GPTConfig, recipe: Recipe, precision: str, device: torch.device, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.gpt = GPT(config).to(device)
        self.device, self.recipe, self.mixed = device, recipe, precision == "bf16-mixed"
        groups = parameter_groups(
            self.gpt, recipe.weight_decay, recipe.learning_rate, recipe.embedding_rate, recipe.head_rate
        )
        self.optimizer: torch.optim.Optimizer
        if recipe.optimizer == "muon":
            self.optimizer = MuonAdamW(groups, recipe.betas)
        else:
            self.optimizer = torch.optim.AdamW(groups, betas=recipe.betas, fused=True)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed)

    def step(self, tokens: torch.Tensor, targets: torch.Tensor, rate_factor: float = 1.0) -> torch.Tensor:
        """Take an optimizer step on a batch, (B, T) each, and return its loss in nats per token."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * rate_factor
        with self.autocast():
            loss = self.gpt.loss(tokens.to(self.device), targets.to(self.device))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def train(self, batches: TrainBatches, steps: int, is_time_up: Callable[[], bool] = lambda: False) -> int:
        """Train for some steps, fewer if the time is up; return how many were taken."""
        recipe = self.recipe
        for step in range(steps):
            factor = learning_rate_factor(
                step, "linear", min(recipe.warmup_steps, steps // 10), steps, 0.0, recipe.decay_share
            )
            tokens, targets = batches.get_batch(step)
            self.step(tokens, targets, factor)
            if is_time_up():
                return step + 1
        return steps

    @torch.no_grad()
    def bits_per_byte(self, text: EncodedText, batch_size: int) -> float:
        """Return the loss on the beginning of the validation text in bits per byte."""
        length = self.gpt.config.context_length
        ids = text.val_ids[: EVALUATION_TOKENS + 1]
        batches = EvaluationBatches(ids, evaluation_starts(len(ids), length, None), length, batch_size)
        nats, num_bytes = 0.0, 0
        self.gpt.eval()
        for index in range(len(batches)):
            tokens, targets = batches[index]
            with self.autocast():
                nats += float(self.gpt.evaluate(tokens.to(self.device), targets.to(self.device))[0])
            num_bytes += int(text.bytes_per_token[targets[targets != IGNORE_INDEX].numpy()].sum())
        self.gpt.train()
        return nats / math.log(2) / num_bytes


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
    end = time.perf_counter() + seconds
    training.train(batches, steps, lambda: time.perf_counter() > end)
    return training.bits_per_byte(text, batch_size)
