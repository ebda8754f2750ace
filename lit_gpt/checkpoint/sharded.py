"""Checkpoints whose tensors lie in slices, as torch.distributed.checkpoint writes them into a folder."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata


def flatten_state(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint by name, each of them once, and the rest, which says what else they are called."""
    rest = {**checkpoint, "state_dict": {}, "optimizer_states": []}
    named: dict[str, Tensor] = {f"state_dict/{name}": value for name, value in checkpoint["state_dict"].items()}
    for state in checkpoint.get("optimizer_states", []):
        rest["optimizer_states"].append({**state, "state": {}})
        for number, values in state["state"].items():
            named |= {f"optimizer/{number}/{name}": value for name, value in values.items()}
    first = {id(value): name for name, value in reversed(named.items())}
    rest["also"] = {name: first[id(value)] for name, value in named.items() if first[id(value)] != name}
    return {name: value.detach() for name, value in named.items() if name not in rest["also"]}, rest


def unflatten_state(named: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint that `flatten_state` took apart."""
    for name, first in rest.pop("also").items():
        named[name] = named[first]
    for name, value in named.items():
        kind, _, key = name.partition("/")
        if kind == "state_dict":
            rest["state_dict"][key] = value
        else:
            number, _, key = key.partition("/")
            rest["optimizer_states"][0]["state"].setdefault(int(number), {})[key] = value
    return rest


class ShardReader(dcp.FileSystemReader):
    """Reads a folder of slices, whose list of contents is a pickle, without running anything in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path, ".metadata"), "rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Knows what torch.distributed.checkpoint writes, and nothing else."""

    MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    OTHERS = (("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"))

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module in (*self.MODULES, "torch", *dict(self.OTHERS)) else None
        ours = isinstance(found, type) and found.__module__ == module in self.MODULES
        if ours or (module, name) in self.OTHERS or isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def read_sharded(path: Path, rest: dict[str, Any], shapes_only: bool) -> dict[str, Any]:
    """The checkpoint in a folder, put together on the CPU, or with tensors of its shapes that hold nothing."""
    device = "meta" if shapes_only else "cpu"
    named = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
        for name, entry in ShardReader(path).read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    if not shapes_only:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be
            dcp.load(named, storage_reader=ShardReader(path), no_dist=True)
    return unflatten_state(named, rest)
