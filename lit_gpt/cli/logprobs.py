"""Show the log-probability of each token of a text."""

import codecs
import math
from collections.abc import Iterable, Iterator

from lit_gpt.inference.texts import GeneratedText
from lit_gpt.lines import display_width
from lit_gpt.printable import escape_controls
from lit_gpt.tokenizer import Tokenizer

LINE_WIDTH, INDENTATION = 79, 12  # columns


def describe_logprobs(text: GeneratedText, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield lines with the tokens that the model has drawn, each with its log-probability, and their sum."""
    assert text.logprobs is not None
    line = "logprobs".ljust(INDENTATION)
    pieces = map(tokenizer.token_bytes, text.tokens)
    for shown, logprob in zip(_show_pieces(pieces), text.logprobs):
        cell = f"{shown} {logprob:.2f}"
        if display_width(line) > INDENTATION and display_width(line) + 2 + display_width(cell) > LINE_WIDTH:
            yield line
            line = " " * INDENTATION
        line += cell if display_width(line) == INDENTATION else f"  {cell}"
    yield line
    total, count = sum(text.logprobs), len(text.tokens)
    yield (
        f"{'':{INDENTATION}}sum {total:.2f}, mean {total / count:.2f} nats of {count:,} tokens; perplexity "
        f"{math.exp(-total / count):.2f}"
    )


def _show_pieces(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield each token in quotes. A part of a character is shown as its bytes, the last part with the character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
    for piece in pieces:
        is_inside = bool(decoder.getstate()[0])  # a character
        text = decoder.decode(piece)
        quoted = escape_controls(repr(text)) if text else ""
        is_whole = not is_inside and text.encode() == piece
        yield (quoted if is_whole else f"<{piece.hex(' ')}>{quoted}") or "<end of text>"
