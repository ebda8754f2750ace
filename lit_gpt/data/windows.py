"""Which windows a batch holds: pure functions of (seed, step, place in the global batch).

A window is T inputs and, shifted by one, T targets: T + 1 ids in a row. Nothing here remembers anything, so resuming
is arithmetic, and worker count, rank count and interruptions cannot change what is seen.
"""

import numpy as np

from lit_gpt.data.shards import Ids, Shards

ROUNDS = 4  # of the Feistel network; Luby and Rackoff 1988 show four to be enough


def random_starts(seed: int, step: int, count: int, tokens: int, length: int) -> np.ndarray:
    """Starts drawn with replacement, as the course draws them: (count,) int64, each in [0, tokens - length).

    The counter-based generator Philox (Salmon et al. 2011) is keyed by the seed and counts from the step, so that any
    step's batch is drawn without drawing those before it. Its raw bits are the same in every numpy release.

    Args:
        seed: of the run.
        step: optimizer step, from 0.
        count: windows in the global batch.
        tokens: ids in the split.
        length: T.
    """
    raw = np.random.Philox(key=seed, counter=[0, step, 0, 0]).random_raw(count)  # (count,) uint64
    return ((raw >> np.uint64(11)) * 2.0**-53 * (tokens - length)).astype(np.int64)


def shuffled_starts(seed: int, step: int, count: int, tokens: int, length: int) -> np.ndarray:
    """Starts of non-overlapping windows, every one of the split once before any comes again: (count,) int64.

    The windows of all passes stand in one endless row, pass after pass, each pass in an order of its own; a global
    batch takes the next `count`. Arguments as in `random_starts`.
    """
    windows = whole_windows(tokens, length)
    passes, places = np.divmod(step * count + np.arange(count, dtype=np.int64), windows)  # (count,), (count,)
    starts = np.empty(count, dtype=np.int64)
    for one in np.unique(passes):
        here = passes == one
        starts[here] = permuted(places[here], windows, seed, int(one)) * length
    return starts


STARTS = {"random": random_starts, "shuffled": shuffled_starts}


def permuted(places: np.ndarray, size: int, seed: int, number: int) -> np.ndarray:
    """Where `places` (n,) go in permutation `number` of 0 … size - 1, computed without holding it: (n,) int64.

    A Feistel network permutes the next power of four; what falls outside walks on until it is inside again (Black and
    Rogaway 2002).
    """
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.Philox(key=seed, counter=[0, number, 0, 1]).random_raw(
        ROUNDS
    )  # never the counters of random_starts
    values = places.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & low
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & low)
        values[outside] = left << half | right
        outside = values >= size
    return values.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): every bit of the result hangs on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def whole_windows(tokens: int, length: int) -> int:
    """How many windows of `length` inputs, each with its targets, lie end to end in `tokens` ids."""
    return (tokens - 1) // length


def evaluation_starts(tokens: int, length: int, count: int | None) -> np.ndarray:
    """The fixed windows a loss is estimated on, in order: all of the split, or `count` spread evenly over it.

    All of them score every token but the first exactly once; the last may be shorter than `length`.
    """
    windows = -(-(tokens - 1) // length)
    chosen = np.arange(windows) if count is None or count >= windows else np.arange(count) * windows // count
    return chosen * length


def gather(ids: Ids, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of the windows at `starts` (n,): twice (n, length) int64, the second shifted by one."""
    windows = np.empty((len(starts), length + 1), dtype=np.int64)
    files, size, first = (ids.arrays, ids.size, ids.start) if isinstance(ids, Shards) else ([ids], len(ids), 0)
    numbers, offsets = np.divmod(starts + first, size)  # (n,) each: the file a window begins in, and where in it
    for row, start, number, offset in zip(windows, starts.tolist(), numbers.tolist(), offsets.tolist()):
        window = files[number][offset : offset + length + 1]
        row[:] = window if len(window) > length else ids[start : start + length + 1]  # which goes on in the next
    return windows[:, :-1], windows[:, 1:]
