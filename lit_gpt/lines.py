"""Lines that fit into a terminal of 80 columns, whatever characters they have."""

import re
import unicodedata
from collections.abc import Iterable

COLUMNS = 80
JOINER = "\u200d"  # of two emoji, or of two letters, as in Persian
ESCAPE = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")  # of a character that cannot be printed
INDENT = " " * 12  # of a continuation; a line begins with a label of as many columns


def display_width(text: str) -> int:
    """Return the columns of a text in a terminal: 2 for each wide character, as Chinese ones, 0 for combining ones."""
    return len(text) if text.isascii() else sum(map(_character_width, text))


def _character_width(character: str) -> int:
    if character == "\ufe0f":  # makes an emoji of the character before it, which takes 2 columns then
        return 1
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut_line(line: str, columns: int = COLUMNS) -> str:
    """Return a line, or its start and an ellipsis if it is wider than some columns. No character is cut in two."""
    return line if display_width(line) <= columns else f"{line[: _fitting_characters(line, columns - 1)]}…"


def pad_line(line: str, columns: int) -> str:
    """Return a line with spaces behind it, as wide as some columns."""
    return line + " " * (columns - display_width(line))


def wrap_line(line: str) -> list[str]:
    """Return a line as lines of at most 80 columns, each after the first indented by 12.

    It is broken at spaces: after a semicolon or a colon if one is in the second half of the line, else after a comma,
    else between words. A word that is longer, such as a path, stays whole.
    """
    lines = []
    while (place := _breaking_place(line)) is not None:
        lines.append(line[:place].rstrip())
        line = INDENT + line[place:].lstrip()
    return [*lines, line]


def _breaking_place(line: str) -> int | None:
    """Return the index of the space at which a line is broken; None if it fits, or has no such space."""
    fitting = _fitting_characters(line, COLUMNS)
    if fitting == len(line):
        return None
    label = len(INDENT)  # characters
    while line[label : label + 1] == " ":
        label += 1
    spaces = [place for place in range(label, fitting + 1) if line[place] == " "]
    late = [place for place in spaces if display_width(line[:place]) > COLUMNS / 2]
    best = [place for place in late if line[place - 1] in ";:"] or [place for place in late if line[place - 1] == ","]
    found = best[-1] if best else spaces[-1] if spaces else line.find(" ", label)
    return found if found >= 0 else None


def wrap_command(label: str, parts: Iterable[str]) -> list[str]:
    r"""Return a command as lines of at most 80 columns that a shell takes as one, because a backslash ends each.

    Args:
        label: What the command does.
        parts: The words of the command, quoted for a shell; a part of several words stays on one line.
    """
    lines = [f"{label:{len(INDENT)}}"]
    for part in parts:
        if lines[-1].strip() and display_width(f"{lines[-1]}{part} \\") > COLUMNS and lines[-1] != INDENT:
            lines.append(INDENT)
        lines[-1] += f"{part} "
    return [f"{line}\\" for line in lines[:-1]] + [lines[-1].rstrip()]


def wrap_text(text: str, prefix: str) -> list[str]:
    """Return a text as lines of at most 80 columns: a prefix before each of its lines, spaces before continuations.

    A line is broken at the last space of its second half, else at any character, because Chinese text has no spaces.
    """
    lines = []
    for line in text.expandtabs(4).split("\n"):
        start = prefix
        while (place := _fitting_characters(line, COLUMNS - len(start))) < len(line):
            space = line.rfind(" ", place // 2, place + 1)
            place = space + 1 if space >= 0 else place
            lines.append((start + line[:place]).rstrip())
            start, line = " " * len(prefix), line[place:]
        lines.append((start + line).rstrip())
    return lines


def _fitting_characters(text: str, columns: int) -> int:
    """Return how many characters from the start of a text fit into some columns; at least one.

    What a person sees as one character stays together: a letter and its accents, joined emoji, an escape as `\\x1b`.
    """
    used = 0
    for count, character in enumerate(text):
        used += _character_width(character)
        if used > columns:
            return _start_of_character(text, count) or max(1, count)
    return len(text)


def _start_of_character(text: str, place: int) -> int:
    """Return the index at which what a person sees as one character begins; `place` is an index within it."""
    for escape in ESCAPE.finditer(text, max(0, place - 9), place + 9):
        if escape.start() < place < escape.end():
            return escape.start()
    while place > 0 and (text[place - 1] == JOINER or unicodedata.category(text[place]) in ("Mn", "Me", "Mc", "Cf")):
        place -= 1
    return place
