"""Bytes of shards against zarr-python."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import make_spec, random_rows

from saffe_cache.core.features import CacheError, Compression
from saffe_cache.core.json_schema import made_of
from saffe_cache.store.arrays import zarr_codec
from saffe_cache.store.layout import (
    COMPRESSIONS,
    ArraySpec,
    choose_rows,
    decode_shard,
    describe_shard,
    encode_shard,
    shard_name,
)

pytestmark = pytest.mark.filterwarnings("error")
quick = settings(deadline=None, max_examples=60, derandomize=True)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "float8", "int64"])
@pytest.mark.parametrize(
    ("row_shape", "chunk_rows", "chunks", "num_rows"),
    [
        ((3,), 1, 1, 1),
        ((3,), 2, 3, 6),  # one full shard
        ((3,), 2, 3, 5),  # its last chunk is not full
        ((3,), 2, 3, 3),  # and there are chunks that no row needs
        ((2, 3), 4, 2, 29),  # full shards and a tail
        ((), 8, 4, 70),
        ((1, 2, 2), 3, 1, 4),
    ],
)
def test_shards_are_those_of_zarr_python(
    tmp_path: Path,
    dtype: str,
    row_shape: tuple[int, ...],
    chunk_rows: int,
    chunks: int,
    num_rows: int,
    compression: Compression,
) -> None:
    if dtype in ("int8", "float8") and not row_shape:
        pytest.skip("a token has numbers")
    spec = make_spec(dtype, row_shape, chunk_rows, chunks, compression=compression)
    rows = random_rows(spec, num_rows, 0)
    array = zarr.create_array(
        tmp_path,
        shape=rows.shape,
        chunks=(chunk_rows, *rows.shape[1:]),
        shards=(spec.shard_rows, *rows.shape[1:]),
        dtype=spec.numpy_dtype,
        compressors=None if compression == "none" else zarr_codec(spec.numpy_dtype),
        filters=None,
        fill_value=spec.fill_value,
    )
    array[...] = rows
    for index in range(math.ceil(num_rows / spec.shard_rows)):
        part = rows[index * spec.shard_rows : (index + 1) * spec.shard_rows]
        data = b"".join(encode_shard(spec, part))
        assert data == (tmp_path / shard_name(index, spec)).read_bytes()
        assert compression != "none" or len(data) == spec.shard_file_bytes(len(part))
        np.testing.assert_array_equal(decode_shard(spec, describe_shard(spec, part), data, "x"), part)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_longer_shard_passes_unless_it_is_garbage(compression: Compression) -> None:
    spec = make_spec("float32", (2,), 2, 3, compression=compression)
    rows = random_rows(spec, 6, 0)
    grown, entry = b"".join(encode_shard(spec, rows)), describe_shard(spec, rows[:3])
    np.testing.assert_array_equal(decode_shard(spec, entry, grown, "x"), rows[:3])
    for data in (grown + b"\0", grown + bytes(spec.chunk_bytes), grown[:-1], b"".join(encode_shard(spec, rows[:2]))):
        with pytest.raises(CacheError, match=r"^x: "):
            decode_shard(spec, entry, data, "x")


@quick
@given(st.integers(1, 2**26), st.integers(1, 2**28))
def test_shards_are_whole_chunks_of_about_the_given_size(row_bytes: int, shard_bytes: int) -> None:
    chunk_rows, shard_rows = choose_rows(row_bytes, shard_bytes)
    assert 1 <= chunk_rows <= 64
    assert shard_rows % chunk_rows == 0
    assert shard_rows * row_bytes <= max(shard_bytes, chunk_rows * row_bytes)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "int8", "row_shape": (), "dimension_names": ("row",)},
        {"chunk_rows": 0},
        {"chunk_rows": 4},
        {"shard_rows": 0},
        {"dimension_names": ("row",)},
    ],
)
def test_impossible_layouts_are_refused(change: dict[str, object]) -> None:
    good = {"row_shape": (2,), "dtype": "float32", "chunk_rows": 3, "shard_rows": 6, "dimension_names": ("row", "x")}
    with pytest.raises(ValueError, match="expected"):
        ArraySpec(**{**good, **change})  # type: ignore[arg-type]


def test_unknown_type_in_a_manifest_is_refused() -> None:
    content = {"row_shape": [2], "dtype": "float64", "chunk_rows": 3, "shard_rows": 6, "dimension_names": ["row", "x"]}
    with pytest.raises((TypeError, ValueError), match="float64"):
        made_of(ArraySpec, content)
