"""The weights of a GPT under the names and in the layout of GGUF, and back.

llama.cpp has one list of names for all architectures. Two details differ between them: which biases must be there, and
in which order the channels of a head stand where `rope` rotates pairs of them.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lit_gpt.model import GPT, GPTConfig

ROTATES_NEIGHBOURS = ("llama", "arcee")  # pairs are channels (2i, 2i + 1) of a head; elsewhere (i, i + E/2), as here
HAS_ALL_BIASES = ("gpt2", "starcoder2")  # llama.cpp does not load these without the biases
POSITION_TABLE = "position_embd.weight"


class Part(NamedTuple):
    """A layer of the model, and where GGUF has its rows.

    Attributes:
        layer: The name of the layer in the model.
        names: The names of the layers in GGUF that share its rows, in their order.
        heads: For each of them the number of heads whose channels are reordered; 0 if none are.
        rows: For each of them the number of its rows.
    """

    layer: str
    names: tuple[str, ...]
    heads: tuple[int, ...]
    rows: tuple[int, ...]


def model_parts(config: GPTConfig, architecture: str) -> Iterator[Part]:
    """Yield all layers of a model that have weights, without the table of positions."""
    D, V = config.d_model, config.vocab_size
    yield Part("embedding", ("token_embd",), (0,), (V,))
    for block in range(config.num_blocks):
        yield from _block_parts(config, architecture, block)
    yield Part("norm", ("output_norm",), (0,), (D,))
    if not config.tie_embeddings:
        yield Part("head", ("output",), (0,), (V,))


def _block_parts(config: GPTConfig, architecture: str, block: int) -> Iterator[Part]:
    D, H, K, E = config.d_model, config.num_heads, config.kv_heads, config.head_width
    hidden = config.hidden_width
    ours, theirs = f"blocks.{block}", f"blk.{block}"
    yield Part(f"{ours}.attention_norm", (f"{theirs}.attn_norm",), (0,), (D,))
    if architecture == "gpt2":
        yield Part(f"{ours}.attention.qkv", (f"{theirs}.attn_qkv",), (0,), ((H + 2 * K) * E,))
    else:
        heads = (H, K, 0) if architecture in ROTATES_NEIGHBOURS else (0, 0, 0)
        names = (f"{theirs}.attn_q", f"{theirs}.attn_k", f"{theirs}.attn_v")
        yield Part(f"{ours}.attention.qkv", names, heads, (H * E, K * E, K * E))
    if config.qk_norm:
        yield Part(f"{ours}.attention.q_norm", (f"{theirs}.attn_q_norm",), (0,), (E,))
        yield Part(f"{ours}.attention.k_norm", (f"{theirs}.attn_k_norm",), (0,), (E,))
    yield Part(f"{ours}.attention.project", (f"{theirs}.attn_output",), (0,), (D,))
    yield Part(f"{ours}.mlp_norm", (f"{theirs}.ffn_norm",), (0,), (D,))
    if config.is_gated:
        yield Part(f"{ours}.mlp.up", (f"{theirs}.ffn_gate", f"{theirs}.ffn_up"), (0, 0), (hidden, hidden))
    else:
        yield Part(f"{ours}.mlp.up", (f"{theirs}.ffn_up",), (0,), (hidden,))
    yield Part(f"{ours}.mlp.project", (f"{theirs}.ffn_down",), (0,), (D,))


def to_gguf(model: GPT, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of every tensor of the GGUF file, in float32 on the CPU."""
    config = model.config
    state = {name: value.float().cpu() for name, value in model.state_dict().items()}
    for part in model_parts(config, architecture):
        for kind in ("weight", "bias"):
            value = state.get(f"{part.layer}.{kind}")
            if value is None and kind == "bias" and _needs_bias(part, architecture):
                value = torch.zeros(sum(part.rows))
            if value is not None:
                for name, heads, rows in zip(part.names, part.heads, value.split(part.rows), strict=True):
                    yield f"{name}.{kind}", interleave_halves(rows, heads) if heads else rows
    if config.position == "learned":
        yield POSITION_TABLE, state["position.table.weight"]
    elif config.position == "sinusoidal":
        yield POSITION_TABLE, model.get_buffer("position.table").float().cpu()


def _needs_bias(part: Part, architecture: str) -> bool:
    return architecture in HAS_ALL_BIASES and part.layer not in ("embedding", "head")


def from_gguf(tensors: Mapping[str, Tensor], config: GPTConfig, architecture: str) -> dict[str, Tensor]:
    """Return the `state_dict` of the model whose tensors in GGUF these are.

    Args:
        tensors: The tensors of the file, in float32.
        config: The shape of the model.
        architecture: The architecture that the file names.

    Raises:
        ValueError: A tensor is missing, or has another shape, or is none of this model.
    """
    with torch.device("meta"):
        expected = {name: value.shape for name, value in GPT(config).state_dict().items()}
    remaining, state = dict(tensors), {}
    for part in model_parts(config, architecture):
        for kind in ("weight", "bias"):
            names = [f"{name}.{kind}" for name in part.names]
            name = f"{part.layer}.{kind}"
            if name not in expected:
                _drop_zeros(remaining, names)
                continue
            rows = [_take(remaining, name) for name in names]
            rows = [separate_halves(value, heads) if heads else value for value, heads in zip(rows, part.heads)]
            state[name] = torch.cat(rows)
    if config.position == "learned":
        state["position.table.weight"] = _take(remaining, POSITION_TABLE)
    elif config.position == "sinusoidal":
        remaining.pop(POSITION_TABLE, None)
    if config.tie_embeddings:
        state["head.weight"] = state["embedding.weight"]
    if remaining:
        raise ValueError(f"it has the tensor {min(remaining)}, and no {architecture} model here has one")
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, and its settings say {tuple(shape)}")
    return state


def _take(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"it has no tensor {name}")
    return tensors.pop(name)


def _drop_zeros(tensors: dict[str, Tensor], names: list[str]) -> None:
    """Remove biases that a model without biases has in GGUF, all zero; others stay, and are refused later."""
    for name in names:
        if name in tensors and not tensors[name].any():
            del tensors[name]


def interleave_halves(rows: Tensor, heads: int) -> Tensor:
    """Reorder the channels of each head: (i, i + E/2) -> (2i, 2i + 1), for `heads` heads of E rows."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def separate_halves(rows: Tensor, heads: int) -> Tensor:
    """Undo `interleave_halves`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)
