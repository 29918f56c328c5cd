"""Rows of a block, from batches in any order, in every storage type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saffe_cache.encoders.transfers import Encoded
from saffe_cache.extraction.encoding import BlockRows
from saffe_cache.store.dtypes import to_storage
from saffe_cache.store.layout import STORAGE_DTYPES, ArraySpec

WIDTH, FIRST = 3, 5


@dataclass
class Texts:
    """As much of a job as rows ask for: texts of some lengths, FIRST of them before the block."""

    lengths: Sequence[int]

    def __post_init__(self) -> None:
        self.offsets: np.ndarray | None = np.cumsum([0, *[2] * FIRST, *self.lengths])

    def is_flat(self, name: str) -> bool:
        return self.offsets is not None and name.startswith("hidden_states/")

    def first_row(self, name: str, number: int) -> int:
        return int(self.offsets[number]) if self.offsets is not None and self.is_flat(name) else number


def spec_of(shape: tuple[int, ...], dtype: str) -> ArraySpec:
    names = tuple(f"axis{number}" for number in range(len(shape) + 1))
    return ArraySpec(row_shape=shape, dtype=dtype, chunk_rows=1, shard_rows=1, dimension_names=names)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), lengths=st.lists(st.integers(1, 5), min_size=1, max_size=8), dtype=st.sampled_from(STORAGE_DTYPES)
)
def test_texts_are_placed_by_their_offsets(data: st.DataObject, lengths: list[int], dtype: str) -> None:
    """However they are ordered and batched: against rows put one after the other."""
    job: Any = Texts(lengths)
    generator = np.random.default_rng(len(lengths))
    states = [generator.normal(size=(length, WIDTH)).astype(np.float32) for length in lengths]
    vectors = generator.normal(size=(len(lengths), WIDTH)).astype(np.float32)
    order = data.draw(st.permutations(range(len(lengths))))
    cut = data.draw(st.integers(0, len(lengths)))
    specs = {"hidden_states/2": spec_of((WIDTH,), dtype), "pooled": spec_of((WIDTH,), "float32")}
    rows = BlockRows(job, range(FIRST, FIRST + len(lengths)), specs)
    for batch in (order[:cut], order[cut:]):
        if batch:
            padded = np.full((len(batch), max(lengths[i] for i in batch), WIDTH), 77, np.float32)
            for place, i in enumerate(batch):
                padded[place, : lengths[i]] = states[i]
            encoded = Encoded({2: padded}, {"pooled": vectors[list(batch)]}, np.array([lengths[i] for i in batch]))
            rows.put([FIRST + i for i in batch], encoded)
    portion = rows.to_portion()
    assert portion.rows["hidden_states/2"][0] == 2 * FIRST
    np.testing.assert_array_equal(portion.rows["hidden_states/2"][1], to_storage(np.concatenate(states), dtype))
    assert portion.rows["pooled"][0] == FIRST
    np.testing.assert_array_equal(portion.rows["pooled"][1], vectors)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("present", [(0, 1, 2), (0, 2), (1,), ()])
def test_photos_that_were_not_read_are_rows_of_nan(dtype: str, present: tuple[int, ...]) -> None:
    job: Any = Texts([1, 1, 1])
    job.offsets = None
    specs = {"hidden_states/2": spec_of((2, WIDTH), dtype), "pooled": spec_of((WIDTH,), "float32")}
    rows = BlockRows(job, range(FIRST, FIRST + 3), specs)
    states = np.random.default_rng(0).normal(size=(3, 2, WIDTH)).astype(np.float32)
    expected = np.full_like(states, np.nan)
    expected[list(present)] = states[list(present)]
    if present:
        here = states[list(present)]
        encoded = Encoded({2: here}, {"pooled": here[:, 0]}, np.full(len(present), 2))
        rows.put([FIRST + i for i in present], encoded)
    portion = rows.to_portion()
    np.testing.assert_array_equal(portion.rows["hidden_states/2"][1], to_storage(expected, dtype))
    np.testing.assert_array_equal(portion.rows["pooled"][1], expected[:, 0])
    assert portion.rows["pooled"][1].base is None or portion.rows["pooled"][1].base.size == 3 * WIDTH
    assert portion.invalid == {}


def test_inputs_with_numbers_that_are_not_finite_are_named() -> None:
    job: Any = Texts([2, 1, 3])
    rows = BlockRows(job, range(FIRST, FIRST + 3), {"hidden_states/2": spec_of((WIDTH,), "float32")})
    states = np.ones((3, 3, WIDTH), np.float32)
    states[0, 2] = np.nan  # behind the end of its text: nobody's
    states[1, 0, 1] = np.inf
    states[2, 2, 2] = np.nan
    rows.put([FIRST, FIRST + 1, FIRST + 2], Encoded({2: states}, {}, np.array([2, 1, 3])))
    assert rows.to_portion().invalid == {FIRST + i: "hidden_states/2 is not finite" for i in (1, 2)}
