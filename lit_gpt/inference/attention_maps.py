"""The attention weights of a model, which its fused kernels do not return."""

import math

import torch
from torch import Tensor

from lit_gpt import ops
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, Block, GPTConfig

HEADS_PER_BLOCK = 4  # that are shown by default, of the first block and of the last one


@torch.no_grad()
def attention_maps(model: GPT, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
    """Return how much each token attends to each earlier one, in every head of every block.

    Entry [n, h, t, s] is the part of token s in what head h of block n reads at token t. A row adds up to 1. The
    weights are those that `MultiHeadAttention` applies, before dropout; they are computed from the same queries and
    keys. `test_attention_maps_times_values_are_the_output_of_attention` compares them.

    Args:
        model: A model in evaluation mode, not sharded.
        tokens: (T,) int64, at most `context_length` of them.
        documents: (T,) int64, the number of the document of each token; None: all are one document.

    Returns:
        (blocks, H, T, T) float32 on the device of the model.
    """
    T = len(tokens)
    batch = None if documents is None else documents[None]  # (1, T)
    visible = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()  # (T, T)
    if batch is not None:
        visible = ops.document_mask(batch)[0, 0]  # (T, T)
    maps = []
    x, inputs = model.prepare_inputs(tokens[None], documents=batch)  # (1, T, D)
    with ops.autocast_disabled(x):
        for block in model.blocks:
            assert isinstance(block, Block)
            q, k, _ = block.attention.queries_keys_values(block.attention_norm(x), inputs)
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (1, H, T, E)
            scores = (q @ k.mT).float() / math.sqrt(q.shape[-1])  # (1, H, T, T)
            maps.append(scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)[0])
            x = block(x, inputs)  # (1, T, D)
    return torch.stack(maps)


def check_heads(heads: list[list[int]] | None, config: GPTConfig) -> None:
    """Check that the model has these heads.

    Raises:
        UserError: It does not.
    """
    for head in heads or []:
        blocks, heads_of_block = config.num_blocks, config.num_heads
        if len(head) != 2 or not (0 <= head[0] < blocks and 0 <= head[1] < heads_of_block):
            raise UserError(
                f"--attention_heads has {head}: give pairs of a block from 0 to {blocks - 1} and a head from 0 to "
                f"{heads_of_block - 1}, as [[0, 0], [{blocks - 1}, 0]]"
            )


def shown_heads(heads: list[list[int]] | None, config: GPTConfig) -> list[tuple[int, int]]:
    """Return the heads whose attention is shown, as (block, head)."""
    if heads is not None:
        return [(block, head) for block, head in heads]
    blocks = sorted({0, config.num_blocks - 1})
    return [(block, head) for block in blocks for head in range(min(HEADS_PER_BLOCK, config.num_heads))]
