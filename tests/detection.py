"""Measure how often encodings are detected rightly, by this program and by libraries.

    pip install django sphinx faker charset-normalizer faust-cchardet chardetng-py  # none is in the extra "test"
    python tests/detection.py                       # the tables of docs/encodings.md
    python tests/detection.py --seeds 1 --failures  # fewer files; and each wrong guess of this program

The texts are translations from Django and Sphinx and names of people from Faker, in the languages that are written in
each encoding. Nothing of them is stored here. A guess is right if the file, decoded with it, is the text that was
encoded.
"""

import argparse
import collections
import csv
import importlib
import importlib.metadata
import importlib.util
import io
import platform
import random
import re
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lit_gpt.data.encodings import detect_encoding
from lit_gpt.data.sources import Source
from lit_gpt.errors import UserError

LENGTHS = (300, 3_000, 30_000, 300_000)  # characters
KINDS = ("prose", "table")
WESTERN = ("fr", "de", "es", "it", "pt", "sv", "da", "nb", "fi", "nl", "en")
CENTRAL = ("pl", "cs", "hu", "sk", "sl", "hr", "ro")
ALL = ("fr", "de", "pl", "ru", "el", "tr", "he", "ar", "th", "ja", "ko", "zh_Hans", "zh_Hant", "en")
LANGUAGES: dict[str, tuple[str, ...]] = {  # that people write in each encoding
    "utf_8": ALL,
    "utf_8_sig": ALL,
    "utf_16": ALL,
    "utf_16_le": ALL,
    "utf_16_be": ALL,
    "gb18030": ("zh_Hans",),
    "big5": ("zh_Hant",),
    "cp932": ("ja",),
    "euc_jp": ("ja",),
    "iso2022_jp": ("ja",),
    "cp949": ("ko",),
    "cp1250": CENTRAL,
    "cp1251": ("ru", "uk", "bg", "be", "mk", "sr"),
    "cp1252": WESTERN,
    "cp1253": ("el",),
    "cp1254": ("tr",),
    "cp1255": ("he",),
    "cp1256": ("ar", "fa"),
    "cp1257": ("lt", "lv", "et"),
    "cp1258": ("vi",),
    "cp874": ("th",),
    "koi8_r": ("ru",),
    "koi8_u": ("uk",),
    "iso8859_2": CENTRAL,
    "mac_roman": WESTERN,
    "cp850": WESTERN,
    "cp866": ("ru",),
}
SPHINX_NAMES = {"zh_Hans": "zh_CN", "zh_Hant": "zh_TW", "uk": "uk_UA"}
FAKER_NAMES = {
    "ar": "ar_SA", "be": "ru_RU", "bg": "bg_BG", "cs": "cs_CZ", "da": "da_DK", "de": "de_DE", "el": "el_GR",
    "en": "fr_FR", "es": "es_ES", "et": "et_EE", "fa": "fa_IR", "fi": "fi_FI", "fr": "fr_FR", "he": "he_IL",
    "hr": "hr_HR", "hu": "hu_HU", "it": "it_IT", "ja": "ja_JP", "ko": "ko_KR", "lt": "lt_LT", "lv": "lv_LV",
    "mk": "mk_MK", "nb": "no_NO", "nl": "nl_NL", "pl": "pl_PL", "pt": "pt_PT", "ro": "ro_RO", "ru": "ru_RU",
    "sk": "sk_SK", "sl": "sl_SI", "sr": "mk_MK", "sv": "sv_SE", "th": "th_TH", "tr": "tr_TR", "uk": "uk_UA",
    "vi": "vi_VN", "zh_Hans": "zh_CN", "zh_Hant": "zh_TW",
}  # fmt: skip
ENGLISH_SIGNS = ("don’t", "“quoted”", "café", "£4.50", "€20", "30 °C", "naïve", "Zoë", "–", "José", "Müller")
MESSAGE = re.compile(r'^(msgid|msgstr)(?:_plural|\[\d\])? ((?:"(?:[^"\\]|\\.)*"\s*)+)', re.MULTILINE)
VIETNAMESE_TONES = "\u0300\u0301\u0303\u0309\u0323"  # cp1258 stores them after the vowel


@dataclass(frozen=True)
class Case:
    """A file whose encoding is known.

    Attributes:
        encoding: The encoding, one of `LANGUAGES`.
        language: The language of its text.
        length: Its characters, one of `LENGTHS`.
        kind: One of `KINDS`.
        text: Its text.
        content: Its bytes.
    """

    encoding: str
    language: str
    length: int
    kind: str
    text: str
    content: bytes


