"""The metrics of a run: how they are computed, what they are called, and when they are logged."""

import math
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics import Metric, MetricCollection

VAL_SPLITS = ("train_eval", "val")  # the order of TextDataModule.val_dataloader
VAL_METRICS = ("loss/train_eval", "loss/val", "val/perplexity", "val/bits_per_byte", "val/accuracy")
TRAIN_METRICS = ("loss/train", "optim/lr", "optim/grad_norm")
METRICS = (*TRAIN_METRICS, *VAL_METRICS)  # what a callback can monitor


def is_logging_step(trainer: Trainer, step: int) -> bool:
    """Return whether Lightning logs the metrics of optimizer step `step`, counted from 1."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return interval > 0 and (step % interval == 0 or trainer.should_stop)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over many tokens; Apple's devices have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class Ratio(Metric):
    """The sum of one quantity divided by the sum of another, over all batches and ranks.

    The result depends on neither the batch size nor the number of ranks. It is float32; the sums have the given dtype.
    """

    full_state_update = False
    numerator: Tensor
    denominator: Tensor

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.add_state("numerator", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("denominator", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        return (self.numerator / self.denominator).float()


class TokenLoss(Ratio):
    """The mean loss in nats per token."""

    def update(self, nats: Tensor, tokens: Tensor) -> None:
        self.numerator += nats
        self.denominator += tokens


class Perplexity(TokenLoss):
    """The exponential of the mean loss. `torchmetrics.text.Perplexity` needs all logits at once."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class BitsPerByte(Ratio):
    """The loss in bits, divided by the UTF-8 bytes of the predicted tokens."""

    def update(self, nats: Tensor, num_bytes: Tensor) -> None:
        self.numerator += nats.to(self.numerator.dtype) / math.log(2)
        self.denominator += num_bytes


class NextTokenAccuracy(Ratio):
    """The fraction of tokens that the model considered the likeliest."""

    def update(self, correct: Tensor, tokens: Tensor) -> None:
        self.numerator += correct
        self.denominator += tokens


class PositionLoss(Metric):
    """The mean loss in nats at each position of a window: later positions have more context.

    Args:
        length: T, positions in a window.
        dtype: Of the sums.
    """

    full_state_update = False
    nats: Tensor
    tokens: Tensor

    def __init__(self, length: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros(length, dtype=dtype), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(length, dtype=dtype), dist_reduce_fx="sum")

    def update(self, token_losses: Tensor, is_counted: Tensor) -> None:
        """Add the losses (B, T) of a batch; `is_counted` (B, T) says which of them count."""
        self.nats += (token_losses * is_counted).sum(dim=0)
        self.tokens += is_counted.sum(dim=0)

    def compute(self) -> Tensor:
        """Return the losses (T,); NaN where no target counts."""
        return (self.nats / self.tokens).float()


def split_metrics(split: str, has_bytes: bool, device: torch.device) -> MetricCollection:
    """Return the metrics of one split. `update` takes nats, tokens, correct and num_bytes of a batch, each ().

    The windows of the training split, train_eval, have the loss only.

    Args:
        split: The name of the split, such as val.
        has_bytes: Whether the bytes of each token are known.
        device: The device of the batches.
    """
    dtype = sum_dtype(device)
    metrics: dict[str, Any] = {f"loss/{split}": TokenLoss(dtype)}
    if split != "train_eval":
        metrics[f"{split}/perplexity"] = Perplexity(dtype)
        metrics[f"{split}/accuracy"] = NextTokenAccuracy(dtype)
        if has_bytes:
            metrics[f"{split}/bits_per_byte"] = BitsPerByte(dtype)
    return MetricCollection(metrics, compute_groups=False).to(device)
