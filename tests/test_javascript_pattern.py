"""The regular expressions of vocabularies in JavaScript; tests/test_web_page.py runs them beside tiktoken's."""

import pytest

from lit_gpt.convert.javascript_pattern import javascript_pattern
from lit_gpt.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "translated"),
    [
        (r" ?\p{L}+|\pN", r" ?\p{L}+|\p{N}"),
        (r"\p{N}{1,3}+", r"(?=(?<a1>\p{N}{1,3}))\k<a1>"),
        (r"[^\s\p{L}]++[\r\n]*+", r"(?=(?<a1>[^\p{White_Space}\p{L}]+))\k<a1>(?=(?<a2>[\r\n]*))\k<a2>"),
        (r"\s+(?!\S)|\s+?$", r"\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+?$"),
        (r"'(?i:[st]|ll)x", r"'(?:[SsſTt]|[Ll][Ll])x"),
        (r"(?:ab)++", r"(?=(?<a1>(?:ab)+))\k<a1>"),
        (r"[\r\n/]\-\#", r"[\r\n\/]\-#"),
        (r"[a-c.-]", r"[a-c\.\-]"),
    ],
)
def test_pattern_becomes_one_that_javascript_knows(pattern: str, translated: str) -> None:
    assert javascript_pattern(pattern) == translated


@pytest.mark.parametrize(
    "pattern", [r"\w+", r"[\p{Lu}&&\p{L}]", r"(?s).", r"\p{Han}", r"(?i:[a-z])", "a)", "(a", "[a", "+", "(?<n>a)"]
)
def test_pattern_with_an_unknown_part_is_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="a web page has no form of"):
        javascript_pattern(pattern)
