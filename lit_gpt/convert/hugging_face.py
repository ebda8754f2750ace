"""Write a model as a folder of Hugging Face: config, weights, tokenizer, generation config, model card."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.convert import origin
from lit_gpt.convert.architectures import Architecture, architecture_of, biases_of
from lit_gpt.convert.hugging_face_names import to_hugging_face
from lit_gpt.convert.parity import (
    NUM_STRINGS,
    Parity,
    compare_encodings,
    compare_greedy,
    compare_logits,
    prompts_of,
    rounded,
    sample_strings,
)
from lit_gpt.convert.target import Target
from lit_gpt.convert.tokenizer_json import end_name, to_tokenizer_json
from lit_gpt.errors import UserError
from lit_gpt.inference.generate import encode_prompt
from lit_gpt.library_tokenizer import LibraryTokenizer
from lit_gpt.model import GPT
from lit_gpt.tokenizer_base import Tokenizer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = 1e-4  # of logits, in float32

ACTIVATIONS = {"swiglu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A GPT of {parameters:,} parameters (blocks: {blocks}, width: {width}, context: {context}), written by lit_gpt as
`{class_name}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

{texts}

The training text and its licence are not stated here: add them before you publish the model.
"""


# ------------------------------------------------------------------------------------------------------------ writing


