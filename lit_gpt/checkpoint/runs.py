"""The checkpoints in the folders of runs: which is the newest, and which belong to a future that was given up.

Within the folder of a run the later step is newer; between runs the time that is stored in the checkpoints decides. So
copying or moving files is harmless, and so is a clock that was set back. A copy beside the folder of a run, as
version_0_backup, is not newer than the folder.
"""

import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

from lit_gpt.checkpoint.order import Order, read_comment
from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.errors import UserError
from lit_gpt.files import BACKUP_SUFFIX, fsync_folder, remove


def newest_checkpoint(
    logs: Path, name: str | None = None, *, prefer_best: bool = False
) -> tuple[Checkpoint | None, str]:
    """Find the newest undamaged checkpoint.

    Args:
        logs: The folder with the runs, as logs/<name>/version_<n>/.
        name: Which runs to search; all by default.
        prefer_best: Whether to take best.ckpt from the folder of the newest checkpoint, if it has one.

    Returns:
        The checkpoint, opened and verified, or None if there is none; and a warning that names the damaged checkpoints
        that were skipped, or "".

    Raises:
        UserError: There are checkpoints, and all of them are damaged.
    """
    found, damaged = _find_checkpoints(logs.glob("*/version_*") if name is None else Path(logs, name).glob("version_*"))
    if prefer_best and found:
        best = f"{os.path.dirname(found[-1])}/best.ckpt"
        if best in found:
            found.remove(best)
            found.append(best)
    newest: Checkpoint | None = None
    while found and newest is None:
        candidate = found.pop()
        try:
            newest = Checkpoint.open(candidate)
        except UserError:
            damaged.append(candidate)
    if not damaged:
        return newest, ""
    paths = ", ".join(sorted(damaged))
    if newest is None:
        raise UserError(
            f"no checkpoint can be used: {paths}: give one of them as --ckpt_path to see what is wrong, or choose "
            "another --name"
        )
    return newest, f"skipped damaged checkpoints {paths}; using {newest.path}"


def run_names(logs: Path) -> list[str]:
    """Return the names of the runs that have a checkpoint, the one with the newest first."""
    found, _ = _find_checkpoints(logs.glob("*/version_*"))
    return list(dict.fromkeys(Path(path).parts[-3] for path in reversed(found)))


def _find_checkpoints(folders: Iterable[Path]) -> tuple[list[str], list[str]]:
    """Return the paths of the checkpoints in the folders of runs, the newest last; and those of damaged ones."""
    found: list[tuple[float, int, bool, bool, str]] = []
    damaged: list[str] = []
    for folder in folders:
        orders = {path: read_order(path) for path in _checkpoints(folder)}
        damaged += [path for path, order in orders.items() if order is None]
        is_run = re.fullmatch(r"version_\d+", folder.name) is not None
        latest = 0.0  # a clock that was set back does not make a later step older
        for order, path in sorted((order, path) for path, order in orders.items() if order is not None):
            latest = max(latest, order.saved_at)
            found.append((latest, order.step, is_run, path.endswith("/last.ckpt"), path))
    return [path for *_, path in sorted(found)], damaged


def _checkpoints(folder: Path) -> list[str]:
    """Return the paths of all checkpoints in the folder of a run. They are strings, because there may be many."""
    with contextlib.suppress(OSError):  # it is no folder
        names = os.listdir(folder)
        if any(map(_is_backup, names)):
            _restore_backups(folder)
            names = os.listdir(folder)
        return [f"{folder}/{name}" for name in names if name.endswith(".ckpt") and not name.startswith(".")]
    return []


def read_order(path: str) -> Order | None:
    """Return the step and the time of a checkpoint; None if it is damaged."""
    order = read_comment(path)
    if order is None:
        with contextlib.suppress(UserError):
            checkpoint = Checkpoint.open(path, verify=False)
            order = Order(checkpoint.step, checkpoint.saved_at)
    return order


def later_checkpoints(folder: Path, step: int) -> list[Path]:
    """Return the checkpoints in the folder of a run that are later than a step, the latest first; damaged ones too."""
    orders = {path: read_order(path) for path in _checkpoints(folder)}
    steps = {path: math.inf if order is None else order.step for path, order in orders.items()}
    later = sorted((steps[path], path) for path in steps if steps[path] > step)
    return [Path(path) for _, path in reversed(later)]


def set_aside_later_checkpoints(folder: Path, step: int) -> None:
    """Move the checkpoints that are later than a step into a new folder abandoned_<n>: the run goes on from that step.

    They move one after another, the latest first. So at any moment the checkpoints that remain are those of a run that
    has reached one of these steps.

    Raises:
        OSError: One cannot be moved.
    """
    later = later_checkpoints(folder, step)
    if later:
        paths = (folder / f"abandoned_{number}" for number in itertools.count())
        aside = next(path for path in paths if not path.exists())
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
        fsync_folder(aside)
        fsync_folder(folder)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left half-written or half-removed; no process may be writing to the folder."""
    with contextlib.suppress(OSError):  # what cannot be removed does no harm
        _restore_backups(folder)
        for path in (*folder.glob(".*.ckpt.*"), *folder.glob(".*.unfinished")):
            remove(path)


def _is_backup(name: str) -> bool:
    return name.startswith(".") and name.endswith(f".ckpt{BACKUP_SUFFIX}")


def _restore_backups(folder: Path) -> None:
    """Undo the first half of an `atomic_replace` whose process was killed before the second half."""
    for name in filter(_is_backup, os.listdir(folder)):
        path = folder / name.removeprefix(".").removesuffix(BACKUP_SUFFIX)
        if not path.exists():
            (folder / name).rename(path)
