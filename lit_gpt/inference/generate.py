"""From a model and a prompt to new text."""

import codecs
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gpt.device import supports_bfloat16
from lit_gpt.errors import UserError
from lit_gpt.inference.sampling import sample_token
from lit_gpt.kv_cache import KVCache
from lit_gpt.layers import Linear
from lit_gpt.model import GPT
from lit_gpt.sharding import is_sharded
from lit_gpt.tokenizer import Tokenizer


def stream_tokens(
    model: GPT,
    prompts: Tensor | list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yields the next token of every row, (B,) ids, `max_new_tokens` times.

    While all tokens fit in the context, a cache holds what was read; past it the last `context_length` tokens are read
    anew for every token, as the course does. Nothing here waits for the device.

    Args:
        model: in evaluation mode, else dropout stays on.
        prompts: (B, T) ids, or rows of ids of unequal length; at least one in each.
        max_new_tokens: how many to draw.
        temperature, top_k, top_p, generator: as in `sample_token`.
        use_cache: False reads everything anew for every token.
    """
    # tensors made in inference mode stay so, and FSDP2 keeps what it makes
    quiet = torch.no_grad if is_sharded(model) else torch.inference_mode
    yield from quiet()(_stream_tokens)(model, prompts, max_new_tokens, temperature, top_k, top_p, generator, use_cache)


def _stream_tokens(
    model: GPT,
    prompts: Tensor | list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
    use_cache: bool,
) -> Iterator[Tensor]:
    config, weight = model.config, model.embedding.weight
    tokens, padding = (prompts, None) if isinstance(prompts, Tensor) else pad_left(prompts, weight.device)
    cropped = tokens[:, -config.context_length :]  # (B, T)
    if padding is not None:
        padding = (padding - (tokens.shape[1] - cropped.shape[1])).clamp(min=0)
    tokens = cropped

    def new_cache() -> KVCache:
        return KVCache(config, len(tokens), weight.device, weight.dtype, padding)

    cache, unread = new_cache(), tokens
    for _ in range(max_new_tokens):
        if not use_cache or cache.length + unread.shape[1] > config.context_length:
            cache, unread = new_cache(), tokens
        hidden = model.hidden(unread, cache)  # (B, T, D)
        drawn = sample_token(model.head(hidden[:, -1]), temperature, top_k, top_p, generator)  # (B,)
        yield drawn
        unread = drawn[:, None]  # (B, 1)
        if padding is not None and tokens.shape[1] == config.context_length:
            padding = (padding - 1).clamp(min=0)
        tokens = torch.cat((tokens, unread), dim=1)[:, -config.context_length :]  # (B, T)


def pad_left(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows of ids as one tensor (B, T), zeros before the shorter; and how many (B,), or None where all are as long."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    padding = torch.tensor([longest - len(row) for row in rows], device=device)
    return tokens, padding if min(map(len, rows)) < longest else None


def generate(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, end: int | None = None, **sampling: Any
) -> list[list[int]]:
    """What follows each prompt, at most `max_new_tokens` ids, up to but without the id `end`.

    Args:
        model: as in `stream_tokens`, and so is `sampling`.
        prompts: rows of ids, of any lengths from 1.
        max_new_tokens: at most.
        end: the id that ends a text; None: none does.
    """
    drawn, ended = [], torch.zeros(len(prompts), dtype=torch.bool, device=model.embedding.weight.device)
    for step, token in enumerate(stream_tokens(model, prompts, max_new_tokens, **sampling), start=1):
        drawn.append(token)
        if end is not None:
            ended |= token == end
            if step % 16 == 0 and ended.all():  # to ask is to wait for the device
                break
    rows: list[list[int]] = torch.stack(drawn, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def prepare_for_inference(model: GPT) -> GPT:
    """Makes a model ready to write and no longer to train, where its processor multiplies in bfloat16.

    Its weights are kept in it, half the bytes to read for every token, and on a CPU laid out as its library reads them
    fastest: twice as fast for a few rows.
    """
    device = model.embedding.weight.device
    if supports_bfloat16(device):
        for parameter in model.parameters():  # and not the tables of positions
            parameter.data = parameter.data.bfloat16()
        if device.type == "cpu" and torch.backends.mkldnn.is_available():
            for module in list(model.modules()):
                for name, child in module.named_children():
                    if isinstance(child, Linear):
                        setattr(module, name, PackedLinear(child))
    return model


class PackedLinear(nn.Module):
    """A `Linear` whose weight is there in two orders: as it was, and as oneDNN reads it fastest for several rows.

    For one row oneDNN takes twice as long as torch's own product, which torch takes where it may not use oneDNN.
    """

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > x.shape[-1]:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            return y
        onednn: Any = torch.backends.mkldnn
        before, onednn.enabled = onednn.enabled, False
        try:
            return F.linear(x, self.weight, self.bias)
        finally:
            onednn.enabled = before


def encode_prompt(tokenizer: Tokenizer, prompt: str, mode: str) -> list[int]:
    """Ids to start from: a document begins after the end of another, a raw text after a line end."""
    if mode == "rows":
        return [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    try:
        return tokenizer.encode(prompt or "\n")
    except UserError:
        if prompt:
            raise
        return [0]  # a vocabulary of characters without line ends: any will do


def strip_control_characters(text: str) -> str:
    """Text for a screen: control characters, which an untrained model writes, could do anything to a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def stream_text(model: GPT, tokenizer: Tokenizer, prompt: str, mode: str, **sampling: object) -> Iterator[str]:
    """Yields the text that follows `prompt`, whole characters as soon as they are there.

    Args:
        model: what writes.
        tokenizer: its own.
        prompt: what to go on from; may be empty.
        mode: The `data.mode` the model was trained with: "rows" or "raw".
        sampling: as in `stream_tokens`.
    """
    was_training = model.training
    model.eval()
    try:
        tokens = torch.tensor([encode_prompt(tokenizer, prompt, mode)], device=model.embedding.weight.device)  # (1, T)
        characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for drawn in stream_tokens(model, tokens, **sampling):  # type: ignore[arg-type]
            if mode == "rows" and drawn.item() == tokenizer.end_of_text:
                break
            yield characters.decode(tokenizer.token_bytes(int(drawn.item())))
        yield characters.decode(b"", final=True)
    finally:
        model.train(was_training)
