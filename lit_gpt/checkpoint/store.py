"""Checkpoints: written whole or not at all, opened without running anything in them.

One is a file; or, of a model whose weights are spread over devices, a folder of torch.distributed.checkpoint's, into
which each of them wrote its slices, and beside these everything that is no tensor.
"""

import contextlib
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from lit_gpt.errors import UserError
from lit_gpt.files import BACKUP_SUFFIX, atomic_replace, atomic_write, temporary_path, write_error
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.tokenizer import Tokenizer, from_state

NON_TENSOR_FILE = "rest.pt"  # in the folder of a sharded checkpoint, everything that is not a tensor


def _restore_backups(folder: Path) -> None:
    """Undo the first half of an `atomic_replace` whose process was killed before the second half."""
    for backup in folder.glob(f".*.ckpt{BACKUP_SUFFIX}"):
        path = backup.with_name(backup.name.removeprefix(".").removesuffix(BACKUP_SUFFIX))
        if not path.exists():
            backup.rename(path)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left half-written or half-removed; no process may be writing to the folder."""
    with contextlib.suppress(OSError):  # what cannot be removed does no harm
        _restore_backups(folder)
        for path in folder.glob(".*.ckpt.*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint file atomically.

    Raises:
        UserError: The file cannot be written. A previous file at `path` is unchanged.
    """
    try:
        atomic_write(path, lambda file: torch.save(checkpoint, file))
    except OSError as error:
        raise write_error(path, error) from error


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a checkpoint atomically, a file or the folder of a sharded one.

    Raises:
        UserError: `source` cannot be read, or `target` cannot be written. What was at `target` before is unchanged.
    """
    copy = temporary_path(target)
    try:
        if source.is_dir():
            shutil.rmtree(copy, ignore_errors=True)
            for path in source.iterdir():
                _copy_file(path, copy / path.name)
            atomic_replace(copy, target)
        else:
            _copy_file(source, target)
    except OSError as error:
        shutil.rmtree(copy, ignore_errors=True)
        raise write_error(target, error) from error


def _copy_file(source: Path, target: Path) -> None:
    try:
        file = open(source, "rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}), so {target.name} was not written") from error
    with file:
        atomic_write(target, lambda out: shutil.copyfileobj(file, out, 2**24))


# what every checkpoint of ours holds
CONTENTS = {
    "state_dict": dict,
    "hyper_parameters": dict,
    "tokenizer": dict,
    "data": dict,
    "global_step": int,
    "saved_at": float,
}


def open_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU; nothing in it is executed.

    Args:
        path: of the file, or folder.
        mmap: to look at small things quickly: tensors are read from the disk when they are used (those in a folder are
            not read at all), and the checksums that every part of a file carries are not compared with it.

    Raises:
        UserError: there is no such file, it is damaged, or it is not a checkpoint of this project.
    """
    sliced = (path / NON_TENSOR_FILE).is_file()
    if not path.is_file() and not sliced:
        what = "is a folder, not a checkpoint" if path.is_dir() else "no such checkpoint file"
        raise UserError(f"{path}: {what}; they lie in logs/<name>/version_<n>/, as last.ckpt")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be opened (Permission denied): give yourself the right to read it")
    remedy = "give a .ckpt file this project wrote, or --ckpt_path last for the newest that is whole"
    try:
        if not sliced and not zipfile.is_zipfile(path):  # torch.save writes nothing else
            raise UserError(f"{path} cannot be opened (damaged, or no checkpoint): {remedy}")
        if not mmap and not sliced:
            with zipfile.ZipFile(path) as parts:
                odd = (part.filename for part in parts.infolist() if part.external_attr or part.compress_type)
                if broken := parts.testzip() or next(odd, None):  # what torch never writes, no checksum covers
                    raise UserError(f"{path} is damaged (checksum of {broken}): {remedy}")
        if sliced:
            from lit_gpt.checkpoint.sharded import read_sharded  # slow to import

            rest = torch.load(path / NON_TENSOR_FILE, map_location="cpu", weights_only=True)
            checkpoint = read_sharded(path, rest, shapes_only=mmap)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UserError:
        raise
    except Exception as error:  # damaged bytes lead anywhere in the two readers
        why = "it holds code" if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error) else "damaged"
        raise UserError(f"{path} cannot be opened ({why}): {remedy}") from None
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(k), kind) for k, kind in CONTENTS.items()):
        raise UserError(f"{path} is not a checkpoint of lit_gpt: {remedy}")
    return checkpoint


def newest_checkpoint(logs: Path, name: str | None = None) -> Path | None:
    """The last written checkpoint that is whole, of runs called `name` or of any; None where there is none.

    When a checkpoint was written stands in it, so that a copied or moved folder makes no difference. Damaged ones are
    named in a warning.

    Raises:
        UserError: there are some, and none can be used.
    """
    runs = list(Path(logs, name).glob("version_*") if name else logs.glob("*/version_*"))
    for run in runs:
        _restore_backups(run)
    files = [path for run in runs for path in run.glob("*.ckpt")]
    found, damaged, whole = [], [], None
    for path in files:
        try:
            found.append((open_checkpoint(path, mmap=True)["saved_at"], path.name == "last.ckpt", path))
        except UserError:
            damaged.append(path)
    for *_, path in sorted(found, reverse=True):
        try:
            open_checkpoint(path)
        except UserError:
            damaged.append(path)
        else:
            whole = path
            break
    listed = ", ".join(map(str, sorted(damaged)))
    if damaged and whole is None:
        raise UserError(
            f"no checkpoint can be used: {listed}: --ckpt_path with one of them says why; or take another --name"
        )
    if damaged:
        print(f"warning: cannot be used: {listed}; {whole} is taken", file=sys.stderr)
    return whole


def load_model(path: Path | str) -> tuple[GPT, Tokenizer, bool]:
    """From a checkpoint alone: the model in evaluation mode, its tokenizer, and whether it was trained on rows.

    Raises:
        UserError: as `open_checkpoint`, or its weights do not fit its own description.
    """
    checkpoint = open_checkpoint(Path(path))
    try:
        with torch.device("meta"):
            model = GPT(GPTConfig(**checkpoint["hyper_parameters"]["config"]))
        weights = {name.removeprefix("gpt."): value.float() for name, value in checkpoint["state_dict"].items()}
        model.load_state_dict(weights, assign=True)
        model.complete()
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ValueError("its weights are not finite")
        return model.eval(), from_state(checkpoint["tokenizer"]), checkpoint["data"]["mode"] == "rows"
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} describes no model of lit_gpt ({reason}): give a .ckpt file this project wrote"
        ) from None
