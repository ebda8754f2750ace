"""The operations of `lit_gpt.ops` in plain PyTorch: what they compute, without what makes them fast.

Tests put this module in the place of `lit_gpt.ops` and compare logits, losses and gradients.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_gpt.ops.attention import document_mask, document_positions
from lit_gpt.ops.cross_entropy import IGNORE_INDEX
from lit_gpt.ops.dropout import BlockMasks
from lit_gpt.ops.linear import autocast_disabled, compute_dtype

__all__ = [
    "IGNORE_INDEX",
    "BlockMasks",
    "autocast_disabled",
    "compute_dtype",
    "document_mask",
    "document_positions",
]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def embedding(tokens: Tensor, weight: Tensor, tied: bool) -> Tensor:
    return weight[tokens]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def dropout(x: Tensor, p: float, mask: Tensor | None = None) -> Tensor:
    return F.dropout(x, p)


def draw_dropout_masks(
    x: Tensor, attn_mask: Tensor | None, num_heads: int, num_blocks: int, p: float, dtype: torch.dtype
) -> tuple[Tensor | None, list[BlockMasks]]:
    return None, [BlockMasks()] * num_blocks


def prepare_attention_mask(
    visible: Tensor | None, x: Tensor, num_heads: int, dtype: torch.dtype, dropout_p: float, cached: bool
) -> Tensor | None:
    return visible


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (B, H, S, E)
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # (B, H, T, S)
    if attn_mask is None and q.shape[-2] > 1:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ v


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets.flatten(), reduction=reduction)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, float8: bool = False) -> Tensor:
    return cross_entropy(linear(hidden, weight), targets)


def evaluate_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_losses: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    logits = linear(hidden, weight)
    if token_losses is not None:
        token_losses.copy_(cross_entropy(logits, targets, "none").view_as(targets))
    return cross_entropy(logits, targets, "sum"), (logits.argmax(dim=-1) == targets).sum()
