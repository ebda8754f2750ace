"""Checkpoints of the project: written atomically, verified, and read without running code from them.

A checkpoint is one file in the format of torch.save. A model that was sharded over devices is saved as a folder in the
format of torch.distributed.checkpoint, with everything that is not a tensor in a file beside the shards.
"""

import functools
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args, get_origin

import torch
from torch import Tensor

from lit_gpt.checkpoint.archive import Refused, compare_checksums, examine
from lit_gpt.checkpoint.contents import REQUIRED_KEYS, check_contents
from lit_gpt.checkpoint.order import NON_TENSOR_FILE, Order, read_comment, write_comment
from lit_gpt.digests import DIGESTS_FILE, damaged_files
from lit_gpt.errors import UserError, is_out_of_memory
from lit_gpt.files import atomic_replace, atomic_write, open_regular, remove, temporary_path, write_error
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.tokenizer import Tokenizer, from_state

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
        checkpoint = cls(path, _load(path, device="meta"))
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
            _verify_folder(self.path)
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
        model, tokenizer, mode = self.build_model(), self.tokenizer, self.data_fingerprint.get("mode")
        state_dict: dict[str, Tensor] = self.read()["state_dict"]
        weights = {name.removeprefix("gpt."): value.float() for name, value in state_dict.items()}
        model.load_state_dict(weights, assign=True)
        model.tie_and_init_buffers()
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise self._no_model("its weights are not finite")
        if mode not in ("rows", "raw"):
            raise self._no_model(f"its data.mode is {mode!r}")
        return model.eval(), tokenizer, mode

    def build_model(self) -> GPT:
        """Build the model without weights, on the meta device, and check that the weights of the checkpoint fit it.

        Raises:
            UserError: They do not, or the checkpoint does not describe a model.
        """
        weights = {name.removeprefix("gpt."): value for name, value in self.state_dict.items()}
        try:
            arguments = self.hyper_parameters.get("config")
            if not isinstance(arguments, dict):
                raise ValueError("its hyper_parameters have no config")
            config = shape_of(arguments, weights)
            with torch.device("meta"):
                model = GPT(config)
            model.load_state_dict(weights, assign=True)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
            raise self._no_model(" ".join(str(error).split())[:200]) from None
        if self.tokenizer.vocab_size != config.vocab_size:
            raise self._no_model(f"its tokenizer has {self.tokenizer.vocab_size} ids, its model {config.vocab_size}")
        return model

    def _no_model(self, reason: str) -> UserError:
        return UserError(f"{self.path} describes no model of lit_gpt ({reason}): {REMEDY}")

    @property
    def is_sharded(self) -> bool:
        """Whether the checkpoint is a folder of shards."""
        return _is_sharded(self.path)

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
        """The tokenizer of the training data.

        Raises:
            UserError: It is damaged.
        """
        try:
            return from_state(self.contents["tokenizer"])
        except UserError:  # its vocabulary is not installed
            raise
        except ValueError:
            raise UserError(f"{self.path} has a damaged tokenizer: {REMEDY}") from None

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


def shape_of(arguments: dict[str, Any], weights: Mapping[str, Tensor]) -> GPTConfig:
    """Return the shape that a file describes, if a model of this shape takes no more memory than its weights warrant.

    Args:
        arguments: Of GPTConfig.
        weights: Those of the file.

    Raises:
        ValueError, TypeError: There is no such shape, or it is much larger than the weights.
    """
    config = GPTConfig(**arguments)
    for field in fields(config):
        value, types = getattr(config, field.name), get_args(field.type) or (field.type,)
        # GPTConfig itself compares the values of a Literal, and the bounds of a float, which may be an int
        if get_origin(field.type) is not Literal and types != (float,) and type(value) not in types:
            raise TypeError(f"{field.name} is {value!r}")
    if config.num_blocks > len(weights):
        raise ValueError(f"num_blocks is {config.num_blocks}, and it has {len(weights)} weights")
    elements = sum(value.numel() for value in weights.values())
    width = max(config.d_model, config.head_width)  # of a table of positions, which takes memory
    if config.context_length * width > 2**24 + 16 * elements:
        raise ValueError(f"context_length is {config.context_length}, and it has {elements} weights")
    return config


