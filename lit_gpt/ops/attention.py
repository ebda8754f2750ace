"""Scaled dot-product attention.

There are two ways to compute it. PyTorch's fused kernel does not store the (T, T) attention weights, except on a CPU
with dropout. `math_attention` consists of plain matrix products and stores them. On a CPU it is used for up to 512
tokens without a cache, if dropout is active, or in bfloat16 from 32 tokens on, where the backward pass of the fused
kernel is slow. `prepare_attention_mask` decides once per forward pass: a mask of floats selects `math_attention`, one
of bools or None the fused kernel.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

MATH_ATTENTION_MAX_LENGTH = 512  # tokens; beyond it the attention weights take too much memory


def use_math_attention(device: str, length: int, dtype: torch.dtype, dropout_p: float) -> bool:
    """Whether attention over `length` tokens is computed by plain matrix products.

    Args:
        device: its type, as "cpu".
        length: T.
        dtype: of queries, keys and values.
        dropout_p: probability of dropping attention weights.
    """
    faster = dropout_p > 0 or (dtype == torch.bfloat16 and length >= 32)
    return device == "cpu" and faster and length <= MATH_ATTENTION_MAX_LENGTH


def prepare_attention_mask(
    visible: Tensor | None, x: Tensor, num_heads: int, dtype: torch.dtype, dropout_p: float, cached: bool
) -> Tensor | None:
    """Return the mask that `scaled_dot_product_attention` takes, the same for all blocks.

    Args:
        visible: bool (B, 1, T, S) or (T, S), which positions each query attends to; None: causal.
        x: the embeddings (B, T, D), for their shape and device.
        num_heads: H.
        dtype: of queries, keys and values.
        dropout_p: probability of dropping attention weights.
        cached: whether keys and values come from a cache. Then the fused kernel is used.

    Returns:
        For matrix products, what is added to the scores: 0 where visible, -inf where masked, (T, T) or
        (B * H, T, T). For the fused kernel, `visible`.
    """
    B, T, _ = x.shape
    if cached or not use_math_attention(x.device.type, T, dtype, dropout_p):
        return visible
    if visible is None:
        return torch.full((T, T), -torch.inf, dtype=dtype).triu(1)
    return torch.zeros(B, num_heads, T, T, dtype=dtype).masked_fill(~visible, -torch.inf).flatten(0, 1)


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """Return softmax(q k^T / sqrt(E) + mask) v, head by head (Vaswani et al. 2017).

    Args:
        q: queries (B, H, T, E).
        k: keys (B, K, S, E), where K divides H: each is shared by H / K query heads.
        v: values (B, K, S, E).
        attn_mask: from `prepare_attention_mask`. None: causal if T > 1; a single query attends to all keys.
        dropout_p: probability of dropping attention weights.
        dropout_mask: (B * H, T, T) that attention weights are multiplied by, where `attn_mask` is of floats.

    Returns:
        (B, H, T, E).
    """
    if attn_mask is not None and attn_mask.is_floating_point():
        return math_attention(q, k, v, attn_mask, dropout_mask)
    is_causal = attn_mask is None and q.shape[-2] > 1
    grouped = k.shape[1] < q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa=grouped)


def math_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor, dropout_mask: Tensor | None = None) -> Tensor:
    """Return attention computed by matrix products that hold the attention weights (B * H, T, T).

    Args:
        q: queries (B, H, T, E).
        k: keys (B, K, T, E).
        v: values (B, K, T, E).
        attn_bias: added to the scores, (T, T) or (B * H, T, T): -inf where masked.
        dropout_mask: (B * H, T, T) that the attention weights are multiplied by.

    Returns:
        (B, H, T, E).
    """
    B, H, T, E = q.shape
    if k.shape[1] < H:
        k, v = (part.repeat_interleave(H // k.shape[1], dim=1) for part in (k, v))  # (B, H, T, E)
    q, k, v = (part.reshape(B * H, T, E) for part in (q, k, v))
    attn_weights = torch.baddbmm(attn_bias, q, k.mT, alpha=1 / math.sqrt(E)).softmax(dim=-1)  # (B * H, T, T)
    if dropout_mask is not None:
        attn_weights = attn_weights * dropout_mask
    return (attn_weights @ v).view(B, H, T, E)


def attention_saved_bytes(
    device: str,
    length: int,
    num_heads: int,
    kv_heads: int,
    head_width: int,
    dtype: torch.dtype,
    dropout_p: float,
    qk_norm: bool,
    rotary: bool,
) -> int:
    """Return the bytes per token that attention saves for the backward pass, norms of queries and keys included.

    Dropout masks are not counted. `qk_norm` and `rotary` say what is done to queries and keys before; the other
    arguments are those of `use_math_attention` and the letters T, H, K and E of `model.py`.
    """
    width, kv_width, weights = num_heads * head_width, kv_heads * head_width, num_heads * length
    product = width + 2 * kv_width  # the output of the product that gives queries, keys and values
    if use_math_attention(device, length, dtype, dropout_p):
        copies = 3 * width  # queries, and keys and values repeated for each query head
        elements = copies + weights * (2 if dropout_p else 1) + (product if qk_norm else 0)
        return elements * dtype.itemsize
    changed = width + kv_width if qk_norm or rotary else 0  # queries and keys that are no longer part of the product
    log_sum_exp = 4 * num_heads  # bytes: one float32 for each softmax
    return (product + changed + width) * dtype.itemsize + log_sum_exp


def document_positions(documents: Tensor) -> Tensor:
    """Return the position of each token within its own document: (B, T) -> (B, T), each document from 0."""
    columns = torch.arange(documents.shape[1], device=documents.device)  # (T,)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))  # (B, T)
    return columns - (columns * begins).cummax(dim=1).values


def document_mask(documents: Tensor) -> Tensor:
    """Return which tokens each one attends to: those of its own document, up to itself: (B, T) -> (B, 1, T, T)."""
    same = documents[:, None, :, None] == documents[:, None, None, :]  # (B, 1, T, T)
    return same & torch.ones(same.shape[-2:], dtype=torch.bool, device=documents.device).tril()
