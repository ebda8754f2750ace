"""A model with its optimizer and its training step, without the Trainer: to time steps, and for short runs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.model import GPT, GPTConfig
from lit_gpt.optim import MuonAdamW, OptimizerName, gradient_norm, parameter_groups
from lit_gpt.planning.memory import activation_dtype, parameter_dtype


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
    embedding_rate: float = 1.0
    head_rate: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 0
    decay_share: float = 1.0


class BareTraining:
    """A model and its optimizer, which take the same steps as under the Trainer.

    Args:
        config: The shape of the model.
        recipe: How it is trained.
        precision: The Trainer's precision, for example "bf16-mixed".
        device: Where it is trained.
        seed: Of the initial weights. PyTorch's random states stay as they are.
        activation_checkpointing: Whether the activations of a block are computed again in the backward pass.
    """

    def __init__(
        self,
        config: GPTConfig,
        recipe: Recipe,
        precision: str,
        device: torch.device,
        seed: int = 0,
        activation_checkpointing: bool = False,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.gpt = GPT(config).to(device, parameter_dtype(precision))
        self.gpt.blocks.activation_checkpointing = activation_checkpointing
        self.device, self.recipe, self.precision = device, recipe, precision
        groups = parameter_groups(
            self.gpt, recipe.weight_decay, recipe.learning_rate, recipe.embedding_rate, recipe.head_rate
        )
        self.optimizer: torch.optim.Optimizer
        if recipe.optimizer == "muon":
            self.optimizer = MuonAdamW(groups, recipe.betas)
        else:
            self.optimizer = torch.optim.AdamW(groups, betas=recipe.betas, fused=True)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, tokens: Tensor, targets: Tensor, rate_factor: float = 1.0) -> Tensor:
        """Take a step on a batch, (B, T) each, at a fraction of the highest rate; return its loss in nats per token."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * rate_factor
        loss = self.compute_gradients(tokens, targets)
        self.update()
        return loss

    def compute_gradients(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Take the forward and the backward pass of a batch, (B, T) each; return its loss in nats per token."""
        with self._autocast():
            loss = self.gpt.loss(tokens.to(self.device), targets.to(self.device))
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Compute the norm of the gradients, as under the Trainer, and update the weights."""
        gradient_norm([p.grad for p in self.gpt.parameters() if p.grad is not None]).isfinite().item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def evaluate(self, tokens: Tensor, targets: Tensor) -> float:
        """Return the sum of the losses of a batch, (B, T) each, in nats."""
        self.gpt.eval()
        with self._autocast():
            nats = self.gpt.evaluate(tokens.to(self.device), targets.to(self.device))[0]
        self.gpt.train()
        return float(nats)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, activation_dtype(self.precision), enabled="mixed" in self.precision)
