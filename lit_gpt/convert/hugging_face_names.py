"""The names and layouts of the weights in the architectures of Hugging Face, and in ours."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_gpt.convert.architectures import Architecture, biases_of
from lit_gpt.layers import Sinusoidal
from lit_gpt.model import GPT, GPTConfig

# Module of ours -> their modules. Where there are several, ours has their rows one after another. {} is the block.
LLAMA: dict[str, tuple[str, ...]] = {
    "embedding": ("model.embed_tokens",),
    "blocks.{}.attention_norm": ("model.layers.{}.input_layernorm",),
    "blocks.{}.attention.qkv": (
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.k_proj",
        "model.layers.{}.self_attn.v_proj",
    ),
    "blocks.{}.attention.q_norm": ("model.layers.{}.self_attn.q_norm",),
    "blocks.{}.attention.k_norm": ("model.layers.{}.self_attn.k_norm",),
    "blocks.{}.attention.project": ("model.layers.{}.self_attn.o_proj",),
    "blocks.{}.mlp_norm": ("model.layers.{}.post_attention_layernorm",),
    "blocks.{}.mlp.up": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "blocks.{}.mlp.project": ("model.layers.{}.mlp.down_proj",),
    "norm": ("model.norm",),
    "head": ("lm_head",),
}
ARCEE = LLAMA | {"blocks.{}.mlp.up": ("model.layers.{}.mlp.up_proj",)}
STARCODER2 = LLAMA | {
    "blocks.{}.mlp.up": ("model.layers.{}.mlp.c_fc",),
    "blocks.{}.mlp.project": ("model.layers.{}.mlp.c_proj",),
}
GPT2: dict[str, tuple[str, ...]] = {
    "embedding": ("transformer.wte",),
    "position.table": ("transformer.wpe",),
    "blocks.{}.attention_norm": ("transformer.h.{}.ln_1",),
    "blocks.{}.attention.qkv": ("transformer.h.{}.attn.c_attn",),
    "blocks.{}.attention.project": ("transformer.h.{}.attn.c_proj",),
    "blocks.{}.mlp_norm": ("transformer.h.{}.ln_2",),
    "blocks.{}.mlp.up": ("transformer.h.{}.mlp.c_fc",),
    "blocks.{}.mlp.project": ("transformer.h.{}.mlp.c_proj",),
    "norm": ("transformer.ln_f",),
    "head": ("lm_head",),
}
NAMES = {"gpt2": GPT2, "starcoder2": STARCODER2, "arcee": ARCEE}  # the others are Llama's
TRANSPOSED = ("c_attn", "c_proj", "c_fc")  # GPT-2's, whose matrices are (D_in, D_out)


def names_of(name: str, architecture: Architecture) -> list[str]:
    """Return their names of one of our weights: "norm.weight" -> ["model.norm.weight"]."""
    module, _, kind = name.rpartition(".")
    parts = module.split(".")
    block = parts[1] if parts[0] == "blocks" else ""
    if block:
        module = ".".join(["blocks", "{}", *parts[2:]])
    return [f"{theirs.format(block)}.{kind}" for theirs in NAMES.get(architecture.name, LLAMA)[module]]


def is_transposed(name: str, architecture: Architecture) -> bool:
    """Whether their matrix of this name is (D_in, D_out), and not (D_out, D_in)."""
    module, _, kind = name.rpartition(".")
    return architecture.name == "gpt2" and kind == "weight" and module.rpartition(".")[2] in TRANSPOSED


def row_counts(name: str, config: GPTConfig, parts: int) -> list[int]:
    """Return how many rows of one of our weights belong to each of their parts."""
    if name.endswith(("qkv.weight", "qkv.bias")):
        kv_width = config.kv_heads * config.head_width
        return [config.attention_width, kv_width, kv_width]
    return [config.hidden_width] * parts


def to_hugging_face(model: GPT, architecture: Architecture) -> dict[str, Tensor]:
    """Return the weights of a model by their names. A bias that only they have is zero.

    Args:
        model: The model.
        architecture: That of its shape.
    """
    config, weights = model.config, dict(model.state_dict())
    if isinstance(model.position, Sinusoidal):  # they have no other table than a trained one
        weights["position.table.weight"] = model.position.table
    for name, value in model.state_dict().items():
        bias = name.replace(".weight", ".bias")
        if part_of(name) in biases_of(config) and bias not in weights:
            weights[bias] = torch.zeros(len(value))
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name == "head.weight" and config.tie_embeddings:
            continue
        names = names_of(name, architecture)
        parts = value.split(row_counts(name, config, len(names))) if len(names) > 1 else [value]
        for theirs, part in zip(names, parts, strict=True):
            found[theirs] = part.T if is_transposed(theirs, architecture) else part
    return found


def part_of(name: str) -> str:
    """Return to which part with a bias one of our weights belongs, as `architectures.biases_of` names them, or ""."""
    module = name.rpartition(".")[0]
    if module.endswith("norm"):
        return "norm"
    if module.endswith(("mlp.up", "mlp.project")):
        return "mlp"
    return module.rpartition(".")[2] if module.endswith(("attention.qkv", "attention.project")) else ""


def from_hugging_face(
    weights: Mapping[str, Tensor], model: GPT, architecture: Architecture
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights of a model of ours from theirs.

    Args:
        weights: By their names. Those of GPT-2 may lack "transformer." at the beginning, as in the first files of it.
        model: The model to fill, for its names and shapes; it may be without memory.
        architecture: That of the file.

    Returns:
        Our state dict, float32; and their names that nothing was taken from.

    Raises:
        KeyError: A weight is missing; the argument is its name.
        ValueError: A weight has another shape; the argument is its name.
    """
    if architecture.name == "gpt2" and not any(name.startswith("transformer.") for name in weights):
        weights = {name if name == "lm_head.weight" else f"transformer.{name}": weights[name] for name in weights}
    left = set(weights)
    found: dict[str, Tensor] = {}
    for name, expected in model.state_dict().items():
        if name == "head.weight" and model.config.tie_embeddings:
            left.discard("lm_head.weight")
            found[name] = found["embedding.weight"]
            continue
        names = names_of(name, architecture)
        left -= set(names)
        parts = [weights[theirs].T if is_transposed(theirs, architecture) else weights[theirs] for theirs in names]
        rows = row_counts(name, model.config, len(names)) if len(names) > 1 else [len(expected)]
        for theirs, part, count in zip(names, parts, rows, strict=True):
            if part.shape != (count, *expected.shape[1:]):
                raise ValueError(theirs)
        value = parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts])
        found[name] = value.float().contiguous()
    return found, sorted(left)
