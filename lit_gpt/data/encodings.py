"""Detect the encoding of a text file.

1. A byte order mark decides, if the whole file fits.
2. Otherwise UTF-8, if the whole file fits: of the bytes that are not ASCII at most a tenth may be invalid.
3. Otherwise UTF-16, if its zero bytes stand where UTF-16 has them, and its line ends are whole characters.
4. Otherwise the lines that are not ASCII, or an even sample of them, are scored (`encoding_scores`).

docs/encodings.md says how often this is right. `tests/detection.py` measures it.
"""

import codecs
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lit_gpt.data.encoding_scores import GUESS, DetectedEncoding, choose_encoding
from lit_gpt.data.sources import Source
from lit_gpt.errors import UserError

CHUNK_BYTES = 2**20  # read at once; an even number, so that no UTF-16 character of two bytes is cut
SAMPLE_BYTES = 2**18  # of the lines that are not ASCII; of more of them an even sample is scored
PART_BYTES = 2**12  # a longer line is divided into parts of about this size, which are sampled like lines
MAX_NOISE = 0.02  # share of control characters among the bytes of a text
MAX_INVALID = 0.1  # share of invalid places among the bytes that are not ASCII, in UTF-8
MIXTURE_INVALID = 0.4  # a file with a lower share is UTF-8 mixed with something else: its encoding is a guess
ENOUGH_BYTES = 2**24  # bytes that are not ASCII, after which a share above MIXTURE_INVALID is final
MAX_MISFITS = 0.001  # share of invalid bytes in an encoding that a mark or zero bytes suggest

BYTE_ORDER_MARKS = {  # utf-32 before utf-16: the mark of utf-32-le begins with that of utf-16-le
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    "\ufeff".encode("gb18030"): "gb18030",
}
ESCAPED = ("iso2022_kr", "iso2022_jp")  # their bytes are all ASCII

NON_ASCII = bytes(range(128, 256))
CONTROLS = bytes(set(range(32)) - set(b"\t\n\r"))
NOISE = bytes(set(CONTROLS) - set(b"\0\f\x0e\x0f\x1b"))  # a text may have zero bytes, page ends and ISO 2022's controls
BEFORE_CUTS = [bytes([byte]) for byte in range(0x30)]  # bytes that are whole characters in every encoding
INVALID = re.compile("[\udc00-\udcff]")  # what the error handler of data/sources.py makes of invalid bytes
PARTS = re.compile(rb"(?s).{1,%d}[^\x00-\x2f]*" % PART_BYTES)


def detect_encoding(source: Source) -> DetectedEncoding:
    """Detect the encoding of a text file, which is read once or, if it is not UTF-8, a few times.

    Raises:
        UserError: The file is no text, or cannot be read.
    """
    with source.translate_errors():
        marked = _marked_encoding(source)
        if marked:
            return DetectedEncoding(marked)
        counts = _count_bytes(source)
        wide = _encoding_with_zeros(source, counts)
        if wide:
            return DetectedEncoding(wide)
        if counts.invalid <= MAX_INVALID * counts.non_ascii:
            if counts.non_ascii:
                return DetectedEncoding("utf-8", 1 - counts.invalid / counts.non_ascii)
            fitting = (encoding for encoding in ESCAPED if counts.has_escapes and _fits(source, encoding))
            return DetectedEncoding(next(fitting, "utf-8"))
        _check_few_controls(source, counts)
        lines = [line.translate(None, CONTROLS) for line in sample_lines(source)]
    detected = choose_encoding(lines)
    is_mixture = counts.invalid < MIXTURE_INVALID * counts.non_ascii  # UTF-8 and something else
    return replace(detected, confidence=min(detected.confidence, GUESS)) if is_mixture else detected


# --------------------------------------------------------------------------------------------------- the whole file


@dataclass
class _ByteCounts:
    """What the bytes of a file are.

    Attributes:
        size: All.
        zeros: Zero bytes at even and at odd positions.
        non_ascii: Bytes from 128.
        invalid: Places that are invalid UTF-8.
        has_escapes: Whether a sequence occurs that begins two-byte characters in ISO 2022.
    """

    size: int = 0
    zeros: tuple[int, int] = (0, 0)
    non_ascii: int = 0
    invalid: int = 0
    has_escapes: bool = False


def _chunks(source: Source) -> Iterator[bytes]:
    with source.open() as (file, _):
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _marked_encoding(source: Source) -> str | None:
    """Return the encoding that a byte order mark names and the whole file fits; None if there is none."""
    with source.open() as (file, _):
        head = file.read(4)
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark) and _fits(source, encoding):
            return encoding
    return None


def _fits(source: Source, encoding: str) -> bool:
    """Return whether nearly all bytes of a file are valid in an encoding, as `MAX_MISFITS` says."""
    decoder = codecs.getincrementaldecoder(encoding)("lit_gpt.surrogates")
    characters = invalid = 0
    for chunk in itertools.chain(_chunks(source), [b""]):
        text = decoder.decode(chunk, final=not chunk)
        characters += len(text)
        invalid += len(INVALID.findall(text))
    return invalid <= MAX_MISFITS * characters


