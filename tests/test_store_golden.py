"""Every release reads the caches of every format version, made by the release that introduced it."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr
from store_cases import export_hdf5, import_hdf5, memory_folder, verify, without_fsync

from saffe_cache.core.features import BlockSpec, Fingerprint
from saffe_cache.store.reader import open_cache

pytestmark = pytest.mark.filterwarnings("error")
IMAGE_KEY, TEXT_KEY = "image-vit-61d36c9f68ed", "text-bert-1dd78aebf458"


@pytest.fixture(scope="module")
def golden() -> Iterator[Path]:
    with memory_folder() as folder, without_fsync():
        with tarfile.open(Path(__file__).parent / "golden" / "v1.tar.xz") as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)  # 3.11.4 brings it
            archive.extractall(folder)  # noqa: S202 — our own
        yield folder / "v1.zarr"


def numbers(*shape: int) -> np.ndarray:
    return (np.arange(np.prod(shape)).reshape(shape) / 4).astype(np.float32)


def test_version_1_is_intact(golden: Path) -> None:
    assert verify(golden) == (16, [])
    cache = open_cache(golden)
    assert list(cache.encoders) == [IMAGE_KEY, TEXT_KEY]


def test_the_table_of_version_1(golden: Path) -> None:
    table = open_cache(golden).table
    assert table.ids == tuple(f"train/{number}.png" for number in range(6))
    assert table.splits == ("train", "train", "train", "train", "test", "train")
    assert table.problems == ("", "", "", "", "", "OSError: cut short")
    assert table.rows["image"].tolist() == [0, 1, 2, 3, 4, -1]
    assert table.rows["audio"].tolist() == [-1] * 6
    assert [row.tolist() for row in table.captions] == [[0, 1], [4, 1], [5, 1], [6, 1], [], []]
    assert [row.tolist() for row in table.labels] == [[0, 1], [1], [0, 1], [1], [0, 1], []]
    assert table.class_names == ("fox", "polar_bear")
    assert [row.tolist() for row in table.class_texts] == [[2], [3]]
    texts = ("caption 0", "ein Bär \ud800", "a photo of a fox.", "a photo of a polar bear.")
    assert table.inputs["text"].texts == (*texts, "caption 1", "caption 2", "caption 3")
    hashes = [row.tobytes() for row in table.inputs["image"].content_hash]
    assert hashes == [hashlib.sha256(bytes([number])).digest() for number in range(5)]


def test_the_image_encoder_of_version_1(golden: Path) -> None:
    encoder = open_cache(golden).encoder("image")
    manifest = encoder.manifest
    assert manifest.fingerprint == Fingerprint({"modality": "image", "model_id": "golden/vit", "revision": "0" * 40})
    assert (manifest.num_layers, manifest.hidden_size, manifest.vector, manifest.finished_rows) == (3, 4, "pooled", 5)
    assert manifest.invalid == {3: "ValueError: no picture"}
    assert manifest.history == [{"config": {"data": "golden"}, "saffe_cache": "0.1.0"}]
    assert (manifest.layers, encoder.block_layers) == ([2, 3], [2])
    states = numbers(5, 2, 4)
    states[3] = np.nan
    rows = np.array([4, 0, 3, 1])
    tokens = encoder.tokens(rows, (2, 3))
    assert tokens.mask is None
    assert [state.dtype for state in tokens.states] == [np.float16, np.float32]
    np.testing.assert_array_equal(tokens.states[0], states[rows])
    np.testing.assert_array_equal(tokens.states[1], states[rows] * 2)
    np.testing.assert_array_equal(encoder.vectors(rows), states[rows, 0])
    assert encoder.usable(np.arange(-1, 6)).tolist() == [False, True, True, True, False, True, False]
    good = states[[0, 1, 2, 4]].astype(np.float64)
    found = encoder.statistics("hidden_states/2")
    assert (found.mean, found.std, found.max_magnitude) == pytest.approx((good.mean(), good.std(), 9.75))


def test_the_block_of_version_1(golden: Path) -> None:
    block = open_cache(golden).encoder("image").block(2)
    assert block.spec == BlockSpec(num_attention_heads=2, norm_first=True, activation="gelu", layer_norm_eps=1e-6)
    assert sorted(block.tensors) == ["query_bias", "query_weight"]
    np.testing.assert_array_equal(block.tensors["query_weight"], np.eye(4))
    np.testing.assert_array_equal(block.tensors["query_bias"], np.arange(4))


def test_the_text_encoder_of_version_1(golden: Path) -> None:
    encoder = open_cache(golden).encoder("text")
    assert encoder.offsets.tolist() == [0, 1, 3, 6, 7, 9, 12, 13]
    tokens = encoder.tokens(np.array([2, 0]), (1,))
    assert tokens.mask is not None
    assert tokens.mask.tolist() == [[True, True, True], [True, False, False]]
    np.testing.assert_array_equal(tokens.states[0][0], numbers(13, 4)[3:6])
    np.testing.assert_array_equal(tokens.states[0][1], [*numbers(1, 4), [0] * 4, [0] * 4])
    np.testing.assert_array_equal(encoder.vectors(np.arange(7)), -numbers(7, 3))
    np.testing.assert_array_equal(encoder.array("pooled").read_range(0, 7), numbers(7, 4))


def test_other_programs_read_version_1(golden: Path) -> None:
    stored = zarr.open_group(golden, mode="r")[f"encoders/{TEXT_KEY}/hidden_states/1"]
    np.testing.assert_array_equal((stored[...].astype("u4") << 16).view("f4"), numbers(13, 4))
    with xarray.open_datatree(golden, engine="zarr", consolidated=False, chunks=None) as tree:
        encoder = tree[f"encoders/{IMAGE_KEY}"]
        assert encoder["hidden_states/3"].sizes == {"image": 5, "token": 2, "hidden": 4}
        np.testing.assert_array_equal(encoder["pooled"].sel(image=4), numbers(5, 2, 4)[4, 0])


def test_version_1_through_hdf5(golden: Path, tmp_path: Path) -> None:
    import_hdf5(export_hdf5(golden, tmp_path / "v1.h5"), tmp_path / "v1.zarr")
    assert verify(tmp_path / "v1.zarr") == (16, [])
