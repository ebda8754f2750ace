"""Read a model from a folder of Hugging Face: GPT-2, Llama, Qwen 2, Qwen 3, Arcee, Starcoder 2, SmolLM."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.checkpoint.store import shape_of
from lit_gpt.convert import origin
from lit_gpt.convert.architectures import ARCHITECTURES, Architecture
from lit_gpt.convert.hugging_face_names import from_hugging_face
from lit_gpt.convert.tokenizer_json import from_tokenizer_json
from lit_gpt.errors import UserError
from lit_gpt.layers import Sinusoidal
from lit_gpt.library_tokenizer import LibraryTokenizer
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.tokenizer_base import Tokenizer

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
# Tables that some files hold beside the weights, and that follow from the shape
COMPUTED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
DAMAGE = (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, RuntimeError)  # of odd values
# What a config may switch on and this model lacks: its key -> the value that switches it off
SWITCHES: dict[str, Any] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "no_rope_layers": None,
    "logit_scale": None,
}


def read_hugging_face(path: Path) -> tuple[GPT, Tokenizer, str]:
    """Read a model.

    Args:
        path: A folder with config.json, tokenizer.json and .safetensors, or a .safetensors in such a folder.

    Returns:
        The model in evaluation mode, on the CPU, with float32 weights; its tokenizer; and "rows" if its texts begin
        with an id of their own, else "raw".

    Raises:
        UserError: A file is missing or damaged, or the model has a part that ours lacks; the message names it.
    """
    folder = path if path.is_dir() else path.parent
    description = read_json(folder / "config.json")
    architecture = _architecture(description, folder)
    weights = _read_weights(path, folder)
    config = gpt_config(description, architecture, weights, folder)
    saved = _origin(description, config, weights)
    model = None if saved is None else _fill_as_exported(GPTConfig(**saved["config"]), weights, architecture, folder)
    if model is None:
        saved, (model, left) = None, _fill(config, weights, architecture, folder)
        if left:
            raise UserError(f"{folder} has the weight {left[0]}, which no part of lit_gpt's model takes: not supported")
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(f"{folder} has weights that are not finite: copy it again from where it came")
    tokenizer, mode = read_tokenizer(folder, config.vocab_size, description, saved)
    return model.eval(), tokenizer, mode


def _fill(
    config: GPTConfig, weights: Mapping[str, Tensor], architecture: Architecture, folder: Path
) -> tuple[GPT, list[str]]:
    """Return a model with the weights of a folder, and the names of weights that have no place in it.

    Raises:
        UserError: A weight is missing, or has another shape.
    """
    with torch.device("meta"):
        model = GPT(config)
    try:
        found, left = from_hugging_face(weights, model, architecture)
    except KeyError as error:
        raise UserError(f"{folder} lacks the weight {error.args[0]}: copy it again from where it came") from None
    except ValueError as error:
        raise UserError(f"{folder}: the weight {error} has another shape than config.json says") from None
    model.load_state_dict(found, assign=True)
    model.tie_and_init_buffers()
    return model, [name for name in left if not name.endswith(COMPUTED)]


def _fill_as_exported(
    config: GPTConfig, weights: Mapping[str, Tensor], architecture: Architecture, folder: Path
) -> GPT | None:
    """Return the model that was exported; None if another program has trained weights that it does not have.

    An export adds biases of zero, and writes the table of sinusoidal positions as weights.
    """
    model, left = _fill(config, weights, architecture, folder)
    for name in left:
        if name == "transformer.wpe.weight" and isinstance(model.position, Sinusoidal):
            if not torch.equal(weights[name].float(), model.position.table.to(weights[name].dtype).float()):
                return None
        elif not name.endswith(".bias") or weights[name].any():
            return None
    return model


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Raises:
        UserError: There is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give a folder of Hugging Face, with its {path.name}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: copy it again from where it came")
    return content


# ------------------------------------------------------------------------------------------------------------- shape


def _architecture(description: dict[str, Any], folder: Path) -> Architecture:
    name = description.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{folder}: model_type {name!r} is not supported: give a model of one of these: {known}")
    if description.get("auto_map"):
        raise UserError(f"{folder} needs code of its own (auto_map), which is never run: not supported")
    return ARCHITECTURES[name]


def gpt_config(
    description: dict[str, Any], architecture: Architecture, weights: Mapping[str, Tensor], folder: Path
) -> GPTConfig:
    """Return the shape that a config.json describes.

    Args:
        description: Its content.
        architecture: That of its model_type.
        weights: Those of the folder.
        folder: For messages.

    Raises:
        UserError: It names a part that the model lacks, or an impossible value.
    """
    for key, off in SWITCHES.items():
        if description.get(key, off) not in (off, None):
            raise UserError(f"{folder}: {key} is {description[key]!r} in config.json, which is not supported")
    try:
        shape = _gpt2_shape if architecture.name == "gpt2" else _shape
        return shape_of(shape(description, architecture, folder), weights)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{folder}: config.json lacks {error}: copy it again from where it came") from None
    except DAMAGE as error:
        raise UserError(f"{folder}: config.json describes no model ({error})") from None


def _gpt2_shape(description: dict[str, Any], architecture: Architecture, folder: Path) -> dict[str, Any]:
    return {
        "vocab_size": description["vocab_size"],
        "context_length": description["n_positions"],
        "d_model": description["n_embd"],
        "num_blocks": description["n_layer"],
        "num_heads": description["n_head"],
        "hidden_size": description.get("n_inner"),
        "bias": True,
        "position": "learned",
        "norm": "layernorm",
        "norm_eps": float(description.get("layer_norm_epsilon", 1e-5)),
        "mlp": _activation(description, "activation_function", "gelu_new", folder),
        "qk_norm": False,
        "tie_embeddings": description.get("tie_word_embeddings", True),
    }


def _shape(description: dict[str, Any], architecture: Architecture, folder: Path) -> dict[str, Any]:
    _check_windows(description, folder)
    heads, name = description["num_attention_heads"], architecture.name
    width = description.get("head_dim")
    shape = {
        "vocab_size": description["vocab_size"],
        "context_length": description["max_position_embeddings"],
        "d_model": description["hidden_size"],
        "num_blocks": description["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": description.get("num_key_value_heads", heads),
        "head_size": width or (128 if name == "qwen3" else None),
        "hidden_size": description["intermediate_size"],
        "position": "rope",
        "rope_base": _rope_base(description, folder),
        "qk_norm": name == "qwen3",
        "tie_embeddings": description.get("tie_word_embeddings", name == "starcoder2"),
    }
    if name == "starcoder2":
        bias = description.get("use_bias", True)
        norm = {"norm": "layernorm", "norm_eps": float(description.get("norm_epsilon", 1e-5)), "bias": True}
        mlp = _activation(description, "hidden_act", "gelu_pytorch_tanh", folder)
        return {**shape, **norm, "qkv_bias": bias, "project_bias": bias, "mlp_bias": bias, "mlp": mlp}
    activation = description.get("hidden_act", "relu2" if name == "arcee" else "silu")
    if activation != ("relu2" if name == "arcee" else "silu"):
        raise UserError(f"{folder}: hidden_act is {activation!r} in config.json, which is not supported for {name}")
    attention_bias = description.get("attention_bias", False)
    return {
        **shape,
        "norm": "rmsnorm",
        "norm_eps": float(description.get("rms_norm_eps", 1e-6)),
        "mlp": "relu2" if name == "arcee" else "swiglu",
        "qkv_bias": True if name == "qwen2" else attention_bias,
        "project_bias": False if name == "qwen2" else attention_bias,
        "mlp_bias": description.get("mlp_bias", False),
    }


def _activation(description: dict[str, Any], key: str, default: str, folder: Path) -> str:
    name = description.get(key) or default
    if name not in ACTIVATIONS:
        raise UserError(f"{folder}: {key} is {name!r} in config.json, which is not supported")
    return ACTIVATIONS[name]


def _rope_base(description: dict[str, Any], folder: Path) -> float:
    """Return the base of the angles.

    Raises:
        UserError: They are scaled.
    """
    parameters = description.get("rope_parameters") or description.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise UserError(f"{folder}: rope_type is {kind!r} in config.json, and scaled angles are not supported")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{folder}: partial_rotary_factor in config.json is not supported")
    return float(parameters.get("rope_theta", description.get("rope_theta", 10_000.0)))


def _check_windows(description: dict[str, Any], folder: Path) -> None:
    """Check that every layer attends to all earlier tokens.

    Raises:
        UserError: Some attend to a window only.
    """
    window, length = description.get("sliding_window"), description["max_position_embeddings"]
    if description.get("use_sliding_window", True) and window is not None and window < length:
        raise UserError(f"{folder}: sliding_window is {window} in config.json, which is not supported")
    kinds = description.get("layer_types") or []
    if any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{folder}: layer_types is {kinds!r:.80} in config.json, which is not supported")


def _origin(description: dict[str, Any], config: GPTConfig, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return what our export says of the model; None if it does not, or if the file was changed afterwards."""
    saved: Any = description.get(origin.KEY)
    try:
        ours = shape_of(saved["config"], weights)
    except (TypeError, ValueError, LookupError):
        return None
    is_known = saved.get("mode") in ("rows", "raw") and isinstance(saved.get("tokenizer"), dict)
    return saved if is_known and origin.is_unchanged(ours, config) else None


