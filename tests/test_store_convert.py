"""A converted cache holds the same items, vectors and blocks, and the same hidden states within its type."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from store_cases import (
    NUM_LAYERS,
    convert,
    describe,
    image_contents,
    shard_files,
    text_contents,
    verify,
    write_contents,
)

from saffe_cache.cli import main
from saffe_cache.core.features import CacheError, Compression
from saffe_cache.store.dtypes import from_storage
from saffe_cache.store.layout import STORAGE_DTYPES
from saffe_cache.store.reader import open_cache

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("no_fsync")]
ERROR = {"float32": 2**-10, "float16": 2**-10, "bfloat16": 2**-7, "int8": 2**-6, "float8": 2**-3}
"""Of the largest magnitude, for what was float16 or bfloat16 before."""


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_converted_cache_holds_the_same_rows(tmp_path: Path, dtype: str, compression: Compression | None) -> None:
    contents = [image_contents(13), text_contents(13)]
    write_contents(tmp_path / "old", *contents)
    path = convert(tmp_path / "old", tmp_path / "new", storage=dtype, compression=compression, shard_mb=0)
    assert verify(path)[1] == []
    old, new = open_cache(tmp_path / "old"), open_cache(path)
    assert (new.table.ids, list(new.encoders)) == (old.table.ids, list(old.encoders))
    for one in contents:
        encoder = new.encoder(one.modality)
        for name, (spec, rows) in one.arrays.items():
            found, expected = encoder.array(name).read_range(0, len(rows)), from_storage(rows, spec.dtype)
            if name.startswith("hidden_states"):
                assert encoder.array(name).spec.dtype == dtype
                assert encoder.array(name).is_mapped == (compression is None)
                np.testing.assert_allclose(found, expected, atol=ERROR[dtype] * np.abs(expected).max(), rtol=0)
            else:
                np.testing.assert_array_equal(found, expected)
        for layer in encoder.block_layers:
            for tensor, values in old.encoder(one.modality).block(layer).tensors.items():
                np.testing.assert_array_equal(encoder.block(layer).tensors[tensor], values)
        assert layer < NUM_LAYERS
    assert f"{dtype} with zstd" in describe(path) or compression is None


def test_compression_and_back_gives_the_same_files(tmp_path: Path) -> None:
    write_contents(tmp_path / "a", image_contents(13))
    convert(tmp_path / "a", tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c", compression="zstd")
    convert(tmp_path / "c", tmp_path / "d", compression="none")
    assert shard_files(tmp_path / "b") == shard_files(tmp_path / "d")
    assert shard_files(tmp_path / "b").keys() == shard_files(tmp_path / "c").keys()
    assert shard_files(tmp_path / "b") != shard_files(tmp_path / "c")


def test_invalid_conversions_raise(tmp_path: Path) -> None:
    write_contents(tmp_path / "old", image_contents(5, "float32"))
    with pytest.raises(CacheError, match="a cache exists there"):
        convert(tmp_path / "old", tmp_path / "old")
    zarr_json = next((tmp_path / "old" / "encoders").glob("image*/zarr.json"))
    content = json.loads(zarr_json.read_text())
    content["attributes"]["saffe_cache"]["finished_rows"] = 0
    zarr_json.write_text(json.dumps(content))
    with pytest.raises(CacheError, match="is unfinished"):
        convert(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new" / "zarr.json").exists()


def test_overflow_in_conversion_is_named_and_leaves_no_cache(tmp_path: Path) -> None:
    contents = image_contents(5, "float32")
    contents.arrays["hidden_states/3"][1][2, 1, 0] = 1e6
    write_contents(tmp_path / "old", contents)
    with pytest.raises(CacheError, match=r"image-tiny.*: hidden_states/3: magnitude 1e\+06 exceeds float16's 65504"):
        convert(tmp_path / "old", tmp_path / "new", storage="float16")
    with pytest.raises(CacheError, match="there is no feature cache"):
        open_cache(tmp_path / "new")
    convert(tmp_path / "old", tmp_path / "new", storage="bfloat16")
    assert verify(tmp_path / "new")[1] == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_contents(tmp_path / "old", image_contents(5))
    assert main(["cache", "convert", f"{tmp_path}/old", f"{tmp_path}/new", "--storage", "int8"]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/new"
    assert open_cache(tmp_path / "new").encoder("image").array("hidden_states/1").spec.dtype == "int8"
