"""The operations of the model, each written for speed on CPUs and GPUs.

`model.py` is written in terms of these functions and does not branch on CPU or GPU. Everything that depends on the
device, on autocast or on the dtype is decided here. `reference.py` provides the same names in a few lines of plain
PyTorch: it says what each function computes, and tests compare the two.

Functions named `..._saved_bytes` say what an operation saves for the backward pass; `planning/memory.py` adds them up.
"""

from lit_gpt.ops.attention import (
    document_mask,
    document_positions,
    prepare_attention_mask,
    scaled_dot_product_attention,
)
from lit_gpt.ops.cross_entropy import (
    IGNORE_INDEX,
    cross_entropy,
    evaluate_linear_cross_entropy,
    linear_cross_entropy,
)
from lit_gpt.ops.dropout import BlockMasks, draw_dropout_masks, dropout
from lit_gpt.ops.linear import autocast_disabled, compute_dtype, embedding, linear
from lit_gpt.ops.rms_norm import rms_norm

__all__ = [
    "IGNORE_INDEX",
    "BlockMasks",
    "autocast_disabled",
    "compute_dtype",
    "cross_entropy",
    "document_mask",
    "document_positions",
    "draw_dropout_masks",
    "dropout",
    "embedding",
    "evaluate_linear_cross_entropy",
    "linear",
    "linear_cross_entropy",
    "prepare_attention_mask",
    "rms_norm",
    "scaled_dot_product_attention",
]
