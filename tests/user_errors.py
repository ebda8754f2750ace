"""Helpers for tests of user errors: a command that cannot work prints one line and changes no file."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conftest import Fit, Result, forked

RUN = Path("logs/small/version_0")
LAST = str(RUN / "last.ckpt")

TABLE = ["--data.files", "t.csv"]
OVERLAY = ["--config", "overlay.yaml"]
TWO_RANKS = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


@dataclass
class Case:
    """A command that ends with a user error.

    Attributes:
        flags: The flags of the command.
        message: A part of the line that it prints.
        prepare: Makes the files that the command meets.
    """

    flags: list[str]
    message: str
    prepare: Callable[[], object] = lambda: None


def write(content: str | bytes, path: str = "t.csv") -> Callable[[], object]:
    """Return a function that writes a file."""
    return lambda: Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


class Harmful:
    """An object that runs a shell command if it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("echo harm > harmed",)


def folder_contents() -> dict[str, bytes | None]:
    """Return all files and folders in the working folder, without the token cache, which any command may fill."""
    paths = (path for path in Path().rglob("*") if path.parts[:2] != ("data", "cache"))
    return {
        str(path): path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None
        for path in paths
        if str(path) not in ("data", "out.txt", "err.txt")
    }


def assert_user_error(result: Result, message: str) -> None:
    """Check that a command ended with status 2 and printed one line with `message`, and nothing else."""
    assert result.status == 2, result.err
    assert message in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert result.out == ""


def check_case(fit: Fit, case: Case) -> None:
    """Check that a command ends with a user error, changes no file, and runs no code of a checkpoint."""
    case.prepare()
    before = folder_contents()
    steps = [] if "--trainer.max_steps" in case.flags else ["--trainer.max_steps", 8]
    assert_user_error(fit(*case.flags, *steps), case.message)
    assert folder_contents() == before
    assert not Path("harmed").exists()


def check_case_on_two_ranks(folder: Path, case: Case) -> None:
    """Check that a command on two ranks prints its error once and changes no file."""
    case.prepare()
    before = folder_contents()
    flags = ["--config", "small.yaml", *TWO_RANKS, "--trainer.max_steps", 8, *case.flags]
    assert_user_error(forked(folder, *flags), case.message)
    assert folder_contents() == before
