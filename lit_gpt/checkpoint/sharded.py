"""Sharded checkpoints: folders in the format of torch.distributed.checkpoint."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lit_gpt.compat import SHARD_METADATA_GLOBALS


def flatten_state(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Separate the tensors of a checkpoint from everything else.

    Args:
        checkpoint: A checkpoint as Lightning dumps it, with at most one optimizer.

    Returns:
        The tensors as a flat dictionary, with names such as "state_dict/gpt.head.weight" and "optimizer/3/exp_avg";
        tied weights occur once. And the rest of the checkpoint, where "also" maps the other names of tied weights to
        the name under which the tensor is stored.
    """
    rest = {**checkpoint, "state_dict": {}, "optimizer_states": []}
    tensors: dict[str, Tensor] = {f"state_dict/{name}": value for name, value in checkpoint["state_dict"].items()}
    for optimizer in checkpoint.get("optimizer_states", []):
        rest["optimizer_states"].append({**optimizer, "state": {}})
        for index, values in optimizer["state"].items():
            tensors |= {f"optimizer/{index}/{name}": value for name, value in values.items()}
    first_name = {id(value): name for name, value in reversed(tensors.items())}
    rest["also"] = {name: first_name[id(value)] for name, value in tensors.items() if first_name[id(value)] != name}
    return {name: value.detach() for name, value in tensors.items() if name not in rest["also"]}, rest


def unflatten_state(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """Return the checkpoint that `flatten_state` separated; both arguments are modified."""
    for name, first_name in rest.pop("also").items():
        tensors[name] = tensors[first_name]
    for name, value in tensors.items():
        part, _, key = name.partition("/")
        if part == "state_dict":
            rest["state_dict"][key] = value
        else:
            index, _, key = key.partition("/")
            rest["optimizer_states"][0]["state"].setdefault(int(index), {})[key] = value
    return rest


class ShardReader(dcp.FileSystemReader):
    """Reads a folder of shards without running code from it; its metadata file is a pickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path, ".metadata"), "rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Accepts the classes that torch.distributed.checkpoint writes into its metadata, and nothing else."""

    MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")

    def find_class(self, module: str, name: str) -> Any:
        known = module in (*self.MODULES, "torch") or (module, name) in SHARD_METADATA_GLOBALS
        found = super().find_class(module, name) if known else None
        is_metadata_class = isinstance(found, type) and found.__module__ == module in self.MODULES
        if is_metadata_class or (module, name) in SHARD_METADATA_GLOBALS or isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def read_sharded(path: Path, rest: dict[str, Any], device: str) -> dict[str, Any]:
    """Read a sharded checkpoint into one dictionary with complete tensors.

    Args:
        path: The folder.
        rest: What is not a tensor, as `flatten_state` returned it.
        device: "cpu", or "meta" for tensors with shape and dtype but no values.
    """
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
        for name, entry in ShardReader(path).read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    if device != "meta":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads everything
            dcp.load(tensors, storage_reader=ShardReader(path), no_dist=True)
    return unflatten_state(tensors, rest)
