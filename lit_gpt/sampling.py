"""Which tokens may be drawn next: top-k and top-p."""

import torch
from torch import Tensor

MIN_TEMPERATURE = 1e-5  # below it the quotients could overflow float32, and the likeliest token is taken


def keep_likeliest(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Set the logits of all but the likeliest tokens to -inf, so that their probability is 0: (B, V) -> (B, V).

    Args:
        logits: divided by the temperature.
        top_k: keep the k likeliest tokens, and those as likely as the last of them (Fan et al. 2018). None: all.
        top_p: of these, keep the smallest set of likeliest tokens whose probabilities sum to at least p (nucleus
            sampling, Holtzman et al. 2020); at least one. None: all.
    """
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None:
        descending, order = logits.sort(dim=-1, descending=True)  # (B, V)
        probs = descending.softmax(dim=-1)  # (B, V)
        outside = probs.cumsum(dim=-1) - probs >= top_p  # (B, V): the likelier tokens reach p without this one
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits
