"""SHA-256 digests of the files in a folder, kept beside them in SHA256SUMS, the format of sha256sum(1).

`sha256sum -c SHA256SUMS` in the folder compares them too.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lit_gpt.files import atomic_write, open_regular

DIGESTS_FILE = "SHA256SUMS"
LARGEST_DIGESTS_FILE = 2**24  # bytes; enough for 100,000 files

# A digest, two spaces, and a plain name: the file is in the folder itself.
LINE = re.compile(r"([0-9a-f]{64})  (?!\.\.?$)([A-Za-z0-9._-]+)")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Raises:
        OSError: It cannot be read, or is no regular file; a symbolic link is not followed.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_all(paths: Iterable[Path]) -> dict[str, str]:
    """Return the digests of files by their names, computed in threads.

    Raises:
        OSError: See `sha256`.
    """
    paths = list(paths)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing and reading release the interpreter lock
        return dict(zip((path.name for path in paths), threads.map(sha256, paths), strict=True))


def write_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Write SHA256SUMS.

    Args:
        folder: The folder that holds the files.
        digests: The SHA-256 of each file in hexadecimal, by its name.

    Raises:
        OSError: The file cannot be written.
    """
    lines = [f"{digest}  {name}" for name, digest in sorted(digests.items())]
    assert all(map(LINE.fullmatch, lines)), lines
    atomic_write(folder / DIGESTS_FILE, lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))


def read_digests(folder: Path) -> dict[str, str]:
    """Return the digests in SHA256SUMS by the names of their files.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged.
    """
    with open_regular(folder / DIGESTS_FILE) as file:
        content = file.read(LARGEST_DIGESTS_FILE + 1)
    if len(content) > LARGEST_DIGESTS_FILE or not content.endswith(b"\n"):
        raise ValueError(f"{DIGESTS_FILE} is too long, or cut off")
    matches = [LINE.fullmatch(line) for line in content.decode("ascii").removesuffix("\n").split("\n")]
    digests = {match[2]: match[1] for match in matches if match is not None}
    if len(digests) < len(matches):
        raise ValueError(f"{DIGESTS_FILE} has a line that is no digest, or names a file twice")
    return digests


def damaged_files(folder: Path, needed: Iterable[str] = (), compared: Iterable[str] | None = None) -> list[str]:
    """Compare the files that SHA256SUMS names with their digests.

    Args:
        folder: The folder.
        needed: Names that SHA256SUMS must contain.
        compared: The names of the files to compare; None: all.

    Returns:
        The names of the files that differ, cannot be read or are no regular files, and of those in `needed` that have
        no digest; only SHA256SUMS if it is itself missing or damaged. [] if the folder is as it was written.
    """
    try:
        digests = read_digests(folder)
    except (OSError, ValueError):
        return [DIGESTS_FILE]

    def is_damaged(name: str) -> bool:
        try:
            return sha256(folder / name) != digests[name]
        except OSError:
            return True

    names = list(digests if compared is None else digests.keys() & compared)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        damaged = [name for name, found in zip(names, threads.map(is_damaged, names), strict=True) if found]
    return sorted({*damaged, *(set(needed) - digests.keys())})
