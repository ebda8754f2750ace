"""`--budget`: the time for a command, and what does not go together with it."""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import Namespace

from lit_gpt.cli.arguments import CommandLine
from lit_gpt.errors import UserError, shorten

UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}  # seconds, the largest first
EXAMPLES = "90s, 10m, 2h or 1d"
# Proposed instead of a budget that is too short, in seconds.
USUAL_BUDGETS = (10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600, 900, 1_800, 3_600, 7_200, 14_400, 28_800, 86_400)


@dataclass(frozen=True)
class Budget:
    """The time that a command may take.

    Attributes:
        text: It as the user gave it, such as "10m".
        seconds: It in seconds.
        start: When the command began, as time.perf_counter().
    """

    text: str
    seconds: float
    start: float

    @property
    def used(self) -> float:
        """The seconds since the command began."""
        return time.perf_counter() - self.start

    @property
    def remaining(self) -> float:
        """The seconds until the budget ends; negative after its end."""
        return self.seconds - self.used


def parse_duration(text: str) -> float:
    """Return a duration in seconds: `90s`, `10m`, `1.5h`, `1d`, or several units, the largest first, as `1h30m`.

    Raises:
        UserError: It is no such duration, or it is zero.
    """
    number = r"(\d{1,9}(?:\.\d{1,9})?)"
    match = re.fullmatch("".join(rf"(?:{number}{unit})?" for unit in UNITS), "".join(text.split()))
    if re.fullmatch(r"[\d.]+", text.strip()):
        raise UserError(f"--budget {shorten(text)} has no unit: give a unit, as {EXAMPLES}")
    if not text.strip() or match is None:
        raise UserError(f"--budget {shorten(text)!r} is no time: give a number and a unit, as {EXAMPLES}")
    seconds = sum(float(count) * unit for count, unit in zip(match.groups(), UNITS.values()) if count is not None)
    if seconds == 0:
        raise UserError(f"--budget {text} leaves no time: give more, as {EXAMPLES}")
    return seconds


def format_budget(seconds: float) -> str:
    """Return whole seconds as they can be typed behind `--budget`: `45s`, `90s`, `10m`, `2h`, `1d`."""
    for unit, size in UNITS.items():
        if seconds >= size and seconds % size == 0 and (seconds >= 2 * size or seconds == size):
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def usual_budget(seconds: float) -> str:
    """Return the shortest usual budget that is not shorter than some seconds."""
    return format_budget(next((usual for usual in USUAL_BUDGETS if usual >= seconds), 86_400 * (seconds // 86_400 + 1)))


def find_budget(arguments: CommandLine, start: float) -> Budget | None:
    """Return the budget of a command; None if it has none.

    Args:
        arguments: The command line.
        start: When the command began, as time.perf_counter().

    Raises:
        UserError: It is no duration, or the command continues a run, whose settings and steps are fixed.
    """
    given = [flag.value for flag in arguments.text_flags if flag.key == "budget"]
    text = given[-1] if given else None
    if not isinstance(text, str):
        return None
    budget = Budget(text, parse_duration(text), start)
    command = arguments.args[0]
    if command != "fit":
        raise UserError(f"--budget {text} is for training: leave out --budget or {command}")
    if arguments.checkpoint is not None or arguments.gives_checkpoint:
        raise UserError(
            f"--budget {text} leaves nothing to choose beside --ckpt_path: the settings and steps of a run are fixed "
            "when it begins; leave out --budget"
        )
    return budget


def check_budget(settings: Namespace, given: set[str], budget: Budget) -> None:
    """Check that the settings of a command leave the length of the run to its budget, and that they train one model.

    Args:
        settings: All settings.
        given: The names of those that flags and configs give.
        budget: The budget.

    Raises:
        UserError: They do not.
    """
    for message in _budget_errors(settings, given, f"--budget {budget.text}"):
        raise UserError(message)


def _budget_errors(settings: Namespace, given: set[str], flag: str) -> Iterator[str]:
    trainer = settings.trainer
    for name in ("max_steps", "max_epochs", "max_time", "min_steps", "min_epochs"):
        if f"trainer.{name}" in given and trainer[name] not in (None, -1):
            yield f"{flag} and --trainer.{name} {trainer[name]} both say how long to train: leave one out"
    if settings.model.init_from is not None:
        yield f"{flag} chooses settings for a new model: leave out --model.init_from, or give --trainer.max_time"
    if settings.preflight:
        yield (
            f"--preflight measures given settings, and {flag} chooses them: give {flag} --plan, and --preflight with "
            "the command that it prints"
        )
    for name in ("fast_dev_run", "barebones", "overfit_batches"):
        if trainer[name]:
            yield f"{flag} trains a model to keep, and --trainer.{name} does not: leave one out"
    if trainer.accumulate_grad_batches != 1:
        yield (
            f"{flag} chooses how a step is divided: give --data.global_batch_size, the windows in a step, instead of "
            f"--trainer.accumulate_grad_batches {trainer.accumulate_grad_batches}"
        )
    if "trainer.devices" in given and not _is_one_device(trainer.devices):
        yield f"{flag} measures one device: give --trainer.devices 1, or leave out --budget"
    processes = [os.environ.get(name, "1") for name in ("WORLD_SIZE", "SLURM_NTASKS")]
    if trainer.num_nodes > 1 or any(count.isdecimal() and int(count) > 1 for count in processes):
        yield f"{flag} measures one device: start one process on one machine, or leave out --budget"
    if "trainer.strategy" in given and trainer.strategy != "auto":
        yield f"{flag} measures one device: leave out --trainer.strategy, or --budget"


def _is_one_device(devices: Any) -> bool:
    """Return whether a value of `trainer.devices` stands for one device, as 1, [0] and, on most machines, auto do."""
    if str(devices) in ("auto", "-1"):
        return torch.cuda.device_count() <= 1
    return len(devices) == 1 if isinstance(devices, list) else str(devices) == "1"
