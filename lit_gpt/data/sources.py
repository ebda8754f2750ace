"""Where text lies: files here or behind a URL, packed or not, in whatever encoding."""

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
HEAD = 2**22  # bytes an encoding is looked for in
SAMPLE = 2**16  # bytes, from the first that is not ASCII, that it is guessed from
GUESSES = ("gb18030", "big5", "cp932", "euc_jp", "euc_kr", "cp1252", "cp1251", "koi8_r")
WIDE = ("utf_16_le", "utf_16_be")  # where there are zero bytes
MARKS = {  # the longer ones first: that of utf-32 begins as that of utf-16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class Source:
    """One file.

    Attributes:
        name: its path or URL, as a person gave it or a glob found it.
        split: that all of it belongs to: "val" or "test"; or none.
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
        """ ".gz", ".zst" or nothing."""
        suffix = os.path.splitext(self.name)[1].lower()
        return suffix if suffix in COMPRESSIONS else ""

    @property
    def suffix(self) -> str:
        """The suffix that says how it is read, as ".csv"."""
        name = self.name[: len(self.name) - len(self.compression)]
        return os.path.splitext(name)[1].lower()

    @contextmanager
    def open_raw(self) -> Iterator[BinaryIO]:
        """The bytes as they lie there.

        Raises:
            UserError: it cannot be opened.
        """
        with self.said():
            file = _opened(self.name)
        with file:
            yield file

    @contextmanager
    def open(self) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """The bytes, unpacked, and the file they come from, whose `tell` says how far reading has come."""
        with self.open_raw() as raw:
            if self.compression == ".gz":
                with gzip.GzipFile(fileobj=raw) as file:
                    yield file, raw  # type: ignore[misc]
            elif self.compression == ".zst":
                import pyarrow  # imported here: it takes its time

                with io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd")) as file:
                    yield file, raw
            else:
                yield raw, raw

    @contextmanager
    def said(self) -> Iterator[None]:
        """Says in one line what goes wrong in reading it."""
        try:
            yield
        except UserError:
            raise
        except UnicodeError as error:  # as one without the mark that UTF-16 begins with
            raise UserError(f"{self}: {error}: give its encoding, as --data.encoding utf-8") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{self} is damaged ({error}): fetch or pack it again") from None
        except OSError as error:
            if self.compression == ".zst" and error.errno is None:
                raise UserError(f"{self} is damaged ({error}): fetch or pack it again") from None
            raise UserError(f"{self} cannot be read ({error.strerror or error}): give another") from None
        except Exception as error:
            if not self.is_remote:
                raise
            raise UserError(f"{self} cannot be read ({type(error).__name__}: {error}): give another") from None

    def size(self) -> int:
        """Bytes, as it lies there."""
        with self.said(), self.open_raw() as file:
            return file.seek(0, os.SEEK_END)

    def sha256(self) -> str:
        """The SHA-256 of the bytes as they lie there, in hexadecimal digits."""
        with self.said(), self.open_raw() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _opened(name: str) -> Any:
    if "://" not in name:
        return open(name, "rb")
    import fsspec  # imported here: only a URL needs it

    return fsspec.open(name, "rb").open()


def find_sources(patterns: str | Iterable[str], split: str = "") -> list[Source]:
    """The files that paths, URLs or globs of them name: in the order given, a glob's in the order of their names.

    Raises:
        UserError: one of them names nothing, or a folder.
    """
    found: list[Source] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not pattern.strip():
            raise UserError("--data.files is empty: give a path, a list of them or a quoted glob")
        found.extend(Source(name, split) for name in (_remote(pattern) if "://" in pattern else _local(pattern)))
    if not found:
        raise UserError("no file to read: give --data.files PATH")
    for source in found:
        try:
            source.name.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{os.fsencode(source.name)!r}: its name is not UTF-8: rename it") from None
        if not source.is_remote and not os.access(source.name, os.R_OK):
            raise UserError(f"{source} may not be read: give yourself the right to, as with chmod u+r")
    check_no_duplicates(found)
    return found


def check_no_duplicates(sources: list[Source]) -> None:
    """Raises UserError where two of them are the same file."""
    seen: set[str] = set()
    for source in sources:
        place = source.name if source.is_remote else os.path.realpath(source.name)
        if place in seen:
            raise UserError(f"--data.files names {source} twice: leave one out")
        seen.add(place)


def _local(pattern: str) -> list[str]:
    path = Path(os.path.expanduser(pattern))
    if path.is_dir():
        raise UserError(f"{pattern} is a folder: give its files, as --data.files '{pattern.rstrip('/')}/*.csv'")
    if path.exists() and not path.is_file():
        raise UserError(f"{pattern} is no ordinary file: copy its text into one")
    matches = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
    matches = [match for match in matches if os.path.isfile(match)]
    if not matches:
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{pattern}: no such file{did_you_mean(path.name, beside)}; give --data.files PATH")
    return matches


def _remote(pattern: str) -> list[str]:
    import fsspec  # imported here: only a URL needs it

    try:
        system, path = fsspec.core.url_to_fs(pattern)
        if system.isdir(path) and not system.isfile(path):
            raise UserError(f"{pattern} is a folder: give its files, as --data.files '{pattern.rstrip('/')}/*.csv'")
        matches = sorted(system.glob(path)) if glob.has_magic(path) else [path] * system.exists(path)
    except UserError:
        raise
    except (ImportError, ValueError) as error:  # no such protocol, or what speaks it is not installed
        raise UserError(f"{pattern} cannot be opened ({error}): install what it needs, or copy the file here") from None
    except Exception as error:  # whatever the protocol's own library raises
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{pattern} cannot be reached ({reason}): mend the URL, or copy the file here") from None
    if not matches:
        raise UserError(f"{pattern}: no such file; give --data.files URL")
    return [str(system.unstrip_protocol(match)) for match in matches]


# ---------------------------------------------------------------------------------------------------- encodings


def detect_encoding(source: Source) -> tuple[str, float]:
    """The encoding of a text file, and how sure that is, from 0 to 1.

    A byte order mark decides; else it is UTF-8 where nearly all that is not ASCII forms characters of it; else what
    charset-normalizer finds least chaotic.

    Raises:
        UserError: it is none that is known.
    """
    with source.said(), source.open() as (file, _):
        head = file.read(HEAD)
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding, 1.0
    strange = len(head) - len(head.translate(None, bytes(range(128, 256))))  # bytes that are not ASCII
    wide = head.count(0) * 10 > len(head)  # as in UTF-16
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # which waits for the rest of a character cut in two
    broken = decoder.decode(head).count("\ufffd") - head.count("\ufffd".encode())
    if broken * 10 <= strange and not wide:
        return "utf-8", 1 - broken / strange if strange else 1.0
    import charset_normalizer  # imported here: few files need it

    if b"\0" in head:  # of the ends of lines, if of nothing else
        guesses: tuple[str, ...] = WIDE
        sample = head[:SAMPLE]
    else:
        start = re.search(rb"[\x80-\xff]", head)
        assert start is not None
        begin = head.rfind(b"\n", 0, start.start()) + 1
        guesses, sample = GUESSES, head[begin : begin + SAMPLE]
        sample = sample[: sample.rfind(b"\n") + 1] or sample  # amid no character
    best = charset_normalizer.from_bytes(sample, cp_isolation=list(guesses), preemptive_behaviour=False).best()
    if best is None:
        raise UserError(f"{source}: its encoding is none that is known: give it, as --data.encoding gb18030")
    return best.encoding.replace("_", "-"), 1 - best.chaos


def bad_bytes(error: UnicodeError) -> tuple[str, int]:
    """Stands a lone surrogate in for every byte that is no part of a character, so that the row can be told apart."""
    assert isinstance(error, UnicodeDecodeError)
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error("lit_gpt.bad_bytes", bad_bytes)


@contextmanager
def open_text(source: Source, encoding: str, newline: str | None) -> Iterator[tuple[io.TextIOWrapper, BinaryIO]]:
    """The text of a file without its byte order mark, bad bytes as lone surrogates, and the file it comes from."""
    codec = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    with source.open() as (file, raw):
        yield io.TextIOWrapper(file, encoding=codec, errors="lit_gpt.bad_bytes", newline=newline), raw
