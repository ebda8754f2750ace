"""The loss of the output head: cross entropy of `hidden @ weight.T`, without holding all logits.

With a vocabulary of 100,000 the logits of a batch take more memory than everything else together. They are therefore
computed chunk by chunk, and each chunk's gradients are taken at once in the forward pass, so that nothing is computed
twice (as in Liger Kernel, Hsu et al. 2024). Where all logits are small, a CPU is faster with all of them at once.
`F.linear_cross_entropy` of torch 2.13 is slower in bfloat16 and returns the loss in bfloat16; see docs/kernels.md.
"""

import functools
import importlib.util
import math
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lit_gpt.ops.float8 import Float8Weight
from lit_gpt.ops.linear import accumulation_dtype, autocast_disabled, linear

IGNORE_INDEX = -100  # a target that counts in no loss; PyTorch's default
UNCHUNKED_LOSS_BYTES = 2**21  # bytes of float32 logits up to which a CPU is faster without chunks


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross entropy of logits (..., V) with targets (...), in nats, computed in float32 or wider.

    `reduction` is "mean" over the targets that count, or "sum".
    """
    flat = logits.flatten(0, -2).to(accumulation_dtype(logits.dtype))  # (N, V)
    return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, float8: bool = False) -> Tensor:
    """Return `cross_entropy(linear(hidden, weight), targets)`, the mean over the targets that count.

    Args:
        hidden: (..., D).
        weight: (V, D).
        targets: (...) int64; `IGNORE_INDEX` counts in no loss.
        float8: Whether the logits and the gradient of `hidden` are computed in float8, see `Float8Weight`.

    Returns:
        A scalar in nats, in float32 or wider.
    """
    if not torch.is_grad_enabled():
        nats, _ = evaluate_linear_cross_entropy(hidden, weight, targets)
        return nats * _mean_scale(targets, nats.dtype)
    if holds_all_logits(targets, weight) and not float8:
        return cross_entropy(linear(hidden, weight), targets)
    return _chunked_loss(hidden.flatten(0, -2), weight, targets.flatten(), float8)


@torch.no_grad()
def evaluate_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_losses: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what an evaluation adds up over its batches. The logits are computed a chunk of rows at a time.

    Args:
        hidden: (..., D).
        weight: (V, D).
        targets: (...) int64; `IGNORE_INDEX` counts in neither.
        token_losses: (...) float, contiguous; if given, it receives the loss of each target in nats, 0 for
            `IGNORE_INDEX`.

    Returns:
        The sum of the cross entropies, in nats, a scalar in float32 or wider. The number of targets that have the
        largest logit, an int64 scalar; among equal logits the first is the largest, as for `argmax`.
    """
    hidden, targets = _wide_enough(hidden.flatten(0, -2)), targets.flatten()  # (N, D), (N,)
    nats = torch.zeros((), device=hidden.device, dtype=accumulation_dtype(hidden.dtype))
    correct = torch.zeros((), device=hidden.device, dtype=torch.int64)
    with autocast_disabled(hidden):
        padded = _pad_vocabulary(weight.type_as(hidden))  # (V or more, D)
        for rows in _chunks(hidden, padded, nats.dtype):
            logits = _chunk_logits(hidden[rows], padded, len(weight))  # (n, V or more)
            # the two steps of `cross_entropy`: the loss of each target costs no second softmax
            log_probs = logits.to(nats.dtype).log_softmax(dim=-1)  # (n, V or more)
            nats += F.nll_loss(log_probs, targets[rows], ignore_index=IGNORE_INDEX, reduction="sum")
            if token_losses is not None:
                losses = F.nll_loss(log_probs, targets[rows], ignore_index=IGNORE_INDEX, reduction="none")  # (n,)
                token_losses.view(-1)[rows] = losses
            del log_probs
            correct += _count_largest_(logits, targets[rows])
    return nats, correct


def holds_all_logits(targets: Tensor, weight: Tensor) -> bool:
    """Whether `linear_cross_entropy` computes all logits of these targets at once; only then can it be compiled."""
    logits_bytes = targets.numel() * len(weight) * torch.float32.itemsize
    return targets.device.type == "cpu" and logits_bytes <= UNCHUNKED_LOSS_BYTES and torch.is_grad_enabled()


