"""Make text safe to print: control characters, and others that hide or reorder text, become visible escapes."""

import re

# What a terminal may execute, and what makes a line look different from what it says:
CONTROLS = (
    r"\x00-\x1f\x7f-\x9f"  # C0 controls, among them ESC and line ends; DEL; C1 controls
    r"\u2028\u2029"  # line and paragraph separators
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # reorder the characters around them
    r"\u00ad\u034f\u17b4\u17b5\u180e\u200b\u2060-\u2065\u3164\ufeff\uffa0\ufff0-\ufffb"  # invisible
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"  # invisible
    r"\ud800-\udfff"  # half a surrogate pair, which no encoding can write
)
# Invisible, but part of ordinary text: joiners (Persian, Hindi, emoji) and variation selectors (Han, Mongolian, emoji).
# Only a run of them is escaped, because it can hide a text.
JOINERS, SELECTORS = r"\u200c\u200d", r"\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef"
FLAG = r"\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{3,6}\U000e007f"  # the emoji of a region, as Scotland
UNPRINTABLE = re.compile(rf"({FLAG})|[{CONTROLS}]|(?<=[{JOINERS}{SELECTORS}])[{SELECTORS}]|(?<=[{JOINERS}])[{JOINERS}]")


def escape_controls(text: str, keep: str = "") -> str:
    r"""Replace control characters by escapes as in a Python string: `\x1b`, `\n`, `\u202e`.

    Ordinary text of every language stays as it is, emoji included.

    Args:
        text: Any text, also one with lone surrogates.
        keep: Characters that stay, as "\n".
    """

    def escape(match: re.Match[str]) -> str:
        found = match[0]
        return found if match[1] or found in keep else found.encode("unicode_escape").decode()

    return UNPRINTABLE.sub(escape, text)


def one_line(text: str) -> str:
    """Return text as one printable line: every run of white space becomes a space."""
    return escape_controls(" ".join(text.split()))
