"""Statistics of shards: those of numpy, over the rows that are looked at, however the rows come."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from store_cases import make_spec

from saffe_cache.store import dtypes
from saffe_cache.store.dtypes import combine_moments, from_storage, sampled_moments, to_storage
from saffe_cache.store.layout import describe_shard

pytestmark = pytest.mark.filterwarnings("error")
quick = settings(deadline=None, max_examples=60, derandomize=True)


@quick
@given(
    st.sampled_from(["float32", "float16", "bfloat16", "int8", "float8"]),
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 60), st.integers(1, 3)),
        elements=st.floats(-6e4, 6e4, width=32) | st.just(np.nan),
    ),
    st.integers(1, 7),
)
def test_statistics_are_those_of_numpy(dtype: str, values: np.ndarray, shard_rows: int) -> None:
    spec = make_spec(dtype, values.shape[1:], 1, shard_rows)
    rows = to_storage(values, dtype)
    shards = [rows[start : start + shard_rows] for start in range(0, len(rows), shard_rows)]
    found = combine_moments([describe_shard(spec, shard) for shard in shards])
    numbers = from_storage(rows, dtype).astype(np.float64)
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        assert (found.mean, found.std, found.max_magnitude) == (0, 0, 0)
        return
    scale = max(1.0, np.abs(numbers).max())
    assert found.mean == pytest.approx(numbers.mean(), abs=1e-12 * scale)
    assert found.std == pytest.approx(numbers.std(), abs=1e-7 * scale)
    assert found.max_magnitude == np.abs(numbers).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_of_many_and_of_huge_numbers(dtype: str) -> None:
    values = np.random.default_rng(0).normal(1000, 1e-1, size=2**18 + 5).astype(np.float32)
    values = values[:, None]
    spec = make_spec(dtype, (1,), 1, len(values))
    rows = to_storage(values, dtype)
    found = combine_moments([describe_shard(spec, rows)])
    assert found.std == pytest.approx(from_storage(rows, dtype).astype(np.float64).std(), rel=1e-9)
    huge = combine_moments([describe_shard(spec, to_storage(np.array([[3e38], [-3e38], [np.inf]], np.float32), dtype))])
    assert huge.std == pytest.approx(3e38, rel=0.01)  # the square of a float32 would be infinite


@quick
@given(
    st.sampled_from(["float16", "int8"]),
    st.lists(st.integers(1, 70), min_size=1, max_size=9),
    st.integers(1, 12),
    st.integers(1, 9),
)
def test_sample_does_not_depend_on_portions(dtype: str, portions: list[int], n: int, block_tokens: int) -> None:
    num_rows, shape = sum(portions), (3, 2)
    rows = to_storage(np.random.default_rng(n).normal(size=(num_rows, *shape)).astype(np.float32), dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dtypes, "_SAMPLE_NUMBERS", max(1, rows.size // n))
        patch.setattr(dtypes, "_BLOCK", block_tokens * rows.shape[-1])
        found = sampled_moments(np.split(rows, np.cumsum(portions)[:-1]), dtype)
        assert found == sampled_moments([rows], dtype)
    numbers = from_storage(rows[:: rows.size // max(1, rows.size // n)], dtype).astype(np.float64)
    assert found.count == numbers.size
    assert found.mean == pytest.approx(numbers.mean(), abs=1e-9)
    assert found.m2 == pytest.approx(numbers.var() * numbers.size, rel=1e-6)
    assert found.max_magnitude == np.abs(numbers).max()


def test_large_shard_is_sampled_and_a_small_one_read_whole() -> None:
    rows = np.zeros((2**16, 256), np.float16)
    assert sampled_moments([rows], "float16").count == 2**21
    assert sampled_moments([rows[:8]], "float16").count == 8 * 256
