"""Write JSON Lines, one object after another, so that whatever happens only whole lines remain."""

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from lit_gpt.cli.messages import json_line, print_lines
from lit_gpt.errors import UserError


class JsonLines:
    """A new file of JSON Lines, a context manager.

    Each line is written by one call, as soon as its object is known. So a process that is killed loses no earlier
    line, and leaves no part of one. If the disk is full, the part that was written is cut off. A file without lines is
    removed.

    Args:
        path: The file, which must not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0  # lines in the file
        self._size = 0  # bytes of these lines

    def __enter__(self) -> "JsonLines":
        try:
            self._file = open(self.path, "xb", buffering=0)
        except FileExistsError:
            what = "is a folder" if self.path.is_dir() else "exists"
            raise UserError(f"--jsonl {self.path} {what}: give the name of a new file") from None
        except OSError as error:
            reason = error.strerror if self.path.parent.is_dir() else f"there is no folder {self.path.parent}"
            raise UserError(f"--jsonl {self.path} cannot be written ({reason}): give another path") from None
        return self

    def write(self, value: Any) -> None:
        """Append an object.

        Raises:
            UserError: It cannot be written.
        """
        line = f"{json_line(value)}\n".encode()
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(self._size)
            raise UserError(
                f"--jsonl {self.path} cannot be written ({error.strerror}): free disk space there, or give another path"
            ) from None
        self.count += 1
        self._size += len(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._file.close()
        if not self.count:
            self.path.unlink(missing_ok=True)
        elif kind is not None:
            print_lines(f"wrote       {self.path}, the first {self.count:,} of the texts", to_stderr=True)
