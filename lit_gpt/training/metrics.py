"""Names and values of the metrics of a run, and the steps at which they are logged."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

VAL_SPLITS = ("train_eval", "val")  # the order of TextDataModule.val_dataloader
METRICS = ("loss/train_eval", "loss/val", "val/perplexity", "val/bits_per_byte")  # of every validation


def is_logging_step(trainer: Trainer, step: int) -> bool:
    """Return whether metrics are logged after optimizer step `step`, counted from 1."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return interval > 0 and step % interval == 0


def log_step_metrics(trainer: Trainer, metrics: Mapping[str, Tensor | float]) -> None:
    """Log metrics of the optimizer step that has just been taken. `self.log` takes half a millisecond for each."""
    numbers = {tag: float(value) for tag, value in metrics.items()}
    trainer.callback_metrics.update({tag: torch.tensor(number) for tag, number in numbers.items()})
    for logger in trainer.loggers:
        logger.log_metrics(numbers, trainer.global_step - 1)  # Lightning counts steps from 0
        logger.save()


def compute_metrics(sums: Tensor, splits: Sequence[str]) -> dict[str, Tensor]:
    """Return `loss/<split>` in nats per token, `<split>/perplexity` and `<split>/bits_per_byte` of each split.

    Of the split train_eval there is the loss only. Without bytes there are no bits per byte.

    Args:
        sums: Nats, tokens and bytes of each split, (splits, 3).
        splits: Names of the splits.
    """
    metrics = {}
    for split, (nats, tokens, size) in zip(splits, sums, strict=True):
        metrics[f"loss/{split}"] = loss = (nats / tokens).float()
        if split != "train_eval":
            metrics[f"{split}/perplexity"] = loss.exp()
            if size > 0:
                metrics[f"{split}/bits_per_byte"] = (nats / size / np.log(2)).float()
    return metrics
