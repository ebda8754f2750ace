"""Find and open input files: local or remote, compressed or not, in any text encoding."""

import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lit_gpt.errors import UserError, did_you_mean

COMPRESSIONS = (".gz", ".zst")
MIN_LARGE, MAX_EXPANSION = 2**28, 2000  # a text of more bytes or characters has fewer for each stored byte


@dataclass(frozen=True)
class Source:
    """An input file.

    Attributes:
        name: Path or URL of the file.
        split: "val" or "test" if the whole file belongs to that split; otherwise "".
    """

    name: str
    split: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def is_remote(self) -> bool:
        return "://" in self.name

    @property
    def path(self) -> str:
        """The name; of a URL without its query, or the first name with a suffix in the query if only that has one."""
        if not self.is_remote:
            return self.name  # may contain ? and #
        path, *values = re.split("[?#&=]", self.name)
        return next((part for part in (path, *values) if os.path.splitext(part)[1]), path)

    @property
    def compression(self) -> str:
        """Either ".gz", ".zst", or "" if the file is not compressed."""
        suffix = os.path.splitext(self.path)[1].lower()
        return suffix if suffix in COMPRESSIONS else ""

    @property
    def suffix(self) -> str:
        """The suffix that names the format, without that of the compression: ".csv" for "a.CSV.gz"."""
        stem = self.path[: len(self.path) - len(self.compression)]
        return os.path.splitext(stem)[1].lower()

    @contextmanager
    def open_stored(self) -> Iterator[BinaryIO]:
        """Open the file for reading its bytes as they are stored, without decompression.

        Raises:
            UserError: The file cannot be opened.
        """
        with self.translate_errors():
            file = _open_binary(self.name)
        with file:
            yield file

    @contextmanager
    def open(self) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """Open the file for reading its decompressed bytes.

        Yields:
            The decompressed file, and the stored file, whose `tell()` measures progress in stored bytes.

        Raises:
            UserError: The file cannot be opened.
        """
        with self.open_stored() as stored:
            if not self.compression:
                yield stored, stored
                return
            decompressed: Any
            if self.compression == ".gz":
                decompressed = gzip.GzipFile(fileobj=stored)
            else:
                import pyarrow  # imported here because it takes long

                decompressed = pyarrow.CompressedInputStream(stored, "zstd")
            with decompressed, io.BufferedReader(_LimitedReader(self, stored, decompressed), 2**16) as file:
                yield file, stored

    def check_expansion(self, stored_size: int, size: int) -> None:
        """Check that the file is not so well compressed that it cannot be text.

        Args:
            stored_size: Its stored bytes.
            size: The bytes or characters that were read from it.

        Raises:
            UserError: It is.
        """
        if size > max(MIN_LARGE, MAX_EXPANSION * stored_size):
            raise UserError(
                f"{self}: more than {size:,} characters in {stored_size:,} bytes, which is no text: give other files"
            )

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Turn the errors of reading this file into UserErrors that name it."""
        try:
            yield
        except UserError:
            raise
        except UnicodeError as error:  # for example: UTF-16 without a byte order mark
            raise UserError(f"{self}: {error}: give its encoding, as --data.encoding utf-8") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{self} is damaged ({error}): download or compress it again") from None
        except OSError as error:
            if self.compression == ".zst" and error.errno is None:
                raise UserError(f"{self} is damaged ({error}): download or compress it again") from None
            raise UserError(f"{self} cannot be read ({error.strerror or error}): give another file") from None
        except Exception as error:
            if not self.is_remote:
                raise
            raise UserError(f"{self} cannot be read ({type(error).__name__}: {error}): give another file") from None

    def size(self) -> int:
        """Return the number of stored bytes."""
        with self.translate_errors(), self.open_stored() as file:
            return file.seek(0, os.SEEK_END)

    def sha256(self) -> str:
        """Return the SHA-256 of the decompressed bytes, in hexadecimal digits."""
        with self.translate_errors(), self.open() as (file, _):
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


class _LimitedReader(io.RawIOBase):
    """The decompressed bytes of a source, whose number is compared with the stored ones."""

    def __init__(self, source: Source, stored: BinaryIO, decompressed: Any) -> None:
        self.source, self.decompressed = source, decompressed
        self.stored_size, self.size = stored.seek(0, os.SEEK_END), 0
        stored.seek(0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.decompressed.readinto(buffer)
        self.size += count
        self.source.check_expansion(self.stored_size, self.size)
        return count


def _open_binary(name: str) -> Any:
    if "://" not in name:
        return open(name, "rb")
    import fsspec  # imported here because only URLs need it

    return fsspec.open(name, "rb").open()


def find_sources(patterns: str | Iterable[str], split: str = "") -> list[Source]:
    """Return the files named by paths, URLs or globs of either.

    Args:
        patterns: A path, URL or glob, or several.
        split: `Source.split` of the files.

    Returns:
        The files in the order of the patterns; those of a glob in the order of their names.

    Raises:
        UserError: A pattern matches no file, names a folder, or a file is named twice or cannot be read.
    """
    sources: list[Source] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not pattern.strip():
            raise UserError("--data.files is empty: give a path, a list of them or a quoted glob")
        names = _match_urls(pattern) if "://" in pattern else _match_paths(pattern)
        sources.extend(Source(name, split) for name in names)
    if not sources:
        raise UserError("no file to read: give --data.files PATH")
    for source in sources:
        try:
            source.name.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{os.fsencode(source.name)!r}: its name is not UTF-8: rename it") from None
        if not source.is_remote and not os.access(source.name, os.R_OK):
            raise UserError(f"{source} cannot be read (no permission): allow it, as with chmod u+r")
    check_no_duplicates(sources)
    return sources


def check_no_duplicates(sources: list[Source]) -> None:
    """Raise UserError if two sources are the same file."""
    locations: set[str] = set()
    for source in sources:
        location = source.name if source.is_remote else os.path.realpath(source.name)
        if location in locations:
            raise UserError(f"--data.files names {source} twice: remove one")
        locations.add(location)


def _match_paths(pattern: str) -> list[str]:
    path = Path(os.path.expanduser(pattern))
    if path.is_dir():
        raise UserError(f"{pattern} is a folder: give its files, as --data.files '{pattern.rstrip('/')}/*.csv'")
    if path.exists() and not path.is_file():
        raise UserError(f"{pattern} is not a regular file: copy its text into one")
    matches = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
    matches = [match for match in matches if os.path.isfile(match)]
    if not matches:
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{pattern}: no such file{did_you_mean(path.name, siblings)}; give --data.files PATH")
    return matches


def _match_urls(pattern: str) -> list[str]:
    import fsspec  # imported here because only URLs need it

    try:
        system, path = fsspec.core.url_to_fs(pattern)
        if system.isdir(path) and not system.isfile(path):
            raise UserError(f"{pattern} is a folder: give its files, as --data.files '{pattern.rstrip('/')}/*.csv'")
        exists = system.exists(path)  # also a name with a `?`, which may begin a query
        matches = sorted(system.glob(path)) if glob.has_magic(path) and not exists else [path] * exists
    except UserError:
        raise
    except (ImportError, ValueError) as error:  # unknown protocol, or its package is not installed
        raise UserError(
            f"{pattern} cannot be opened ({error}): install the package for its protocol, or copy the file here"
        ) from None
    except Exception as error:  # each protocol has its own exceptions
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{pattern} cannot be reached ({reason}): correct the URL, or copy the file here") from None
    if not matches:
        raise UserError(f"{pattern}: no such file; give --data.files URL")
    return [str(system.unstrip_protocol(match)) for match in matches]


# --------------------------------------------------------------------------------------------------------- text


def replace_by_surrogates(error: UnicodeError) -> tuple[str, int]:
    """Decode each invalid byte as a lone surrogate, so that the rows that contain one can be found and rejected.

    This is an error handler of `codecs`. Unlike "surrogateescape" it also handles invalid bytes below 128.
    """
    assert isinstance(error, UnicodeDecodeError)
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error("lit_gpt.surrogates", replace_by_surrogates)


@contextmanager
def open_text(source: Source, encoding: str, newline: str | None) -> Iterator[tuple[io.TextIOWrapper, BinaryIO]]:
    """Open a file as text without its byte order mark, with invalid bytes decoded as lone surrogates.

    Args:
        source: The file.
        encoding: Its encoding.
        newline: As in Python's `open`.

    Yields:
        The text, and the stored file, whose `tell()` measures progress in stored bytes.
    """
    with source.open() as (file, stored):
        buffered = io.BufferedReader(file)  # type: ignore[type-var]
        with contextlib.suppress(UnicodeEncodeError):  # an encoding that has no byte order mark
            mark = "\ufeff".encode(encoding)
            if buffered.peek(len(mark)).startswith(mark):
                buffered.read(len(mark))
        yield io.TextIOWrapper(buffered, encoding=encoding, errors="lit_gpt.surrogates", newline=newline), stored
