"""Draw the next token from logits: temperature, top-k and top-p."""

import math

import torch
from torch import Tensor

from lit_gpt.errors import UserError


def sample_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token for each row.

    Args:
        logits: (B, V) logits of the last position.
        temperature: Divides the logits; 0 chooses the most likely token.
        top_k: Sample from the k most likely tokens only (Fan et al. 2018).
        top_p: Sample from the smallest set of most likely tokens whose probabilities sum to at least p only (nucleus
            sampling, Holtzman et al. 2020).
        generator: The random number generator; the global one by default.

    Returns:
        (B,) int64 token ids.

    Raises:
        UserError: A sampling parameter is out of range.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature < 1e-5:  # the quotients would overflow float32
        return logits.argmax(dim=-1)  # (B,)
    if temperature != 1.0:
        logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth_logit = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth_logit, -torch.inf)
    if top_p is not None:
        sorted_logits, order = logits.sort(dim=-1, descending=True)  # (B, V)
        probabilities = sorted_logits.softmax(dim=-1, dtype=torch.float32)  # (B, V)
        outside = probabilities.cumsum(dim=-1) - probabilities >= top_p  # the more likely tokens reach p already
        outside[:, 0] = False  # the most likely token always stays
        logits = logits.masked_fill(outside.gather(-1, order.argsort(dim=-1)), -torch.inf)
    # Inverse transform sampling needs one random number a row. torch.multinomial draws one for each token, which takes
    # much longer on a CPU.
    cumulative = logits.softmax(dim=-1, dtype=torch.float32).cumsum(dim=-1)  # (B, V)
    point = torch.rand(len(logits), 1, device=logits.device, generator=generator) * cumulative[:, -1:]  # (B, 1)
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)  # (B,)


def check_sampling(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> None:
    """Check the arguments of `sample_token`.

    Raises:
        UserError: A sampling parameter is out of range.
    """
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature is {temperature}: give 0 (always the most likely token) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}: give 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: give a probability above 0, up to 1")
