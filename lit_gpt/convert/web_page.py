"""A model as one HTML file, which a browser opens without a network: weights, tokenizer and a forward pass.

The folder `page` holds the parts of the file. `page/model.js` is the model, as `lit_gpt/model.py` is here.
"""

import base64
import copy
import functools
import hashlib
import html
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lit_gpt.compat import encoding_pattern
from lit_gpt.convert.javascript_pattern import javascript_pattern
from lit_gpt.convert.page_program import PageProgram
from lit_gpt.convert.parity import (
    NUM_STRINGS,
    Parity,
    compare_encodings,
    compare_greedy,
    compare_logits,
    prompts_of,
    sample_strings,
)
from lit_gpt.convert.target import Target
from lit_gpt.errors import UserError
from lit_gpt.figures import format_count
from lit_gpt.files import atomic_write
from lit_gpt.inference.generate import encode_prompt
from lit_gpt.model import GPT
from lit_gpt.tokenizer import BytePairTokenizer, ByteTokenizer, CharTokenizer, Tokenizer

PageDtype = Literal["bfloat16", "int8", "float32"]

MAX_PARAMETERS = 30_000_000  # a page of 80 MB in bfloat16; a token then takes a tenth of a second
MAX_LOGITS = 2**21  # that are compared for each text
MAX_DIFFERENCE = 1e-4  # between the logits of the page and those of the model with the same rounded weights
PARTS = Path(__file__).parent / "page"
# In the order in which they need each other. The last one starts the page; the others can run without a browser.
SCRIPTS = (
    *("weights", "model", "tokenizer", "utf8", "sampling", "generate"),
    *("words", "token_card", "written_text", "interface"),
)


def write_web_page(model: GPT, tokenizer: Tokenizer, mode: str, path: Path, dtype: PageDtype = "bfloat16") -> None:
    """Write a model into one HTML file.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        mode: The `data.mode` of its training, "rows" or "raw".
        path: The file to write; its name without suffix is the title.
        dtype: The format of the matrices. int8 has a scale for each row. Vectors stay in float32.

    Raises:
        UserError: The model is too large, or JavaScript cannot express how its tokenizer splits texts.
        OSError: The file cannot be written. A previous file at `path` is unchanged.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > MAX_PARAMETERS:
        raise UserError(
            f"the model has {format_count(parameters)} parameters, and a web page takes up to "
            f"{format_count(MAX_PARAMETERS)}: export it as --to gguf {path.stem}.gguf; docs/formats.md says for which "
            "shapes"
        )
    if not isinstance(tokenizer, BytePairTokenizer | ByteTokenizer | CharTokenizer):
        raise UserError(
            f"a web page cannot compute the tokenizer {tokenizer.name} of this model: export it in the format from "
            f"which it was imported, as --to hf {path.stem}-hf"
        )
    parts = page_parts(model, tokenizer, mode, path.stem, dtype)
    atomic_write(path, lambda file: file.writelines(part.encode() for part in parts))


def page_parts(model: GPT, tokenizer: Tokenizer, mode: str, title: str, dtype: PageDtype) -> list[str]:
    """Return the parts of the file, one after another."""
    scripts = {name: (PARTS / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS}
    style = (PARTS / "style.css").read_text(encoding="utf-8")
    template = Template((PARTS / "page.html").read_text(encoding="utf-8"))
    facts = json.dumps(page_facts(model, tokenizer, mode, title, dtype)).replace("<", r"\u003c")
    # Nothing is loaded, nothing is sent, and no other script runs.
    policy = f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src " + " ".join(
        _digest(script) for script in scripts.values()
    )
    page = template.substitute(
        policy=policy,
        title=html.escape(title),
        style=style,
        facts=facts,
        scripts="\n".join(f'<script id="{name}.js">{script}</script>' for name, script in scripts.items()),
        weights="\0",
    )
    before, after = page.split("\0")
    return [before, *_weight_elements(model, dtype), after]


def page_facts(model: GPT, tokenizer: Tokenizer, mode: str, title: str, dtype: PageDtype) -> dict[str, Any]:
    """Return what the page knows besides the weights, as data that JSON can represent.

    `config` has the fields of GPTConfig and what follows from them, so that no default stands in the page.
    """
    config = model.config
    resolved = {
        "kv_heads": config.kv_heads,
        "head_width": config.head_width,
        "norm_eps": getattr(model.norm, "eps", None),
    }
    state, pattern = tokenizer.state(), None
    if isinstance(tokenizer, BytePairTokenizer):
        pattern = javascript_pattern(encoding_pattern(tokenizer.encoding))
        state["pieces"] = [base64.b64encode(token).decode("ascii") for token in tokenizer.tokens]
    return {
        "title": title,
        "mode": mode,
        "dtype": dtype,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "config": {**asdict(config), **resolved},
        "tokenizer": state,
        "pattern": pattern,
    }


def _digest(text: str) -> str:
    """Return the digest of an inline style or script, as a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


