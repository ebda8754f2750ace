"""Dropout.

On a CPU the masks of a whole forward pass are drawn at once, before the first block. Drawing them takes a third of the
time PyTorch needs, a compiled block is a pure function of its inputs, and activation checkpointing recomputes a block
with the same masks. On other devices the kernels draw masks of their own.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class BlockMasks(NamedTuple):
    """The dropout masks of one block. None where the operation draws its own, or nothing is dropped.

    Attributes:
        attn_weights: (B * H, T, T).
        attn_output: (B, T, D).
        mlp_output: (B, T, D).
    """

    attn_weights: Tensor | None = None
    attn_output: Tensor | None = None
    mlp_output: Tensor | None = None


def dropout(x: Tensor, p: float, mask: Tensor | None = None) -> Tensor:
    """Set elements to zero with probability `p` and scale the others by 1 / (1 - p) (Srivastava et al. 2014).

    Args:
        x: of any shape.
        p: the probability; 0 returns `x`.
        mask: what `x` is multiplied by, as `dropout_mask` draws it; None: the kernel draws one.
    """
    if mask is not None:
        return x * mask
    return F.dropout(x, p) if p else x


def dropout_mask(count: int, p: float, dtype: torch.dtype) -> Tensor:
    """Draw an inverted-dropout mask on the CPU: 0 with probability `p`, else 1 / (1 - p); shape (count,).

    One random number of 64 bits gives four uniform ones of 16 bits, so `p` is rounded to a multiple of 2**-16. As in
    PyTorch, 1 / (1 - p) is rounded to `dtype`, in bfloat16 by up to 0.2%.
    """
    threshold = min(round(p * 2**16), 2**16 - 1)
    uniform = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    return (uniform >= threshold - 2**15).view(torch.uint8).to(dtype).mul_(2**16 / (2**16 - threshold))


def draw_dropout_masks(
    x: Tensor, attn_mask: Tensor | None, num_heads: int, num_blocks: int, p: float, dtype: torch.dtype
) -> tuple[Tensor | None, list[BlockMasks]]:
    """Draw all dropout masks of a forward pass, in the order in which they are used.

    Args:
        x: the embeddings (B, T, D), for their shape and device.
        attn_mask: as `prepare_attention_mask` returned it. Attention by plain matrix products, which a mask of floats
            selects, takes a dropout mask; the fused kernel draws its own.
        num_heads: H.
        num_blocks: how many blocks the model has.
        p: the dropout probability; 0 in evaluation.
        dtype: of the masks.

    Returns:
        The mask of the embeddings, (B, T, D) or None, and the masks of each block.
    """
    if x.device.type != "cpu" or p == 0:
        return None, [BlockMasks()] * num_blocks
    B, T, D = x.shape
    stream, weights = (B, T, D), (B * num_heads, T, T)
    masks_weights = attn_mask is not None and attn_mask.is_floating_point()
    block = [weights, stream, stream] if masks_weights else [stream, stream]
    shapes = [stream] + block * num_blocks
    sizes = [math.prod(shape) for shape in shapes]
    drawn = [part.view(shape) for part, shape in zip(dropout_mask(sum(sizes), p, dtype).split(sizes), shapes)]
    none: list[Tensor | None] = [] if masks_weights else [None]
    blocks = [drawn[i : i + len(block)] for i in range(1, len(drawn), len(block))]
    return drawn[0], [BlockMasks(*none, *masks) for masks in blocks]
