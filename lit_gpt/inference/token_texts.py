"""Tokens as a person can read them, in tables and pictures."""

from lit_gpt.printable import escape_controls
from lit_gpt.tokenizer import Tokenizer

END_OF_TEXT = "<end>"
BLANK = "␣"


def visible_text(text: str) -> str:
    r"""Make blanks visible: a space becomes `␣`, other white space and controls an escape, as `\n`."""
    escaped = escape_controls(text)
    parts = (char.encode("unicode_escape").decode() if char.isspace() and char != " " else char for char in escaped)
    return "".join(parts).replace(" ", BLANK)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""Return the text of one token. Bytes that are only a part of a character become escapes, as `\xe9\x9d`."""
    if token == tokenizer.end_of_text:
        return END_OF_TEXT
    return visible_text(tokenizer.token_bytes(token).decode("utf-8", errors="backslashreplace"))


def token_texts(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """Return the texts of tokens that follow each other.

    Where several tokens form a character together, each shows the character and which part of it the token is, as
    `静1/2` and `静2/2`.
    """
    texts: list[str] = []
    parts: list[int] = []  # the tokens of a character that is not complete yet
    for token in tokens:
        if token == tokenizer.end_of_text:
            texts += [*(token_text(tokenizer, part) for part in parts), END_OF_TEXT]
            parts = []
            continue
        parts.append(token)
        try:
            text = visible_text(b"".join(map(tokenizer.token_bytes, parts)).decode("utf-8"))
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                continue
            texts += [token_text(tokenizer, part) for part in parts]
        else:
            count = len(parts)
            texts += [text] if count == 1 else [f"{text}{number}/{count}" for number in range(1, count + 1)]
        parts = []
    return [*texts, *(token_text(tokenizer, part) for part in parts)]
