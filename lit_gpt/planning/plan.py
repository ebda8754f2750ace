"""A plan: the settings of the run that makes the most of a budget of time, and the reasons for them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Plan:
    """What is chosen for a run, and why.

    Attributes:
        settings: The chosen settings, such as "model.config.d_model" -> 128. A setting that the person gave is not
            among them.
        reasons: At most ten rows: what is chosen, and why.
        seconds: The expected time from now to the last checkpoint.
        bits_per_byte: The expected loss on the validation split, in bits per byte; None if it cannot be predicted.
    """

    settings: dict[str, Any]
    reasons: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    bits_per_byte: float | None = None
