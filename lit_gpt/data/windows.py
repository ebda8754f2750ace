"""Which windows of a split are in a batch, as pure functions of seed and step.

A window is T + 1 consecutive token ids: T inputs and, shifted by one, T targets. Nothing here has state. A resumed run
therefore draws the same windows as one that was not interrupted, with any number of workers and ranks.
"""

import numpy as np

from lit_gpt.data.shards import ShardedArray, TokenIds
from lit_gpt.errors import UserError

FEISTEL_ROUNDS = 4  # enough for a pseudorandom permutation (Luby and Rackoff, 1988)


def check_window_count(name: str, count: int | None, context_length: int) -> None:
    """Check a setting of TextDataModule that counts windows; None is valid.

    Raises:
        UserError: There is no window, or there are 2**31 tokens or more, which an index of 32 bits cannot count.
    """
    if count is not None and count < 1:
        raise UserError(f"--data.{name} is {count}: give 1 or more")
    if count is not None and count * context_length >= 2**31:
        raise UserError(f"--data.{name} is {count}, with {context_length} tokens to a window: give fewer windows")


def random_starts(seed: int, step: int, num_windows: int, num_tokens: int, context_length: int) -> np.ndarray:
    """Draw the window starts of a global batch with replacement, as `get_batch` of the course does.

    The generator is Philox (Salmon et al., 2011), which is counter-based: the seed is its key and the step is part of
    its counter, so that a step is drawn without drawing those before it. Its raw bits are the same in every NumPy
    release.

    Args:
        seed: Seed of the sampling.
        step: Optimizer step, from 0.
        num_windows: Windows in the global batch.
        num_tokens: Tokens in the split.
        context_length: T, tokens in a window.

    Returns:
        The first token of each window, (num_windows,) int64, in [0, num_tokens - context_length).
    """
    bits = np.random.Philox(key=seed, counter=[0, step, 0, 0]).random_raw(num_windows)  # (num_windows,) uint64
    uniform = (bits >> np.uint64(11)) * 2.0**-53  # in [0, 1)
    return (uniform * (num_tokens - context_length)).astype(np.int64)


def shuffled_starts(seed: int, step: int, num_windows: int, num_tokens: int, context_length: int) -> np.ndarray:
    """Draw non-overlapping windows without replacement: every window of the split once before any is repeated.

    The windows of all epochs form one sequence, each epoch in a random order of its own. A global batch is the next
    `num_windows` of the sequence, so it may lie in two epochs. Arguments and result are as in `random_starts`.
    """
    windows_per_epoch = count_windows(num_tokens, context_length)
    sequence = step * num_windows + np.arange(num_windows, dtype=np.int64)  # (num_windows,)
    epochs, indices = np.divmod(sequence, windows_per_epoch)  # (num_windows,), (num_windows,)
    starts = np.empty(num_windows, dtype=np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        starts[in_epoch] = permute(indices[in_epoch], windows_per_epoch, seed, int(epoch)) * context_length
    return starts


WINDOW_SAMPLERS = {"random": random_starts, "shuffled": shuffled_starts}


def permute(indices: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the elements at `indices` of a random permutation of 0 … size - 1, without computing the others.

    A Feistel network permutes the numbers below the next power of four. A result of `size` or more goes through the
    network again until it is smaller (cycle walking: Black and Rogaway, 2002).

    Args:
        indices: (N,) int64, in [0, size).
        size: Length of the permutation.
        seed: Seed of the sampling.
        epoch: Number of the permutation; every epoch has its own.

    Returns:
        (N,) int64, in [0, size).
    """
    half_bits = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    # the last word of the counter differs from that of random_starts, so that the two never share random bits
    keys = np.random.Philox(key=seed, counter=[0, epoch, 0, 1]).random_raw(FEISTEL_ROUNDS)
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half_bits, values[outside] & half_mask
        for key in keys:
            left, right = right, left ^ (_splitmix64_finalizer(right ^ key) & half_mask)
        values[outside] = left << half_bits | right
        outside = values >= size
    return values.astype(np.int64)


def _splitmix64_finalizer(x: np.ndarray) -> np.ndarray:
    """Return a hash of each 64-bit number, in which every bit depends on all bits of `x` (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def count_windows(num_tokens: int, context_length: int) -> int:
    """Return the number of full non-overlapping windows of inputs, each with its targets, in a split."""
    return (num_tokens - 1) // context_length


def evaluation_starts(num_tokens: int, context_length: int, num_windows: int | None) -> np.ndarray:
    """Return the starts of the fixed windows on which a loss is estimated, in order.

    Args:
        num_tokens: Tokens in the split.
        context_length: T, tokens in a window.
        num_windows: Windows to choose, spread evenly over the split; None: all, in which every token but the first is
            a target exactly once. The last window may have fewer than T targets.

    Returns:
        (N,) int64.
    """
    available = -(-(num_tokens - 1) // context_length)
    if num_windows is None or num_windows >= available:
        return np.arange(available) * context_length
    return np.arange(num_windows) * available // num_windows * context_length


def read_windows(ids: TokenIds, starts: np.ndarray, context_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and targets of the windows at `starts` (B,): each (B, T) int64, targets shifted by one."""
    windows = np.empty((len(starts), context_length + 1), dtype=np.int64)  # (B, T + 1)
    ids = ids if isinstance(ids, ShardedArray) else ShardedArray([ids], len(ids))
    shards, offsets = np.divmod(starts + ids.start, ids.shard_size)  # (B,), (B,)
    # one slice for each window is faster than indexing with all positions
    for row, start, shard, offset in zip(windows, starts.tolist(), shards.tolist(), offsets.tolist()):
        window = ids.arrays[shard][offset : offset + context_length + 1]
        crosses_shards = len(window) <= context_length
        row[:] = ids[start : start + context_length + 1] if crosses_shards else window
    return windows[:, :-1], windows[:, 1:]
