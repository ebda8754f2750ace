"""Lines of at most 80 columns: lines with labels, commands for a shell, generated texts."""

import re
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.lines import cut_line, display_width, wrap_command, wrap_line, wrap_text


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("abc", 3),
        ("床前明月光", 10),
        ("ｆｕｌｌ", 8),
        ("한국어", 6),
        ("ﾊﾝｶｸ", 4),
        ("é", 1),
        ("e\u0301", 1),
        ("日本\u200dgo", 6),
        ("🙂", 2),
        ("\u2764\ufe0f", 2),  # a heart as an emoji
    ],
)
def test_display_width_counts_the_columns_of_a_terminal(text: str, width: int) -> None:
    assert display_width(text) == width


@pytest.mark.parametrize(
    ("line", "columns", "cut"),
    [
        ("abcdef", 6, "abcdef"),
        ("abcdef", 5, "abcd…"),
        ("床前明月光", 10, "床前明月光"),
        ("床前明月光", 9, "床前明月…"),
        ("床前明月光", 8, "床前明…"),  # half of a character is not shown
        ("e\u0301e\u0301e\u0301", 2, "e\u0301…"),  # nor a letter without its accent
        ("x👩\u200d🚀 y", 4, "x…"),  # nor half of a joined emoji, of an escape or of a syllable
        (r"ab\x1bcd", 6, "ab…"),
        (r"ab\x1bcd", 7, r"ab\x1b…"),
        ("नमस्ते दुनिया", 4, "नमस्…"),
    ],
)
def test_cut_line_fits_and_keeps_whole_characters(line: str, columns: int, cut: str) -> None:
    assert cut_line(line, columns) == cut


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        ("text        short", ["text        short"]),
        ("x" * 12 + "y" * 68, ["x" * 12 + "y" * 68]),
        (  # after a semicolon, though more words would fit
            "label       " + "word " * 8 + "end; " + "word " * 8,
            ["label       " + "word " * 8 + "end;", "            " + "word " * 7 + "word"],
        ),
        (  # after a comma
            "label       " + "word, " * 14 + "word",
            ["label       " + ("word, " * 11).rstrip(), "            word, word, word, word"],
        ),
        ("label       " + "word " * 16, ["label       " + ("word " * 13).rstrip(), "            word word word"]),
        ("label       " + "字字字 " * 10, ["label       " + ("字字字 " * 9).rstrip(), "            字字字"]),
        ("logs        " + "/path" * 20, ["logs        " + "/path" * 20]),
        (
            "logs        in " + "/path" * 20 + " end",
            ["logs        in", "            " + "/path" * 20, "            end"],
        ),
    ],
)
def test_wrap_line_breaks_at_the_best_place(line: str, lines: list[str]) -> None:
    assert [text.rstrip() for text in wrap_line(line)] == lines


def test_long_lines_are_broken_quickly() -> None:
    assert len(wrap_line("changed     data.files " + "file " * 50_000)) == 50_000 // 13 + 1
    assert len(wrap_text("字" * 50_000, "  | ")) == -(-50_000 // 38)


WORD = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=40)
WORDS = st.lists(WORD, min_size=1, max_size=20)


@given(WORDS)
def test_wrap_line_keeps_the_words_and_fits_unless_a_word_is_longer(words: list[str]) -> None:
    lines = wrap_line(f"label       {' '.join(words)}")
    assert " ".join(lines).split() == ["label", *words]
    for line in lines:
        assert display_width(line) <= 80 or len(line.removeprefix("label").split()) == 1
    assert all(re.match(r" {12}\S", line) for line in lines[1:])


@given(WORDS)
def test_wrapped_command_is_the_same_for_a_shell(words: list[str]) -> None:
    lines = wrap_command("more", [shlex.quote(word) for word in words])
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == ["more", *words]
    assert all(display_width(line) <= 80 or len(line.split()) <= 3 for line in lines)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"])))
def test_wrapped_text_fits_and_keeps_every_character(text: str) -> None:
    lines = wrap_text(text, "  | ")
    assert all(display_width(line) <= 80 for line in lines)
    assert lines[0].startswith("  |")
    assert all(line.startswith("    ") or not line for line in lines[1:])
    assert "".join(line[4:] for line in lines).replace(" ", "") == text.rstrip().replace(" ", "")


def test_text_is_broken_at_spaces_or_between_chinese_characters() -> None:
    assert wrap_text("word " * 16 + "\nnext", "  | ") == ["  | " + ("word " * 15).rstrip(), "    word", "  | next"]
    assert wrap_text("床" * 40, "  | ") == ["  | " + "床" * 38, "    床床"]
