"""Root mean square normalisation."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lit_gpt.ops.linear import accumulation_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x ** 2) + eps) * weight` over the last dimension (Zhang and Sennrich 2019).

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean of the squares.

    Returns:
        (..., D) in the dtype of `x`, computed in float32 or wider.
    """
    # Without gradients PyTorch's function is as fast, and a compiler fuses it into one loop.
    if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y: Tensor = RMSNormFunction.apply(x, weight, eps)
        return y
    # The fused kernels want one dtype for both; they compute in float32 all the same.
    return F.rms_norm(x, x.shape[-1:], weight.type_as(x), eps)


def rms_norm_saved_bytes(width: int, element_size: int) -> int:
    """Return the bytes per token that `rms_norm` saves for the backward pass: its input and one float32."""
    return width * element_size + 4


class RMSNormFunction(torch.autograd.Function):
    """`rms_norm` with a shorter backward pass on a CPU.

    PyTorch's function saves two float32 copies of its input there, and its backward pass takes twice as long. This one
    saves the input as it is and one number per row, `rstd`, the reciprocal of the root mean square.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x (..., D), weight (D,) -> (..., D)."""
        y = x.to(accumulation_dtype(x.dtype), copy=True)  # (..., D)
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)  # (..., 1)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, rstd)
        return y.mul_(rstd).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With x_hat = x * rstd: dx = rstd * (grad * weight - x_hat * mean(grad * x_hat * weight))."""
        x, weight, rstd = ctx.saved_tensors
        x_hat, grad = x.to(rstd.dtype, copy=True).mul_(rstd), grad.to(rstd.dtype)  # (..., D) each
        grad_x_hat = grad * x_hat  # (..., D)
        projection = (grad_x_hat @ weight.to(rstd.dtype)).unsqueeze(-1).div_(-x.shape[-1])  # (..., 1)
        grad_x = x_hat.mul_(projection).addcmul_(grad, weight).mul_(rstd).to(x.dtype)  # (..., D)
        return grad_x, grad_x_hat.flatten(0, -2).sum(0).to(weight.dtype), None
