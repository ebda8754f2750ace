"""Candidates for a run: every combination of tokenizer, context length and shape, with what the rules expect of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from lit_gpt.model import GPTConfig
from lit_gpt.planning import rules
from lit_gpt.planning.memory import estimate_memory, model_without_memory
from lit_gpt.planning.pilots import Recipe
from lit_gpt.planning.speed import SpeedModel, Workload
from lit_gpt.planning.text import TokenizerStatistics

# The ladder of shapes, width and blocks: from 0.1M to 1.5B parameters in the blocks.
SHAPES = (
    *((64, 2), (64, 4), (96, 4), (128, 4), (192, 4), (192, 6), (256, 4), (256, 6), (384, 6), (512, 8), (640, 10)),
    *((768, 12), (1024, 16), (1280, 20), (1280, 36), (1600, 48)),
)
CONTEXT_LENGTHS = (64, 128, 256, 512, 1024)
MEMORY_SHARE = 0.7  # of the free memory that a plan may use


@dataclass(frozen=True)
class Candidate:
    """A model and how it would be trained.

    Attributes:
        tokenizer: The tokenizer and how it divides the text.
        config: The shape of the model.
        recipe: The optimizer and its rates.
        batch_size: B, windows in a forward pass.
        accumulate: Forward passes in an optimizer step.
        precision: The Trainer's precision.
        steps: Optimizer steps that fit into the time.
        step_seconds: Expected time of one of them.
        activation_checkpointing: Whether activations are computed twice to save memory.
        compile: Whether the blocks are compiled.
        bits_per_byte: What the rules expect at the end.
    """

    tokenizer: TokenizerStatistics
    config: GPTConfig
    recipe: Recipe
    batch_size: int
    accumulate: int
    precision: str
    steps: int
    step_seconds: float
    activation_checkpointing: bool = False
    compile: bool = False
    bits_per_byte: float = 0.0

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulate * self.config.context_length

    @property
    def workload(self) -> Workload:
        return Workload(
            self.config, self.batch_size, self.recipe.optimizer, self.precision, self.accumulate, self.compile
        )
