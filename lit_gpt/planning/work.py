"""Count the work of an optimizer step and of an evaluation: operations, numbers, calls. `speed.py` gives it a time."""

from torch import Tensor

from lit_gpt.model import GPT, GPTConfig
from lit_gpt.optim import NEWTON_SCHULZ_GROUPS, OptimizerName, matrix_kind
from lit_gpt.planning.memory import activation_dtype, block_saved_bytes, shallow_model

Work = dict[str, float]  # name of a kind of work -> its amount


def flops_per_token(gpt: GPT) -> float:
    """Return the floating-point operations of the forward and the backward pass for one training token.

    6 for each parameter of the blocks and the head, and `6 * num_blocks * context_length * H * E` for causal
    attention, of which each token attends to half of the context on average (Kaplan et al. 2020, section 2.1).
    """
    config = gpt.config
    parameters = sum(p.numel() for p in gpt.blocks.parameters()) + gpt.head.weight.numel()
    return 6 * parameters + 6 * config.num_blocks * config.context_length * config.attention_width


def pass_work(config: GPTConfig, windows: int, precision: str, device: str = "cpu") -> Work:
    """Return the work that a pass of B = `windows` windows through the model consists of.

    A backward pass does about twice the work of a forward pass, so the same amounts describe a forward pass alone and
    both together.

    Args:
        config: The shape of the model.
        windows: B.
        precision: The Trainer's precision, for example "bf16-mixed".
        device: The type of the device.

    Returns:
        passes: 1.
        blocks: The number of blocks.
        heads: B * H in each block. Attention is computed head by head.
        products: Floating-point operations of the matrix products of a forward pass, attention included.
        activations: Bytes that the blocks save for the backward pass; the traffic of their other operations is
            proportional to them.
        masks: Bytes of dropout masks.
        attention: Attention weights, B * H * T² in each block.
        logits: B * T * V.
        embeddings: Numbers that are looked up in tables.
        weights: Numbers in the matrices of blocks, head and embeddings. They are cast, and their gradients are written.
    """
    gpt = shallow_model(config)
    B, T, D, V = windows, config.context_length, config.d_model, config.vocab_size
    L, H, N = config.num_blocks, config.num_heads, windows * config.context_length
    saved, masks = block_saved_bytes(gpt, activation_dtype(precision), device)
    matrices = L * sum(p.numel() for p in _matrices(gpt))
    tables = 2 - config.tie_embeddings + config.previous_tokens  # of V x D numbers, the head is one
    return {
        "passes": 1,
        "blocks": L,
        "heads": L * B * H,
        "products": 2 * N * (matrices + V * D) + 4 * N * T * config.attention_width * L,
        "activations": N * L * saved,
        "masks": N * L * masks,
        "attention": N * T * H * L,
        "logits": N * V,
        "embeddings": N * D * (1 + config.previous_tokens),
        "weights": matrices + tables * V * D,
    }


def update_work(config: GPTConfig, optimizer: OptimizerName) -> Work:
    """Return the work of an optimizer's update, with the norm of the gradients.

    Returns:
        updates: 1.
        parameters: The number of tensors.
        adamw: Numbers that AdamW updates.
        muon: 1 if there is Muon.
        matrices: The number of matrices that Muon updates.
        momenta: Numbers in these matrices.
        newton_schulz: Floating-point operations that make them orthogonal.
    """
    gpt, L = shallow_model(config), config.num_blocks
    tensors = list(gpt.parameters()) + (L - 1) * list(gpt.blocks.parameters())
    matrices = _matrices(gpt) if optimizer == "muon" else []
    momenta = L * sum(p.numel() for p in matrices)
    return {
        "updates": 1,
        "parameters": len(tensors),
        "adamw": sum(p.numel() for p in tensors) - momenta,
        "muon": bool(matrices),
        "matrices": L * len(matrices),
        "momenta": momenta,
        "newton_schulz": L * sum(map(newton_schulz_flops, matrices)),
    }


def newton_schulz_flops(matrix: Tensor) -> int:
    """Return the floating-point operations of `lit_gpt.optim.newton_schulz` for one matrix."""
    short, kind = matrix_kind(matrix.shape)
    long = max(matrix.shape)
    flops = 0
    for iterations in NEWTON_SCHULZ_GROUPS[kind]:
        gram_products = 1 + 4 * (iterations - 1)  # of matrices (short, short)
        flops += 2 * (2 * short * short * long) + gram_products * 2 * short**3
    return flops


def _matrices(gpt: GPT) -> list[Tensor]:
    """Return the matrices of the blocks, which Muon updates."""
    return [p for p in gpt.blocks.parameters() if p.ndim == 2]