# ------------------------------------------------------------------------------------------------------------- texts


@cache
def sentences(language: str) -> list[str]:
    """Return the translations into a language; for "en" the texts that were translated."""
    found: dict[str, None] = {}
    english = language == "en"
    for package, name in (("django", language), ("sphinx", SPHINX_NAMES.get(language, language))):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"error: the texts come from {package}: pip install django sphinx faker")
        for path in sorted(Path(spec.origin).parent.rglob(f"{'fr' if english else name}/LC_MESSAGES/{package}.po")):
            for match in MESSAGE.finditer(path.read_text(encoding="utf-8")):
                text = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', match[2])).replace('\\"', '"')
                if (match[1] == "msgid") == english and len(text) > 3 and not re.search(r"[%{}\\<>]", text):
                    found[text] = None
    return list(found)


@cache
def names(language: str) -> list[str]:
    """Return names of people; for "en" those of several countries, of which most are ASCII."""
    import faker

    maker = faker.Faker(
        ["en_US"] * 4 + ["fr_FR", "de_DE", "es_ES", "da_DK", "sv_SE", "pt_BR"]
        if language == "en"
        else FAKER_NAMES[language]
    )
    maker.seed_instance(1)
    return [maker.name() for _ in range(1000)]


def sentence(language: str, rng: random.Random) -> str:
    """Return a random sentence; every eighth English one has a sign that is not ASCII."""
    text = rng.choice(sentences(language))
    if language == "en" and rng.random() < 0.125:
        words = text.split(" ")
        words.insert(rng.randint(1, len(words)), rng.choice(ENGLISH_SIGNS))
        text = " ".join(words)
    return text


def make_prose(language: str, length: int, rng: random.Random) -> str:
    """Return lines of a few sentences each."""
    lines, size = [], 0
    while size < length:
        lines.append(" ".join(sentence(language, rng) for _ in range(rng.randint(1, 4))))
        size += len(lines[-1]) + 1
    return "\n".join(lines) + "\n"


