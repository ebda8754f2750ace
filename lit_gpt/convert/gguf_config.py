"""The shape of a model in the metadata of a GGUF file, and back."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_gpt.convert.architectures import Name, architecture_of
from lit_gpt.errors import UserError
from lit_gpt.model import GPTConfig

if TYPE_CHECKING:
    from gguf import GGUFWriter

# The slots of GPTConfig that the name of an architecture stands for.
SLOTS: dict[str, dict[str, Any]] = {
    "llama": {"mlp": "swiglu", "qk_norm": False},
    "qwen2": {"mlp": "swiglu", "qk_norm": False},
    "qwen3": {"mlp": "swiglu", "qk_norm": True},
    "arcee": {"mlp": "relu2", "qk_norm": False},
    "gpt2": {"mlp": "gelu_tanh", "qk_norm": False, "norm": "layernorm", "position": "learned"},
    "starcoder2": {"mlp": "gelu_tanh", "qk_norm": False, "norm": "layernorm"},
}
EPS_KEYS = {"rmsnorm": "attention.layer_norm_rms_epsilon", "layernorm": "attention.layer_norm_epsilon"}
DEFAULT_EPS = {"rmsnorm": 1e-6, "layernorm": 1e-5}
# Further settings of an architecture, each with the value at which it changes nothing.
NEUTRAL = {"attention.causal": True, "rope.scaling.type": "none", "rope.scaling.factor": 1.0, "expert_count": 0}


def gguf_architecture(config: GPTConfig) -> Name:
    """Return the name of the architecture in llama.cpp that computes what a model of this shape computes.

    Raises:
        UserError: None does; the message names the slot.
    """
    name = architecture_of(config).name
    reason = None
    if name in ("gpt2", "starcoder2") and config.mlp not in ("gelu", "gelu_tanh"):
        reason = f"model.config.mlp is {config.mlp} with norm layernorm"
    elif name == "starcoder2" and config.attention_width != config.d_model:
        reason = f"model.config.head_size is {config.head_size} with norm layernorm"
    elif name == "arcee" and any(config.has_bias(part) for part in ("qkv", "project", "mlp")):
        reason = "model.config.bias is true with mlp relu2"
    if reason is not None:
        raise UserError(
            f"{reason}: no architecture of llama.cpp has that; --to hf and --to html take it, and docs/formats.md says "
            "what to train instead"
        )
    return name


def add_config(writer: "GGUFWriter", config: GPTConfig) -> None:
    """Add the metadata of a model's shape to a GGUF file."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_blocks)
    writer.add_feed_forward_length(config.hidden_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    eps = DEFAULT_EPS[config.norm] if config.norm_eps is None else config.norm_eps
    if config.norm == "rmsnorm":
        writer.add_layer_norm_rms_eps(eps)
    else:
        writer.add_layer_norm_eps(eps)
    if config.position == "rope":
        writer.add_rope_dimension_count(config.head_width)
        writer.add_rope_freq_base(config.rope_base)


def read_config(metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> GPTConfig:
    """Return the shape of the model in a GGUF file of another program.

    Args:
        metadata: The metadata of the file.
        shapes: The shapes of its tensors by name; matrices are (D_out, D_in).

    Raises:
        ValueError: No model of this project has one of the settings.
    """
    architecture = metadata["general.architecture"]
    prefix = f"{architecture}."
    settings = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    slots = SLOTS[architecture]
    norm = slots.get("norm", "rmsnorm")

    def take(key: str, default: Any = None) -> Any:
        value = settings.pop(key, default)
        if value is None or isinstance(value, list):
            problem = "missing" if value is None else "a list, a value for each block"
            raise ValueError(f"its {prefix}{key} is {problem}")
        return value

    vocab_size, d_model = shapes["token_embd.weight"]
    num_heads = take("attention.head_count")
    head_size = take("attention.key_length", d_model // num_heads)
    kv_heads = take("attention.head_count_kv", num_heads)
    eps = float(str(np.float32(take(EPS_KEYS[norm]))))  # 1e-5, not the float32 next to it
    config = GPTConfig(
        vocab_size=vocab_size,
        context_length=take("context_length"),
        d_model=take("embedding_length"),
        num_blocks=take("block_count"),
        num_heads=num_heads,
        num_kv_heads=None if kv_heads == num_heads else kv_heads,
        head_size=None if head_size * num_heads == d_model else head_size,
        hidden_size=take("feed_forward_length"),
        rope_base=take("rope.freq_base", 10_000.0),
        norm_eps=None if eps == DEFAULT_EPS[norm] else eps,
        tie_embeddings="output.weight" not in shapes,
        **_biases(architecture, norm, shapes),
        **slots,
    )
    settings.pop("vocab_size", None)  # the rows of the embedding say it
    neutral = {**NEUTRAL, "attention.value_length": head_size, "rope.dimension_count": head_size}
    for key, value in settings.items():
        if value != neutral.get(key):
            raise ValueError(f"its {prefix}{key} is {value!r}, and no model here has such a setting")
    return config


def _biases(architecture: str, norm: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the slots of biases: a layer has one if the file has a tensor for it."""
    qkv = "attn_qkv" if architecture == "gpt2" else "attn_q"
    layers = {"qkv_bias": qkv, "project_bias": "attn_output", "mlp_bias": "ffn_down"}
    found = {slot: f"blk.0.{layer}.bias" in shapes for slot, layer in layers.items()}
    in_norms = "output_norm.bias" in shapes if norm == "layernorm" else all(found.values())
    return {"bias": in_norms, **{slot: value for slot, value in found.items() if value != in_norms}}
