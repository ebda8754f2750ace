"""Shards read like one NumPy array."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.data.shards import ShardedArray


@given(st.data())
def test_sharded_array_indexes_like_numpy_array(data: st.DataObject) -> None:
    size, tokens = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 60))
    array = np.arange(tokens, dtype=np.uint16)
    shards = ShardedArray(np.split(array, range(size, tokens, size)), size)
    for _ in range(3):
        assert len(shards) == len(array)
        assert shards.dtype == array.dtype
        np.testing.assert_array_equal(shards, array)
        for shape in ((), (7,), (3, 4)):
            indices = np.random.default_rng(0).integers(-len(array), len(array), shape)
            selected = shards[indices]
            np.testing.assert_array_equal(selected, array[indices])
            assert selected.dtype == array.dtype
        assert shards[-1] == array[-1]
        with pytest.raises(IndexError):
            shards[[0, len(array)]]
        start, stop = sorted(data.draw(st.tuples(*[st.integers(-len(array), len(array) + 3)] * 2)))
        shards, array = shards[start:stop], array[start:stop]
        if not len(array):
            assert len(np.asarray(shards)) == 0
            return
