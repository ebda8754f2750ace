"""Write files atomically: a file appears whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from lit_gpt.errors import UserError

OLD = ".old"  # what a folder is called while another takes its place


def sync_folder(folder: Path) -> None:
    """Has the disk remember what the files in it are called."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def unfinished(path: Path) -> Path:
    """What is called `path` when it is whole."""
    return path.with_name(f".{path.name}.unfinished")


def put_in_place(unfinished: Path, path: Path) -> None:
    """Gives a whole file or folder its name; a folder that had it goes when the new one stands there."""
    old = path.with_name(f".{path.name}{OLD}")
    if unfinished.is_dir() or path.is_dir():  # neither can be replaced in one step
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
    os.replace(unfinished, path)
    sync_folder(path.parent)
    if old.exists():
        shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()


def not_written(path: Path, why: object) -> UserError:
    before = "; what it held before is whole" if path.exists() else ""
    return UserError(
        f"{path} cannot be written ({why}){before}: make room there, or write elsewhere with --trainer.default_root_dir"
    )


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Makes the file `path` appear whole or not at all: written beside it, synced, renamed, the folder synced.

    Raises:
        UserError: the disk is full, the folder may not be written to, …; what stood at `path` before still does.
    """
    file_path = unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(file_path, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(file_path, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            file_path.unlink()
        # torch.save turns what the disk says into a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(error, OSError | RuntimeError) and isinstance(cause, OSError):
            raise not_written(path, cause.strerror or cause) from error
        raise
