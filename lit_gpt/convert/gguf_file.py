"""Write a model to a GGUF file, which llama.cpp and Ollama run, and read one.

The package `gguf` of llama.cpp writes, reads and quantises. The specification is
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import contextlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lit_gpt.compat import open_gguf
from lit_gpt.convert import origin
from lit_gpt.convert.gguf_config import SLOTS, add_config, gguf_architecture, read_config
from lit_gpt.convert.gguf_tokenizer import add_tokenizer, read_tokens
from lit_gpt.convert.gguf_vocabulary import read_vocabulary
from lit_gpt.convert.gguf_weights import POSITION_TABLE, from_gguf, to_gguf
from lit_gpt.convert.llama_cpp import compare_with_llama_cpp
from lit_gpt.convert.parity import Parity
from lit_gpt.convert.target import Target
from lit_gpt.convert.tokenizer_json import end_name
from lit_gpt.errors import UserError
from lit_gpt.library_tokenizer import LibraryTokenizer
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.tokenizer_base import Tokenizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, ReaderTensor

# How matrices are stored, and how much a log-probability of llama.cpp may differ from ours after the same rounding: it
# rounds what it multiplies the matrices with, too. docs/formats.md says how much SmolLM2-135M differs. In float32, the
# activation of GPT-2 still comes from a table in float16.
TOLERANCES = {"f16": 0.1, "f32": 5e-3, "bf16": 0.5, "q8_0": 1.5}
DAMAGE = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError)  # what it raises
INSTALL = "pip install 'lit-gpt[gguf]'"
BLOCK = 32  # elements of a row that share a scale in Q8_0


def write_gguf(model: GPT, tokenizer: Tokenizer, mode: str, path: Path, dtype: str = "f16") -> None:
    """Write a model with its tokenizer to a GGUF file, and a Modelfile for Ollama beside it.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        mode: The `data.mode` of its training. With "rows", programs begin a text with the end of another one.
        path: The file.
        dtype: One of `TOLERANCES`, of the matrices; norms and biases are always float32. With q8_0, matrices whose rows
            are no multiple of 32 elements are float16.

    Raises:
        UserError: GGUF has no word for a slot of the model or for its tokenizer, or a package is missing.
        OSError: The file cannot be written.
    """
    architecture = gguf_architecture(model.config)
    _check_packages("gguf", "xllamacpp")
    from gguf import GGUFWriter, LlamaFileType

    with contextlib.closing(GGUFWriter(path, architecture)) as writer:
        writer.add_name(path.stem)
        writer.add_file_type(LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
        add_config(writer, model.config)
        add_tokenizer(writer, tokenizer, mode)
        writer.add_string(origin.KEY, json.dumps(origin.describe(model.config, tokenizer, mode), ensure_ascii=False))
        for name, value in to_gguf(model, architecture):
            data, data_type = _quantize(name, value, dtype)
            writer.add_tensor(name, data, raw_dtype=data_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    path.with_suffix(".Modelfile").write_text(_modelfile(path, model, tokenizer), encoding="utf-8")


def check_gguf(model: GPT, tokenizer: Tokenizer, mode: str, path: Path, texts: list[str], dtype: str = "f16") -> Parity:
    """Compare what llama.cpp computes from a file with what the model computes.

    Args:
        model: The model that was written; with another dtype than f32, the weights that are in the file are used.
        tokenizer: Its tokenizer.
        mode: The `data.mode` of its training.
        path: As `write_gguf` wrote it.
        texts: Texts whose beginnings are continued.
        dtype: That of the file.

    Raises:
        ParityError: They differ.
        UserError: A package is missing.
    """
    _check_packages("gguf", "xllamacpp")
    rounded = model if dtype == "f32" else read_gguf(path)[0]
    return compare_with_llama_cpp(path, rounded, tokenizer, mode, texts, TOLERANCES[dtype])


def _check_packages(*packages: str) -> None:
    """Check that packages of the extra `gguf` are installed.

    Raises:
        UserError: One is missing.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(f"a GGUF file needs the package {missing[0]}, which is not installed: {INSTALL}")


def _quantize(name: str, value: Tensor, dtype: str) -> tuple[np.ndarray, "GGMLQuantizationType"]:
    """Return the values of a tensor in the format of the file, and the name of that format.

    Raises:
        UserError: A value is too large for float16.
    """
    from gguf import GGMLQuantizationType, quantize

    if value.ndim == 1 or name == POSITION_TABLE:  # llama.cpp adds these to float32 values
        dtype = "f32"
    elif dtype == "q8_0" and value.shape[-1] % BLOCK:
        dtype = "f16"
    if dtype == "f16" and value.abs().max() > torch.finfo(torch.float16).max:
        raise UserError(f"{name} has a value of {value.abs().max():.3g}, too large for f16: export with --dtype bf16")
    data_type = GGMLQuantizationType[dtype.upper()]
    return quantize(value.contiguous().numpy(), data_type), data_type


