"""Checkpoints of the project: written atomically, verified, and read without running code from them.

A checkpoint is one file in the format of torch.save. A model that was sharded over devices is saved as a folder in the
format of torch.distributed.checkpoint, with everything that is not a tensor in a file beside the shards.
"""

import contextlib
import functools
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.files import BACKUP_SUFFIX, atomic_replace, atomic_write, remove, temporary_path, write_error
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.tokenizer import Tokenizer, from_state

NON_TENSOR_FILE = "rest.pt"  # in the folder of a sharded checkpoint, everything that is not a tensor

# The keys that every checkpoint of this project has, and the types of their values.
REQUIRED_KEYS = {
    "state_dict": dict,
    "hyper_parameters": dict,
    "tokenizer": dict,
    "data": dict,
    "global_step": int,
    "saved_at": float,
}

REMEDY = "give a .ckpt file that this project wrote, or --ckpt_path last for the newest undamaged one"


class Checkpoint:
    """A checkpoint that is open: its metadata and the shapes of its tensors are in memory, the tensors are not.

    Example:
        >>> checkpoint = Checkpoint.open("logs/poems/version_0/best.ckpt")
        >>> checkpoint.step
        5000
        >>> model, tokenizer, mode = checkpoint.load_model()

    Attributes:
        path: The file, or the folder of a sharded checkpoint.
        contents: All contents; its tensors are on the meta device, so they have shape and dtype but no values.
    """

    def __init__(self, path: Path, contents: dict[str, Any]) -> None:
        self.path = path
        self.contents = contents
        self._verified = False

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> "Checkpoint":
        """Open a checkpoint; nothing in it is executed.

        Args:
            path: The file, or the folder of a sharded checkpoint.
            verify: Whether to look for damaged bytes, see `verify`.

        Raises:
            UserError: The path does not exist, or is damaged, or is not a checkpoint of this project.
        """
        path = Path(path)
        checkpoint = cls(path, _load(path, device="meta", mmap=True))
        if verify:
            checkpoint.verify()
        return checkpoint

    def verify(self) -> None:
        """Read all bytes once and compare them with the checksums in the file; do nothing the second time.

        Raises:
            UserError: The checkpoint is damaged.
        """
        if self._verified:
            return
        if self.is_sharded:
            self.read()  # compares the checksums of all shards
        else:
            _verify_checksums(self.path)
        self._verified = True

    def read(self, mmap: bool = False) -> dict[str, Any]:
        """Return the contents with the values of their tensors, on the CPU.

        Args:
            mmap: Whether to map the tensors of a file into memory, so that bytes are read when they are used. Shards
                are always read into memory.

        Raises:
            UserError: The checkpoint is damaged.
        """
        return _load(self.path, device="cpu", mmap=mmap)

    def load_model(self) -> tuple[GPT, Tokenizer, str]:
        """Build the model and load its weights.

        Returns:
            The model in evaluation mode, on the CPU, with float32 weights; its tokenizer; and the `data.mode` of its
            training, "rows" or "raw".

        Raises:
            UserError: The weights are damaged or not finite, or do not fit the description of the model.
        """
        try:
            with torch.device("meta"):
                model = GPT(GPTConfig(**self.hyper_parameters["config"]))
            state_dict: dict[str, Tensor] = self.read()["state_dict"]
            weights = {name.removeprefix("gpt."): value.float() for name, value in state_dict.items()}
            model.load_state_dict(weights, assign=True)
            model.tie_and_init_buffers()
            if not all(parameter.isfinite().all() for parameter in model.parameters()):
                raise ValueError("its weights are not finite")
            return model.eval(), self.tokenizer, self.data_fingerprint["mode"]
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.path} describes no model of lit_gpt ({reason}): {REMEDY}") from None

    @property
    def is_sharded(self) -> bool:
        """Whether the checkpoint is a folder of shards."""
        return (self.path / NON_TENSOR_FILE).is_file()

    @property
    def step(self) -> int:
        """The number of optimizer steps taken."""
        step: int = self.contents["global_step"]
        return step

    @property
    def saved_at(self) -> float:
        """When the checkpoint was written, in seconds since 1970."""
        saved_at: float = self.contents["saved_at"]
        return saved_at

    @property
    def config_text(self) -> str | None:
        """The config of the run as YAML; None if the run was not started from the command line."""
        return self.contents.get("config")

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """The arguments of `LitGPT`."""
        hyper_parameters: dict[str, Any] = self.contents["hyper_parameters"]
        return hyper_parameters

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the training data."""
        return from_state(self.contents["tokenizer"])

    @property
    def data_fingerprint(self) -> dict[str, Any]:
        """What identifies the training data."""
        fingerprint: dict[str, Any] = self.contents["data"]
        return fingerprint

    @property
    def callbacks(self) -> dict[str, Any]:
        """The states of the callbacks by their `state_key`."""
        return self.contents.get("callbacks", {})

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """The names, shapes and dtypes of the weights, as tensors on the meta device."""
        state_dict: dict[str, Tensor] = self.contents["state_dict"]
        return state_dict

    @property
    def optimizer_state(self) -> dict[int, dict[str, Tensor]] | None:
        """The optimizer state of each parameter on the meta device; None if the checkpoint has no optimizer."""
        states = self.contents.get("optimizer_states")
        return states[0]["state"] if states else None


def load_model(path: str | Path) -> tuple[GPT, Tokenizer, str]:
    """Load a model from a checkpoint alone, see `Checkpoint.load_model`.

    Raises:
        UserError: See `Checkpoint.open` and `Checkpoint.load_model`.
    """
    return Checkpoint.open(path).load_model()


def newest_checkpoint(logs: Path, name: str | None = None) -> tuple[Checkpoint | None, str]:
    """Find the newest undamaged checkpoint by the time stored in it, so that copying or moving folders is harmless.

    Args:
        logs: The folder with the runs, as logs/<name>/version_<n>/.
        name: Which runs to search; all by default.

    Returns:
        The checkpoint, opened and verified, or None if there is none; and a warning that names the damaged checkpoints
        that were skipped, or "".

    Raises:
        UserError: There are checkpoints, and all of them are damaged.
    """
    folders = list(Path(logs, name).glob("version_*") if name else logs.glob("*/version_*"))
    opened, damaged = [], []
    for folder in folders:
        _restore_backups(folder)
        for path in folder.glob("*.ckpt"):
            try:
                opened.append(Checkpoint.open(path, verify=False))
            except UserError:
                damaged.append(path)
    opened.sort(key=lambda checkpoint: (checkpoint.saved_at, checkpoint.path.name == "last.ckpt", checkpoint.path))
    newest: Checkpoint | None = None
    while opened and newest is None:
        checkpoint = opened.pop()
        try:
            checkpoint.verify()
            newest = checkpoint
        except UserError:
            damaged.append(checkpoint.path)
    if not damaged:
        return newest, ""
    paths = ", ".join(map(str, sorted(damaged)))
    if newest is None:
        raise UserError(
            f"no checkpoint can be used: {paths}: give one of them as --ckpt_path to see what is wrong, or choose "
            "another --name"
        )
    return newest, f"skipped damaged checkpoints {paths}; using {newest.path}"


# ------------------------------------------------------------------------------------------------------- reading


def _load(path: Path, device: str, mmap: bool) -> dict[str, Any]:
    """Return the contents of a checkpoint with its tensors on the CPU, or on the meta device."""
    is_sharded = (path / NON_TENSOR_FILE).is_file()
    if not path.is_file() and not is_sharded:
        problem = "is a folder, not a checkpoint" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {problem}: checkpoints are in logs/<name>/version_<n>/, for example last.ckpt")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be opened (Permission denied): give yourself the permission to read it")
    try:
        if not is_sharded and not zipfile.is_zipfile(path):  # torch.save writes zip files only
            raise UserError(f"{path} cannot be opened (damaged, or not a checkpoint): {REMEDY}")
        if is_sharded:
            from lit_gpt.checkpoint.sharded import read_sharded  # slow to import

            non_tensors = torch.load(path / NON_TENSOR_FILE, map_location="cpu", weights_only=True)
            contents: Any = read_sharded(path, non_tensors, device)
        else:
            contents = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except UserError:
        raise
    except Exception as error:  # damaged bytes can raise almost any exception in these libraries
        holds_code = isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error)
        reason = "it holds code" if holds_code else "damaged"
        raise UserError(f"{path} cannot be opened ({reason}): {REMEDY}") from None
    if not isinstance(contents, dict) or not all(isinstance(contents.get(k), v) for k, v in REQUIRED_KEYS.items()):
        raise UserError(f"{path} is not a checkpoint of lit_gpt: {REMEDY}")
    return contents


def _verify_checksums(path: Path) -> None:
    """Compare the entries of a checkpoint file with their checksums.

    Raises:
        UserError: An entry is damaged, or has attributes that torch.save never writes and no checksum covers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            altered = (entry.filename for entry in archive.infolist() if entry.external_attr or entry.compress_type)
            damaged = archive.testzip() or next(altered, None)
    except Exception:  # damaged bytes can raise almost any exception
        raise UserError(f"{path} cannot be opened (damaged): {REMEDY}") from None
    if damaged:
        raise UserError(f"{path} is damaged (checksum of {damaged}): {REMEDY}")


# ------------------------------------------------------------------------------------------------------- writing


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
            remove(copy)
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


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left half-written or half-removed; no process may be writing to the folder."""
    with contextlib.suppress(OSError):  # what cannot be removed does no harm
        _restore_backups(folder)
        for path in folder.glob(".*.ckpt.*"):
            remove(path)


def _restore_backups(folder: Path) -> None:
    """Undo the first half of an `atomic_replace` whose process was killed before the second half."""
    for backup in folder.glob(f".*.ckpt{BACKUP_SUFFIX}"):
        path = backup.with_name(backup.name.removeprefix(".").removesuffix(BACKUP_SUFFIX))
        if not path.exists():
            backup.rename(path)
