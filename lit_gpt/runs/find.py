"""Find the folders of runs, and what became of a run that did not record its end."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lit_gpt.errors import UserError, did_you_mean
from lit_gpt.files import expand_path, open_regular
from lit_gpt.runs.summary import SUMMARY_FILE

LOGS = Path("logs")  # the default folder of runs


def find_runs(words: list[str], logs: Path = LOGS) -> tuple[list[str], int]:
    """Return the folders of runs that have a summary, and how many have none.

    Args:
        words: Names of runs in `logs`, or folders: of a run, or of several. [] is all of `logs`.
        logs: The folder of all runs.

    Raises:
        UserError: A word names no folder.
    """
    folders: list[str] = []
    without = 0
    seen = set()  # a folder that is named twice, or that a symbolic link leads to, is one run
    for top in [_resolve(word, logs) for word in words] or [logs]:
        for folder, has_summary in _walk(str(top), depth=2):
            with contextlib.suppress(OSError):  # it has just been removed
                state = os.stat(folder)
                if (state.st_dev, state.st_ino) not in seen:
                    seen.add((state.st_dev, state.st_ino))
                    without += not has_summary
                    folders += [folder] if has_summary else []
    return folders, without


def _resolve(word: str, logs: Path) -> Path:
    for path in (logs / word, expand_path(word)):
        if path.is_dir():
            return path
    names = sorted(path.name for path in logs.iterdir() if path.is_dir()) if logs.is_dir() else []
    raise UserError(
        f"{word} is neither a run in {logs} nor a folder{did_you_mean(word, names)}: give the name of a run, or a "
        "folder of runs"
    )


def _walk(folder: str, depth: int) -> Iterator[tuple[str, bool]]:
    """Yield the folders of runs in a folder, or itself, each with whether it has a summary."""
    if os.path.lexists(os.path.join(folder, SUMMARY_FILE)):
        yield folder, True
    elif os.path.basename(folder).startswith("version_"):
        yield folder, False
    elif depth > 0:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:  # it is no folder, or may not be read
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir() and not entry.name.startswith("."):
                    yield from _walk(entry.path, depth - 1)


def what_became(folder: str) -> Literal["running", "killed", "unknown"]:
    """Return whether a run whose status is "running" still runs.

    A process that trains holds a lock, which the system takes from it when it ends, however it ends.
    """
    try:
        import fcntl  # does not exist on Windows

        with open_regular(os.path.join(folder, ".lock")) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # closing the file gives it back
        return "killed"
    except BlockingIOError:
        return "running"
    except (ImportError, OSError):
        return "unknown"
