"""Which architecture of other programs computes what a GPT of ours computes.

An architecture is a fixed choice of most slots of `GPTConfig`. Hugging Face has a class for each, llama.cpp a name.
A shape that no architecture expresses cannot be exported to either of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lit_gpt.errors import UserError
from lit_gpt.model import GPTConfig

Name = Literal["qwen3", "qwen2", "llama", "arcee", "gpt2", "starcoder2"]


@dataclass(frozen=True)
class Architecture:
    """An architecture of Hugging Face and llama.cpp.

    Attributes:
        name: `model_type` in Hugging Face's config.json, and `general.architecture` in a GGUF file.
        class_name: The class of transformers that computes it.
    """

    name: Name
    class_name: str


ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("qwen3", "Qwen3ForCausalLM"),
        Architecture("qwen2", "Qwen2ForCausalLM"),
        Architecture("llama", "LlamaForCausalLM"),
        Architecture("arcee", "ArceeForCausalLM"),
        Architecture("gpt2", "GPT2LMHeadModel"),
        Architecture("starcoder2", "Starcoder2ForCausalLM"),
    )
}

Part = Literal["qkv", "project", "mlp", "norm"]

GPT2_ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu2")  # of those without a gate, all


def architecture_of(config: GPTConfig) -> Architecture:
    """Return the architecture that expresses a shape: never qwen2, which only an import has.

    transformers gives Qwen 2 a tokenizer of its own, whatever the folder says; Llama computes the same shapes.

    Raises:
        UserError: None does; the message names the slots.
    """
    reasons = list(_obstacles(config))
    if reasons:
        raise UserError(
            f"{', '.join(reasons)}: no architecture of Hugging Face or llama.cpp has that; --to html takes any shape, "
            "and docs/formats.md says what to train instead"
        )
    if config.position in ("learned", "sinusoidal"):
        return ARCHITECTURES["gpt2"]
    if config.norm == "layernorm":
        return ARCHITECTURES["starcoder2"]
    if config.mlp == "relu2":
        return ARCHITECTURES["arcee"]
    return ARCHITECTURES["qwen3" if config.qk_norm else "llama"]


def biases_of(config: GPTConfig) -> set[Part]:
    """Return the parts that have a bias in the architecture of a shape. Where ours has none, it is zero there.

    One switch of an architecture stands for several of ours.
    """
    attention, mlp = config.has_bias("qkv") or config.has_bias("project"), config.has_bias("mlp")
    if config.norm == "layernorm":
        is_switched_off = config.position == "rope" and not (attention or mlp)  # GPT-2 has no switch
        return {"norm"} if is_switched_off else {"norm", "qkv", "project", "mlp"}
    parts: set[Part] = {"qkv", "project"} if attention else set()
    return {*parts, "mlp"} if mlp else parts


def _obstacles(config: GPTConfig) -> Iterator[str]:
    """Yield what keeps every architecture from expressing a shape, as "the slot and its value, what it goes with"."""
    if config.previous_tokens:
        yield f"model.config.previous_tokens is {config.previous_tokens}"
    if config.norm == "none":
        yield "model.config.norm is none"
    if config.position == "none":
        yield "model.config.position is none"
    elif config.position == "rope":
        yield from _obstacles_with_rope(config)
    else:
        yield from _obstacles_without_rope(config)


def _obstacles_without_rope(config: GPTConfig) -> Iterator[str]:
    """Yield what GPT-2 lacks. It has all biases; where ours has none, zeros stand for it."""
    position = f"with position {config.position}"
    if config.norm != "layernorm":
        yield f"model.config.norm is {config.norm} {position}"
    if config.mlp not in GPT2_ACTIVATIONS:
        yield f"model.config.mlp is {config.mlp} {position}"
    if config.qk_norm:
        yield f"model.config.qk_norm is true {position}"
    if config.kv_heads != config.num_heads:
        yield f"model.config.num_kv_heads is {config.num_kv_heads} {position}"
    if config.attention_width != config.d_model:
        yield f"model.config.head_size is {config.head_size} {position}"


def _obstacles_with_rope(config: GPTConfig) -> Iterator[str]:
    """Yield what none of the other architectures has."""
    if config.norm == "layernorm":  # Starcoder 2
        if config.qk_norm:
            yield "model.config.qk_norm is true with norm layernorm"
        if config.mlp not in GPT2_ACTIVATIONS:
            yield f"model.config.mlp is {config.mlp} with norm layernorm and position rope"
        return
    if config.mlp not in ("swiglu", "relu2"):
        yield f"model.config.mlp is {config.mlp} with norm rmsnorm"
    if config.qk_norm and config.mlp == "relu2":
        yield "model.config.qk_norm is true with mlp relu2"
    if config.qk_norm and biases_of(config):
        yield "model.config.bias is true with qk_norm"
