"""Candidates for a run: every combination of tokenizer, context length and shape, with what the rules expect of it."""

from collections.abc import Iterator
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


@dataclass(frozen=True)
class Machine:
    """Where a run takes place.

    Attributes:
        device: The device.
        speed: How fast it is.
        free_memory: Bytes that are free; None if this is not known.
        has_bfloat16: Whether it multiplies bfloat16 matrices in hardware.
    """

    device: torch.device
    speed: SpeedModel
    free_memory: int | None
    has_bfloat16: bool


def list_candidates(
    tokenizers: list[TokenizerStatistics], given: dict[str, Any], machine: Machine, seconds: float
) -> list[Candidate]:
    """Return every candidate that fits into the memory and the time, the one with the lowest expected loss first.

    Args:
        tokenizers: The tokenizers to choose from.
        given: The settings that the person gave, such as "model.config.d_model" -> 128; they stay as they are.
        machine: Where the run takes place.
        seconds: The time to train in.
    """
    found = []
    for tokenizer in tokenizers:
        for context_length in _context_lengths(tokenizer, given):
            for config in _configs(tokenizer, context_length, given):
                candidate = _fit_into_time(tokenizer, config, given, machine, seconds)
                if candidate is not None:
                    found.append(candidate)
    return sorted(found, key=lambda candidate: candidate.bits_per_byte)


def _context_lengths(tokenizer: TokenizerStatistics, given: dict[str, Any]) -> list[int]:
    """Return the context lengths to choose from."""
    if "model.config.context_length" in given:
        return [given["model.config.context_length"]]
    longest = rules.longest_context(tokenizer)
    return [length for length in CONTEXT_LENGTHS if length <= longest] or [longest]


def _configs(tokenizer: TokenizerStatistics, context_length: int, given: dict[str, Any]) -> Iterator[GPTConfig]:
    """Yield a shape for every step of the ladder that the given settings leave open."""
    prefix = "model.config."
    fixed = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    fixed.pop("vocab_size", None)
    shapes = {(fixed.get("d_model", width), fixed.get("num_blocks", blocks)) for width, blocks in SHAPES}
    for width, blocks in sorted(shapes):
        chosen = rules.architecture(width, tokenizer)
        settings = {**chosen, "d_model": width, "num_blocks": blocks, "context_length": context_length, **fixed}
        try:
            yield GPTConfig(**settings, vocab_size=tokenizer.vocab_size)
        except ValueError:  # the given settings do not go with this width
            continue


def _fit_into_time(
    tokenizer: TokenizerStatistics, config: GPTConfig, given: dict[str, Any], machine: Machine, seconds: float
) -> Candidate | None:
    """Return a shape with its batch, steps and rates; None if it is too slow or too large.

    The number of tokens in a step, and with it the number of steps, follows from the tokens that can be trained on in
    the time, which changes little with the tokens in a step.
    """
    optimizer = given.get("model.optimizer", "muon")
    precision = given.get("trainer.precision") or rules.precision(config, machine.device, machine.has_bfloat16)
    compiled = given.get("model.compile", rules.compile_pays(machine.device, seconds))
    tokens_per_step = rules.MIN_TOKENS_PER_STEP
    while True:
        batch_size, accumulate = _divide_batch(config, tokens_per_step, given, machine, optimizer, precision)
        if batch_size == 0:
            return None
        workload = Workload(config, batch_size, optimizer, precision, accumulate, compiled)
        step_seconds = machine.speed.step_seconds(workload)
        steps = int(seconds / step_seconds)
        wanted = rules.tokens_per_step(steps * tokens_per_step, machine.device)
        if wanted <= tokens_per_step or "data.batch_size" in given or "data.global_batch_size" in given:
            break
        tokens_per_step *= 2
    if steps < rules.MIN_STEPS:
        return None
    tokens = steps * batch_size * accumulate * config.context_length
    config = replace(config, dropout=given.get("model.config.dropout", rules.dropout(tokenizer, config, tokens)))
    recipe = rules.recipe(optimizer, config, steps, batch_size * accumulate * config.context_length, given)
    expected = rules.expected_bits_per_byte(tokenizer, config, tokens)
    return Candidate(
        tokenizer,
        config,
        recipe,
        batch_size,
        accumulate,
        precision,
        steps,
        step_seconds,
        compile=compiled,
        bits_per_byte=expected,
    )


def _divide_batch(
    config: GPTConfig, tokens_per_step: int, given: dict[str, Any], machine: Machine, optimizer: Any, precision: str
) -> tuple[int, int]:
    """Return B, windows in a forward pass that fit into the memory, and the forward passes of a step; (0, 0): none."""
    windows = max(1, tokens_per_step // config.context_length)
    if "data.global_batch_size" in given:
        windows = given["data.global_batch_size"]
    batch_size = given.get("data.batch_size", windows)
    gpt = model_without_memory(config)
    while True:
        state, activations = estimate_memory(gpt, optimizer, batch_size, precision, machine.device.type)
        fits = machine.free_memory is None or state + activations <= MEMORY_SHARE * machine.free_memory
        if fits:
            break
        if "data.batch_size" in given or batch_size == 1:
            return 0, 0
        batch_size //= 2
    accumulate = (
        max(1, windows // batch_size) if "data.batch_size" not in given or "data.global_batch_size" in given else 1
    )
    return batch_size, accumulate
