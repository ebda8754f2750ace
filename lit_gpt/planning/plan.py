"""A plan: the settings of the run that makes the most of a budget of time, and the reasons for them."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from lit_gpt.data.config import CorpusConfig
from lit_gpt.data.sources import Source
from lit_gpt.data.tokenize import read_texts
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.planning.overheads import Overheads

SAMPLE_CHARACTERS = 2**20
LEAST_CHARACTERS = 2_000
SHARE = 0.95  # of the time that is planned; the rest is for a machine that becomes slower
VALIDATIONS = 5


@dataclass(frozen=True)
class Plan:
    """What is chosen for a run, and why.

    Attributes:
        settings: The chosen settings, such as "model.config.d_model" -> 128. A setting that the person gave is not
            among them.
        reasons: At most ten rows: what is chosen, and why.
        seconds: The expected time from now to the last checkpoint.
        bits_per_byte: The expected loss on the validation split, in bits per byte; None if it cannot be predicted.
        prepare_seconds: The part of `seconds` until the text is tokenized.
        step_seconds: The part of `seconds` for each step; None if the number of steps is given.
        ending_seconds: The part of `seconds` after the last step: its validation, texts and checkpoints.
    """

    settings: dict[str, Any]
    reasons: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    bits_per_byte: float | None = None
    prepare_seconds: float = 0.0
    step_seconds: float | None = None
    ending_seconds: float = 0.0


def make_plan(
    sources: list[Source],
    config: CorpusConfig,
    given: dict[str, Any],
    seconds: float,
    overheads: Overheads,
    device: torch.device,
) -> Plan:
    """Choose the settings of a run.

    Args:
        sources: The files of text.
        config: How they are read. Its tokenizer is the person's choice only if "data.tokenizer" is given.
        given: The settings that flags and configs give, by name, such as "model.config.d_model" -> 128. They stay as
            they are.
        seconds: The time from now to the end of the command.
        overheads: The time that the run takes outside of its steps.
        device: Where the model will train.

    Raises:
        UserError: The text is too short for any model, or the time for reading it.
    """
    start = time.perf_counter()
    characters = 0
    used: set[str] = set()
    for text in read_texts(sources, config.read_options):
        characters += len(text)
        used.update(text)
        if characters >= SAMPLE_CHARACTERS:
            break
    if characters < LEAST_CHARACTERS:
        raise UserError(
            f"the text has {characters:,} characters: give {LEAST_CHARACTERS:,} or more, of which a model can learn"
        )
    chosen = {
        "data.tokenizer": "char",
        "data.batch_size": 16,
        "model.config.context_length": 64,
        "model.config.d_model": 128,
        "model.config.num_blocks": 4,
        "model.config.num_heads": 2,
    }
    step_seconds = _time_step({**chosen, **given}, len(used) + 1, device)
    prepare = 2 * (time.perf_counter() - start)
    validation = 32 * step_seconds / 3 + overheads.sample + 2 * overheads.checkpoint
    left = SHARE * seconds - prepare - overheads.begin - (VALIDATIONS + 1) * validation - overheads.end
    steps = int(left / step_seconds)
    if steps < 1:
        raise UserError(f"{seconds:.0f} s are too few for a step: give a longer --budget")
    chosen |= {"trainer.max_steps": steps, "trainer.val_check_interval": max(1, steps // VALIDATIONS)}
    settings = {key: value for key, value in chosen.items() if key not in given}
    return Plan(
        settings,
        [(f"steps       {steps:,}", f"{1e3 * step_seconds:.1f} ms each")],
        SHARE * seconds,
        None,
        prepare,
        step_seconds,
        validation + overheads.end,
    )


def _time_step(settings: dict[str, Any], vocab_size: int, device: torch.device) -> float:
    """Return the seconds of a training step, without the optimizer."""
    names = ("context_length", "d_model", "num_blocks", "num_heads")
    config = GPTConfig(vocab_size=vocab_size, **{name: settings[f"model.config.{name}"] for name in names})
    model = GPT(config).to(device)
    shape = settings["data.batch_size"], config.context_length
    tokens = torch.randint(vocab_size, shape, device=device)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        model.loss(tokens, tokens).backward()
        times.append(time.perf_counter() - start)
    return 1.2 * sorted(times)[len(times) // 2]
