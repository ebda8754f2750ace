"""From a command with `--budget` to the settings that the planner chooses for it, and back to a command."""

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import Namespace

from lit_gpt.cli.arguments import CommandLine
from lit_gpt.cli.budget import Budget, check_budget, usual_budget
from lit_gpt.cli.exclusive_settings import LIMITS
from lit_gpt.cli.help import format_value
from lit_gpt.cli.messages import print_command, print_lines, print_page, program_name
from lit_gpt.cli.parser import load_settings
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.lines import display_width, pad_line
from lit_gpt.planning.overheads import Overheads
from lit_gpt.planning.plan import USED_SHARE, Plan, make_plan
from lit_gpt.training.deadline import MARGIN, Deadline
from lit_gpt.training.steps_in_time import StepsInTime

# Seconds from the start of a command to the planner on the machine on which `Overheads` was measured.
REFERENCE_START = 2.8
MAX_SLOWNESS = 4.0  # the first start after an installation reads everything from the disk, and says less
RESERVE_SHARE, MAX_RESERVE = 0.02, 5.0  # of a budget, in seconds at most: a busy machine may take so long to end
MAX_START_SHARE = 0.25  # of a budget, for what is neither choosing nor training
NOT_REPEATED = ("--budget", "--plan", "--no_plan")  # in the command that equals a plan


@dataclass(frozen=True)
class Planned:
    """A plan, and the budget that it is made for.

    Attributes:
        plan: The plan.
        budget: The budget.
        overheads: The time of the run outside of its steps.
        is_all: Whether the command ends with the plan (`--plan`).
    """

    plan: Plan
    budget: Budget
    overheads: Overheads
    is_all: bool

    def check_time_left(self) -> None:
        """Check that there is time to train when the text is tokenized.

        Raises:
            UserError: There is not.
        """
        if time.perf_counter() + self.overheads.begin >= self._last_step_end():
            raise UserError(
                f"--budget {self.budget.text} is too short: {self.budget.used:.0f} s of it are used when the text is "
                "tokenized; give the same command again, which finds the tokens, or a longer budget"
            )

    def steps_in_time(self) -> StepsInTime:
        """Return what changes the number of steps if they take more or less time than expected."""
        end = self._last_step_end() + self.plan.validation_seconds
        return StepsInTime(end, self.plan.step_seconds, self.plan.validation_seconds)

    def deadline(self) -> Deadline:
        """Return what ends the run in time if its steps take longer than expected."""
        reserve = min(RESERVE_SHARE * self.budget.seconds, MAX_RESERVE)
        end = self.budget.start + self.budget.seconds - reserve
        return Deadline(end, self._ending_seconds, self.overheads.end, self.budget.text)

    @property
    def _ending_seconds(self) -> float:
        """The expected time after the last step: its validation, the report and the end of the process."""
        return self.plan.validation_seconds + self.overheads.end

    def _last_step_end(self) -> float:
        """Return when the last step should end, so early that the deadline does not stop the run before it."""
        target = self.budget.start + USED_SHARE * self.budget.seconds - self.plan.validation_seconds
        return min(target, self.deadline().end - MARGIN * self._ending_seconds)


def choose_settings(arguments: CommandLine, budget: Budget) -> Planned:
    """Let the planner choose the settings that the command leaves open, and add them to it as flags.

    Args:
        arguments: The command line; changed in place.
        budget: Its budget.

    Raises:
        UserError: A setting is wrong or does not go together with a budget, or the budget or the text is too short.
    """
    parser, settings, _ = load_settings(arguments, is_complete=False)
    check_budget(settings, parser.given, budget)
    given = {key: settings[key] for key in sorted(parser.given - {"budget", "plan", *LIMITS})}
    data = TextDataModule(**settings.data)
    sources = data.sources()
    overheads = scale_overheads(budget)
    check_length(budget, overheads)
    plan = make_plan(sources, data.corpus_config, given, budget.remaining, overheads, find_device(settings))
    chosen = {**plan.settings, **other_settings(settings, parser.given)}
    arguments.add_flags([f"--{key}={format_value(value)}" for key, value in chosen.items()])
    check_choice(arguments, budget)
    return Planned(plan, budget, overheads, settings.plan)


def check_choice(arguments: CommandLine, budget: Budget) -> None:
    """Check that the chosen settings go together with the given ones, before anything is printed or written.

    Raises:
        UserError: They do not.
    """
    try:
        _, settings, _ = load_settings(arguments)
        TextDataModule(**settings.data)
    except UserError as error:
        raise UserError(
            f"--budget {budget.text} chooses settings that do not go with the given ones: {error}"
        ) from None


def scale_overheads(budget: Budget) -> Overheads:
    """Return the time outside of the steps on this machine, whose speed the start of the command shows."""
    return Overheads(min(max(budget.used / REFERENCE_START, 0.25), MAX_SLOWNESS))


def check_length(budget: Budget, overheads: Overheads) -> None:
    """Check that the budget leaves time to train.

    Raises:
        UserError: It does not.
    """
    start, rest = budget.used, overheads.begin + overheads.end
    if start + rest > MAX_START_SHARE * budget.seconds:
        raise UserError(
            f"--budget {budget.text} is too short: start-up takes {start:.1f} s, and the beginning and the end of a "
            f"run {rest:.1f} s, more than {MAX_START_SHARE:.0%} of it; give "
            f"{usual_budget((start + rest) / MAX_START_SHARE)} or more"
        )


def find_device(settings: Namespace) -> torch.device:
    """Return the device on which the Trainer will train."""
    accelerator = settings.trainer.accelerator
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def other_settings(settings: Namespace, given: set[str]) -> dict[str, Any]:
    """Return what a budget decides and the planner does not: one device, and no limit but the steps."""
    chosen: dict[str, Any] = {}
    if "trainer.devices" not in given and torch.cuda.device_count() > 1 and settings.trainer.accelerator != "cpu":
        chosen["trainer.devices"] = 1
    return chosen


# ----------------------------------------------------------------------------------------------------------- printing


def print_plan(plan: Plan) -> None:
    """Print what is chosen, and why, as a table."""
    width = max((display_width(what) for what, _ in plan.reasons), default=0)
    print_page(f"{pad_line(what, width)}   {why}".rstrip() for what, why in plan.reasons)


def print_explicit_command(arguments: CommandLine) -> None:
    """Print the command that gives all chosen settings, so that it trains without a planner."""
    program = [program_name("python")], [sys.argv[0]]
    print_lines("", "the same settings, without a planner:")
    print_command("command", *program, *split_flags(arguments.explicit_args))


def split_flags(args: list[str]) -> list[list[str]]:
    """Return each flag with its value, once: of a flag that is given again, the last value counts.

    Flags that add to a list, as `--data.files+`, stay as often as they are given. A word that does not begin with two
    dashes is the value of the flag before it.
    """
    parts: dict[str, list[str]] = {}
    key = ""
    for number, arg in enumerate(args):
        if arg.startswith("--"):
            flag = arg.partition("=")[0]
            is_repeated = flag.endswith("+") or flag in ("--config", "--allow_imports")
            key = f"{flag} {number}" if is_repeated else flag
            parts.pop(key, None)
        flag, equals, value = arg.partition("=")
        is_pair = equals and arg.startswith("--") and value and not value.startswith("-")
        parts.setdefault(key, []).extend([flag, value] if is_pair else [arg])
    return [part for key, part in parts.items() if key not in NOT_REPEATED]