def _chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor, float8: bool = False) -> Tensor:
    hidden = _wide_enough(hidden)
    scale = _mean_scale(targets, accumulation_dtype(hidden.dtype))
    with autocast_disabled(hidden):  # on a GPU it would take the softmax in float32
        loss: Tensor = LinearCrossEntropy.apply(hidden, weight, targets, scale, float8)
    return loss


def _wide_enough(hidden: Tensor) -> Tensor:
    """Return float16 as float32: its range is too small for probabilities and for a mean over many tokens."""
    return hidden.float() if hidden.dtype == torch.float16 else hidden


def _mean_scale(targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the factor that turns a sum over the targets that count into their mean."""
    return 1 / (targets != IGNORE_INDEX).sum().to(dtype)


def chunk_bytes(device: str, tokens: int, vocab_size: int) -> int:
    """Return the bytes of logits that the loss holds at a time on a GPU: two chunks. Gradients are not counted."""
    return 2 * min(LinearCrossEntropy.CHUNK_BYTES[device], tokens * vocab_size * torch.float32.itemsize)


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of `hidden @ weight.T`, a chunk of rows at a time, times a scale.

    Products are taken in the dtype of `hidden` and added up in float32 or wider. The probability of a target is bounded
    below by the smallest normal number of that dtype, in float32 e**-87.
    """

    # Bytes of logits in a chunk; on a GPU two chunks are alive at a time. Smaller ones are slower. On a CPU larger ones
    # are newly mapped memory each time, which is far slower.
    CHUNK_BYTES: ClassVar = {"cpu": 2**25, "cuda": 2**30}
    # Rows of the weight gradient that are added up at once, so that they stay in the cache.
    GRAD_ROWS: ClassVar = {"cpu": 2**12}
    # The vocabulary is padded to a multiple of this, for which the products have fast kernels.
    VOCAB_MULTIPLE: ClassVar = {"cuda": 64}

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, float8: bool = False
    ) -> Tensor:
        """hidden (N, D), weight (V, D), targets (N,), scale () -> a scalar in nats."""
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        dtype, (vocab_size, _) = accumulation_dtype(hidden.dtype), weight.shape
        padded = _pad_vocabulary(weight.type_as(hidden))  # (V or more, D)
        rounded = Float8Weight(padded) if float8 else None
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.empty_like(padded, dtype=dtype) if needs_weight else None
        loss = torch.zeros((), device=hidden.device, dtype=dtype)
        for rows in _chunks(hidden, padded, hidden.dtype):
            counted = (targets[rows] != IGNORE_INDEX).unsqueeze(-1)  # (n, 1)
            row_scale = counted * scale.to(dtype)  # (n, 1)
            logits = _chunk_logits(hidden[rows], rounded or padded, vocab_size)  # (n, V or more)
            losses, grad = _losses_and_grad(logits, targets[rows], vocab_size)  # (n,), (n, V or more)
            del logits
            loss += (losses * counted.squeeze(-1)).sum()
            if grad_hidden is not None:
                product = grad @ padded if rounded is None else rounded.grad_hidden(grad)  # (n, D)
                grad_hidden[rows] = product * row_scale
            if grad_weight is not None:
                scaled = (hidden[rows] * row_scale).type_as(hidden)  # (n, D)
                _accumulate(grad_weight, grad, scaled, first=rows.start == 0)
            del grad  # before the next chunk is computed
        ctx.grads = grad_hidden, None if grad_weight is None else grad_weight[:vocab_size].to(weight.dtype)
        return loss * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Scale the gradients in place: the larger one has the size of the embedding."""
        grads = ctx.grads
        del ctx.grads
        if grad.device.type != "cpu" or grad != 1:  # reading the value on a GPU would wait for it
            for part in grads:
                if part is not None:
                    part.mul_(grad)
        return *grads, None, None, None


def _pad_vocabulary(weight: Tensor) -> Tensor:
    """Append rows of zeros up to a multiple of VOCAB_MULTIPLE: (V, D) -> (V or more, D)."""
    missing = -len(weight) % LinearCrossEntropy.VOCAB_MULTIPLE.get(weight.device.type, 1)
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


def _chunks(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> list[slice]:
    """Split N rows so that the logits of each chunk, in `dtype`, take CHUNK_BYTES at most."""
    limits = LinearCrossEntropy.CHUNK_BYTES
    chunks = math.ceil(len(hidden) * len(weight) * dtype.itemsize / limits.get(weight.device.type, limits["cpu"]))
    rows = max(1, math.ceil(len(hidden) / max(1, chunks)))
    return [slice(start, start + rows) for start in range(0, len(hidden), rows)]


def _chunk_logits(hidden: Tensor, padded: Tensor | Float8Weight, vocab_size: int) -> Tensor:
    """Return hidden @ padded.T, (n, V or more), with minus infinity in the columns of the padding."""
    logits = padded.logits(hidden) if isinstance(padded, Float8Weight) else hidden @ padded.T
    logits[:, vocab_size:] = -torch.inf
    return logits


def _count_largest_(logits: Tensor, targets: Tensor) -> Tensor:
    """Return how many of the targets (n,) are the argmax of their logits (n, V), which are changed in place.

    `argmax` costs a CPU much more time than `amax`. It is therefore taken only in rows where the target's logit equals
    the largest of the others, which is common in bfloat16.
    """
    target_index = torch.arange(len(targets), device=targets.device), targets.clamp(min=0)  # (n,) each
    target_logit = logits[target_index]
    logits[target_index] = -torch.inf
    largest_other = logits.amax(dim=-1)  # (n,)
    is_largest = target_logit > largest_other
    tied = target_logit == largest_other
    is_largest[tied] = targets[tied] < logits[tied].argmax(dim=-1)
    return (is_largest & (targets != IGNORE_INDEX)).sum()


def _losses_and_grad(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return the loss of each row (n,) and its gradient (n, V or more), both computed in float32 or wider.

    The gradient may take the place of the logits (n, V or more); those from `vocab_size` on are minus infinity.
    """
    if logits.device.type == "cuda" and logits.dtype in (torch.float32, torch.bfloat16) and can_use_triton():
        from lit_gpt.ops.softmax_kernel import loss_and_grad_

        return loss_and_grad_(logits, targets, vocab_size), logits
    in_place = logits if logits.device.type == "cpu" else None  # newly mapped memory costs a CPU more than exp
    grad = torch.softmax(logits, dim=-1, out=in_place)
    return _loss_and_grad_(grad, targets), grad


