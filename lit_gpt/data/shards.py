"""Many files of token ids, read as one array."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TOKENS_PER_SHARD = 2**28  # ids in a file, all but the last


class ShardedArray:
    """Arrays end to end as one: of one dimension, read only, nothing of it held.

    Args:
        arrays: all of `size` ids but the last, which may have fewer.
        size: of each.
        start: the first id that counts, and
        stop: the one after the last; None: all of them.
        folder: of the files that the arrays are; a process this is sent to opens them there, and is sent no ids.
    """

    def __init__(
        self,
        arrays: Sequence[np.ndarray],
        size: int,
        start: int = 0,
        stop: int | None = None,
        folder: Path | None = None,
    ) -> None:
        self.arrays, self.size, self.start, self.folder = arrays, size, start, folder
        self.stop = sum(map(len, arrays)) if stop is None else stop
        self.dtype = arrays[0].dtype

    def __reduce__(self) -> tuple[Any, ...]:
        assert self.folder is not None
        return open_shards, (self.folder, self.dtype.str, self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, places: Any) -> Any:
        """As of an array, for a number, a slice of step 1 or an integer array of any shape, in numpy's own terms.

        A slice gives `ShardedArray`.
        """
        if isinstance(places, slice):
            start, stop, step = places.indices(len(self))
            assert step == 1, "ids are taken in their order"
            return ShardedArray(self.arrays, self.size, self.start + start, self.start + max(start, stop), self.folder)
        places = np.asarray(places)
        if places.size and not -len(self) <= places.min() <= places.max() < len(self):
            raise IndexError(f"places from {places.min()} to {places.max()} in {len(self)} ids")
        flat = np.where(places < 0, self.stop, self.start).ravel() + places.ravel()  # (n,)
        number = flat // self.size
        flat -= number * self.size
        # windows lie each in one file, or two: as many stretches, not as many ids, are looked up
        cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(flat)]
        found = np.empty(len(flat), dtype=self.dtype)
        for begin, end in itertools.pairwise(cuts):
            if begin < end:
                found[begin:end] = self.arrays[number[begin]][flat[begin:end]]
        return found.reshape(places.shape)[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it; in memory, where it lies in more than one file."""
        files = range(self.start // self.size, max(1, -(-self.stop // self.size)))
        stretches = [
            self.arrays[number][max(0, self.start - number * self.size) : max(0, self.stop - number * self.size)]
            for number in files
        ]
        whole = stretches[0] if len(stretches) == 1 else np.concatenate(stretches or [np.empty(0, self.dtype)])
        return np.array(whole, dtype=dtype, copy=copy)


Ids = np.ndarray | ShardedArray


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"ids_{number:05}.bin"


def open_shards(folder: Path, dtype: str, start: int = 0, stop: int | None = None) -> ShardedArray:
    """The ids in a folder, or those from `start` to before `stop`, memory-mapped.

    Raises:
        FileNotFoundError: there are none.
    """
    paths = [shard_path(folder, number) for number in range(max(1, len(list(folder.glob("ids_*.bin")))))]
    arrays = [np.memmap(path, dtype=dtype, mode="r").view(np.ndarray) for path in paths]
    return ShardedArray(arrays, len(arrays[0]), start, stop, folder.absolute())
