"""Checkpoint files: written whole or not at all, opened without running anything in them."""

import contextlib
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.tokenizer import Tokenizer, from_state


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Makes the file `path` appear whole or not at all: written beside it, synced, renamed, the folder synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def copy_whole(source: Path, target: Path) -> None:
    """Copies a file by `write_whole`."""
    with open(source, "rb") as file:
        write_whole(target, lambda out: shutil.copyfileobj(file, out, 2**24))


def open_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU; nothing in the file is executed.

    Args:
        path: of the file.
        mmap: read tensors from the disk when they are used, to look at the rest quickly.

    Raises:
        UserError: there is no such file, or it is not a checkpoint of this project.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file; they lie in logs/<name>/version_<n>/, as last.ckpt")
    if not zipfile.is_zipfile(path):  # torch.save writes nothing else
        raise UserError(f"{path} cannot be opened (damaged, or no checkpoint): give a .ckpt file this project wrote")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        why = "it holds code" if "GLOBAL" in str(error) else "damaged"
        raise UserError(f"{path} cannot be opened ({why}): give a .ckpt file this project wrote") from None
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters", "tokenizer"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of lit_gpt: give a .ckpt file this project wrote")
    return checkpoint


def newest_checkpoint(logs: Path, name: str | None = None) -> Path | None:
    """The last written checkpoint that opens, of runs called `name` or of any; None where there is none."""
    files = Path(logs, name).glob("version_*/*.ckpt") if name else logs.glob("*/version_*/*.ckpt")
    for path in sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name == "last.ckpt"), reverse=True):
        try:
            open_checkpoint(path, mmap=True)
        except UserError as error:
            print(f"passed over: {error}", file=sys.stderr)
        else:
            return path
    return None


def load_model(path: Path | str) -> tuple[GPT, Tokenizer, bool]:
    """From a checkpoint alone: the model in evaluation mode, its tokenizer, and whether it was trained on rows."""
    checkpoint = open_checkpoint(Path(path))
    model = GPT(GPTConfig(**checkpoint["hyper_parameters"]["config"]))
    weights = {name.removeprefix("gpt."): value for name, value in checkpoint["state_dict"].items()}
    model.load_state_dict(weights)
    return model.eval(), from_state(checkpoint["tokenizer"]), checkpoint["data"]["mode"] == "rows"
