"""Estimate the memory and the disk space that a run needs from its settings."""

import pickle

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.model import GPT, Block
from lit_gpt.ops.attention import attention_saved_bytes, use_math_attention
from lit_gpt.ops.cross_entropy import chunk_bytes
from lit_gpt.ops.linear import linear_saved_bytes
from lit_gpt.ops.rms_norm import rms_norm_saved_bytes
from lit_gpt.training.checkpointing import StepCheckpoint
from lit_gpt.training.module import LitGPT

CHECKPOINT_BYTES_PER_PARAMETER = 2000  # beside its data: names and headers of a parameter and its optimizer state


def parameter_dtype(precision: str) -> torch.dtype:
    """Return the dtype of the parameters under the Trainer's `precision`."""
    return {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)


def activation_dtype(precision: str) -> torch.dtype:
    """Return the dtype of the activations under the Trainer's `precision`; float16 counts as bfloat16."""
    return torch.bfloat16 if "mixed" in precision else parameter_dtype(precision)


# --------------------------------------------------------------------------------------------------------- memory


def estimate_memory(trainer: Trainer, model: LitGPT, windows: int) -> tuple[int, int]:
    """Estimate the memory of one process in training.

    Args:
        trainer: the Trainer, for its device, precision and strategy.
        model: the model; its weights are not read.
        windows: B, windows in a forward pass.

    Returns:
        The bytes of weights, gradients and optimizer state, of which FSDP2 gives each process an equal part, and the
        bytes of activations.
    """
    device, precision = trainer.strategy.root_device.type, str(trainer.precision)
    shards = trainer.world_size if isinstance(trainer.strategy, ModelParallelStrategy) else 1
    activations = activation_bytes(model.gpt, windows, precision, device)
    if device == "cuda":  # on a CPU the chunks of logits are small
        config = model.gpt.config
        activations += chunk_bytes(device, windows * config.context_length, config.vocab_size)
    return state_bytes(model, precision) // shards, activations


def processes_sharing_memory(trainer: Trainer) -> int:
    """Return how many processes of the run use the memory of one device: on a CPU, all on this machine."""
    return 1 if trainer.strategy.root_device.type == "cuda" else trainer.num_devices


def state_bytes(model: LitGPT, precision: str = "32-true") -> int:
    """Return the bytes of weights, gradients and optimizer state.

    AdamW has two moments for each weight, Muon one.
    """
    muon_group = "blocks" if model.hparams["optimizer"] == "muon" else None
    groups = model.parameter_groups()
    numbers = sum((3 if group["name"] == muon_group else 4) * p.numel() for group in groups for p in group["params"])
    return parameter_dtype(precision).itemsize * numbers


def activation_bytes(gpt: GPT, windows: int, precision: str, device: str = "cpu") -> int:
    """Estimate the bytes that a forward pass saves for the backward pass, if the blocks are not compiled.

    Args:
        gpt: the model; its weights are not read.
        windows: B, windows in the forward pass.
        precision: the Trainer's precision.
        device: the type of the device, as "cpu".
    """
    cast_weights = 0  # a copy of each matrix in the dtype of the activations
    if "mixed" in precision:
        matrices = sum(p.numel() for p in gpt.blocks.parameters() if p.ndim == 2)
        cast_weights = activation_dtype(precision).itemsize * matrices
    return windows * gpt.config.context_length * activation_bytes_per_token(gpt, precision, device) + cast_weights


def activation_bytes_per_token(gpt: GPT, precision: str, device: str = "cpu") -> int:
    """Estimate the bytes that a forward pass saves for each token; for the arguments see `activation_bytes`.

    The functions of `lit_gpt.ops` say what each operation saves. LayerNorm counts as RMSNorm.
    """
    config, dtype = gpt.config, activation_dtype(precision)
    stream = config.d_model * dtype.itemsize  # one residual stream
    saved, masks = _block_saved_bytes(gpt, dtype, device)
    if gpt.blocks.activation_checkpointing:
        # the input and the masks of each block; everything else of one block at a time, when it is recomputed
        blocks = config.num_blocks * (stream + masks) + saved + masks
    else:
        blocks = config.num_blocks * (saved + masks)
    norm_and_head = rms_norm_saved_bytes(config.d_model, dtype.itemsize) + linear_saved_bytes(
        config.d_model, dtype.itemsize
    )
    tokens_and_targets = 2 * torch.int64.itemsize
    return blocks + norm_and_head + tokens_and_targets


def _block_saved_bytes(gpt: GPT, dtype: torch.dtype, device: str) -> tuple[int, int]:
    """Return the bytes per token that a block saves: of its operations, and of its dropout masks."""
    config, block = gpt.config, gpt.blocks[0]
    assert isinstance(block, Block)
    size, width, length, dropout = dtype.itemsize, config.d_model, config.context_length, config.dropout
    saved = 2 * rms_norm_saved_bytes(width, size)
    saved += attention_saved_bytes(
        device,
        length,
        config.num_heads,
        config.kv_heads,
        config.head_size,
        dtype,
        dropout,
        qk_norm=config.qk_norm,
        rotary=config.position == "rope",
    )
    for linear in (block.attention.qkv, block.attention.project, block.mlp.up, block.mlp.project):
        saved += linear_saved_bytes(linear.in_features, size)
    saved += _activation_saved_elements(block) * size
    if not dropout:
        return saved, 0
    masks = 2 * width  # of the outputs of attention and feed-forward
    if use_math_attention(device, length, dtype, dropout):
        masks += config.num_heads * length  # of the attention weights
    return saved, masks * size


def _activation_saved_elements(block: Block) -> int:
    """Return how many elements per token the activation function saves, without its output.

    They are measured on one token, so that a new activation function needs no entry here. Its output is the input of
    the next linear layer, which counts it.
    """
    elements: dict[int, int] = {}  # address of a storage -> its elements

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        elements[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    x = torch.ones(1, block.mlp.up.out_features, requires_grad=True, device="cpu")  # (1, hidden)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        y = block.mlp.activation(x)
    elements.pop(y.untyped_storage().data_ptr(), None)
    return sum(elements.values())


# ----------------------------------------------------------------------------------------------------- disk space


def checkpoint_bytes(model: LitGPT, data: TextDataModule) -> int:
    """Estimate the size of a checkpoint: weights, optimizer state, tokenizer."""
    parameters = list(model.gpt.parameters())
    gradients = sum(torch.float32.itemsize * p.numel() for p in parameters)
    tokenizer = len(pickle.dumps(data.tokenizer.state()))
    return state_bytes(model) - gradients + tokenizer + CHECKPOINT_BYTES_PER_PARAMETER * len(parameters)


def checkpoint_count(checkpointing: StepCheckpoint, trainer: Trainer, max_steps: int | None) -> int:
    """Return how many checkpoints a run leaves: last.ckpt, best.ckpt if it validates, and the periodic ones.

    Args:
        checkpointing: the callback that writes them.
        trainer: the Trainer.
        max_steps: the last optimizer step; None: the run has no end.
    """
    periodic = checkpointing.keep
    if max_steps is not None:
        periodic = min(periodic, max_steps // checkpointing.every_n_steps)
    return 1 + (trainer.limit_val_batches != 0) + periodic
