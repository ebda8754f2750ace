"""Sharded checkpoints: folders in the format of torch.distributed.checkpoint (DCP).

Beside the shards, shards.json says where each part of each tensor is. DCP's own .metadata says the same as a pickle; it
is written for DCP's tools, and never read here.
"""

import contextlib
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.futures import Future

from lit_gpt.checkpoint.archive import DTYPES, Refused, examine
from lit_gpt.checkpoint.order import NON_TENSOR_FILE
from lit_gpt.digests import sha256_of_all, write_digests
from lit_gpt.files import atomic_write, fsync_folder, open_regular

SHARDS_FILE = "shards.json"
MAX_SHARDS_FILE_BYTES = 2**24  # enough for 150,000 chunks

FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")  # in the folder itself


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


# ------------------------------------------------------------------------------------------------- where the parts are


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor: its place in the tensor, and its bytes in a file of the folder."""

    offsets: list[int]
    sizes: list[int]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is stored in chunks."""

    dtype: torch.dtype
    size: list[int]
    chunks: list[Chunk]


def complete_folder(
    folder: Path, metadata: Metadata, digests: Mapping[str, str], write_rest: Callable[[BinaryIO], object]
) -> None:
    """Add to a folder of shards where their parts are, what is no tensor, and last the digests of all files.

    Args:
        folder: The folder into which `dcp.save` has written.
        metadata: What `dcp.save` returned.
        digests: Of the shards, by their names.
        write_rest: Writes what is no tensor, see `flatten_state`, into an opened file.

    Raises:
        OSError: A file cannot be written.
    """
    _write_shards(folder / SHARDS_FILE, metadata)
    atomic_write(folder / NON_TENSOR_FILE, write_rest)
    others = sha256_of_all(folder / name for name in (".metadata", SHARDS_FILE, NON_TENSOR_FILE))
    write_digests(folder, {**digests, **others})
    fsync_folder(folder)


def _write_shards(path: Path, metadata: Metadata) -> None:
    places = {(index.fqn, *index.offset): info for index, info in metadata.storage_data.items()}
    tensors = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata), name
        chunks = []
        for chunk in tensor.chunks:
            place = places[name, *chunk.offsets]
            found = Chunk(list(chunk.offsets), list(chunk.sizes), place.relative_path, place.offset, place.length)
            chunks.append(asdict(found))
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "size": list(tensor.size), "chunks": chunks}
    content = json.dumps(tensors).encode()
    assert len(content) <= MAX_SHARDS_FILE_BYTES
    atomic_write(path, lambda file: file.write(content))


def read_shards(folder: Path) -> dict[str, StoredTensor]:
    """Return where the parts of each tensor are, by the names of `flatten_state`.

    Raises:
        Refused: shards.json is damaged, or names bytes outside the files of the folder, or more than they have.
        OSError: A file cannot be read.
    """
    with open_regular(folder / SHARDS_FILE) as file:
        content = file.read(MAX_SHARDS_FILE_BYTES + 1)
    if len(content) > MAX_SHARDS_FILE_BYTES:
        raise Refused(f"{SHARDS_FILE} is too long")
    try:
        tensors = {
            name: StoredTensor(DTYPES[tensor["dtype"]], tensor["size"], [Chunk(**chunk) for chunk in tensor["chunks"]])
            for name, tensor in json.loads(content).items()
        }
        for tensor in tensors.values():
            _check_tensor(tensor)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"{SHARDS_FILE} is damaged") from error
    chunks = [chunk for tensor in tensors.values() for chunk in tensor.chunks]
    stored = sum((folder / name).lstat().st_size for name in {chunk.file for chunk in chunks})
    if sum(chunk.length for chunk in chunks) > stored:
        raise Refused(f"{SHARDS_FILE} names more bytes than there are")
    return tensors


def needed_files(folder: Path) -> set[str]:
    """Return the names of the files that a checkpoint consists of, as far as shards.json can be read."""
    files = {NON_TENSOR_FILE, SHARDS_FILE}
    with contextlib.suppress(Refused, OSError):
        files |= {chunk.file for tensor in read_shards(folder).values() for chunk in tensor.chunks}
    return files


def _check_tensor(tensor: StoredTensor) -> None:
    """Check that a tensor is made up of its chunks, and that each has enough bytes.

    Raises:
        ValueError: It is not.
        TypeError: A value has the wrong type.
    """
    for chunk in tensor.chunks:
        numbers = [*tensor.size, *chunk.offsets, *chunk.sizes, chunk.start, chunk.length]
        if any(type(number) is not int or number < 0 for number in numbers) or not FILE_NAME.fullmatch(chunk.file):
            raise ValueError(chunk)
        if any(a + n > end for a, n, end in zip(chunk.offsets, chunk.sizes, tensor.size, strict=True)):
            raise ValueError(chunk)
        if math.prod(chunk.sizes) * tensor.dtype.itemsize > chunk.length:
            raise ValueError(chunk)
    if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
        raise ValueError(tensor)


# -------------------------------------------------------------------------------------------------- reading the tensors


class ShardReader(dcp.StorageReader):
    """Reads tensors from a folder, for `dcp.load`. Nothing in the folder is executed.

    Args:
        folder: The folder.
        tensors: Where their parts are.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.folder, self.tensors = folder, tensors
        self.chunks = {
            (name, *chunk.offsets): (chunk, tensor.dtype) for name, tensor in tensors.items() for chunk in tensor.chunks
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(tensor.dtype),
                    torch.Size(tensor.size),
                    [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks],
                )
                for name, tensor in self.tensors.items()
            }
        )

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        for item in plan.items:
            assert item.storage_index.offset is not None
            chunk, dtype = self.chunks[item.storage_index.fqn, *item.storage_index.offset]
            part = self._read_chunk(chunk, dtype)
            for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, offset, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_chunk(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        """Return a chunk, which is itself a file of torch.save inside a file of the folder.

        Raises:
            Refused: It is damaged, or another tensor than shards.json says.
            OSError: It cannot be read.
        """
        with open_regular(self.folder / chunk.file) as file:
            file.seek(chunk.start)
            content = io.BytesIO(file.read(chunk.length))
        described = examine(content)
        if not isinstance(described, Tensor) or (list(described.shape), described.dtype) != (chunk.sizes, dtype):
            raise Refused(f"{chunk.file} holds other tensors than {SHARDS_FILE} says")
        content.seek(0)
        tensor: Tensor = torch.load(content, map_location="cpu", weights_only=True)
        return tensor

    def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `read_metadata` has returned what `read_data` needs."""

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: a reader reads one folder."""

    def prepare_local_plan(self, plan: dcp.LoadPlan) -> dcp.LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def read_sharded(folder: Path, rest: dict[str, Any], device: str) -> dict[str, Any]:
    """Read a sharded checkpoint into one dictionary with complete tensors.

    Args:
        folder: The folder.
        rest: What is not a tensor, as `flatten_state` returned it; changed in place.
        device: "cpu", or "meta" for tensors with shape and dtype but no values.

    Raises:
        Refused: A file is damaged.
        OSError: shards.json cannot be read.
    """
    stored = read_shards(folder)
    tensors = {name: torch.zeros(tensor.size, dtype=tensor.dtype, device=device) for name, tensor in stored.items()}
    if device != "meta":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads everything
            try:
                dcp.load(tensors, storage_reader=ShardReader(folder, stored), no_dist=True)
            except CheckpointException as error:  # it is no Exception
                raise Refused("damaged") from error
    return unflatten_state(tensors, rest)