# ------------------------------------------------------------------------------------------------------------- weights


def _weight_elements(model: GPT, dtype: PageDtype) -> Iterator[str]:
    """Yield an element of the page for each tensor; a tied head, which is the embedding, has none."""
    for name, tensor in model.named_parameters():
        kind, data = encode_tensor(tensor, dtype)
        text = base64.b64encode(data).decode("ascii")
        yield f'<script type="text/plain" id="{name}" data-dtype="{kind}" data-rows="{len(tensor)}">{text}</script>\n'


def encode_tensor(tensor: Tensor, dtype: PageDtype) -> tuple[PageDtype, bytes]:
    """Return the format of a tensor in the page, and its bytes, little-endian and row after row."""
    values = tensor.detach().cpu().float()
    if values.ndim == 1 or dtype == "float32":
        return "float32", values.numpy().astype("<f4").tobytes()
    if dtype == "bfloat16":
        return "bfloat16", values.bfloat16().view(torch.int16).numpy().astype("<i2").tobytes()
    scales, integers = quantize(values)
    return "int8", scales.numpy().astype("<f4").tobytes() + integers.numpy().astype(np.int8).tobytes()


def quantize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale of each row of a matrix, (rows, 1) float32, and its values in units of it, from -127 to 127."""
    scales = matrix.abs().amax(dim=1, keepdim=True) / 127  # (rows, 1)
    return scales, (matrix / scales.clamp(min=torch.finfo(torch.float32).tiny)).round()


@torch.no_grad()
def rounded(model: GPT, dtype: PageDtype) -> GPT:
    """Return a copy of a model with the weights as a page holds them."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.ndim > 1 and dtype == "bfloat16":
            parameter.copy_(parameter.bfloat16())
        elif parameter.ndim > 1 and dtype == "int8":
            scales, integers = quantize(parameter.float())
            parameter.copy_(scales * integers)
    return model


# ---------------------------------------------------------------------------------------------------------- comparison


def check_web_page(
    model: GPT,
    tokenizer: Tokenizer,
    mode: str,
    path: Path,
    texts: list[str],
    dtype: PageDtype = "bfloat16",
    num_strings: int = NUM_STRINGS,
) -> Parity:
    """Run the program of a page, and compare it with the model whose weights are rounded as in the page.

    Args:
        model: The model that was written.
        tokenizer: Its tokenizer.
        mode: The `data.mode` of its training.
        path: The page.
        texts: Texts for the logits and the beginnings of continuations.
        dtype: That of the page.
        num_strings: How many strings both encode.

    Raises:
        ParityError: They differ.
        UserError: Node.js is not installed.
    """
    model = rounded(model, dtype)
    with PageProgram(path) as program:
        strings = compare_encodings(tokenizer.encode, program.encode, sample_strings(tokenizer, texts, num_strings))
        length = max(8, MAX_LOGITS // tokenizer.vocab_size)
        rows = [encode_prompt(tokenizer, text, mode)[:length] for text in texts]
        difference, tokens = compare_logits(model, rows, program.logits, MAX_DIFFERENCE)
        prompts = prompts_of(tokenizer, texts, mode)
        continuation = functools.partial(program.continuation, raw_bytes=True)
        greedy = compare_greedy(model, prompts, continuation, MAX_DIFFERENCE)
    return Parity(difference, tokens, strings, greedy)


TARGET = Target(write_web_page, check_web_page, get_args(PageDtype), "any browser, without a network", suffix=".html")
