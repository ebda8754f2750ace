"""Text that is printed: controls are escaped, ordinary text stays."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.printable import escape_controls, one_line

# Ordinary text with characters that are invisible and necessary.
ORDINARY = {
    "Chinese": "床前明月光，疑是地上霜。\u3000𠮷",
    "Han variants": "葛\U000e0100飾区 辻\U000e0101",
    "Korean": "훈민정음 ㄱㄴㄷ",
    "Hebrew": "בְּרֵאשִׁית",
    "Arabic": "بِسْمِ اللَّه ﷽ \u0600\u0661",
    "Persian": "می\u200cخواهم",
    "Hindi": "हिन्दी क्\u200dष क्\u200cष",
    "Thai": "กำหนด น้ำ",
    "Mongolian": "ᠮᠣᠩᠭᠣᠯ ᠠ\u180b",
    "Vietnamese": "tiếng Việt, e\u0302\u0301",
    "emoji": "👍🏽 👨\u200d👩\u200d👧 ❤\ufe0f\u200d🔥 1\ufe0f\u20e3 🇨🇳",
    "flags of regions": "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "code": "print('a\\\\n') # {x!r} §€½ \u00a0|",
}


@pytest.mark.parametrize("text", ORDINARY.values(), ids=ORDINARY.keys())
def test_escape_controls_keeps_ordinary_text(text: str) -> None:
    assert escape_controls(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\r\nb\tc\x00\x7f", r"a\r\nb\tc\x00\x7f"),
        ("\x85\x9b31m", r"\x85\x9b31m"),
        ("a\u2028b\u2029", r"a\u2028b\u2029"),
        ("\u202etxt.exe\u2066\u200f\u061c", r"\u202etxt.exe\u2066\u200f\u061c"),
        ("pass\u200bword\ufeff\u2060\u00ad", r"pass\u200bword\ufeff\u2060\xad"),
        ("\udc80", r"\udc80"),
        ("a\U000e0041\U000e0042", r"a\U000e0041\U000e0042"),  # tags that no flag precedes
        ("a\ufe0f\ufe00\ufe01", "a\ufe0f" + r"\ufe00\ufe01"),  # a run of selectors can hide a text
        ("a\u200d\u200c\u200d", "a\u200d" + r"\u200c\u200d"),
    ],
)
def test_escape_controls_shows_what_is_not_printable(text: str, expected: str) -> None:
    assert escape_controls(text) == expected


def test_escape_controls_keeps_the_characters_that_it_is_told_to() -> None:
    assert escape_controls("a\n\tb\r\n", keep="\n\t") == "a\n\tb\\r\n"


def test_escape_controls_escapes_every_control_and_every_format_character_but_signs_and_joiners() -> None:
    visible_or_joining = ("ARABIC", "SYRIAC", "KAITHI", "EGYPTIAN", "ZERO WIDTH NON-JOINER", "ZERO WIDTH JOINER")
    for number in range(0x110000):
        character = chr(number)
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            is_kept = escape_controls(character) == character
            assert is_kept == (unicodedata.name(character, "").startswith(visible_or_joining) and number != 0x61C)


@given(st.text())
def test_one_line_has_no_line_end_and_is_printed_as_it_is(text: str) -> None:
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert escape_controls(line) == line
