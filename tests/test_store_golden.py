"""Every release reads the caches of every format version, made by the release that introduced it."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pytest
import xarray
import zarr
from store_cases import export_hdf5, import_hdf5, memory_folder, verify, without_fsync

from saffe_cache.core.features import BlockSpec, Fingerprint
from saffe_cache.core.items import Item
from saffe_cache.store.parts import read_table, remove_unlisted, write_part
from saffe_cache.store.reader import open_cache
from saffe_cache.store.root import RootManifest, existing_root, write_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import TableBuilder

pytestmark = pytest.mark.filterwarnings("error")
IMAGE_KEY, TEXT_KEY = "image-vit-61d36c9f68ed", "text-bert-1dd78aebf458"


def unpacked(folder: Path, version: int) -> Path:
    with tarfile.open(Path(__file__).parent / "golden" / f"v{version}.tar.xz") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)  # 3.11.4 brings it
        archive.extractall(folder)  # noqa: S202 — our own
    return folder / f"v{version}.zarr"


@pytest.fixture(scope="module")
def golden() -> Iterator[Path]:
    with memory_folder() as folder, without_fsync():
        yield unpacked(folder, 1)


@pytest.fixture(scope="module")
def golden_2() -> Iterator[Path]:
    with memory_folder() as folder, without_fsync():
        yield unpacked(folder, 2)


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


def test_version_1_grows_into_version_2(tmp_path: Path) -> None:
    with without_fsync():
        cache = unpacked(tmp_path, 1)
        storage = Storage(cache)
        root = existing_root(storage)
        old = read_table(storage, root)
        builder = TableBuilder(old, ("a photo of a {}.",))
        assert builder.add(Item(id="train/6.png", split="train", captions=("caption 6", "caption 0"), labels=("fox",)))
        part = builder.part()
        assert part is not None
        new = RootManifest(write_part(storage, root, part), root.encoders)
        write_root(storage, new, root)
        remove_unlisted(storage, new)
    assert (root.version, existing_root(storage).version, len(new.tables)) == (1, 2, 1)
    table = open_cache(cache).table
    assert table.ids == (*old.ids, "train/6.png")
    assert [row.tolist() for row in table.captions] == [[0, 1], [4, 1], [5, 1], [6, 1], [], [], [7, 0]]
    assert table.class_names == old.class_names
    assert verify(cache) == (16, [])
    assert not (cache / "tables" / "1").exists()


# ---- version 2 ----


def read_parts(cache: Path) -> tuple[dict[int, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """The items by number, and the rows of all other files, read as FORMAT.md says, with pyarrow alone."""
    root = json.loads((cache / "zarr.json").read_bytes())["attributes"]["saffe_cache"]
    assert root["format_version"] == 2
    items: dict[int, dict[str, Any]] = {}
    others: dict[str, list[dict[str, Any]]] = {}
    for name in root["tables"]:
        part = cache / "tables" / name
        attributes = json.loads((part / "zarr.json").read_bytes())["attributes"]["saffe_cache"]
        assert (attributes["encoding-type"], attributes["encoding-version"]) == ("saffe-items", 2)
        for kind, described in attributes["arrays"].items():
            data = (part / kind / "c" / "0").read_bytes()
            assert described == {"shape": [len(data)], "dtype": "uint8", "crc32c": google_crc32c.value(data)}
            rows = pa.ipc.open_file(data).read_all().to_pylist()
            assert len(rows) == attributes["rows"][kind]
            if kind == "items":
                items |= {row.pop("number"): row for row in rows}
            else:
                others.setdefault(kind, []).extend(rows)
    return items, others


def test_version_2_is_intact(golden_2: Path) -> None:
    assert verify(golden_2) == (16, [])
    cache = open_cache(golden_2)
    assert list(cache.encoders) == [IMAGE_KEY, TEXT_KEY]
    assert len(cache.root.tables) == 2


def test_the_table_of_version_2(golden_2: Path) -> None:
    table = open_cache(golden_2).table
    assert table.ids == tuple(f"train/{number}.png" for number in range(7))
    assert table.splits == ("train", "train", "train", "train", "test", "train", "train")
    assert table.problems == ("", "", "", "", "", "OSError: cut short", "")
    assert table.rows["image"].tolist() == [0, 1, 2, 3, 4, -1, 5]
    assert [row.tolist() for row in table.captions] == [[0, 1], [0], [5, 1], [6, 1], [], [], [7, 1]]
    assert [row.tolist() for row in table.labels] == [[0, 1], [1], [0, 1], [1], [0, 1], [], [0, 1]]
    assert table.class_names == ("fox", "polar_bear")
    assert [row.tolist() for row in table.class_texts] == [[2], [3]]
    texts = ("caption 0", "ein Bär \ud800", "a photo of a fox.", "a photo of a polar bear.")
    assert table.inputs["text"].texts == (*texts, *(f"caption {number}" for number in (1, 2, 3, 6)))
    hashes = [row.tobytes() for row in table.inputs["image"].content_hash]
    assert hashes == [hashlib.sha256(bytes([number])).digest() for number in (0, 1, 2, 3, 4, 6)]


def test_another_reader_finds_the_same_in_version_2(golden_2: Path) -> None:
    table, (items, others) = open_cache(golden_2).table, read_parts(golden_2)
    texts = table.inputs["text"].texts
    assert texts is not None
    assert sorted(items) == list(range(len(table)))
    for number, item in items.items():
        found = table.ids[number], table.splits[number], table.problems[number]
        assert found == tuple(item[name].decode() for name in ("id", "split", "problem"))
        assert [int(rows[number]) for rows in table.rows.values()] == [item[kind] for kind in table.rows]
        assert table.captions[number].tolist() == item["captions"]
        assert table.labels[number].tolist() == item["labels"]
    assert [one["name"].decode() for one in others["classes"]] == list(table.class_names)
    assert [one["texts"] for one in others["classes"]] == [rows.tolist() for rows in table.class_texts]
    assert [one["text"].decode("utf-8", "surrogatepass") for one in others["text"]] == list(texts)
    for kind, inputs in table.inputs.items():
        assert b"".join(one["content_hash"] for one in others[kind]) == inputs.content_hash.tobytes()
    for one in others["text"]:
        assert hashlib.sha256(one["text"]).digest() == one["content_hash"]


def test_version_2_through_hdf5(golden_2: Path, tmp_path: Path) -> None:
    """The file holds the table in one piece, and so does the new cache."""
    import_hdf5(export_hdf5(golden_2, tmp_path / "v2.h5"), tmp_path / "v2.zarr")
    assert verify(tmp_path / "v2.zarr") == (16, [])
    mine, theirs = (open_cache(path).table for path in (tmp_path / "v2.zarr", golden_2))
    assert (mine.ids, mine.splits, mine.problems) == (theirs.ids, theirs.splits, theirs.problems)
    assert mine.inputs["text"].texts == theirs.inputs["text"].texts
    assert [row.tolist() for row in mine.captions] == [row.tolist() for row in theirs.captions]


def test_other_programs_read_version_2(golden_2: Path) -> None:
    members = dict(zarr.open_group(golden_2, mode="r").members(max_depth=None))
    with xarray.open_datatree(golden_2, engine="zarr", consolidated=False, chunks=None) as tree:
        assert tree[f"encoders/{IMAGE_KEY}"]["hidden_states/3"].sizes == {"image": 5, "token": 2, "hidden": 4}
    for name in open_cache(golden_2).root.tables:
        file = pa.ipc.open_file(pa.BufferReader(members[f"tables/{name}/items"][...]))  # type: ignore[index]
        assert file.read_all()["id"][-1].as_py() == b"train/5.png" or name.startswith("2-")
