"""Atomic file writes: a file or folder appears complete or not at all."""

import contextlib
import errno
import io
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lit_gpt.errors import UserError

BACKUP_SUFFIX = ".old"  # of the hidden name that a folder has while another one replaces it


def expand_path(typed: str) -> Path:
    """Return a path as a person types it: `~` and `~user` at its beginning are home folders. `./~` is not."""
    return Path(os.path.expanduser(typed))


def fsync_folder(folder: Path) -> None:
    """Flush the names of the files in a folder to the disk."""
    if os.name == "posix":  # other systems cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_regular(path: str | Path) -> io.BufferedReader:
    """Open a file that somebody else may have put there, for reading.

    Raises:
        IsADirectoryError: It is a folder.
        OSError: It cannot be opened, or is no regular file: not a symbolic link, which could lead elsewhere, and not a
            pipe or a device, which could be read without end.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)  # without O_NONBLOCK, opening a pipe waits for a writer
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "Not a regular file", str(path))


def remove(path: Path) -> None:
    """Remove a file, a folder with its contents, or a symbolic link, which is not followed; do nothing without one.

    Raises:
        OSError: It cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder() -> Iterator[str]:
    """Create a folder for temporary files, and remove it at the end.

    Raises:
        UserError: The disk is full, or nothing may be written there.
    """
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:
        raise UserError(
            f"no temporary folder can be created ({error.strerror or error}): free disk space, or give TMPDIR a folder "
            "with free space"
        ) from None
    with folder as name:
        yield name


def temporary_path(path: Path) -> Path:
    """Return the hidden name, in the same folder, under which `path` is written until it is complete."""
    return path.with_name(f".{path.name}.unfinished")


def atomic_replace(source: Path, target: Path, durable: bool = True) -> None:
    """Rename a complete file or folder to `target` and replace what is there.

    A folder cannot be replaced in one step: the old one is renamed to `.<name>.old` first, and removed at the end.
    Symbolic links at either name are replaced; what they lead to is unchanged.

    Args:
        source: The file or folder.
        target: Its new name.
        durable: Whether the new name survives a power failure from now on.
    """
    backup = target.with_name(f".{target.name}{BACKUP_SUFFIX}")
    if source.is_dir() or (target.is_dir() and not target.is_symlink()):
        remove(backup)
        if target.is_symlink():
            target.unlink()
        elif target.exists():
            target.rename(backup)
    os.replace(source, target)
    if durable:
        fsync_folder(target.parent)
    with contextlib.suppress(OSError):  # what remains of the old one does no harm
        remove(backup)


def atomic_write(
    path: Path, write: Callable[[BinaryIO], Any], temporary_folder: Path | None = None, durable: bool = True
) -> None:
    """Write a file so that it appears complete or not at all.

    The content goes to a temporary file, which is flushed to the disk and then renamed to `path`. Its name is unique:
    several processes may write the same file at once, and the last one wins. A symbolic link at `path` is replaced, and
    none is followed.

    Args:
        path: The file to write. Its folder is created if it does not exist.
        write: Is called with the open temporary file and writes the content.
        temporary_folder: The folder of the temporary file, on the same file system; by default the folder of `path`.
        durable: Whether to wait until the disk has the file, some milliseconds. Without it a power failure, but nothing
            else, may leave an incomplete file.

    Raises:
        OSError: The file could not be written. A previous file at `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = (temporary_folder or path.parent) / f".{path.name}.{uuid.uuid4().hex}.unfinished"
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        atomic_replace(temporary, path, durable)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError | MemoryError):
            raise error.__context__ from None  # torch.save reports an error of `file.write` as a RuntimeError
        raise


def write_error(
    path: Path, cause: BaseException, remedy: str = "choose another folder with --trainer.default_root_dir"
) -> UserError:
    """Return the error to raise when `path` could not be written because of `cause`.

    Args:
        path: The file or folder that was to be written.
        cause: The error that was met.
        remedy: What to do if there is no space to free.
    """
    reason = getattr(cause, "strerror", None) or cause
    unchanged = "; the previous file is unchanged" if os.path.exists(path) else ""
    if isinstance(cause, PermissionError | NotADirectoryError):
        return UserError(f"{path} cannot be written ({reason}){unchanged}: {remedy}")
    return UserError(f"{path} cannot be written ({reason}){unchanged}: free disk space there, or {remedy}")
