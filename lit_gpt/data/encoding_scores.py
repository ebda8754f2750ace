"""Choose the encoding of lines that are not ASCII: score what they are in each of many encodings.

chardet scores how much they look like the languages that are written in an encoding. Where several are equally good,
the neighbours of each character decide (`implausibility`), and in short texts how common the encodings are.
"""

import collections
import math
import re
from dataclasses import dataclass

from lit_gpt.data.plausibility import implausibility, is_letter

SURE = 0.95  # a lower confidence is a guess, which is printed
GUESS = 0.9  # the confidence where something else than the scores speaks against certainty, at most
EXAMPLE_CHARACTERS = 32  # of a line, which may each take two columns of the console

TWO_BYTE = ("gb18030", "big5hkscs", "cp932", "euc_jis_2004", "cp949")
CANDIDATES = (  # as chardet names them; a subset, as ascii, gbk or iso8859-1, is read as its superset
    *TWO_BYTE,  # of encodings in which a file has the same text, the first is taken
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "cp874"),
    *("koi8-r", "koi8-u", "iso8859-2", "iso8859-5", "iso8859-7", "iso8859-15"),
    *("mac-roman", "mac-cyrillic", "cp437", "cp850", "cp852", "cp866"),
)

# The numbers below were chosen with `tests/detection.py`.
MAX_SCORED = 8  # encodings, those that chardet finds likeliest
MAX_CHARACTERS = 20_000  # of the sample; of more, an even part is compared with its neighbours
IMPLAUSIBILITY_WEIGHT = 3.0  # score = chardet's confidence * prior * exp(-weight * mean implausibility)

# Priors: how common an encoding is among files whose text decides little.
PRIORS = dict.fromkeys(CANDIDATES, 1.0) | {"cp1252": 1.25, "cp1250": 0.9, "cp1258": 0.9, "iso8859-2": 0.9}
PRIORS |= {"iso8859-15": 0.8, "mac-roman": 0.8, "mac-cyrillic": 0.7, "cp437": 0.7, "cp850": 0.75, "cp852": 0.7}
PRIOR_OF_SIGNS = 30.0  # of cp1252, if all is signs that stand where they usually do, as in prices and after quotes
USUAL = 0.16  # their mean implausibility, at most
PRIOR_EVIDENCE = 20  # characters with different neighbours; from so many on the priors count less

# Evidence: the number of characters that are not ASCII, with different neighbours. Less than this makes a guess.
MAX_REPEATED = 3  # times that the same character is counted
MIN_EVIDENCE = 4
MIN_WORDS = 8  # different words that are not ASCII
MIN_TWO_BYTE = 25  # different characters, in encodings of two bytes a character
TWO_BYTE_EVIDENCE = 0.4  # what such a character counts: more of them occur in each encoding
MAX_RIVAL = 0.4  # share of the best score that another encoding of two bytes may have: names of people fit several
MAX_STRANGENESS = 0.15  # mean implausibility of the best encoding; it is hardly above 0.07 in the right one

MAX_INVALID_LINES = 0.1  # share of the lines that may be invalid in an encoding that fits all others best

WORDS = re.compile(r"[A-Za-z]*[^\x00-\x7f][A-Za-z\x80-\U0010ffff]*")  # that are not ASCII
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


@dataclass(frozen=True)
class _Scored:
    """The sample of a file in one encoding.

    Attributes:
        encoding: The encoding.
        text: The decoded sample.
        score: How likely it is, compared with the others.
        strangeness: Mean `implausibility` of its characters.
    """

    encoding: str
    text: str
    score: float
    strangeness: float


def choose_encoding(lines: list[bytes]) -> DetectedEncoding:
    """Return the encoding of a file whose lines that are not ASCII are given."""
    ranking = _rank(lines)
    for encoding in _nearly_fitting(lines):  # a few bytes are invalid in it: it may be the encoding of the others
        others = _rank([line for line in lines if _decodes(line, encoding)])
        if others and others[0].encoding == encoding and (not ranking or others[0].score > ranking[0].score):
            ranking = others
    if not ranking:  # chardet finds no text; the reader rejects the lines that are invalid in the commonest encoding
        return DetectedEncoding("cp1252", 0.0, "", _examples(b"\n".join(lines).decode("cp1252", "replace")))
    best = min((one for one in ranking if one.text == ranking[0].text), key=lambda one: CANDIDATES.index(one.encoding))
    second = next((scored for scored in ranking if scored.text != best.text), None)
    evidence, is_enough = _evidence(best)
    is_enough = is_enough and best.strangeness <= MAX_STRANGENESS
    if second and {best.encoding, second.encoding} <= set(TWO_BYTE):
        is_enough = is_enough and second.score <= MAX_RIVAL * ranking[0].score
    odds = (second.score / ranking[0].score) ** evidence if second else 0.0
    confidence = 1 / (1 + odds) if is_enough else min(1 / (1 + odds), GUESS)
    return DetectedEncoding(best.encoding, confidence, second.encoding if second else "", _examples(best.text))


