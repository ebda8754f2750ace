"""Estimate the memory and disk space a run needs from its settings."""

import pickle

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.model import GPT, LinearCrossEntropy
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
    if device == "cuda":  # where two chunks of the head's logits are no little
        logits = windows * model.gpt.config.context_length * model.gpt.config.vocab_size * 4
        activations += 2 * min(LinearCrossEntropy.CHUNK[device], logits)
    return state_bytes(model, precision) // holders, activations


def activation_bytes(gpt: GPT, windows: int, precision: str, device: str = "cpu") -> int:
    """About the bytes that the forward pass of one batch leaves for the backward pass, blocks not compiled.

    It goes through `Block` and adds up what the operations keep of one token.

    Args:
        gpt: the model.
        windows: B.
        precision: the Trainer's.
        device: its type.
    """
    config, mixed, cpu = gpt.config, "mixed" in precision, device == "cpu"
    T, D, H, KE = config.context_length, config.d_model, config.num_heads, config.kv_heads * config.head_size
    hidden = sum(block.mlp.project.in_features for block in gpt.blocks) // config.num_blocks  # type: ignore[union-attr, misc]
    size = 2 if mixed else element_bytes(precision)
    norm = 2 * size * D + 4  # what it reads, and a number of it; its output is what a product reads
    turned = config.qk_norm or config.position == "rope"
    if cpu and T <= 512 and (config.dropout or (size == 2 and T >= 32)):  # attention_by_products
        attention = size * (3 * D + H * T) + (size * (D + 2 * KE) if config.qk_norm else 0)  # qkv's output by its norms
        attention += 2 * size * H * T if config.dropout else 0
    else:
        attention = size * (2 * D + 2 * KE) + 4 * H  # what qkv gave, what came of it, sums of shares
        attention += size * (D + KE) if turned else 0
    mlp = {"swiglu": 4, "gelu": 2, "relu": 1, "relu2": 2}[config.mlp] * size * hidden
    masks = 2 * size * D if config.dropout else 0
    block = 2 * norm + attention + size * D + mlp + masks
    blocks = config.num_blocks * block
    if gpt.blocks.activation_checkpointing:  # what goes into each, its masks, and one of them at work
        shares = size * H * T if config.dropout and cpu and T <= 512 else 0
        blocks = config.num_blocks * (size * D + masks + shares) + block
    token = blocks + norm + 2 * 8
    cast = size * sum(p.numel() for p in gpt.blocks.parameters() if p.ndim == 2) if mixed else 0
    return windows * T * token + cast


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
