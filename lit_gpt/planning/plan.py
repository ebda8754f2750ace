"""A plan: the settings of the run that makes the most of a budget of time, and the reasons for them."""

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lit_gpt.data.config import CorpusConfig
from lit_gpt.data.sources import Source
from lit_gpt.device import free_memory, supports_bfloat16
from lit_gpt.errors import UserError
from lit_gpt.figures import format_bytes, format_duration
from lit_gpt.planning import rules
from lit_gpt.planning.candidates import Candidate, Machine, fit_into_memory, list_candidates
from lit_gpt.planning.choose import MIN_PILOT_SECONDS, encode_sample, pick, successive_halving
from lit_gpt.planning.memory import parameter_count
from lit_gpt.planning.overheads import Overheads
from lit_gpt.planning.settings import candidate_settings, describe_choice
from lit_gpt.planning.speed import TRAINER_SECONDS, measure_machine, measure_step
from lit_gpt.planning.text import TextSample, TokenizerStatistics, sample_text, tokenizer_options
from lit_gpt.tokenizer import Tokenizer

USED_SHARE = 0.93  # of the time, up to the last checkpoint; the rest is for a machine that becomes slower
CHOOSING_SHARE = 0.09  # of the time, at most
PILOT_SECONDS = 16.0  # for the steps of all short runs together, at most
MACHINE_SECONDS, STEP_SECONDS = (0.9, 3.0), (0.9, 4.0)  # shortest and longest measurement of the machine and of a step
COMPILE_SECONDS = 40.0  # on a GPU
VALIDATION_SHARE = 0.03  # of the time, for all validations together
VALIDATIONS = 10


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
        step_seconds: The part of `seconds` for each step.
        validation_seconds: The part of `seconds` for each validation, with its texts and checkpoints.
    """

    settings: dict[str, Any]
    reasons: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    bits_per_byte: float | None = None
    prepare_seconds: float = 0.0
    step_seconds: float = 0.0
    validation_seconds: float = 0.0


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
        UserError: The text is too short for any model, the time is, or no model fits into the memory.
    """
    start = time.perf_counter()
    sample = sample_text(sources, config)
    options = tokenizer_options(sample, config, given, rules.VOCAB_SIZES)
    speed = measure_machine(device, _between(0.015 * seconds, MACHINE_SECONDS))
    machine = Machine(device, speed, free_memory(device), supports_bfloat16(device))
    training_seconds = 0.85 * seconds
    tokenize_seconds = min(statistics.prepare_seconds for statistics, _ in options)
    if training_seconds <= tokenize_seconds:
        raise UserError(
            f"reading and tokenizing the text takes about {format_duration(tokenize_seconds)}, and {seconds:.0f} s are "
            "left: give a longer --budget"
        )
    found = list_candidates([statistics for statistics, _ in options], given, machine, training_seconds)
    if not found:
        raise UserError(
            f"{seconds:.0f} s are too few for {rules.MIN_STEPS} steps of any model on this text: give a longer --budget"
        )
    picked = [fitting for candidate in pick(found) if (fitting := fit_into_memory(candidate, given, machine))]
    if not picked:
        raise UserError(
            f"no model fits into {format_bytes(machine.free_memory or 0)} of free memory: free some, or give a smaller "
            "--data.batch_size or --model.config"
        )
    chosen, pilots = _compare(picked, sample, options, given, seconds, start, device)
    chosen = replace(chosen, step_seconds=_time_step(chosen, machine, _between(0.02 * seconds, STEP_SECONDS)))
    left = seconds - (time.perf_counter() - start)
    rows = describe_choice(chosen, found, sample, pilots)
    return _complete_plan(chosen, given, machine, left, overheads, rows)


def _between(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])


def _time_step(chosen: Candidate, machine: Machine, seconds: float) -> float:
    """Return the seconds of a step of a candidate under the Trainer, from a measurement of so many seconds.

    The measurement and the prediction come from different seconds of a machine whose speed changes. Their mean is less
    wrong than either. Compiling takes too long to measure, so compiled steps are predicted, and corrected by what is
    measured without it.
    """
    plain = replace(chosen.workload, compile=False)
    ratio = (measure_step(plain, machine.device, seconds) + TRAINER_SECONDS) / machine.speed.step_seconds(plain)
    return machine.speed.step_seconds(chosen.workload) * (ratio if chosen.compile else math.sqrt(ratio))


def _compare(
    picked: list[Candidate],
    sample: TextSample,
    options: list[tuple[TokenizerStatistics, Tokenizer]],
    given: dict[str, Any],
    seconds: float,
    start: float,
    device: torch.device,
) -> tuple[Candidate, int]:
    """Return the best candidate, and how many were compared in short runs: none where there is no time for them."""
    used = time.perf_counter() - start
    pilot_seconds = min(PILOT_SECONDS, CHOOSING_SHARE * seconds - used)
    if len(picked) == 1 or pilot_seconds < 2 * len(picked) * MIN_PILOT_SECONDS:
        return picked[0], 0
    names = {candidate.tokenizer.name for candidate in picked}
    texts = {stats.name: encode_sample(sample, tokenizer) for stats, tokenizer in options if stats.name in names}
    return successive_halving(picked, texts, given, pilot_seconds, device)[0], len(picked)


def _complete_plan(
    chosen: Candidate,
    given: dict[str, Any],
    machine: Machine,
    seconds: float,
    overheads: Overheads,
    rows: list[tuple[str, str]],
) -> Plan:
    """Return the plan of a candidate: how often the run validates, on how much text, and how many steps it takes."""
    length, prepare_seconds = chosen.config.context_length, chosen.tokenizer.prepare_seconds
    per_token = machine.speed.evaluation_seconds(chosen.config, 2**14, chosen.precision) / 2**14
    validations = VALIDATIONS if seconds >= 30 else VALIDATIONS // 2
    val_tokens = chosen.tokenizer.train_tokens / 9
    affordable = VALIDATION_SHARE * seconds / validations / per_token
    eval_windows = None if val_tokens + 256 * length <= affordable else max(16, int(affordable / 2 / length))
    evaluated = val_tokens + 256 * length if eval_windows is None else 2 * eval_windows * length
    prompts = given.get("generate.prompts", "")
    texts = overheads.samples(chosen.config, given.get("generate.max_new_tokens", 64))
    texts *= len(prompts) if isinstance(prompts, list) else 1
    validation = evaluated * per_token + texts + overheads.checkpoints(parameter_count(chosen.config))
    compiling = COMPILE_SECONDS if chosen.compile else 0.0
    outside = prepare_seconds + compiling + overheads.begin + texts + validations * validation + overheads.end
    left = USED_SHARE * seconds - outside
    steps = max(1, int(left / chosen.step_seconds))
    settings = candidate_settings(chosen, given)
    settings |= {
        "trainer.max_steps": steps,
        "trainer.val_check_interval": math.ceil(steps / validations),
        "data.eval_windows": eval_windows,
        "validate_at_start": False,
    }
    rows = [
        *rows,
        (f"steps       {steps:,}", f"about {1e3 * chosen.step_seconds:.1f} ms each; {validations} validations"),
    ]
    return Plan(
        {key: value for key, value in settings.items() if key not in given},
        rows,
        USED_SHARE * seconds,
        chosen.bits_per_byte,
        prepare_seconds,
        chosen.step_seconds,
        validation,
    )
