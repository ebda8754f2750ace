"""Many files of token ids, read as one array."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SHARD = 2**28  # ids in a file, all but the last; corpora shorter than that are one memory map


class Shards:
    """Arrays end to end as one: of one dimension, read only, nothing of it held.

    Args:
        arrays: all of `size` ids but the last, which may have fewer.
        size: of each.
        start: the first id that counts, and
        stop: the one after the last; None: all of them.
    """

    def __init__(self, arrays: Sequence[np.ndarray], size: int, start: int = 0, stop: int | None = None) -> None:
        self.arrays, self.size, self.start = arrays, size, start
        self.stop = sum(map(len, arrays)) if stop is None else stop
        self.dtype = arrays[0].dtype

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, places: Any) -> Any:
        """As of an array, for a number, a slice of step 1 or an integer array of any shape, in numpy's own terms.

        A slice gives a view: an array where it lies in one file, else `Shards`.
        """
        if isinstance(places, slice):
            start, stop = places.start, places.stop
            if start is None or stop is None or not 0 <= start <= stop <= self.stop - self.start:
                start, stop, step = places.indices(len(self))
                assert step == 1, "ids are taken in their order"
            return self._view(self.start + start, self.start + max(start, stop))
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

    def _view(self, start: int, stop: int) -> "np.ndarray | Shards":
        number = min(start // self.size, len(self.arrays) - 1)
        array, before = self.arrays[number], number * self.size
        inside = stop <= before + len(array)
        return array[start - before : stop - before] if inside else Shards(self.arrays, self.size, start, stop)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it, in memory."""
        ends = range(self.start - self.start % self.size + self.size, self.stop + self.size, self.size)
        views = [self._view(max(self.start, end - self.size), min(end, self.stop)) for end in ends]
        return np.concatenate(views).astype(self.dtype if dtype is None else dtype, copy=False)


Ids = np.ndarray | Shards


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"ids_{number:05}.bin"


def open_shards(folder: Path, dtype: str) -> Ids:
    """The ids in a folder, memory-mapped: an array where they are one file.

    Raises:
        FileNotFoundError: there are none.
    """
    paths = [shard_path(folder, number) for number in range(max(1, len(list(folder.glob("ids_*.bin")))))]
    arrays = [np.memmap(path, dtype=dtype, mode="r").view(np.ndarray) for path in paths]
    return arrays[0] if len(arrays) == 1 else Shards(arrays, len(arrays[0]))