@functools.cache
def can_use_triton() -> bool:
    """Return whether Triton is installed, as PyTorch for GPUs does on Linux, and what it needs to compile its calls."""
    has_compiler = "CC" in os.environ or any(map(shutil.which, ("gcc", "clang", "cc")))
    has_headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return importlib.util.find_spec("triton") is not None and has_compiler and has_headers


def _loss_and_grad_(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Turn probabilities (n, V) into the gradient of the loss in place; return the loss of each row (n,).

    The gradient is p - 1 at the target and p elsewhere. `p - 1` is computed as minus the sum of the other
    probabilities, because in bfloat16 a target's p rounds to 1 long before the others vanish.
    """
    dtype = accumulation_dtype(probabilities.dtype)
    target_index = torch.arange(len(targets), device=targets.device), targets.clamp(min=0)  # (n,) each
    target_prob = probabilities[target_index].to(dtype)  # (n,)
    probabilities[target_index] = 0  # indexed: scatter would copy a bfloat16 chunk
    other_prob = probabilities.sum(dim=-1)  # (n,)
    probabilities[target_index] = -other_prob
    other_prob, tiny = other_prob.to(dtype), torch.finfo(dtype).tiny
    return torch.where(other_prob < 0.5, -torch.log1p(-other_prob), -target_prob.clamp(min=tiny).log())  # (n,)


def _accumulate(accumulator: Tensor, grad: Tensor, hidden: Tensor, first: bool) -> None:
    """Add grad.T @ hidden to the accumulator (V, D), or write it there if it is the first."""
    dtype = accumulator.dtype
    if accumulator.device.type == "cuda" or hidden.dtype == dtype:
        out_dtype: dict[str, Any] = {} if hidden.dtype == dtype else {"out_dtype": dtype}
        torch.addmm(accumulator, grad.T, hidden, beta=0 if first else 1, out=accumulator, **out_dtype)
        return
    rows = LinearCrossEntropy.GRAD_ROWS.get(accumulator.device.type, len(accumulator))
    for grad_chunk, target in zip(grad.T.split(rows), accumulator.split(rows)):
        target.copy_(grad_chunk @ hidden) if first else target.add_((grad_chunk @ hidden).to(dtype))
