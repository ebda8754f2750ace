"""From a model and a prompt to new text."""

import codecs
import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.model import GPT, KVCache
from lit_gpt.tokenizer import Tokenizer


def next_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one token a row: logits (B, V) -> (B,) ids.

    Args:
        logits: of the last position.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest (Fan et al. 2018).
        top_p: keep the fewest likeliest whose probabilities reach p (Holtzman et al. 2020).
        generator: of random numbers; the global one if left out.

    Raises:
        UserError: a number is out of range.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature < 1e-5:  # below it float32 cannot hold the quotients
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)  # (B, V)
        probabilities = ordered.softmax(dim=-1)
        reached_before = probabilities.cumsum(dim=-1) - probabilities >= top_p  # (B, V)
        reached_before[:, 0] = False  # the likeliest always stays
        logits = logits.masked_fill(reached_before.gather(-1, order.argsort(dim=-1)), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator).squeeze(-1)


def check_sampling(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> None:
    """Refuses what `next_token` cannot draw by.

    Raises:
        UserError: a number is out of range.
    """
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature is {temperature}: give 0 (always the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}: give 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: give a probability above 0, up to 1")


@torch.no_grad()
def stream(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every row, (B,) ids, `max_new_tokens` times.

    While all tokens fit in the context, a cache holds what was read; past it the last `context_length` tokens are read
    anew for every token, as the course does.

    Args:
        model: in evaluation mode, else dropout stays on.
        tokens: the prompts, (B, T) ids, T at least 1.
        max_new_tokens: how many to draw.
        temperature, top_k, top_p, generator: as in `next_token`.
    """
    context = model.config.context_length
    cache = KVCache(model.config, len(tokens), tokens.device, model.embedding.weight.dtype)
    unread = tokens[:, -context:]  # (B, T)
    for _ in range(max_new_tokens):
        if cache.length + unread.shape[1] <= context:
            hidden = model.hidden(unread, cache)  # (B, T, D)
        else:
            hidden = model.hidden(tokens[:, -context:])
        drawn = next_token(model.head(hidden[:, -1]), temperature, top_k, top_p, generator)  # (B,)
        yield drawn
        unread = drawn[:, None]  # (B, 1)
        tokens = torch.cat((tokens[:, -context:], unread), dim=1)  # (B, T + 1)


def prompt_tokens(tokenizer: Tokenizer, prompt: str, rows: bool) -> list[int]:
    """Ids to start from: a document begins after the end of another, a raw text after a line end."""
    if rows:
        return [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    try:
        return tokenizer.encode(prompt or "\n")
    except UserError:
        if prompt:
            raise
        return [0]  # a vocabulary of characters without line ends: any will do


def shown(text: str) -> str:
    """Text for a screen: control characters, which an untrained model writes, could do anything to a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def stream_text(model: GPT, tokenizer: Tokenizer, prompt: str, rows: bool, **sampling: object) -> Iterator[str]:
    """Yields the text that follows `prompt`, whole characters as soon as they are there.

    Args:
        model: what writes.
        tokenizer: its own.
        prompt: what to go on from; may be empty.
        rows: whether it was trained on rows, so that a document's end is the end.
        sampling: as in `stream`.
    """
    was_training = model.training
    model.eval()
    try:
        tokens = torch.tensor([prompt_tokens(tokenizer, prompt, rows)], device=model.embedding.weight.device)  # (1, T)
        characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for drawn in stream(model, tokens, **sampling):  # type: ignore[arg-type]
            if rows and drawn.item() == tokenizer.end_of_text:
                break
            yield characters.decode(tokenizer.token_bytes(int(drawn.item())))
        yield characters.decode(b"", final=True)
    finally:
        model.train(was_training)
