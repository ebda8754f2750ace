"""Matrix products and table look-ups, and the dtype in which the model computes.

Weights stay in the dtype they are trained in, usually float32. Under autocast the whole residual stream is bfloat16 (or
float16), and each weight is cast once, right before its product. Autocast itself is switched off around the blocks:
otherwise it would cast back and forth at every norm and softmax.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which the model computes: that of autocast where it is enabled, else that of `weight`."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def autocast_disabled(x: Tensor) -> torch.autocast:
    """Return a context manager in which operations on the device of `x` keep the dtypes they are given."""
    return torch.autocast(x.device.type, enabled=False)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums of many `dtype` numbers are computed: float32, or `dtype` if that is wider."""
    return torch.promote_types(dtype, torch.float32)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`, computed in the dtype of `x`.

    Args:
        x: (..., D_in).
        weight: (D_out, D_in), of any dtype.
        bias: (D_out,), of any dtype, or None.

    Returns:
        (..., D_out) in the dtype of `x`.
    """
    return F.linear(x, weight.type_as(x), None if bias is None else bias.type_as(x))


def linear_saved_bytes(in_features: int, element_size: int) -> int:
    """Return the bytes per token that `linear` saves for the backward pass: its input."""
    return in_features * element_size


def embedding(tokens: Tensor, weight: Tensor, tied: bool) -> Tensor:
    """Return the rows of `weight` that `tokens` select.

    Args:
        tokens: (...) int64.
        weight: (V, D).
        tied: whether the output head uses the same weight. Its gradient then has all V rows anyway. On a CPU the
            gradient of the look-up is made sparse in this case, and only the selected rows are added to it.

    Returns:
        (..., D).
    """
    return F.embedding(tokens, weight, sparse=tied and tokens.device.type == "cpu")
