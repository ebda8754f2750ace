"""Candidates for a run: every combination of tokenizer, context length and shape, with what the rules expect of it."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from lit_gpt.model import GPTConfig
from lit_gpt.optim import OptimizerName
from lit_gpt.planning import rules
from lit_gpt.planning.bare_training import Recipe
from lit_gpt.planning.memory import estimate_memory_of_shape
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
            self.config,
            self.batch_size,
            self.recipe.optimizer,
            self.precision,
            self.accumulate,
            self.compile,
            self.activation_checkpointing,
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
    """Return every candidate that can be trained in the time, the one with the lowest expected loss first.

    Args:
        tokenizers: The tokenizers to choose from.
        given: The settings that the person gave, such as "model.config.d_model" -> 128; they stay as they are.
        machine: Where the run takes place. Its memory is not considered, see `fit_into_memory`.
        seconds: The time to tokenize the text and to train in.
    """
    found = []
    for tokenizer in tokenizers:
        left = seconds - tokenizer.prepare_seconds
        for width, blocks in _shapes(given):
            for context_length in _context_lengths(tokenizer, given):
                config = _make_config(tokenizer, width, blocks, context_length, given)
                candidate = None if config is None else _fit_into_time(tokenizer, config, given, machine, left)
                if candidate is not None:
                    found.append(candidate)
            if found and found[-1].steps < 2 * rules.MIN_STEPS:  # larger models are too slow
                break
    return sorted(found, key=lambda candidate: candidate.bits_per_byte)


def _shapes(given: dict[str, Any]) -> list[tuple[int, int]]:
    """Return width and blocks of each step of the ladder, with those that are given in place of the others."""
    width, blocks = given.get("model.config.d_model"), given.get("model.config.num_blocks")
    return list(dict.fromkeys((width or step[0], blocks or step[1]) for step in SHAPES))


def _context_lengths(tokenizer: TokenizerStatistics, given: dict[str, Any]) -> list[int]:
    """Return the context lengths to choose from."""
    if "model.config.context_length" in given:
        return [given["model.config.context_length"]]
    longest = rules.longest_context(tokenizer)
    return [length for length in CONTEXT_LENGTHS if length <= longest] or [longest]


def _make_config(
    tokenizer: TokenizerStatistics, width: int, blocks: int, context_length: int, given: dict[str, Any]
) -> GPTConfig | None:
    """Return the shape of a model; None if the given settings do not go with its width."""
    prefix = "model.config."
    fixed = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    chosen = {**rules.architecture(width, tokenizer), "d_model": width, "num_blocks": blocks}
    try:
        return GPTConfig(**{**chosen, "context_length": context_length, **fixed, "vocab_size": tokenizer.vocab_size})
    except ValueError:
        return None


def _fit_into_time(
    tokenizer: TokenizerStatistics, config: GPTConfig, given: dict[str, Any], machine: Machine, seconds: float
) -> Candidate | None:
    """Return a shape with its batch, steps and rates; None if fewer steps than `rules.MIN_STEPS` fit into the time.

    The tokens in a step follow from the tokens that can be trained on in the time. That number grows a little with the
    tokens in a step, because the optimizer then takes less of the time.
    """
    optimizer: OptimizerName = given.get("model.optimizer", "muon")
    precision = given.get("trainer.precision") or ("bf16-mixed" if machine.has_bfloat16 else "32-true")
    compiled = given.get("model.compile", rules.compile_pays(machine.device, seconds))
    windows_given = given.get("data.global_batch_size") or given.get("data.batch_size")
    tokens_per_step = rules.MIN_TOKENS_PER_STEP
    while True:
        windows = windows_given or max(1, tokens_per_step // config.context_length)
        workload = Workload(config, windows, optimizer, precision, compile=compiled)
        step_seconds = machine.speed.step_seconds(workload)
        steps = int(seconds / step_seconds)
        if windows_given or rules.tokens_per_step(steps * tokens_per_step, machine.device) <= tokens_per_step:
            break
        tokens_per_step *= 2
    if steps < rules.MIN_STEPS:
        return None
    tokens = steps * windows * config.context_length
    epochs = tokens / tokenizer.train_tokens
    config = replace(config, dropout=given.get("model.config.dropout", rules.dropout(epochs)))
    recipe = rules.recipe(optimizer, config, steps, windows * config.context_length, epochs, given)
    expected = rules.expected_bits_per_byte(tokenizer, config, tokens)
    return Candidate(tokenizer, config, recipe, windows, 1, precision, steps, step_seconds, False, compiled, expected)


def fit_into_memory(candidate: Candidate, given: dict[str, Any], machine: Machine) -> Candidate | None:
    """Return a candidate whose batch is divided into forward passes that fit into the memory; None if none fits.

    Activation checkpointing comes last, because it costs a third more time.
    """
    windows = candidate.batch_size * candidate.accumulate
    first = min(windows, given.get("data.batch_size", windows))
    sizes = [first] if "data.batch_size" in given else [first >> n for n in range(first.bit_length())]
    recomputes = given.get("model.activation_checkpointing", False)
    for recompute in [recomputes] if recomputes or "model.activation_checkpointing" in given else [False, True]:
        for batch_size in sizes:
            needed = estimate_memory_of_shape(
                candidate.config,
                candidate.recipe.optimizer,
                batch_size,
                candidate.precision,
                machine.device.type,
                recompute,
            )
            if machine.free_memory is None or sum(needed) <= MEMORY_SHARE * machine.free_memory:
                return replace(
                    candidate,
                    batch_size=batch_size,
                    accumulate=max(1, windows // batch_size),
                    activation_checkpointing=recompute,
                )
    return None
