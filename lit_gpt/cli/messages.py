"""What a command prints on the console besides its results: usage errors, program names, fewer warnings."""

import argparse
import logging
import shutil
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from lit_gpt.errors import UserError


class LineParser(argparse.ArgumentParser):
    """An argument parser that accepts flags in full only, shows their defaults, and reports an error in one line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def program_name(name: str) -> str:
    """Return how to call a program of this Python environment: its name if that is on PATH, else its path."""
    program = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(program):
        return name
    return str(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program)


def quiet_lightning() -> None:
    """Silence Lightning's announcements, which the preflight replaces, and warnings that do not apply."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "You're resuming from a checkpoint that ended before the epoch ended",  # the sampler continues from the step
        "The number of training batches",  # is smaller than the logging interval, which counts across epochs
        "Be aware that when using `ckpt_path`",  # a validation does not need the state of training callbacks
        "The '.*_dataloader' does not have many workers",  # one process prepares a batch in a third of a millisecond
        "It is recommended to use `self.log",  # with sync_dist: the logged values are equal on all devices already
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # lightning 2.6 calls what torch has renamed
    ):
        warnings.filterwarnings("ignore", message=message)
