"""The likeliest next tokens of a text, as a person can read them."""

import codecs
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.inference.token_texts import token_text, visible_text
from lit_gpt.model import GPT
from lit_gpt.sharding import full_tensor, is_sharded
from lit_gpt.tokenizer import Tokenizer

MAX_PARTS = 4  # tokens of one character: it has at most four bytes


@dataclass(frozen=True)
class NextToken:
    r"""A token that may come next.

    Attributes:
        token: Its id.
        text: Its text, see `token_text`. Where it begins a character, the likeliest such character follows, as in
            `\xe6\x9a → 暖`.
        probability: From 0 to 1.
    """

    token: int
    text: str
    probability: float


@torch.no_grad()
def likeliest_next_tokens(
    model: GPT, tokenizer: Tokenizer, ids: list[int], count: int, also: int | None = None
) -> list[NextToken]:
    """Return the likeliest tokens after a text, the likeliest first; collective if the model is sharded.

    Args:
        model: A model in evaluation mode.
        tokenizer: The model's tokenizer.
        ids: The tokens of the text, at least one; of more than `context_length` the last ones count.
        count: How many tokens to return.
        also: A token to return too, as the last one if it is not among these; None: no other one.
    """
    probs = last_logits(model, [ids])[0].softmax(dim=-1)  # (V,)
    tokens: list[int] = probs.topk(min(count, len(probs))).indices.tolist()
    tokens += [also] if also is not None and also not in tokens else []
    characters = {} if is_sharded(model) else likely_characters(model, tokenizer, ids, tokens)
    arrows = {token: f" → {visible_text(character)}" for token, character in characters.items()}
    return [
        NextToken(token, token_text(tokenizer, token) + arrows.get(token, ""), float(probs[token])) for token in tokens
    ]


def last_logits(model: GPT, rows: list[list[int]]) -> Tensor:
    """Return the logits of the token that follows each row, (B, V) float32. All rows have the same length.

    Those of the other positions are not computed: with a long text and a large vocabulary they would take gigabytes.
    """
    context = [row[-model.config.context_length :] for row in rows]
    hidden = model.hidden(torch.tensor(context, device=model.embedding.weight.device))  # (B, T, D)
    return full_tensor(model.head(hidden[:, -1])).float()


def likely_characters(model: GPT, tokenizer: Tokenizer, ids: list[int], tokens: list[int]) -> dict[int, str]:
    """Return the character that is likely to come of each token that is the beginning of one.

    The likeliest token is appended to each until the character is complete. A token that is whole, or from which this
    leads to no character, is not in the result.

    Args:
        model: A model in evaluation mode.
        tokenizer: The model's tokenizer.
        ids: The tokens of the text.
        tokens: May follow it.
    """
    found: dict[int, str] = {}
    beginnings = {token: decode_beginning(tokenizer.token_bytes(token)) for token in tokens}
    rows = [[token] for token, (_, is_complete) in beginnings.items() if is_complete is False]
    for _ in range(MAX_PARTS - 1):
        if not rows:
            break
        following = last_logits(model, [[*ids, *row] for row in rows]).argmax(dim=-1).tolist()  # (B,)
        rows = [[*row, token] for row, token in zip(rows, following)]
        remaining = []
        for row in rows:
            text, is_complete = decode_beginning(b"".join(map(tokenizer.token_bytes, row)))
            whole = beginnings[row[0]][0]
            if is_complete is not None and len(text) > len(whole):
                found[row[0]] = text[len(whole)]
            elif is_complete is False:
                remaining.append(row)
        rows = remaining
    return found


def decode_beginning(data: bytes) -> tuple[str, bool | None]:
    """Return the characters at the beginning of UTF-8, and whether these are all; None: it is not valid."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(data)
    except UnicodeDecodeError:
        return "", None
    return text, not decoder.getstate()[0]
