"""What updates the weights, and how fast."""

import math
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

Schedule = Literal["constant", "cosine", "linear"]


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices (embeddings too) with weight decay; norms' scales and biases without."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate_factor(step: int, schedule: Schedule, warmup_steps: int, max_steps: int, lowest: float) -> float:
    """The share of the peak learning rate that optimizer step `step`, from 0, takes.

    It climbs in equal strides over `warmup_steps`, from one stride on and never from 0, and is then constant, or falls
    by a cosine (Loshchilov and Hutter 2017) or a line to `lowest`, reached at `max_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    fallen = progress if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
    return 1.0 - (1.0 - lowest) * fallen
