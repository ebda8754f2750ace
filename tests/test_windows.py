"""Windows are pure functions of seed and step, cover what they promise, and stay inside their split."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.data.windows import (
    STARTS,
    evaluation_starts,
    gather,
    permuted,
    random_starts,
    shuffled_starts,
    whole_windows,
)


def test_the_draws_are_pinned() -> None:
    """These numbers make old checkpoints resume exactly: they may never change."""
    assert random_starts(1337, 0, 4, 1_000_000, 64).tolist() == [919557, 984338, 112983, 826681]
    assert random_starts(1337, 7, 4, 1_000_000, 64).tolist() == [987034, 441344, 957995, 550341]
    assert shuffled_starts(1337, 0, 4, 1_000_000, 64).tolist() == [248192, 721088, 202368, 237952]
    assert shuffled_starts(1337, 4000, 4, 1_000_000, 64).tolist() == [470272, 824192, 860992, 579584]


@pytest.mark.parametrize("sampling", STARTS)
def test_the_same_step_gives_the_same_windows_in_any_order(sampling: str) -> None:
    starts = STARTS[sampling]
    forwards = [starts(3, step, 8, 5000, 16) for step in range(20)]
    backwards = [starts(3, step, 8, 5000, 16) for step in reversed(range(20))]
    np.testing.assert_array_equal(forwards, backwards[::-1])
    assert not np.array_equal(forwards, [starts(4, step, 8, 5000, 16) for step in range(20)])


@settings(max_examples=60, deadline=None)
@given(
    sampling=st.sampled_from(list(STARTS)),
    tokens=st.integers(9, 500),
    step=st.integers(0, 10**6),
    seed=st.integers(0, 2**63),
)
def test_no_window_leaves_its_split(sampling: str, tokens: int, step: int, seed: int) -> None:
    starts = STARTS[sampling](seed, step, 7, tokens, 8)
    assert starts.shape == (7,)
    assert starts.min() >= 0
    assert starts.max() + 8 <= tokens - 1  # the last target


def test_random_windows_are_spread_evenly() -> None:
    starts = np.concatenate([random_starts(0, step, 100, 1016, 16) for step in range(1000)])
    counts = np.bincount(starts, minlength=1000)  # 100 each is to be expected
    assert counts.size == 1000
    assert ((counts - 100) ** 2 / 100).sum() < 1150  # chi squared with 999 degrees of freedom, p = 0.0006


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_shuffled_windows_come_once_before_any_comes_again(batch: int) -> None:
    tokens, length = 3333, 16
    windows = whole_windows(tokens, length)
    drawn = np.concatenate(
        [shuffled_starts(5, step, batch, tokens, length) for step in range(-(-3 * windows // batch))]
    )
    passes = [drawn[i * windows : (i + 1) * windows] for i in range(3)]
    for one in passes:
        np.testing.assert_array_equal(np.sort(one), np.arange(windows) * length)
    assert not np.array_equal(passes[0], passes[1])


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40), number=st.integers(0, 50))
def test_a_permutation_visits_every_place_once(size: int, seed: int, number: int) -> None:
    np.testing.assert_array_equal(np.sort(permuted(np.arange(size), size, seed, number)), np.arange(size))


def test_a_permutation_is_well_mixed() -> None:
    places = permuted(np.arange(10_000), 10_000, seed=1, number=0)
    assert abs(np.corrcoef(np.arange(10_000), places)[0, 1]) < 0.05
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05


def test_targets_are_inputs_shifted_by_one() -> None:
    ids = np.arange(100, dtype=np.uint16) ** 2 % 97
    starts = np.array([0, 17, 91])
    x, y = gather(ids, starts, 8)
    for row, start in enumerate(starts):
        np.testing.assert_array_equal(x[row], ids[start : start + 8])
        np.testing.assert_array_equal(y[row], ids[start + 1 : start + 9])
    assert x.dtype == y.dtype == np.int64


@pytest.mark.parametrize("count", [None, 1, 5, 17, 18, 400])
def test_evaluation_windows_are_fixed_ordered_and_apart(count: int | None) -> None:
    starts = evaluation_starts(tokens=280, length=16, count=count)
    assert len(starts) == min(18, count or 18)  # 279 targets in windows of 16
    assert starts[0] == 0
    assert (np.diff(starts) >= 16).all()
    assert (starts % 16 == 0).all()
    assert starts[-1] < 279