def _count_bytes(source: Source) -> _ByteCounts:
    counts = _ByteCounts()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for chunk in itertools.chain(_chunks(source), [b""]):
        counts.size += len(chunk)
        if b"\0" in chunk:
            even = chunk[::2].count(0)
            counts.zeros = (counts.zeros[0] + even, counts.zeros[1] + chunk.count(0) - even)
        if chunk.isascii() and not decoder.getstate()[0]:
            counts.has_escapes = counts.has_escapes or b"\x1b$" in chunk
            continue
        counts.non_ascii += len(chunk) - len(chunk.translate(None, NON_ASCII))
        text = decoder.decode(chunk, final=not chunk)
        if "\ufffd" in text:
            counts.invalid += text.count("\ufffd") - chunk.count("\ufffd".encode())
            if counts.non_ascii > ENOUGH_BYTES and counts.invalid > MIXTURE_INVALID * counts.non_ascii:
                break  # whatever follows, the file is not UTF-8
    return counts


def _encoding_with_zeros(source: Source, counts: _ByteCounts) -> str | None:
    """Return the encoding of a text in UTF-16 or UTF-32 without a byte order mark; None if the file is none.

    A zero byte may occur in another text too, even beside each line end. But in UTF-16 all line ends with a zero byte
    stand at even positions. And many other bytes are control characters: zero bytes where most characters are ASCII,
    others where they are not.

    Raises:
        UserError: Most bytes are zero, and the file is no such text.
    """
    zeros = sum(counts.zeros)
    if zeros == 0:
        return None
    controls = _count(source, CONTROLS)
    has_few_others = 100 * (controls - zeros) < counts.size
    if 5 * controls < counts.size and (counts.invalid == 0 or has_few_others):
        return None
    if 0.5 * counts.size < zeros < 0.8 * counts.size:  # three of four bytes are zero where characters are ASCII
        for encoding in ("utf-32-le", "utf-32-be"):
            if _fits(source, encoding):
                return encoding
    for encoding in ("utf-16-le", "utf-16-be"):
        if _fits(source, encoding) and _has_zeros_of_utf16(source, counts, encoding):
            return encoding
    if zeros > 0.5 * counts.size:
        raise UserError(f"{source} is no text: {zeros / counts.size:.0%} of it are zero bytes: give another file")
    return None


def _has_zeros_of_utf16(source: Source, counts: _ByteCounts, encoding: str) -> bool:
    """Return whether line ends stand as in "utf-16-le" or "utf-16-be"; in a single line, whether zero bytes do."""
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    decoded = pairs = single = 0  # line ends: decoded characters, their two bytes anywhere, bytes `\n` anywhere
    for chunk in _chunks(source):
        decoded += decoder.decode(chunk).count("\n")
        pairs += chunk.count("\n".encode(encoding))
        single += chunk.count(b"\n")
    if single:
        return decoded > 0.9 * pairs and 20 * decoded > single
    even, odd = counts.zeros
    of_ascii, others = (odd, even) if encoding == "utf-16-le" else (even, odd)
    return 10 * of_ascii > counts.size and of_ascii > 50 * others


def _count(source: Source, wanted: bytes) -> int:
    """Return how many bytes of a file are among those wanted."""
    return sum(len(chunk) - len(chunk.translate(None, wanted)) for chunk in _chunks(source))


def _check_few_controls(source: Source, counts: _ByteCounts) -> None:
    """Raise UserError if a file has too many control characters for a text."""
    share = _count(source, NOISE) / counts.size
    if share > MAX_NOISE:
        raise UserError(f"{source} is no text: {share:.0%} of it are control characters: give another file")


# ------------------------------------------------------------------------------------------------------- the sample


def sample_lines(source: Source) -> list[bytes]:
    """Return the lines of a file that are not ASCII, or an even sample of `SAMPLE_BYTES`."""
    sample: list[bytes] = []
    stride, first, size = 1, 0, 0  # of the lines every `stride`-th is taken; the next one is lines[first]
    for lines in _non_ascii_lines(source):
        taken = lines[first::stride]
        first = (first - len(lines)) % stride
        sample += taken
        size += sum(map(len, taken))
        while size > SAMPLE_BYTES and len(sample) > 1:
            first += stride * (len(sample) % 2)
            sample = sample[::2]
            stride *= 2
            size = sum(map(len, sample))
    return sample


def _non_ascii_lines(source: Source) -> Iterator[list[bytes]]:
    """Yield the lines of each chunk that are not ASCII; of a long line, parts.

    A line is divided before a byte below 0x30. In no encoding such a byte is part of another character.
    """
    rest = b""
    for chunk in itertools.chain(_chunks(source), [b""]):
        data = rest + chunk
        if not chunk:
            end = len(data)
        elif b"\n" in data:
            end = 1 + data.rfind(b"\n")
        else:
            end = 1 + max(map(data.rfind, BEFORE_CUTS))
        if end == 0:  # a whole chunk has no such byte: where the next character begins is unknown
            yield [data]
            return
        data, rest = data[:end], data[end:]
        if not data.isascii():
            lines = [line for line in data.splitlines() if not line.isascii()]
            yield [part for line in lines for part in _divide(line) if not part.isascii()]


def _divide(line: bytes) -> list[bytes]:
    return [line] if len(line) <= PART_BYTES else PARTS.findall(line)
