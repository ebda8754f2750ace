"""Detect the encoding of a text file.

1. A byte order mark decides, if the whole file fits.
2. Otherwise UTF-8, if the whole file fits: of the bytes that are not ASCII at most a tenth may be invalid.
3. Otherwise UTF-16, if its zero bytes stand where UTF-16 has them, and its line ends are whole characters.
4. Otherwise the lines that are not ASCII are scored, or an even sample of them. chardet scores how much they look like
   the languages that are written in each encoding. `implausibility` decides where it finds several equally good.

docs/encodings.md says how often this is right. `tests/detection.py` measures it.
"""

import codecs
import collections
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lit_gpt.data.plausibility import implausibility
from lit_gpt.data.sources import Source
from lit_gpt.errors import UserError

SURE = 0.95  # a lower confidence is a guess, which is printed
GUESS = 0.9  # the confidence where something else than the scores speaks against certainty, at most
CHUNK_BYTES = 2**20  # read at once; even, so that no UTF-16 character of two bytes is cut
SAMPLE_BYTES = 2**18  # of lines that are not ASCII
PART_BYTES = 2**12  # of a longer line
MAX_NOISE = 0.02  # of all bytes
MIXTURE_INVALID = 0.4
ENOUGH_BYTES = 2**24
MAX_INVALID = 0.1  # of the bytes that are not ASCII, or of the lines
EXAMPLE_CHARACTERS = 32  # of a line, which may each take two columns of the console

BYTE_ORDER_MARKS = {  # utf-32 before utf-16: the mark of utf-32-le begins with that of utf-16-le
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    "\ufeff".encode("gb18030"): "gb18030",
}
ESCAPED = ("iso2022_kr", "iso2022_jp")  # their bytes are all ASCII
TWO_BYTE = ("gb18030", "big5hkscs", "cp932", "euc_jis_2004", "cp949")
CANDIDATES = (  # as chardet names them; a subset, as ascii, gbk or iso8859-1, is read as its superset
    *TWO_BYTE,  # of encodings in which a file has the same text, the first is taken
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "cp874"),
    *("koi8-r", "koi8-u", "iso8859-2", "iso8859-5", "iso8859-7", "iso8859-15"),
    *("mac-roman", "mac-cyrillic", "cp437", "cp850", "cp852", "cp866"),
)

# These were chosen with `tests/detection.py`.
MAX_SCORED = 8  # encodings that chardet finds likeliest
MAX_CHARACTERS = 20_000  # of the sample, whose neighbours are compared
IMPLAUSIBILITY_WEIGHT = 3.0
PRIORS = dict.fromkeys(CANDIDATES, 1.0) | {"cp1252": 1.25, "cp1250": 0.9, "cp1258": 0.9, "iso8859-2": 0.9}
PRIORS |= {"iso8859-15": 0.8, "mac-roman": 0.8, "mac-cyrillic": 0.7, "cp437": 0.7, "cp850": 0.75, "cp852": 0.7}
PRIOR_EVIDENCE = 20  # characters from which the priors count less
MIN_EVIDENCE = 4  # different characters with different neighbours; fewer decide nothing, and leave it to the priors
TWO_BYTE_EVIDENCE = 0.4  # of a character of two bytes: more of them occur in each encoding

NON_ASCII = bytes(range(128, 256))
CONTROLS = bytes(set(range(32)) - set(b"\t\n\r"))
NOISE = bytes(
    set(CONTROLS) - set(b"\0\f\x0e\x0f\x1b")
)  # what no text has; zero bytes and those of ISO 2022 may be there
BEFORE_CUTS = [bytes([byte]) for byte in range(0x30)]
PARTS = re.compile(rb"(?s).{1,%d}[^\x00-\x2f]*" % PART_BYTES)
CONTEXTS = re.compile(r"(?s)(?:(?<=(.))|^)([^\x00-\x7f])(?=(.?))")  # a character and its neighbours