# ------------------------------------------------------------------------------------------------------- reading


def _is_sharded(path: Path) -> bool:
    return (path / NON_TENSOR_FILE).is_file()


def _load(path: Path, device: str, mmap: bool = False) -> dict[str, Any]:
    """Return the contents of a checkpoint with its tensors on the CPU, or on the meta device.

    Raises:
        UserError: It does not exist, is damaged, or is not a checkpoint of this project.
    """
    is_sharded = _is_sharded(path)
    if not path.is_file() and not is_sharded:
        problem = (
            "is a folder, not a checkpoint" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        )
        raise UserError(
            f"{path} {problem}: give one in logs/<name>/version_<n>/, for example last.ckpt, or --ckpt_path last, the "
            "newest one of --name"
        )
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be opened (Permission denied): give yourself the permission to read it")
    try:
        return _load_folder(path, device) if is_sharded else _load_file(path, device, mmap)
    except Refused as error:
        reason = str(error)
    except Exception as error:  # damaged bytes can raise almost any exception in these libraries
        if is_out_of_memory(error):
            raise
        reason = "damaged"
    if is_sharded:
        _verify_folder(path)  # it can name the damaged files
    raise UserError(f"{path} cannot be opened ({reason}): {REMEDY}")


def _load_file(path: Path, device: str, mmap: bool) -> dict[str, Any]:
    with open(path, "rb") as file:
        contents: dict[str, Any] = examine(file)
    check_contents(contents, path.stat().st_size)
    _check_comment(path, contents)
    if device != "meta":
        contents = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    return contents


def _load_folder(path: Path, device: str) -> dict[str, Any]:
    from lit_gpt.checkpoint.sharded import read_sharded  # slow to import

    with open_regular(path / NON_TENSOR_FILE) as file:
        examine(file)
        file.seek(0)
        rest = torch.load(file, map_location="cpu", weights_only=True)
    contents = read_sharded(path, rest, device)
    check_contents(contents, sum(file.lstat().st_size for file in path.iterdir()))
    _check_comment(path, contents)
    return contents


def _check_comment(path: Path, contents: dict[str, Any]) -> None:
    order = read_comment(path)
    if order is not None and order != (contents["global_step"], contents["saved_at"]):
        raise Refused("its comment contradicts its contents")


def _verify_checksums(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            compare_checksums(file)
    except (Refused, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): {REMEDY}") from None


def _verify_folder(path: Path) -> None:
    from lit_gpt.checkpoint.sharded import needed_files  # slow to import

    if damaged := damaged_files(path, needed_files(path)):
        is_old = damaged == [DIGESTS_FILE] and not (path / DIGESTS_FILE).exists()
        note = "; an earlier version of lit_gpt wrote none, and can consolidate it" if is_old else ""
        raise UserError(f"{path} is damaged ({', '.join(damaged)}{note}): {REMEDY}")


# ------------------------------------------------------------------------------------------------------- writing


def write_contents(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    """Write a checkpoint, or what is no tensor of it, into an opened file."""
    torch.save(checkpoint, file)
    if REQUIRED_KEYS.keys() <= checkpoint.keys():
        write_comment(file, Order(checkpoint["global_step"], checkpoint["saved_at"]))


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint file atomically.

    Raises:
        UserError: The file cannot be written. A previous file at `path` is unchanged.
    """
    try:
        atomic_write(path, lambda file: write_contents(checkpoint, file))
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
            for path in sorted(source.iterdir()):
                _copy_file(path, copy / path.name)
            atomic_replace(copy, target)
        else:
            _copy_file(source, target)
    except OSError as error:
        shutil.rmtree(copy, ignore_errors=True)
        raise write_error(target, error) from error


def _copy_file(source: Path, target: Path) -> None:
    try:
        file = open_regular(source)
    except OSError as error:
        raise UserError(
            f"{source} cannot be read ({error.strerror}), so {target.name} was not written: check this disk, and "
            "resume with --ckpt_path last"
        ) from error
    with file:
        atomic_write(target, lambda out: shutil.copyfileobj(file, out, 2**24))
