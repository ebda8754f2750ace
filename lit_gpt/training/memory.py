"""Estimate the memory and disk space a run needs from its settings."""

import pickle

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.model import GPT, Block, FeedForward
from lit_gpt.ops.attention import attention_saved_bytes, use_math_attention
from lit_gpt.ops.cross_entropy import chunk_bytes
from lit_gpt.ops.linear import linear_saved_bytes
from lit_gpt.ops.rms_norm import rms_norm_saved_bytes
from lit_gpt.optim import parameter_groups
from lit_gpt.training.checkpointing import StepCheckpoint
from lit_gpt.training.module import LitGPT


def format_bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def element_bytes(precision: str) -> int:
    """Of a weight, under the Trainer's `precision`."""
    return {"bf16-true": 2, "64-true": 8}.get(precision, 4)


def state_bytes(model: LitGPT, precision: str = "32-true") -> int:
    """Bytes of weights, gradients and the optimizer's state: four numbers a parameter, three for Muon's matrices."""
    groups = parameter_groups(model.gpt, model.weight_decay, model.optimizer)
    return element_bytes(precision) * sum((3 if g["muon"] else 4) * p.numel() for g in groups for p in g["params"])


def estimate_memory(trainer: Trainer, model: LitGPT, windows: int) -> tuple[int, int]:
    """What a process will take for the weights and what belongs to them, all or its slices, and for activations."""
    device, precision = trainer.strategy.root_device.type, str(trainer.precision)
    holders = trainer.world_size if isinstance(trainer.strategy, ModelParallelStrategy) else 1
    activations = activation_bytes(model.gpt, windows, precision, device)
    if device == "cuda":  # on a CPU the chunks of the loss are small
        config = model.gpt.config
        activations += chunk_bytes(device, windows * config.context_length, config.vocab_size)
    return state_bytes(model, precision) // holders, activations


def activation_bytes(gpt: GPT, windows: int, precision: str, device: str = "cpu") -> int:
    """Estimate the bytes that the forward pass of one batch saves for the backward pass, blocks not compiled.

    Adds up what each operation of a block says it saves per token.

    Args:
        gpt: the model; its weights are not read.
        windows: B.
        precision: the Trainer's.
        device: its type, as "cpu".
    """
    config, block = gpt.config, gpt.blocks[0]
    assert isinstance(block, Block)
    dtype = (
        torch.bfloat16
        if "mixed" in precision
        else {2: torch.bfloat16, 8: torch.float64}.get(element_bytes(precision), torch.float32)
    )
    size, T, D = dtype.itemsize, config.context_length, config.d_model
    dropout = config.dropout
    norm = rms_norm_saved_bytes(D, size)
    attention = attention_saved_bytes(
        device,
        T,
        config.num_heads,
        config.kv_heads,
        config.head_size,
        dtype,
        dropout,
        qk_norm=config.qk_norm,
        rotary=config.position == "rope",
    )
    products = (block.attention.qkv, block.attention.project, block.mlp.up, block.mlp.project)
    saved = 2 * norm + attention + sum(linear_saved_bytes(product.in_features, size) for product in products)
    saved += activation_saved_elements(block.mlp) * size
    masks = 2 * size * D if dropout else 0  # of both outputs
    if dropout and use_math_attention(device, T, dtype, dropout):
        masks += size * config.num_heads * T  # of the attention weights
    if gpt.blocks.activation_checkpointing:  # each block's input and masks, and one block while it is recomputed
        per_token = config.num_blocks * (size * D + masks) + saved + masks
    else:
        per_token = config.num_blocks * (saved + masks)
    per_token += norm + linear_saved_bytes(D, size)  # the last norm and the head
    per_token += 2 * torch.int64.itemsize  # tokens and targets
    weights = sum(p.numel() for p in gpt.blocks.parameters() if p.ndim == 2)
    cast = size * weights if "mixed" in precision else 0  # the weights in the dtype of the products
    return windows * T * per_token + cast


def activation_saved_elements(mlp: FeedForward) -> int:
    """Return how many elements per token the activation of a feed-forward saves, its output not counted.

    It is measured on one token, so that a new activation needs no entry here.
    """
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    x = torch.ones(1, mlp.up.out_features, requires_grad=True, device="cpu")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = mlp.activation(x)
    saved.pop(y.untyped_storage().data_ptr(), None)  # it is the input of the next product, which counts it
    return sum(saved.values())


def checkpoint_bytes(model: LitGPT, data: TextDataModule) -> int:
    """Of a checkpoint file: weights, the optimizer's state, the tokenizer, and what stands around each tensor."""
    weights = list(model.gpt.parameters())
    state = state_bytes(model) - sum(4 * p.numel() for p in weights)  # without gradients
    return state + len(pickle.dumps(data.tokenizer.state())) + 2000 * len(weights)


def checkpoint_count(saves: StepCheckpoint, trainer: Trainer, steps: int | None) -> int:
    """How many files a run of `steps` leaves: last.ckpt, best.ckpt where it validates, and periodic ones."""
    periodic = saves.keep if steps is None else min(saves.keep, steps // saves.every_n_steps)
    return 1 + (trainer.limit_val_batches != 0) + periodic


def processes_sharing_memory(trainer: Trainer) -> int:
    """How many of the run's share one memory: on a CPU, all on this machine."""
    return 1 if trainer.strategy.root_device.type == "cuda" else trainer.num_devices