@dataclass(frozen=True)
class DetectedEncoding:
    """The encoding of a file.

    Attributes:
        name: A codec of Python.
        confidence: From 0 to 1, which is certain.
        runner_up: The second best encoding; "" if there is none.
        examples: Up to two lines of the file, decoded, that show characters that are not ASCII; of a guess only.
    """

    name: str
    confidence: float = 1.0
    runner_up: str = ""
    examples: tuple[str, ...] = ()

    @property
    def is_sure(self) -> bool:
        return self.confidence >= SURE


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
            if counts.has_escapes and not counts.non_ascii:
                for encoding in ESCAPED:
                    if _fits(source, encoding):
                        return DetectedEncoding(encoding)
            return DetectedEncoding("utf-8", 1 - counts.invalid / counts.non_ascii if counts.non_ascii else 1.0)
        _check_few_controls(source, counts)
        lines = sample_lines(source)
    detected = _choose(lines)
    is_mixture = counts.invalid < MIXTURE_INVALID * counts.non_ascii  # UTF-8 and something else
    return replace(detected, confidence=min(detected.confidence, GUESS)) if is_mixture else detected


# --------------------------------------------------------------------------------------------------- the whole file


@dataclass
class _ByteCounts:
    """What the bytes of a file are.

    Attributes:
        size: All.
        zeros: Zero bytes at even and at odd positions.
        line_ends: Bytes that are `\\n`.
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
    """Return whether at most a thousandth of the characters of a file are invalid in an encoding."""
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    characters = invalid = 0
    for chunk in itertools.chain(_chunks(source), [b""]):
        text = decoder.decode(chunk, final=not chunk)
        characters += len(text)
        invalid += text.count("\ufffd")
    return invalid * 1000 <= characters


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
    even, odd = counts.zeros
    if even + odd == 0:
        return None
    controls = _count(source, CONTROLS)
    if 5 * controls < counts.size and (counts.invalid == 0 or 100 * (controls - even - odd) < counts.size):
        return None
    if even + odd > counts.size / 2:
        for encoding in ("utf-32-le", "utf-32-be"):
            if even + odd < 0.8 * counts.size and _fits(source, encoding):
                return encoding
    for encoding, line_end, zeros, other_zeros in (
        ("utf-16-le", b"\n\0", odd, even),
        ("utf-16-be", b"\0\n", even, odd),
    ):
        if _fits(source, encoding) and _has_utf16_line_ends(source, counts, encoding, line_end, zeros, other_zeros):
            return encoding
    if even + odd > counts.size / 2:
        raise UserError(
            f"{source} is no text: {(even + odd) / counts.size:.0%} of it are zero bytes: give another file"
        )
    return None


def _has_utf16_line_ends(
    source: Source, counts: _ByteCounts, encoding: str, line_end: bytes, zeros: int, other_zeros: int
) -> bool:
    """Return whether line ends stand as in UTF-16; in a single line, whether the zero bytes do.

    Args:
        source: The file.
        counts: Its bytes.
        encoding: "utf-16-le" or "utf-16-be".
        line_end: The bytes of a line end.
        zeros: Zero bytes where the encoding has those of ASCII characters.
        other_zeros: Zero bytes elsewhere.
    """
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    line_ends = pairs = single = 0
    for chunk in _chunks(source):
        line_ends += decoder.decode(chunk).count("\n")
        pairs += chunk.count(line_end)
        single += chunk.count(b"\n")
    if single:
        return line_ends > 0.9 * pairs and 20 * line_ends > single
    return 10 * zeros > counts.size and zeros > 50 * other_zeros


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
        end = (
            len(data) if not chunk else 1 + (data.rfind(b"\n") if b"\n" in data else max(map(data.rfind, BEFORE_CUTS)))
        )
        if end == 0:  # a whole chunk has no such byte: where the next character begins is unknown
            yield [data]
            return
        data, rest = data[:end], data[end:]
        if not data.isascii():
            lines = [line for line in data.splitlines() if not line.isascii()]
            yield [part for line in lines for part in _divide(line) if not part.isascii()]


def _divide(line: bytes) -> list[bytes]:
    return [line] if len(line) <= PART_BYTES else PARTS.findall(line)


# ------------------------------------------------------------------------------------------------------- the scores


@dataclass(frozen=True)
class _Scored:
    """The sample of a file in one encoding.

    Attributes:
        encoding: The encoding.
        text: The decoded sample.
        score: How likely it is, compared with the others.
    """

    encoding: str
    text: str
    score: float


def _choose(lines: list[bytes]) -> DetectedEncoding:
    """Return the encoding of a file whose lines that are not ASCII are given."""
    lines = [line.translate(None, CONTROLS) for line in lines]
    ranking = _rank(lines)
    for encoding in _nearly_fitting(lines):  # a few bytes are invalid in it: it may be the encoding of the others
        others = _rank([line for line in lines if _decodes(line, encoding)])
        if others and others[0].encoding == encoding and (not ranking or others[0].score > ranking[0].score):
            ranking = others
    if not ranking:  # chardet finds no text; the reader rejects the lines that are invalid in the commonest encoding
        return DetectedEncoding("cp1252", 0.0, "", _examples(b"\n".join(lines).decode("cp1252", "replace")))
    best = min((one for one in ranking if one.text == ranking[0].text), key=lambda one: CANDIDATES.index(one.encoding))
    second = next((scored for scored in ranking if scored.text != best.text), None)
    evidence = float(len(set(CONTEXTS.findall(best.text))))
    if best.encoding in TWO_BYTE:
        evidence *= TWO_BYTE_EVIDENCE
    odds = (second.score / ranking[0].score) ** evidence if second else 0.0
    confidence = 1 / (1 + odds) if evidence >= MIN_EVIDENCE else min(1 / (1 + odds), GUESS)
    return DetectedEncoding(best.encoding, confidence, second.encoding if second else "", _examples(best.text))


def _rank(lines: list[bytes]) -> list[_Scored]:
    """Return the encodings in which all lines are valid and which are likely at all, the likeliest first."""
    import chardet  # imported here because few files need it

    sample = b"\n".join(lines)
    found = chardet.detect_all(
        sample, include_encodings=CANDIDATES, compat_names=False, ignore_threshold=True, max_bytes=len(sample) + 1
    )
    scored = []
    for candidate in found[:MAX_SCORED]:
        encoding, confidence = str(candidate["encoding"]), candidate["confidence"]
        if encoding not in CANDIDATES:  # its answer if it finds none
            continue
        text = sample.decode(encoding, "replace")
        contexts = collections.Counter(CONTEXTS.findall(text[:MAX_CHARACTERS]))
        mean = sum(number * implausibility(*context) for context, number in contexts.items()) / contexts.total()
        prior = PRIORS[encoding] ** min(1.0, PRIOR_EVIDENCE / len(contexts))
        scored.append(_Scored(encoding, text, max(confidence, 1e-6) * prior * math.exp(-IMPLAUSIBILITY_WEIGHT * mean)))
    return sorted(scored, key=lambda one: -one.score)


def _nearly_fitting(lines: list[bytes]) -> list[str]:
    """Return the encodings in which at most a tenth of the lines, and at least one, are invalid."""
    counts = {encoding: sum(not _decodes(line, encoding) for line in lines) for encoding in CANDIDATES}
    return [encoding for encoding, invalid in counts.items() if 0 < invalid <= MAX_INVALID * len(lines)]


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _examples(text: str) -> tuple[str, ...]:
    """Return parts of two lines that show characters that are not ASCII."""
    examples: dict[str, None] = {}
    for line in text.split("\n"):
        first = re.search(r"[^\x00-\x7f]", line)
        if first:
            start = max(0, first.start() - EXAMPLE_CHARACTERS // 2)
            examples[line[start : start + EXAMPLE_CHARACTERS].strip()] = None
        if len(examples) == 2:
            break
    return tuple(examples)
