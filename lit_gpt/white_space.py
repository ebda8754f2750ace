"""Cut a text at long runs of white space, in which the regular expressions of byte-pair vocabularies fail.

A byte-pair vocabulary has a regular expression that splits a text into pre-tokens. Those of cl100k_base, o200k_base and
GPT-2 contain `\\s+(?!\\S)`, white space up to its last character. tiktoken and rustbpe match it with a stack that holds
about a million characters, and end with a panic in a longer run. Which pre-tokens such a run has is known without the
expression, because it looks ahead by one character only, and never back.

Runs of other characters, as a line of dots, do not fail. They are single pre-tokens too, in which tiktoken merges pairs
at about 4 microseconds a byte: a row of the longest permitted length, 16 million dots, takes a minute.
"""

import re
from collections.abc import Iterator

import tiktoken

from lit_gpt.compat import encode_pre_token

LONG_RUN = 2**16  # characters; a shorter run stays as it is
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # `\s` of Rust's expressions

_RUN = re.compile(f"[{WHITE_SPACE}]*")


def find_long_runs(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of all runs of at least `LONG_RUN` characters of white space.

    Only every `LONG_RUN`-th character is looked at, because such a run contains one of them.
    """
    position = LONG_RUN - 1
    while position < len(text):
        if _RUN.fullmatch(text[position]):
            window = text[max(0, position - LONG_RUN + 1) : position][::-1]
            start = position - _RUN.match(window).end()  # type: ignore[union-attr]
            end = _RUN.match(text, position).end()  # type: ignore[union-attr]
            if end - start >= LONG_RUN:
                yield start, end
            position = max(position, end)
        position += LONG_RUN


def cut_long_runs(text: str, pattern: str) -> Iterator[tuple[str, bool]]:
    """Cut a text between pre-tokens, so that no long run of white space is left to the regular expression.

    Args:
        text: The text.
        pattern: The regular expression of the vocabulary.

    Yields:
        The parts in order, each with whether it is a single pre-token. The others have the pre-tokens that they have
        in the text.
    """
    ends_lines = r"[\r\n]" in pattern  # `\s*[\r\n]`: white space up to the last line end is a pre-token of its own
    takes_end = r"\s++$" in pattern  # white space at the end of the text is one pre-token, matched without the stack
    position = 0
    for start, end in find_long_runs(text):
        is_last = end == len(text)
        if is_last and takes_end:
            if ends_lines and text[start] in "\r\n":  # `[\r\n]*` after punctuation may take them
                break
        elif ends_lines:
            start = max(start, text.rfind("\n", start, end) + 1, text.rfind("\r", start, end) + 1)
        stop = end if is_last else end - 1  # the last character belongs to what follows
        if stop - start >= LONG_RUN - 1:
            yield text[position:start], False
            yield text[start:stop], True
            position = stop
    yield text[position:], False


def encode_run(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Return the ids of white space that is one pre-token.

    Byte pairs are merged from the left. Equal characters therefore become equal tokens, up to a rest at the end that
    depends on their number modulo a power of two only: `LONG_RUN` characters more add equal tokens in the middle.
    Hence the ids of a run of millions follow from those of a short one. To merge all its bytes would take a minute.
    """
    count, shortened = len(text), LONG_RUN + len(text) % LONG_RUN
    if count <= 2 * LONG_RUN or text.count(text[0]) < count:
        return encode_pre_token(encoding, text)
    few, more = (encode_pre_token(encoding, text[:length]) for length in (shortened, shortened + LONG_RUN))
    middle = next((i for i, (a, b) in enumerate(zip(few, more)) if a != b), len(few))
    added = more[middle : middle + len(more) - len(few)]
    if more[middle + len(added) :] != few[middle:]:
        return encode_pre_token(encoding, text)
    return few[:middle] + added * ((count - shortened) // LONG_RUN) + few[middle:]
