"""What an exported file says about the model it comes from, so that an import gives the same model.

Other programs have no names for some of our settings: dropout, a sinusoidal table, which tokenizer it was. An exported
file states them beside what the other program reads. Whoever reads the file checks that they still fit.
"""

import base64
import math
from dataclasses import asdict
from typing import Any

from lit_gpt.model import GPTConfig
from lit_gpt.tokenizer import Tokenizer, from_state

KEY = "lit_gpt"  # in config.json, and in the metadata of a GGUF file


def describe(config: GPTConfig, tokenizer: Tokenizer, mode: str) -> dict[str, Any]:
    """Return the shape, the mode and the tokenizer without its tokens, as data that JSON can represent."""
    state = {name: value for name, value in tokenizer.state().items() if name not in ("characters", "json")}
    if state.get("pieces") is not None:
        state["pieces"] = []
    return {"config": asdict(config), "mode": mode, "tokenizer": state}


def is_unchanged(ours: GPTConfig, theirs: GPTConfig) -> bool:
    """Return whether a file still describes the shape that was exported, as far as other programs have names for it.

    Args:
        ours: The shape in the description.
        theirs: The shape that the rest of the file describes.
    """
    sizes = ("vocab_size", "context_length", "d_model", "num_blocks", "num_heads", "kv_heads", "head_width")
    parts = ("hidden_width", "mlp", "qk_norm", "tie_embeddings", "norm")
    default_eps = 1e-5 if ours.norm == "layernorm" else 1e-6
    numbers = [(ours.norm_eps or default_eps, theirs.norm_eps or default_eps)]
    if ours.position == "rope":
        numbers.append((ours.rope_base, theirs.rope_base))
    return all(getattr(ours, name) == getattr(theirs, name) for name in (*sizes, *parts)) and all(
        math.isclose(one, other, rel_tol=1e-6) for one, other in numbers
    )


def restore_tokenizer(state: dict[str, Any], tokens: list[bytes]) -> Tokenizer:
    """Return the tokenizer of a description.

    Args:
        state: `describe(...)["tokenizer"]`.
        tokens: The bytes of the ids that are parts of a text, in the order of their ids.

    Raises:
        ValueError: No tokenizer has this state and these tokens.
        UserError: Its vocabulary is not installed.
    """
    state = dict(state)
    if state.get("name") == "char":
        state["characters"] = b"".join(tokens).decode("utf-8")
    elif state.get("pieces") is not None:
        state["pieces"] = [base64.b64encode(token).decode("ascii") for token in tokens]
    tokenizer = from_state(state)
    if any(tokenizer.token_bytes(token) != content for token, content in enumerate(tokens)):
        raise ValueError("its tokens are not those of the tokenizer it names")
    return tokenizer