def write_hugging_face(model: GPT, tokenizer: Tokenizer, mode: str, folder: Path, dtype: str = "float32") -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` open, without code of ours.

    Args:
        model: In evaluation mode, on the CPU.
        tokenizer: Its tokenizer.
        mode: The `data.mode` of its training.
        folder: Is created.
        dtype: Of the weights, one of `DTYPES`.

    Raises:
        UserError: No architecture expresses the model, or a package is missing.
        OSError: The folder cannot be written.
    """
    architecture = architecture_of(model.config)
    try:
        import tokenizers  # noqa: F401  (to_tokenizer_json needs it)
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("--to hf needs safetensors, tokenizers and transformers: pip install 'lit-gpt[hf]'") from None
    weights = to_hugging_face(model, architecture)
    tensors = {name: value.to(DTYPES[dtype]).contiguous() for name, value in weights.items()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise UserError(f"{name} has a value too large for {dtype}: export with --dtype bfloat16")
    folder.mkdir(parents=True)
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    config = folder / "config.json"
    _write_json(config, hugging_face_config(model, tokenizer, mode, architecture, dtype))
    shutil.copymode(config, folder / "model.safetensors")  # safetensors lets nobody else read it
    _write_json(folder / "generation_config.json", _generation_config(tokenizer, mode))
    (folder / "tokenizer.json").write_text(to_tokenizer_json(tokenizer, mode), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(model, tokenizer))
    (folder / "README.md").write_text(_card(model, tokenizer, architecture, mode, folder.name), encoding="utf-8")


def hugging_face_config(
    model: GPT, tokenizer: Tokenizer, mode: str, architecture: Architecture, dtype: str = "float32"
) -> dict[str, Any]:
    """Return config.json. No default of transformers is relied on: they belong to one model each."""
    config = model.config
    shared = {
        "architectures": [architecture.class_name],
        "model_type": architecture.name,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,  # the same for transformers 4
        "use_cache": True,
        **_special_ids(tokenizer, mode),
        origin.KEY: origin.describe(config, tokenizer, mode),
    }
    if architecture.name == "gpt2":
        return {**shared, **_gpt2_shape(model)}
    return {**shared, **_shape(model, architecture)}


def _gpt2_shape(model: GPT) -> dict[str, Any]:
    config = model.config
    return {
        "n_positions": config.context_length,
        "n_ctx": config.context_length,  # what llama.cpp reads
        "n_embd": config.d_model,
        "n_layer": config.num_blocks,
        "n_head": config.num_heads,
        "n_inner": config.hidden_width,
        "activation_function": "gelu_new" if config.mlp == "gelu_tanh" else ACTIVATIONS[config.mlp],
        "layer_norm_epsilon": model.norm.eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }


def _shape(model: GPT, architecture: Architecture) -> dict[str, Any]:
    config, biases = model.config, biases_of(model.config)
    shape: dict[str, Any] = {
        "hidden_size": config.d_model,
        "intermediate_size": config.hidden_width,
        "num_hidden_layers": config.num_blocks,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.context_length,
        "hidden_act": ACTIVATIONS[config.mlp],
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,  # the same for transformers 4
        "rope_scaling": None,
        "attention_dropout": config.dropout,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    if architecture.name == "starcoder2":
        shape |= {"norm_epsilon": model.norm.eps, "use_bias": "mlp" in biases}
        return shape | {"residual_dropout": config.dropout, "embedding_dropout": config.dropout}
    shape |= {"attention_bias": "qkv" in biases, "mlp_bias": "mlp" in biases}
    return shape | {"rms_norm_eps": model.norm.eps}


def _special_ids(tokenizer: Tokenizer, mode: str) -> dict[str, int | None]:
    """Return the ids before and after a text. In raw mode a text has neither."""
    begin = tokenizer.begin_of_text if mode == "rows" else None
    end = tokenizer.end_of_text if mode == "rows" or isinstance(tokenizer, LibraryTokenizer) else None
    return {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": tokenizer.end_of_text}


def _generation_config(tokenizer: Tokenizer, mode: str) -> dict[str, Any]:
    return {**_special_ids(tokenizer, mode), "do_sample": True, "temperature": 0.8}


def _tokenizer_config(model: GPT, tokenizer: Tokenizer) -> dict[str, Any]:
    if isinstance(tokenizer, LibraryTokenizer):
        names = [tokenizer.library.id_to_token(token) for token in (tokenizer.begin, tokenizer.end_of_text)]
    else:
        names = [end_name(tokenizer)] * 2
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[0],
        "eos_token": names[1],
        "pad_token": names[1],
        "padding_side": "left",  # texts go on at the right
        "model_max_length": model.config.context_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # their names in a text are text
    }


def _card(model: GPT, tokenizer: Tokenizer, architecture: Architecture, mode: str, name: str) -> str:
    config, rows, end = model.config, mode == "rows", end_name(tokenizer)
    if isinstance(tokenizer, LibraryTokenizer):
        texts = f"A text ends with `{end}`."
    elif rows:
        texts = f"The tokenizer puts `{end}` before a text, and the model writes it after one."
    else:
        texts = "The model was trained on one long text: it writes on without an end."
    return CARD.format(
        name=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        blocks=config.num_blocks,
        width=config.d_model,
        context=config.context_length,
        class_name=architecture.class_name,
        prompt="" if rows else "\\n",
        texts=f"{texts} The characters `{end}` in a prompt are text.",
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- parity


@torch.no_grad()
def check_hugging_face(
    model: GPT,
    tokenizer: Tokenizer,
    mode: str,
    folder: Path,
    texts: list[str],
    dtype: str = "float32",
    num_strings: int = NUM_STRINGS,
) -> Parity:
    """Compare what transformers computes from a folder with what our model computes.

    Args:
        model: The model that was written; with another dtype, its weights are rounded to that one meanwhile.
        tokenizer: Its tokenizer.
        mode: The `data.mode` of its training.
        folder: As `write_hugging_face` wrote it.
        texts: Texts for the logits and the beginnings of continuations.
        dtype: That of the file.
        num_strings: How many strings both encode.

    Raises:
        ParityError: They differ.
        UserError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise UserError("--to hf needs transformers, which proves the result: pip install 'lit-gpt[hf]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = rounded(model, DTYPES[dtype])

    def continuation(prompt: list[int], count: int) -> list[int]:
        tokens = torch.tensor([prompt])
        length = {"max_new_tokens": count, "min_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
        greedy = {"do_sample": False, "temperature": None, "attention_mask": torch.ones_like(tokens)}
        row: list[int] = theirs.generate(tokens, **length, **greedy)[0, len(prompt) :].tolist()
        return row

    def encode(text: str) -> list[int]:
        ids: list[int] = their_tokenizer.encode(text, add_special_tokens=False)
        return ids

    def logits(row: list[int]) -> Tensor:
        found: Tensor = theirs(torch.tensor([row])).logits[0].float()  # (T, V)
        return found

    strings = compare_encodings(tokenizer.encode, encode, sample_strings(tokenizer, texts, num_strings))
    compare_encodings(lambda text: encode_prompt(tokenizer, text, mode), their_tokenizer.encode, texts)
    rows = [encode_prompt(tokenizer, text, mode) for text in texts]
    difference, tokens = compare_logits(ours, rows, logits, TOLERANCE)
    greedy = compare_greedy(ours, prompts_of(tokenizer, texts, mode), continuation, TOLERANCE)
    return Parity(difference, tokens, strings, greedy)


TARGET = Target(write_hugging_face, check_hugging_face, tuple(DTYPES), "transformers: AutoModelForCausalLM")
