"""Estimate the memory and the disk space that a run needs from its settings."""

import functools
from dataclasses import astuple, replace

import torch
from torch import Tensor

from lit_gpt.model import GPT, Block, GPTConfig
from lit_gpt.ops.attention import attention_saved_bytes, use_math_attention
from lit_gpt.ops.cross_entropy import chunk_bytes
from lit_gpt.ops.linear import linear_saved_bytes
from lit_gpt.ops.rms_norm import rms_norm_saved_bytes
from lit_gpt.optim import OptimizerName, parameter_groups

CHECKPOINT_BYTES_PER_PARAMETER = 2000  # beside its data: names and headers of a parameter and its optimizer state


def model_without_memory(config: GPTConfig, activation_checkpointing: bool = False) -> GPT:
    """Return a GPT whose parameters have shapes and no data, to count with. Random states stay as they are."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        gpt = GPT(config)
    gpt.blocks.activation_checkpointing = activation_checkpointing
    return gpt


def parameter_dtype(precision: str) -> torch.dtype:
    """Return the dtype of the parameters under the Trainer's `precision`."""
    return {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)


def activation_dtype(precision: str) -> torch.dtype:
    """Return the dtype of the activations under the Trainer's `precision`; float16 counts as bfloat16."""
    return torch.bfloat16 if "mixed" in precision else parameter_dtype(precision)


# --------------------------------------------------------------------------------------------------------- memory


def estimate_memory_of_shape(
    config: GPTConfig,
    optimizer: OptimizerName,
    windows: int,
    precision: str = "32-true",
    device: str = "cpu",
    activation_checkpointing: bool = False,
) -> tuple[int, int]:
    """Return what `estimate_memory` returns for a model of this shape, in a few milliseconds however deep it is.

    All blocks need the same memory, so the estimates for one and two blocks give those for any number.
    """
    (state, activations), (state_of_two, activations_of_two) = (
        estimate_memory(shallow_model(config, blocks, activation_checkpointing), optimizer, windows, precision, device)
        for blocks in (1, 2)
    )
    more = config.num_blocks - 1
    return state + more * (state_of_two - state), activations + more * (activations_of_two - activations)


def parameter_count(config: GPTConfig) -> int:
    """Return the number of parameters of a model of this shape."""
    one, two = (sum(p.numel() for p in shallow_model(config, blocks).parameters()) for blocks in (1, 2))
    return one + (config.num_blocks - 1) * (two - one)


def shallow_model(config: GPTConfig, num_blocks: int = 1, activation_checkpointing: bool = False) -> GPT:
    """Return a model without memory that has fewer blocks. Equal calls return the same object: do not change it."""
    shape = astuple(replace(config, num_blocks=num_blocks))
    return _shallow_model(shape, activation_checkpointing)


@functools.lru_cache(maxsize=512)
def _shallow_model(shape: tuple, activation_checkpointing: bool) -> GPT:
    return model_without_memory(GPTConfig(*shape), activation_checkpointing)


def estimate_memory(
    gpt: GPT, optimizer: OptimizerName, windows: int, precision: str = "32-true", device: str = "cpu", shards: int = 1
) -> tuple[int, int]:
    """Estimate the memory of one process in training.

    Args:
        gpt: The model; its weights are not read.
        optimizer: Its name.
        windows: B, windows in a forward pass.
        precision: The Trainer's precision, for example "bf16-mixed".
        device: The type of the device, for example "cpu".
        shards: The number of processes that share the weights, as with FSDP2.

    Returns:
        The bytes of weights, gradients and optimizer state, of which each process has an equal part, and the bytes of
        activations.
    """
    activations = activation_bytes(gpt, windows, precision, device)
    if device == "cuda":  # on a CPU the chunks of logits are small
        activations += chunk_bytes(device, windows * gpt.config.context_length, gpt.config.vocab_size)
    return state_bytes(gpt, optimizer, precision) // shards, activations


def processes_sharing_memory(device: str, processes: int) -> int:
    """Return how many of a machine's processes use the memory of one device: on a CPU all of them.

    Args:
        device: The type of the device.
        processes: Processes of the run on this machine.
    """
    return 1 if device == "cuda" else processes


def state_bytes(gpt: GPT, optimizer: OptimizerName, precision: str = "32-true") -> int:
    """Return the bytes of weights, gradients and optimizer state.

    AdamW has two moments for each weight, Muon one.
    """
    muon_group = "blocks" if optimizer == "muon" else None
    groups = parameter_groups(gpt, weight_decay=0.0, learning_rate=0.0)
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
    saved, masks = block_saved_bytes(gpt, dtype, device)
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


def block_saved_bytes(gpt: GPT, dtype: torch.dtype, device: str) -> tuple[int, int]:
    """Return the bytes per token that a block saves for its backward pass: of its operations, and of dropout masks."""
    config, block = gpt.config, gpt.blocks[0]
    assert isinstance(block, Block)
    size, width, length, dropout = dtype.itemsize, config.d_model, config.context_length, config.dropout
    saved = 2 * rms_norm_saved_bytes(width, size)
    saved += attention_saved_bytes(
        device,
        length,
        config.num_heads,
        config.kv_heads,
        config.head_width,
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


def checkpoint_bytes(gpt: GPT, optimizer: OptimizerName, tokenizer_bytes: int) -> int:
    """Estimate the size of a checkpoint: weights, optimizer state, tokenizer.

    Args:
        gpt: The model; its weights are not read.
        optimizer: Its name.
        tokenizer_bytes: The size of the tokenizer's state.
    """
    parameters = list(gpt.parameters())
    gradients = sum(torch.float32.itemsize * p.numel() for p in parameters)
    return state_bytes(gpt, optimizer) - gradients + tokenizer_bytes + CHECKPOINT_BYTES_PER_PARAMETER * len(parameters)


def checkpoint_count(max_steps: int | None, every_n_steps: int, keep: int, validates: bool) -> int:
    """Return how many checkpoints a run leaves: last.ckpt, best.ckpt if it validates, and the periodic ones.

    Args:
        max_steps: The last optimizer step; None: the run has no end.
        every_n_steps: Steps between periodic checkpoints.
        keep: How many periodic checkpoints are kept at most.
        validates: Whether the run validates.
    """
    periodic = keep if max_steps is None else min(keep, max_steps // every_n_steps)
    return 1 + validates + periodic
