"""Tests of lit_gpt.data.windows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.data.windows import (
    WINDOW_SAMPLERS,
    count_windows,
    evaluation_starts,
    permute,
    random_starts,
    read_windows,
    shuffled_starts,
)


def test_window_starts_are_pinned() -> None:
    """These numbers must never change: with them, runs resume exactly from checkpoints of earlier versions."""
    assert random_starts(1337, 0, 4, 1_000_000, 64).tolist() == [919557, 984338, 112983, 826681]
    assert random_starts(1337, 7, 4, 1_000_000, 64).tolist() == [987034, 441344, 957995, 550341]
    assert shuffled_starts(1337, 0, 4, 1_000_000, 64).tolist() == [248192, 721088, 202368, 237952]
    assert shuffled_starts(1337, 4000, 4, 1_000_000, 64).tolist() == [470272, 824192, 860992, 579584]


@pytest.mark.parametrize("sampling", WINDOW_SAMPLERS)
def test_starts_depend_on_seed_and_step_but_not_on_call_order(sampling: str) -> None:
    draw_starts = WINDOW_SAMPLERS[sampling]
    ascending = [draw_starts(3, step, 8, 5000, 16) for step in range(20)]
    descending = [draw_starts(3, step, 8, 5000, 16) for step in reversed(range(20))]
    np.testing.assert_array_equal(ascending, descending[::-1])
    assert not np.array_equal(ascending, [draw_starts(4, step, 8, 5000, 16) for step in range(20)])


@settings(max_examples=60, deadline=None)
@given(
    sampling=st.sampled_from(list(WINDOW_SAMPLERS)),
    num_tokens=st.integers(9, 500),
    step=st.integers(0, 10**6),
    seed=st.integers(0, 2**63),
)
def test_windows_and_their_targets_lie_in_the_split(sampling: str, num_tokens: int, step: int, seed: int) -> None:
    starts = WINDOW_SAMPLERS[sampling](seed, step, 7, num_tokens, 8)
    assert starts.shape == (7,)
    assert starts.min() >= 0
    assert starts.max() + 8 <= num_tokens - 1  # the last target


def test_random_starts_are_uniform() -> None:
    starts = np.concatenate([random_starts(0, step, 100, 1016, 16) for step in range(1000)])
    counts = np.bincount(starts, minlength=1000)  # expected: 100 each
    assert counts.size == 1000
    assert ((counts - 100) ** 2 / 100).sum() < 1150  # chi squared with 999 degrees of freedom, p = 0.0006


@pytest.mark.parametrize("num_windows", [1, 7, 64, 1000])
def test_shuffled_starts_visit_every_window_once_an_epoch(num_windows: int) -> None:
    num_tokens, context_length = 3333, 16
    per_epoch = count_windows(num_tokens, context_length)
    steps = range(-(-3 * per_epoch // num_windows))
    drawn = np.concatenate([shuffled_starts(5, step, num_windows, num_tokens, context_length) for step in steps])
    epochs = [drawn[i * per_epoch : (i + 1) * per_epoch] for i in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(per_epoch) * context_length)
    assert not np.array_equal(epochs[0], epochs[1])


def test_permutations_around_a_power_of_four_are_pinned() -> None:
    assert permute(np.arange(4), 4, seed=5, epoch=1).tolist() == [1, 3, 0, 2]
    assert permute(np.arange(16), 16, seed=5, epoch=1).tolist() == [
        3,
        15,
        10,
        13,
        11,
        12,
        9,
        1,
        4,
        7,
        6,
        5,
        8,
        0,
        14,
        2,
    ]
    assert permute(np.arange(17), 17, seed=5, epoch=1).tolist()[:4] == [1, 3, 16, 12]


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_permute_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    np.testing.assert_array_equal(np.sort(permute(np.arange(size), size, seed, epoch)), np.arange(size))


def test_permute_leaves_no_correlation() -> None:
    permutation = permute(np.arange(10_000), 10_000, seed=1, epoch=0)
    assert abs(np.corrcoef(np.arange(10_000), permutation)[0, 1]) < 0.05
    assert abs(np.corrcoef(permutation[:-1], permutation[1:])[0, 1]) < 0.05


def test_read_windows_shifts_targets_by_one() -> None:
    ids = np.arange(100, dtype=np.uint16) ** 2 % 97
    starts = np.array([0, 17, 91])
    tokens, targets = read_windows(ids, starts, 8)
    for row, start in enumerate(starts):
        np.testing.assert_array_equal(tokens[row], ids[start : start + 8])
        np.testing.assert_array_equal(targets[row], ids[start + 1 : start + 9])
    assert tokens.dtype == targets.dtype == np.int64


@pytest.mark.parametrize("num_windows", [None, 1, 5, 17, 18, 400])
def test_evaluation_starts_are_ordered_and_do_not_overlap(num_windows: int | None) -> None:
    starts = evaluation_starts(num_tokens=280, context_length=16, num_windows=num_windows)
    assert len(starts) == min(18, num_windows or 18)  # 279 targets in windows of 16
    assert starts[0] == 0
    assert (np.diff(starts) >= 16).all()
    assert (starts % 16 == 0).all()
    assert starts[-1] < 279