def _evidence(scored: _Scored) -> tuple[float, bool]:
    """Return how much the text tells about its encoding, and whether that is enough to be sure.

    A character counts again with other neighbours, but not often: a price tells about "£" what another price tells.
    """
    counts = collections.Counter(character for _, character, _ in set(CONTEXTS.findall(scored.text)))
    evidence = sum(min(number, MAX_REPEATED) for number in counts.values())
    if scored.encoding in TWO_BYTE:
        return TWO_BYTE_EVIDENCE * evidence, len(counts) >= MIN_TWO_BYTE
    return evidence, evidence >= MIN_EVIDENCE and len(set(WORDS.findall(scored.text))) >= MIN_WORDS


def _rank(lines: list[bytes]) -> list[_Scored]:
    """Return the encodings in which all lines are valid, the likeliest first; none if chardet finds no text."""
    sample = b"\n".join(lines)
    confidences = _language_confidences(sample)
    for encoding in CANDIDATES:
        small = _in_small_letters(sample, encoding)
        if small:
            found = _language_confidences(small).get(encoding, 0.0)
            confidences[encoding] = max(confidences.get(encoding, 0.0), found)
    likely = dict.fromkeys([*sorted(confidences, key=lambda name: -confidences[name])[:MAX_SCORED], "cp1252"])
    scored = [_score(sample, encoding, confidences[encoding]) for encoding in likely if encoding in confidences]
    return sorted(scored, key=lambda one: -one.score)


def _language_confidences(sample: bytes) -> dict[str, float]:
    """Return how much a sample looks like a language in each encoding that chardet does not exclude, from 0 to 1."""
    import chardet  # imported here because few files need it

    found = chardet.detect_all(
        sample, include_encodings=CANDIDATES, compat_names=False, ignore_threshold=True, max_bytes=len(sample) + 1
    )
    return {str(one["encoding"]): one["confidence"] for one in found if one["encoding"] in CANDIDATES}


def _in_small_letters(sample: bytes, encoding: str) -> bytes:
    """Return a sample in small letters if, in this encoding, it is in capitals; b"" for another.

    chardet's language models hardly know capitals: Russian ones in cp1251 look to them like small letters in koi8-r.
    """
    if not _decodes(sample, encoding):
        return b""
    text = sample.decode(encoding)
    words = set(WORDS.findall(text))
    capitals = sum(len(word) > 1 and word.isupper() for word in words)
    return text.lower().encode(encoding, "ignore") if 2 * capitals > len(words) else b""


def _score(sample: bytes, encoding: str, confidence: float) -> _Scored:
    """Combine chardet's confidence in an encoding with its prior and the plausibility of the decoded characters."""
    text = sample.decode(encoding, "replace")
    rows = text.split("\n")
    contexts = collections.Counter(CONTEXTS.findall("\n".join(rows[:: 1 + len(text) // MAX_CHARACTERS])))
    mean = sum(number * implausibility(*context) for context, number in contexts.items()) / max(1, contexts.total())
    prior = PRIORS[encoding]
    if encoding == "cp1252" and mean < USUAL and not any(is_letter(character) for _, character, _ in contexts):
        prior = PRIOR_OF_SIGNS
    prior **= min(1.0, PRIOR_EVIDENCE / max(1, len(contexts)))
    return _Scored(encoding, text, max(confidence, 1e-6) * prior * math.exp(-IMPLAUSIBILITY_WEIGHT * mean), mean)


def _nearly_fitting(lines: list[bytes]) -> list[str]:
    """Return the encodings in which at most a tenth of the lines, and at least one, are invalid."""
    counts = {encoding: sum(not _decodes(line, encoding) for line in lines) for encoding in CANDIDATES}
    return [encoding for encoding, invalid in counts.items() if 0 < invalid <= MAX_INVALID_LINES * len(lines)]


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
