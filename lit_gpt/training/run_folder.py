"""The folder of one run, logs/<name>/version_<n>: created, locked against other processes, removed if left empty."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from lit_gpt.errors import UserError

MAX_ATTEMPTS = 10_000  # to create a folder that others create or remove
LOCK_TIMEOUT = 8  # seconds: the data workers of a killed process hold its lock for up to five


def create_version(folder: Path) -> Path:
    """Create a folder version_<n>, with the next n that no other process has taken, and return it.

    The system creates a folder for one process only, also on a file system that machines share.

    Raises:
        OSError: It cannot be created.
    """
    for _ in range(MAX_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # what is in the way is found below
            folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            folder = folder.with_name(f"version_{int(folder.name.removeprefix('version_')) + 1}")
        except FileNotFoundError:  # a run that left nothing has removed the folder around it
            continue
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


class RunFolder:
    """Own the folder of a run while a command works in it.

    `create_and_lock` takes the folder, `release` gives it back. Only the first rank of a run calls them.
    """

    def __init__(self) -> None:
        self._created: Path | None = None  # the folder, if this command created it
        self._lock: BaseFileLock | None = None

    def create_and_lock(self, folder: Path, is_new: bool) -> Path:
        """Create the folder of a new run, or check that an existing one can be written to, and lock it.

        Args:
            folder: The folder of the run, as version_<n>.
            is_new: Whether the run is a new one. If the folder exists, another run has just created it, and this run
                takes the next number.

        Returns:
            The folder.

        Raises:
            UserError: The folder cannot be created or written to, or another process trains in it.
        """
        try:
            if is_new:
                folder = self._created = create_version(folder)
            self._lock = FileLock(folder / ".lock")
            self._lock.acquire(timeout=LOCK_TIMEOUT)
        except Timeout:
            raise UserError(
                f"{folder}: another process trains in this folder: wait until it ends, or choose another --name"
            ) from None
        except OSError as error:
            action = "created" if is_new else "written to"
            raise UserError(
                f"{folder} cannot be {action} ({error.strerror}): remove what is in the way, or choose another "
                "folder with --trainer.default_root_dir"
            ) from None
        return folder

    def release(self, keep: bool) -> None:
        """Unlock the folder; remove a new one that holds no checkpoint, and the folders around it if they are empty.

        Args:
            keep: Whether to keep a new folder without a checkpoint too.
        """
        if self._lock is not None and self._lock.is_locked:
            self._lock.release()
            with contextlib.suppress(OSError):
                os.unlink(self._lock.lock_file)
        if self._created is not None and not keep and not any(self._created.glob("*.ckpt")):
            shutil.rmtree(self._created, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty
                for parent in list(self._created.parents)[:2]:
                    parent.rmdir()
