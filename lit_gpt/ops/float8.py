"""The products of the output head in float8, which newer GPUs compute twice as fast as in bfloat16."""

import torch
from torch import Tensor
from torch.nn import functional as F

FLOAT8_CAPABILITY = (8, 9)  # of the first GPUs that multiply float8: Ada (RTX 40), then Hopper (H100)
FLOAT8_MULTIPLE = 16  # of the sizes of matrices that they multiply
# Gradients of a softmax lie between -1 and 1. This makes the largest of them 2**15; float8_e5m2 reaches 57,344.
GRADIENT_SCALE = 2.0**-15


class Float8Weight:
    """The weight of the head, rounded to float8_e4m3fn, and its two products without the gradient of the weight.

    Args:
        weight: (V, D), both multiples of 16.
    """

    def __init__(self, weight: Tensor) -> None:
        self.rows, self.scale = quantize(weight)  # (V, D), ()
        self.columns = self.rows.T.contiguous()  # (D, V), because the second factor has to lie in memory by columns

    def logits(self, hidden: Tensor) -> Tensor:
        """Return hidden @ weight.T: (n, D) -> (n, V) in the dtype of `hidden`."""
        rounded, scale = quantize(hidden)
        return scaled_product(rounded, self.rows.T, scale, self.scale, hidden.dtype)

    def grad_hidden(self, grad: Tensor) -> Tensor:
        """Return grad @ weight for the gradients of a softmax: (n, V) -> (n, D) in the dtype of `grad`."""
        rounded = (grad / GRADIENT_SCALE).to(torch.float8_e5m2)
        scale = torch.full((), GRADIENT_SCALE, device=grad.device)
        return scaled_product(rounded, self.columns.T, scale, self.scale, grad.dtype)


def scaled_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (a * scale_a) @ (b * scale_b) of float8 matrices with scales (); b lies in memory column after column."""
    whole = F.ScalingType.TensorWise
    return F.scaled_mm(a, b, scale_a, whole, scale_b, whole, output_dtype=dtype)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x / scale, rounded to float8_e4m3fn, and the scale (), with which x uses the whole range of float8."""
    scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).to(torch.float8_e4m3fn), scale
