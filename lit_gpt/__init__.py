"""Train a GPT on your own table of text. Names load when first used, so that `import lit_gpt` is instant."""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "GPT": "model",
    "GPTConfig": "model",
    "KVCache": "kv_cache",
    "LitGPT": "training.module",
    "TextDataModule": "data.datamodule",
    "Tokenizer": "tokenizer",
    "UserError": "errors",
    "generate": "inference.generate",
    "generate_texts": "inference.texts",
    "load_model": "convert.load",
    "prepare_for_inference": "inference.generate",
    "stream_text": "inference.generate",
    "utf8_constraint": "inference.utf8",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
