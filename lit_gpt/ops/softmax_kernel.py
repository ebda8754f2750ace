"""A Triton kernel for the loss of the head on a GPU: `cross_entropy.py` calls it where Triton is installed.

PyTorch for NVIDIA GPUs on Linux installs Triton. The kernel reads each row of logits twice and overwrites it by its
gradient, so that a chunk needs no second tensor of its size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SIZE, WARPS = 4096, 8  # columns that a program reads at a time, and warps in a program; each has one row


def loss_and_grad_(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Turn logits (n, V or more) into the gradient of their losses in place; return the losses (n,) in float32.

    Args:
        logits: On the GPU, rows next to each other in memory.
        targets: (n,) int64; one below 0 is read as 0.
        vocab_size: V. The columns after it get a gradient of 0.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    args = logits, targets, losses, vocab_size, logits.shape[1]
    _loss_and_grad_kernel[(len(logits),)](*args, BLOCK=BLOCK_SIZE, num_warps=WARPS)
    return losses


@triton.jit
def _loss_and_grad_kernel(logits, targets, losses, vocab_size, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program computes one row, in float32."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    target = tl.maximum(tl.load(targets + row), 0)
    target_logit = tl.load(logits + target).to(tl.float32)
    largest, others = target_logit, 0.0  # others: the sum of exp(logit - largest) over all columns but the target
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < vocab_size, other=-float("inf")).to(tl.float32)
        before, largest = largest, tl.maximum(largest, tl.max(x, axis=0))
        terms = tl.where(columns == target, 0.0, tl.exp(x - largest))
        others = others * tl.exp(before - largest) + tl.sum(terms, axis=0)
    at_target = tl.exp(target_logit - largest)
    total = others + at_target
    # log(1 + r) = r - r²/2 + r³/3 - r⁴/4 for a likely target, where the logarithm would be rounded too coarsely
    r = others / tl.maximum(at_target, 0.5 * total)
    likely = r * (1 - r * (1 / 2 - r * (1 / 3 - r / 4)))
    unlikely = tl.log(total) + (largest - target_logit)
    tl.store(losses + row, tl.where(others < at_target / 64, likely, unlikely))
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < vocab_size, other=-float("inf")).to(tl.float32)
        grad = tl.where(columns == target, -others, tl.exp(x - largest)) / total
        tl.store(logits + columns, grad.to(logits.dtype.element_ty), mask=columns < width)
