"""The settings that follow from `--model.init_from`: the shape of the model and its tokenizer."""

import functools
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lit_gpt.convert.load import load_model
from lit_gpt.errors import UserError
from lit_gpt.files import atomic_write, write_error
from lit_gpt.model import GPTConfig
from lit_gpt.training.init_from import check_shape

TOKENIZERS = Path("data/tokenizers")  # where the tokenizers of such models are written


def open_start(path: str) -> tuple[GPTConfig, Path]:
    """Return the shape of a model, and the file with its tokenizer, which is written here.

    Raises:
        UserError: There is no such model, or the file cannot be written.
    """
    return _open(path, Path.cwd())


@functools.cache
def _open(path: str, cwd: Path) -> tuple[GPTConfig, Path]:
    """Do the work of `open_start` once for each path; a relative path means another file in another folder `cwd`."""
    model, tokenizer, _ = load_model(os.path.expanduser(path))
    content = json.dumps(tokenizer.state(), ensure_ascii=False).encode("utf-8")
    place = Path(path).absolute()
    name = place.stem
    if place.suffix in (".safetensors", ".ckpt"):
        name = place.parts[-3] if place.parent.name.startswith("version_") else place.parent.name
    file = TOKENIZERS / f"{name}-{hashlib.sha256(content).hexdigest()[:8]}.json"
    try:
        if not file.exists():
            atomic_write(file, lambda opened: opened.write(content))
    except OSError as error:
        raise write_error(file, error, "run in a folder of your own") from error
    return model.config, file


def start_settings(path: str) -> dict[str, Any]:
    """Return the settings that a model gives, as nested as in a config. Flags win over them.

    Raises:
        UserError: See `open_start`.
    """
    config, tokenizer = open_start(path)
    left_out = ("vocab_size", "dropout")
    shape = {key: value for key, value in asdict(config).items() if key not in left_out}
    return {"model": {"config": shape}, "data": {"tokenizer": str(tokenizer), "vocab": "full"}}


def check_start(settings: Namespace) -> None:
    """Check that the settings leave the model as it is in the file of `--model.init_from`.

    Raises:
        UserError: They do not.
    """
    path = settings.model.init_from
    found, tokenizer = open_start(path)
    if settings.data.tokenizer != str(tokenizer):
        raise UserError(
            f"--data.tokenizer {settings.data.tokenizer}: the model of --model.init_from has its own tokenizer: leave "
            "the setting out"
        )
    if settings.data.vocab != "full":
        raise UserError(
            f"--data.vocab {settings.data.vocab}: the model of --model.init_from has its own vocabulary: leave the "
            "setting out"
        )
    shape = {**settings.model.config.as_dict(), "vocab_size": found.vocab_size}
    check_shape(path, found, GPTConfig(**shape))
