"""Compile a model for training with torch.compile."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_gpt.model import GPT, BlockInputs
from lit_gpt.ops.cross_entropy import holds_all_logits


def compile_blocks(gpt: GPT, trainer: Trainer) -> None:
    """Compile the blocks in place, so that the names in checkpoints do not change.

    With one CPU process, all blocks and the loss are compiled as one graph; `cpp_wrapper` lowers the overhead of calls.
    On a GPU or with several ranks, each block is compiled: they share the compiled code, and DDP or FSDP can reduce the
    gradients of one block while the backward pass of the previous block runs.
    """
    if trainer.strategy.root_device.type != "cpu" or trainer.world_size > 1:
        for block in gpt.blocks:
            block.compile()
        return
    options: dict[str, Any] = {"cpp_wrapper": not gpt.blocks.activation_checkpointing}  # torch 2.13 fails with both
    gpt.blocks.compile(options=options)
    eager, compiled = gpt.blocks_loss, torch.compile(gpt.blocks_loss, options=options)

    def blocks_loss(x: Tensor, inputs: BlockInputs, targets: Tensor) -> Tensor:
        # The chunks of a large loss take their gradients by hand, which a compiler cannot follow.
        function = compiled if holds_all_logits(targets, gpt.head.weight) else eager
        return function(x, inputs, targets)

    gpt.blocks_loss = blocks_loss  # type: ignore[method-assign]
