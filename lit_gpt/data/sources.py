"""Find and open input files: local or remote, compressed or not, in any text encoding."""

import codecs
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
DETECTION_BYTES = 2**22  # read from the start of a file to detect its encoding
SAMPLE_BYTES = 2**16  # of them, given to charset-normalizer
CANDIDATE_ENCODINGS = ("gb18030", "big5", "cp932", "euc_jp", "euc_kr", "cp1252", "cp1251", "koi8_r")
UTF16_ENCODINGS = ("utf_16_le", "utf_16_be")
BYTE_ORDER_MARKS = {  # utf-32 before utf-16: the mark of utf-32-le begins with that of utf-16-le
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


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
    def compression(self) -> str:
        """Either ".gz", ".zst", or "" if the file is not compressed."""
        suffix = os.path.splitext(self.name)[1].lower()
        return suffix if suffix in COMPRESSIONS else ""

    @property
    def suffix(self) -> str:
        """The suffix that names the format, without that of the compression: ".csv" for "a.CSV.gz"."""
        stem = self.name[: len(self.name) - len(self.compression)]
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
        """Return the SHA-256 of the stored bytes, in hexadecimal digits."""
        with self.translate_errors(), self.open_stored() as file:
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
        matches = sorted(system.glob(path)) if glob.has_magic(path) else [path] * system.exists(path)
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


# ---------------------------------------------------------------------------------------------------- encodings


def detect_encoding(source: Source) -> tuple[str, float]:
    """Detect the encoding of a text file.

    A byte order mark decides. Without one, the text is UTF-8 if at most a tenth of its bytes that are not ASCII are
    invalid UTF-8. Otherwise charset-normalizer chooses among `CANDIDATE_ENCODINGS`, or among `UTF16_ENCODINGS` if
    there are zero bytes.

    Returns:
        The encoding, and the confidence from 0 to 1.

    Raises:
        UserError: No encoding fits.
    """
    with source.translate_errors(), source.open() as (file, _):
        head = file.read(DETECTION_BYTES)
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding, 1.0
    non_ascii = len(head) - len(head.translate(None, bytes(range(128, 256))))
    may_be_utf16 = head.count(0) * 10 > len(head)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # incremental: the head may end inside a character
    invalid = decoder.decode(head).count("\ufffd") - head.count("\ufffd".encode())
    if invalid * 10 <= non_ascii and not may_be_utf16:
        return "utf-8", 1 - invalid / non_ascii if non_ascii else 1.0
    import charset_normalizer  # imported here because few files need it

    if b"\0" in head:  # in UTF-16 every line end has a zero byte
        candidates: tuple[str, ...] = UTF16_ENCODINGS
        sample = head[:SAMPLE_BYTES]
    else:  # whole lines from the first that is not ASCII, so that no character is cut
        first = re.search(rb"[\x80-\xff]", head)
        assert first is not None
        start = head.rfind(b"\n", 0, first.start()) + 1
        candidates, sample = CANDIDATE_ENCODINGS, head[start : start + SAMPLE_BYTES]
        sample = sample[: sample.rfind(b"\n") + 1] or sample
    best = charset_normalizer.from_bytes(sample, cp_isolation=list(candidates), preemptive_behaviour=False).best()
    if best is None:
        raise UserError(f"{source}: its encoding cannot be detected: give it, as --data.encoding gb18030")
    return best.encoding.replace("_", "-"), 1 - best.chaos


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
    codec = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    with source.open() as (file, stored):
        yield io.TextIOWrapper(file, encoding=codec, errors="lit_gpt.surrogates", newline=newline), stored