def read_gguf(path: Path) -> tuple[GPT, Tokenizer, str]:
    """Build the model of a GGUF file. Quantised weights become float32.

    Returns:
        The model in evaluation mode, on the CPU; its tokenizer; and its mode: "rows" if a text begins with a token
        that the tokenizer adds, else "raw".

    Raises:
        UserError: The file is damaged, or no model or tokenizer here has something that the file has.
    """
    _check_packages("gguf")
    try:
        reader = open_gguf(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        shapes = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors}
        config, tokenizer, mode = _describe(metadata, shapes)
        _check_size(config, shapes)
        if tokenizer.vocab_size != config.vocab_size:
            raise ValueError(f"its tokenizer has {tokenizer.vocab_size} ids, its model {config.vocab_size}")
        tensors = {tensor.name: _dequantize(tensor) for tensor in reader.tensors}
        with torch.device("meta"):
            model = GPT(config)
        model.load_state_dict(from_gguf(tensors, config, metadata["general.architecture"]), assign=True)
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ValueError("its weights are not finite")
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror or error}): give a GGUF file") from None
    except DAMAGE as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read ({reason}): give a GGUF file of one of {', '.join(SLOTS)}") from None
    model.tie_and_init_buffers()
    return model.eval(), tokenizer, mode


def _describe(metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> tuple[GPTConfig, Tokenizer, str]:
    """Return the shape, the tokenizer and the mode of the model in a file, from its metadata.

    Raises:
        ValueError: No model or tokenizer of this project is like that.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in SLOTS:
        raise ValueError(f"its architecture is {architecture!r}")
    config = read_config(metadata, shapes)
    own = _origin(metadata, config)
    if own is None:
        return config, *read_vocabulary(metadata)
    config = GPTConfig(**own["config"])
    if own["tokenizer"]["name"] == LibraryTokenizer.name:
        return config, *read_vocabulary(metadata)
    return config, origin.restore_tokenizer(own["tokenizer"], read_tokens(metadata)), own["mode"]


def _origin(metadata: Mapping[str, Any], config: GPTConfig) -> dict[str, Any] | None:
    """Return what our export says of the model; None if it does not, or if the file was changed afterwards.

    Raises:
        ValueError: What it says is no description of a model.
    """
    own: dict[str, Any] = json.loads(metadata.get(origin.KEY, "{}"))
    if not own or own["mode"] not in ("rows", "raw"):
        return None
    ours = GPTConfig(**own["config"])
    if ours.mlp == "gelu":  # llama.cpp has only gelu_tanh
        config = replace(config, mlp="gelu" if config.mlp == "gelu_tanh" else config.mlp)
    return own if origin.is_unchanged(ours, config) else None


def _check_size(config: GPTConfig, shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that a model takes no more memory than its weights explain.

    Raises:
        ValueError: It has more blocks than the file has tensors, or its tables of positions are much larger.
    """
    elements = sum(math.prod(shape) for shape in shapes.values())
    if config.num_blocks > len(shapes) or config.context_length * config.d_model > 2**24 + 16 * elements:
        raise ValueError(
            f"it names {config.num_blocks} blocks and a context of {config.context_length}, and has {elements} weights"
        )


def _dequantize(tensor: "ReaderTensor") -> Tensor:
    """Return the values of a tensor in float32.

    Raises:
        ValueError: The package cannot read its format.
    """
    from gguf import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise ValueError(f"its tensor {tensor.name} has the format {tensor.tensor_type.name}") from None
    return torch.from_numpy(np.array(values, dtype=np.float32))  # a copy, because the file is mapped into memory


def _modelfile(path: Path, model: GPT, tokenizer: Tokenizer) -> str:
    """Return the text of the Modelfile, which tells Ollama what it would otherwise guess: the template and the end."""
    name = shlex.quote(path.stem)
    return f"""# ollama create {name} -f {name}.Modelfile
FROM ./{path.name}
TEMPLATE {{{{ .Prompt }}}}
PARAMETER stop {end_name(tokenizer)}
PARAMETER num_ctx {model.config.context_length}
"""


TARGET = Target(
    write_gguf,
    check_gguf,
    tuple(TOLERANCES),
    "llama.cpp, and Ollama by the Modelfile beside it",
    suffix=".gguf",
    suffixes_beside=(".Modelfile",),
)