def make_table(language: str, length: int, rng: random.Random) -> str:
    """Return a CSV of a name, dates, numbers and English words; a sentence stands in every fourth row only."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow(["id", "date", "name", "price", "status", "note"])
    number = 0
    while file.tell() < length:
        number += 1
        date = f"{rng.randint(1990, 2025)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
        note = sentence(language, rng) if rng.random() < 0.25 else ""
        status = rng.choice(("open", "closed", "waiting for the customer", "refunded"))
        writer.writerow([number, date, rng.choice(names(language)), f"{rng.uniform(1, 500):.2f}", status, note])
    return file.getvalue()


def encodable(text: str, encoding: str) -> str:
    """Return a text with what an encoding lacks left out, and decomposed as cp1258 stores it."""
    if encoding == "cp1258":
        parts = []
        for character in unicodedata.normalize("NFC", text):
            decomposed = unicodedata.normalize("NFD", character)
            tones = "".join(mark for mark in decomposed if mark in VIETNAMESE_TONES)
            rest = "".join(mark for mark in decomposed if mark not in VIETNAMESE_TONES)
            parts.append(unicodedata.normalize("NFC", rest) + tones)
        text = "".join(parts)
    return text.encode(encoding, "ignore").decode(encoding)


def make_cases(
    seeds: Iterable[int], encodings: list[str] | None = None, lengths: Iterable[int] = LENGTHS
) -> Iterator[Case]:
    """Yield the files: for each encoding, length and kind one for each language and seed.

    A file with no character that is not ASCII is left out: each encoding reads it.
    """
    make = {"prose": make_prose, "table": make_table}
    for encoding in encodings or LANGUAGES:
        for length in lengths:
            for kind in KINDS:
                for language in LANGUAGES[encoding]:
                    for seed in seeds:
                        rng = random.Random(f"{encoding} {length} {kind} {language} {seed}")
                        text = encodable(make[kind](language, length, rng), encoding)
                        if not text.isascii():
                            yield Case(encoding, language, length, kind, text, text.encode(encoding))


# --------------------------------------------------------------------------------------------------------- detectors


def with_this_program(content: bytes) -> tuple[str, bool]:
    """Return the encoding, and whether the program prints no doubt."""
    with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        file.write(content)
        file.flush()
        try:
            found = detect_encoding(Source(file.name))
        except UserError:
            return "none", False
    return found.name, found.is_sure


def with_chardet(content: bytes) -> tuple[str, bool]:
    found = importlib.import_module("chardet").detect(content, compat_names=False)
    return found["encoding"] or "none", found["confidence"] >= 0.9


def with_charset_normalizer(content: bytes) -> tuple[str, bool]:
    best = importlib.import_module("charset_normalizer").from_bytes(content).best()
    return (best.encoding, best.chaos < 0.1) if best else ("none", False)


def with_cchardet(content: bytes) -> tuple[str, bool]:
    found = importlib.import_module("cchardet").detect(content)
    return found["encoding"] or "none", (found["confidence"] or 0) >= 0.9


def with_chardetng(content: bytes) -> tuple[str, bool]:
    detector = importlib.import_module("chardetng_py").EncodingDetector()
    detector.feed(content, last=True)
    return detector.guess_assess(tld=None, allow_utf8=True)


DETECTORS: dict[str, Callable[[bytes], tuple[str, bool]]] = {  # by package
    "lit-gpt": with_this_program,
    "chardet": with_chardet,
    "chardetng-py": with_chardetng,
    "charset-normalizer": with_charset_normalizer,
    "faust-cchardet": with_cchardet,
}


def is_right(case: Case, encoding: str) -> bool:
    """Return whether a file decodes to its text."""
    try:
        return case.content.decode(encoding).removeprefix("\ufeff") == case.text.removeprefix("\ufeff")
    except (LookupError, UnicodeError):
        return False


@dataclass
class Counts:
    """What a detector made of some files. A guess is an answer that it is not sure of."""

    files: int = 0
    right: int = 0
    guesses: int = 0
    wrong_and_sure: int = 0

    def __str__(self) -> str:
        return f"{self.right / self.files:.1%}" if self.files else ""


def measure(detector: str, cases: Iterator[Case], show_failures: bool) -> dict[tuple[str, str, int], Counts]:
    """Return the counts by encoding, kind and length."""
    counts: dict[tuple[str, str, int], Counts] = collections.defaultdict(Counts)
    for case in cases:
        encoding, is_sure = DETECTORS[detector](case.content)
        count = counts[case.encoding, case.kind, case.length]
        count.files += 1
        count.guesses += not is_sure
        if is_right(case, encoding):
            count.right += 1
        else:
            count.wrong_and_sure += is_sure
            if show_failures:
                found = f"{encoding} {'SURE' if is_sure else ''}"
                print(f"{case.encoding:10} {case.language:8} {case.kind:6} {case.length:7,}: {found}")
    return counts


def total(counts: dict[tuple[str, str, int], Counts], *selected: object) -> Counts:
    """Return the sum of the counts whose key contains all selected values."""
    found = [count for key, count in counts.items() if all(value in key for value in selected)]
    return Counts(
        *(sum(getattr(count, name) for count in found) for name in ("files", "right", "guesses", "wrong_and_sure"))
    )


def print_table(corner: str, columns: list[str], rows: dict[str, list[str]]) -> None:
    """Print a table in Markdown."""
    print(f"\n| {corner} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="files for each encoding, length, kind and language")
    parser.add_argument("--first_seed", type=int, default=0, help="another gives other files")
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=list(DETECTORS))
    parser.add_argument("--encodings", nargs="+", choices=LANGUAGES)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--failures", action="store_true", help="print each wrong guess")
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    results, seconds = {}, {}
    for name in options.detectors:
        start = time.perf_counter()
        results[name] = measure(name, make_cases(seeds, options.encodings, options.lengths), options.failures)
        seconds[name] = time.perf_counter() - start
    packages = [*(name for name in options.detectors if name != "lit-gpt"), "django", "sphinx", "faker"]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"{platform.machine()}, Python {platform.python_version()}, {versions}")
    columns = ["all", *KINDS, *(f"{length:,}" for length in options.lengths), "guesses", "wrong and sure", "seconds"]
    rows = {}
    for name, counts in results.items():
        every = total(counts)
        parts = [total(counts, part) for part in (*KINDS, *options.lengths)]
        wrong = f"{every.wrong_and_sure / every.files:.2%} of {every.files:,}"
        guesses = f"{every.guesses / every.files:.1%}"
        rows[name] = [*map(str, [every, *parts]), guesses, wrong, f"{seconds[name]:.0f}"]
    print_table("detector", columns, rows)
    print_table(
        "encoding",
        list(results),
        {
            encoding: [str(total(counts, encoding)) for counts in results.values()]
            for encoding in options.encodings or LANGUAGES
        },
    )


if __name__ == "__main__":
    main()
