"""Token ids in several files, read as one array."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TOKENS_PER_SHARD = 2**28  # in every file but the last
ID_DTYPES = ("<u2", "<u4")


class ShardedArray:
    """A read-only one-dimensional array that lies in several arrays, or a slice of it.

    A `ShardedArray` copies nothing: with memory-mapped files only the elements that are read come into memory. Pickling
    it stores the folder of its files instead of their content.

    Args:
        arrays: The shards in order. All have `shard_size` elements but the last, which may have fewer.
        shard_size: Elements of a shard.
        start: First element of the slice.
        stop: Element after the last of the slice; None: the end.
        folder: Folder of the memory-mapped files, as in `open_shards`. Needed only for pickling.
    """

    def __init__(
        self,
        arrays: Sequence[np.ndarray],
        shard_size: int,
        start: int = 0,
        stop: int | None = None,
        folder: Path | None = None,
    ) -> None:
        self.arrays, self.shard_size, self.start, self.folder = arrays, shard_size, start, folder
        self.stop = sum(map(len, arrays)) if stop is None else stop
        self.dtype = arrays[0].dtype

    def __reduce__(self) -> tuple[Any, ...]:
        assert self.folder is not None
        return open_shards, (self.folder, self.dtype.str, len(self.arrays), self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: Any) -> Any:
        """Return the elements at `index`, as NumPy does.

        Args:
            index: An integer, an integer array of any shape, or a slice with step 1.

        Returns:
            A `ShardedArray` for a slice; otherwise an array of the shape of `index`, in memory.

        Raises:
            IndexError: An index is out of range.
        """
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1, "only slices with step 1 are supported"
            stop = max(start, stop)
            return ShardedArray(self.arrays, self.shard_size, self.start + start, self.start + stop, self.folder)
        index = np.asarray(index)
        if index.size and not -len(self) <= index.min() <= index.max() < len(self):
            raise IndexError(f"indices from {index.min()} to {index.max()} are out of range for {len(self)} elements")
        offsets = np.where(index < 0, self.stop, self.start).ravel() + index.ravel()  # (N,), in all shards
        shards = offsets // self.shard_size  # (N,)
        offsets -= shards * self.shard_size  # (N,), in the shard
        # neighbouring indices mostly lie in one shard: read one run of them at a time
        run_bounds = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(offsets)]
        elements = np.empty(len(offsets), dtype=self.dtype)
        for begin, end in itertools.pairwise(run_bounds):
            if begin < end:
                elements[begin:end] = self.arrays[shards[begin]][offsets[begin:end]]
        return elements.reshape(index.shape)[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all elements; a copy in memory if they lie in more than one shard."""
        size = self.shard_size
        parts = [
            self.arrays[shard][max(0, self.start - shard * size) : max(0, self.stop - shard * size)]
            for shard in range(self.start // size, max(1, -(-self.stop // size)))
        ]
        elements = parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, self.dtype)])
        return np.array(elements, dtype=dtype, copy=copy)


TokenIds = np.ndarray | ShardedArray


def shard_path(folder: Path, number: int) -> Path:
    """Return the file of a shard, by its number from 0."""
    return folder / f"ids_{number:05}.bin"


def open_shards(folder: Path, dtype: str, num_shards: int, start: int = 0, stop: int | None = None) -> ShardedArray:
    """Memory-map the token ids in a folder.

    Args:
        folder: Where the shards lie.
        dtype: Of the ids, as a NumPy string.
        num_shards: Number of the shards.
        start: First id of the slice to return.
        stop: Id after its last; None: all.

    Raises:
        OSError: A shard is missing.
        ValueError: A shard is empty, has a part of an id, or another size than those before it.
    """
    paths = [shard_path(folder, number) for number in range(num_shards)]
    arrays = [np.memmap(path, dtype=dtype, mode="r").view(np.ndarray) for path in paths]
    sizes = [len(array) for array in arrays]
    if not sizes or set(sizes[:-1]) - {sizes[0]} or sizes[-1] > sizes[0]:
        raise ValueError(f"their shards have {sizes} ids")
    return ShardedArray(arrays, sizes[0], start, stop, folder.absolute())