# ----------------------------------------------------------------------------------------------------------- weights


def _read_weights(path: Path, folder: Path) -> Mapping[str, Tensor]:
    """Return the weights of a folder or of one file.

    Raises:
        UserError: There are none, or they cannot be read.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{folder} needs the package safetensors: pip install 'lit-gpt[hf]'") from None
    index = folder / "model.safetensors.index.json"
    if path.is_file():
        files = [path]
    elif index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise UserError(f"{index} is damaged: copy it again from where it came")
        files = [folder / name for name in sorted(set(map(str, names.values())))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        other = next(iter(sorted(folder.glob("*.bin"))), None)
        hint = "give a folder with .safetensors" if other is None else f"{other.name} may run code: give .safetensors"
        raise UserError(f"{folder} has no weights as .safetensors: {hint}")
    weights: dict[str, Tensor] = {}
    for file in files:
        if file.resolve().parent != folder.resolve() and not file.is_symlink():
            raise UserError(f"{index} names a file in another folder: copy it again from where it came")
        try:
            weights |= load_file(file)
            for name, value in weights.items():
                if not (value.is_floating_point() and value.element_size() > 1) and not name.endswith(COMPUTED):
                    raise UserError(f"{file} has quantised weights ({name} in {value.dtype}), which are not supported")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read ({str(error)[:100]}): copy it again from where it came") from None
    return weights


# --------------------------------------------------------------------------------------------------------- tokenizer


def read_tokenizer(
    folder: Path, vocab_size: int, description: dict[str, Any], saved: dict[str, Any] | None
) -> tuple[Tokenizer, str]:
    """Return the tokenizer of a folder and the mode of its texts.

    Args:
        folder: The folder.
        vocab_size: V of the model.
        description: Its config.json.
        saved: What our export says, see `origin`; None: it is another program's.

    Raises:
        UserError: There is no tokenizer.json, or it is of no kind that is supported.
    """
    path = folder / "tokenizer.json"
    state: dict[str, Any] = {} if saved is None else saved["tokenizer"]
    begin, end = _special_ids(folder, description)
    if saved is not None and "size" in state:  # it was an imported one already
        begin, end = state.get("begin", begin), state.get("end", end)
    elif saved is not None:
        begin = end = state.get("end_of_text", vocab_size - 1)
    if not isinstance(end, int):
        raise UserError(f"{folder} names no end of text (eos_token) in tokenizer_config.json or config.json")
    begin = begin if isinstance(begin, int) else end
    tokenizer = from_tokenizer_json(path, saved and state, begin, end, vocab_size)
    if saved is not None:
        return tokenizer, saved["mode"]
    begins = isinstance(tokenizer, LibraryTokenizer) and tokenizer.library.encode("").ids[:1] == [begin]
    return tokenizer, "rows" if begins else "raw"


def _special_ids(folder: Path, description: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return the ids before and after a text, as far as the files name them."""
    ends = {**description, **_generation_ends(folder)}
    names = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    try:
        tokens = {token["content"]: token["id"] for token in read_json(folder / "tokenizer.json")["added_tokens"]}
        begin = _token_id(names.get("bos_token"), tokens, ends.get("bos_token_id"))
        end = _token_id(names.get("eos_token"), tokens, ends.get("eos_token_id"))
    except (LookupError, TypeError):
        raise UserError(f"{folder / 'tokenizer.json'} is damaged: copy it again from where it came") from None
    return begin, end


def _generation_ends(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    content = read_json(path) if path.exists() else {}
    return {key: content[key] for key in ("bos_token_id", "eos_token_id") if content.get(key) is not None}


def _token_id(name: Any, tokens: dict[str, int], given: Any) -> int | None:
    """Return the id of a special token: by its name in the tokenizer's config, or else as config.json gives it."""
    content = name.get("content") if isinstance(name, dict) else name
    if content in tokens:
        return tokens[content]
    first = given[0] if isinstance(given, list) and given else given
    return first if isinstance(first, int) else None
