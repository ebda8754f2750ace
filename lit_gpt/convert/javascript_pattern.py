"""The regular expressions of byte-pair vocabularies, in the syntax of JavaScript.

tiktoken's expressions are those of Rust's crate fancy-regex. JavaScript, with the flag `u`, differs in four ways:

- It has no possessive quantifiers. `X++` becomes `(?=(?<a1>X+))\\k<a1>`: a lookahead never gives back what it matched.
- It does not ignore case in a part of an expression, as `(?i:...)` does: each letter becomes a class of its forms.
- Its `\\s` contains U+FEFF and lacks U+0085: `\\p{White_Space}` is the same as Rust's `\\s`.
- It permits a backslash before the characters of its own syntax only.
"""

import functools
import re
import sys

from lit_gpt.errors import UserError

_ESCAPES = {"s": r"\p{White_Space}", "S": r"\P{White_Space}", "d": r"\p{Nd}", "D": r"\P{Nd}"}
_SAME_ESCAPES = "rntfv"
_SYNTAX = r"^$\.*+?()[]{}|/"
_CATEGORY = re.compile(r"[pP](?:\{([A-Z][a-z]?)\}|([A-Z]))")
_GROUP = re.compile(r"\((?:\?(?:i:|:|=|!|<=|<!))?")
_QUANTIFIER = re.compile(r"(?:[*+?]|\{\d+(?:,\d*)?\})")


def javascript_pattern(pattern: str) -> str:
    r"""Return a regular expression for JavaScript's flag `u` that matches what `pattern` matches in tiktoken.

    Example:
        >>> javascript_pattern(r"\p{N}{1,3}+|\s")
        '(?=(?<a1>\\p{N}{1,3}))\\k<a1>|\\p{White_Space}'

    Raises:
        UserError: The pattern has a part that this module does not know.
    """
    return _Translator(pattern).translate()


class _Translator:
    """Reads a pattern from left to right.

    Attributes:
        position: Of the next character.
        num_atomic: The number of possessive quantifiers so far.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.position = 0
        self.num_atomic = 0

    def translate(self) -> str:
        translated = self.alternatives(ignore_case=False)
        if self.position < len(self.pattern):
            raise self.unknown(self.pattern[self.position])
        return translated

    def alternatives(self, ignore_case: bool) -> str:
        """Translate up to the end of the group."""
        parts: list[str] = []
        while self.position < len(self.pattern) and self.pattern[self.position] != ")":
            parts.append(self.quantified(ignore_case))
        return "".join(parts)

    def quantified(self, ignore_case: bool) -> str:
        """Translate a character, class or group with its quantifier."""
        atom = self.atom(ignore_case)
        quantifier = _QUANTIFIER.match(self.pattern, self.position)
        if quantifier is None:
            return atom
        self.position = quantifier.end()
        if self.skip("+"):
            self.num_atomic += 1
            name = f"a{self.num_atomic}"
            return rf"(?=(?<{name}>{atom}{quantifier[0]}))\k<{name}>"
        return atom + quantifier[0] + ("?" if self.skip("?") else "")

    def atom(self, ignore_case: bool) -> str:
        character = self.pattern[self.position]
        if character == "(":
            return self.group(ignore_case)
        if character == "[":
            return self.character_class(ignore_case)
        if character == "\\":
            return self.escape()
        if character in "*+?{":
            raise self.unknown(character)
        self.position += 1
        if character in "|^$.":
            return character
        forms = _forms(character) if ignore_case else character
        return _literal(forms) if len(forms) == 1 else f"[{''.join(map(_literal, forms))}]"

    def group(self, ignore_case: bool) -> str:
        start = _GROUP.match(self.pattern, self.position)
        assert start is not None, "a group begins here"
        self.position = start.end()
        if self.pattern[self.position : self.position + 1] == "?":
            raise self.unknown(f"{start[0]}?")
        inside = self.alternatives(ignore_case or start[0] == "(?i:")
        if not self.skip(")"):
            raise self.unknown(start[0])
        return f"{'(?:' if start[0] in ('(', '(?i:') else start[0]}{inside})"

    def character_class(self, ignore_case: bool) -> str:
        start = self.position
        self.position += 1
        parts = ["[^" if self.skip("^") else "["]
        while not self.skip("]"):
            rest = self.pattern[self.position : self.position + 2]
            if not rest or rest[0] == "[" or rest in ("&&", "--", "~~"):  # sets inside sets
                raise self.unknown(self.pattern[start : self.position + 2])
            if rest[0] == "\\":
                parts.append(self.escape())
            else:
                self.position += 1
                is_range = rest[0] == "-" and len(parts) > 1 and self.pattern[self.position : self.position + 1] != "]"
                forms = _forms(rest[0]) if ignore_case else rest[0]
                parts += ["-"] if is_range else [rf"\{form}" if form == "-" else _literal(form) for form in forms]
        if ignore_case and "-" in parts:  # the forms of a letter stand beside it, not in its range
            raise self.unknown(f"(?i:{self.pattern[start : self.position]}")
        return "".join([*parts, "]"])

    def escape(self) -> str:
        """Translate a backslash and what belongs to it."""
        if category := _CATEGORY.match(self.pattern, self.position + 1):
            self.position = category.end()
            return rf"\{category[0][0]}{{{category[1] or category[2]}}}"
        character = self.pattern[self.position + 1 : self.position + 2]
        self.position += 2
        if character in _ESCAPES:
            return _ESCAPES[character]
        if character and character in _SAME_ESCAPES:
            return rf"\{character}"
        if not character or character.isalnum():
            raise self.unknown(rf"\{character}")
        return rf"\{character}" if character == "-" else _literal(character)

    def skip(self, character: str) -> bool:
        """Return whether this is the next character, and go on after it."""
        is_next = self.pattern.startswith(character, self.position)
        self.position += is_next
        return is_next

    def unknown(self, part: str) -> UserError:
        return UserError(
            f"the tokenizer splits texts with {self.pattern!r}, and a web page has no form of {part!r}: export to "
            "another format, as --to gguf FILE"
        )


def _literal(character: str) -> str:
    return rf"\{character}" if character in _SYNTAX else character


@functools.cache
def _forms(character: str) -> str:
    """Return the characters that differ from this one in case only: `s` has the forms S, s and ſ."""
    folded = character.casefold()
    return "".join(form for form in map(chr, range(sys.maxunicode + 1)) if form.casefold() == folded)
