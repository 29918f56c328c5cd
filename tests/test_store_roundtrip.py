"""What was written is read back equal: by our reader, by other programs, in any portions and behind a URL."""

from __future__ import annotations

import math
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import tensorstore
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import (
    NUM_LAYERS,
    WIDTH,
    block_weights,
    describe,
    fingerprint,
    group_path,
    image_contents,
    make_spec,
    memory_folder,
    random_rows,
    text_contents,
    verify,
    write_contents,
)

from saffe_cache.core.features import BlockSpec, BlockWeights, CacheError, Compression
from saffe_cache.store import reader
from saffe_cache.store.dtypes import from_storage, is_scaled
from saffe_cache.store.layout import COMPRESSIONS, STORAGE_DTYPES, ArraySpec, encoder_group
from saffe_cache.store.manifest import EncoderManifest, read_encoder
from saffe_cache.store.parts import read_table, write_table
from saffe_cache.store.reader import EncoderCache, open_cache
from saffe_cache.store.root import RootManifest, write_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import TableBuilder
from saffe_cache.store.writer import EncoderWriter, Portion, write_blocks

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("no_fsync")]
quick = settings(deadline=None, max_examples=25, derandomize=True)


@pytest.mark.parametrize(
    "contents",
    [image_contents(11), text_contents(11), image_contents(11, compression="zstd"), image_contents(11, "int8", "zstd")],
    ids=["image", "text", "compressed", "compressed int8"],
)
def test_other_programs_read_the_same(tmp_path: Path, contents) -> None:
    write_contents(tmp_path, contents)
    for name, (spec, rows) in contents.arrays.items():
        path = group_path(tmp_path, contents) / name
        found = zarr.open_array(path, mode="r")
        np.testing.assert_array_equal(found[...], rows)
        assert found.metadata.dimension_names == spec.dimension_names
        store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        np.testing.assert_array_equal(tensorstore.open(store, read=True).result().read().result(), rows)
        group, _, leaf = f"{encoder_group(contents.key)}/{name}".rpartition("/")
        with xarray.open_zarr(tmp_path, group=group, consolidated=False, chunks=None) as dataset:
            np.testing.assert_array_equal(dataset[leaf].to_numpy(), rows)
            assert dataset[leaf].dtype == spec.numpy_dtype
            assert dataset[leaf].dims == spec.dimension_names


def test_other_programs_find_all_arrays_from_the_root(tmp_path: Path) -> None:
    contents = image_contents(5)
    write_contents(tmp_path, contents)
    members = dict(zarr.open_group(tmp_path, mode="r").members(max_depth=None))
    names = {f"{encoder_group(contents.key)}/{name}" for name in contents.arrays}
    [part] = open_cache(tmp_path).root.tables
    assert names | {f"tables/{part}/items", f"{encoder_group(contents.key)}/blocks/1/query_weight"} <= set(members)
    with pa.ipc.open_file(pa.BufferReader(members[f"tables/{part}/items"][...])) as items:
        assert items.read_all()["image"].to_pylist() == list(range(5))


@st.composite
def writings(draw: st.DrawFn) -> list[tuple[ArraySpec, np.ndarray, list[list[tuple[int, int]]]]]:
    """For each array: how it is stored, its rows, and sessions of portions (first row, row behind the last)."""
    drawn = []
    num_sessions = draw(st.integers(1, 3))
    for seed in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from([*STORAGE_DTYPES, "int64"]))
        spec = make_spec(
            dtype,
            draw(st.sampled_from([(3,), (2, 2)] if is_scaled(dtype) else [(), (3,), (2, 2)])),
            draw(st.integers(1, 4)),
            draw(st.integers(1, 4)),
            compression=draw(st.sampled_from(COMPRESSIONS)),
        )
        position, sessions = 0, []
        for _ in range(num_sessions):
            portions = []
            for _ in range(draw(st.integers(0, 5))):
                first = draw(st.integers(max(0, position - 6), position))
                portions.append((first, first + draw(st.integers(0, 20))))
                position = max(position, portions[-1][1])
            sessions.append(portions)
        drawn.append((spec, random_rows(spec, position, seed), sessions))
    return drawn


@quick
@given(writings(), st.randoms(use_true_random=False))
def test_any_portions_in_any_sessions_are_read_back(drawn, random) -> None:
    with memory_folder() as folder:
        storage = Storage(folder)
        manifest = EncoderManifest(fingerprint("image"), "image", NUM_LAYERS, WIDTH, "a0")
        for session in range(len(drawn[0][2])):
            ends = [max([0, *(stop for part in sessions[: session + 1] for _, stop in part)]) for *_, sessions in drawn]
            targets = {f"a{i}": (spec, ends[i]) for i, (spec, *_) in enumerate(drawn)}
            with EncoderWriter(storage, manifest, targets) as writer:
                for i, (_, rows, sessions) in enumerate(drawn):
                    for first, stop in sessions[session]:
                        writer.put(Portion({f"a{i}": (first, rows[first:stop])}))
                writer.finish(1)
            manifest = read_encoder(storage, manifest.key)
            cache = EncoderCache(storage, manifest)
            for i, (spec, rows, _) in enumerate(drawn):
                written = rows[: ends[i]]
                wanted = np.array([random.randrange(ends[i]) for _ in range(9 if ends[i] else 0)], np.int64)
                found = cache.array(f"a{i}")
                np.testing.assert_array_equal(found.read_stored(wanted), written[wanted])
                np.testing.assert_array_equal(found.read(wanted), from_storage(written[wanted], spec.dtype))
                np.testing.assert_array_equal(found.read_range(0, ends[i]), from_storage(written, spec.dtype))
                assert len(found) == ends[i]
                assert len(manifest.arrays[f"a{i}"].shards) == math.ceil(ends[i] / spec.shard_rows)


def test_a_portion_that_leaves_a_gap_is_refused(tmp_path: Path) -> None:
    spec = make_spec("float32", (), 1, 4)
    manifest = EncoderManifest(fingerprint("image"), "image", NUM_LAYERS, WIDTH, "a")
    writer = EncoderWriter(Storage(tmp_path), manifest, {"a": (spec, 4)})
    with pytest.raises(AssertionError, match="rows 0…1"), writer:
        writer.put(Portion({"a": (1, random_rows(spec, 3, 0))}))


def test_finish_refuses_arrays_that_lack_rows(tmp_path: Path) -> None:
    spec = make_spec("float32", (), 1, 4)
    manifest = EncoderManifest(fingerprint("image"), "image", NUM_LAYERS, WIDTH, "a")
    with EncoderWriter(Storage(tmp_path), manifest, {"a": (spec, 4)}) as writer:
        writer.put(Portion({"a": (0, random_rows(spec, 3, 0))}))
        with pytest.raises(AssertionError, match="row 3 of 4"):
            writer.finish(4)


def test_equal_shards_are_committed_one_by_one(tmp_path: Path) -> None:
    """A second shard with the very entry of the first counts too."""
    spec = make_spec("float32", (), 1, 2)
    storage = Storage(tmp_path)
    manifest = EncoderManifest(fingerprint("image"), "image", NUM_LAYERS, WIDTH, "a")
    with EncoderWriter(storage, manifest, {"a": (spec, 9)}) as writer:
        for first in (0, 2):
            writer.put(Portion({"a": (first, np.zeros(2, np.float32))}))
    assert read_encoder(storage, manifest.key).arrays["a"].rows == 4


def test_rows_beyond_the_array_are_refused(tmp_path: Path) -> None:
    write_contents(tmp_path, image_contents(5))
    array = open_cache(tmp_path).encoder("image").array("pooled")
    for row in (-1, 5):
        with pytest.raises(CacheError, match=rf"pooled has 5 rows, row {row} was requested"):
            array.read(np.array([0, row]))
    assert array.read(np.zeros(0, np.int64)).shape == (0, 3)


def test_texts_are_padded_with_a_mask(tmp_path: Path) -> None:
    contents = text_contents(10)
    write_contents(tmp_path, contents)
    rows = np.array([2, 0, 2, 7])
    tokens = open_cache(tmp_path).encoder("text").tokens(rows, (2,))
    lengths = np.diff(contents.offsets)[rows]
    assert tokens.mask.sum(axis=1).tolist() == lengths.tolist()
    flat = from_storage(contents.arrays["hidden_states/2"][1], "bfloat16")
    for state, row, length in zip(tokens.states[0], rows, lengths, strict=True):
        np.testing.assert_array_equal(state[:length], flat[contents.offsets[row] : contents.offsets[row + 1]])
        assert not state[length:].any()


def test_vectors_usable_rows_and_description(tmp_path: Path) -> None:
    contents = text_contents(10)
    write_contents(tmp_path, contents)
    encoder = open_cache(tmp_path).encoder("text")
    encoder.manifest.invalid[3] = "broken"
    np.testing.assert_array_equal(encoder.vectors(np.array([4, 1])), contents.arrays["projected"][1][[4, 1]])
    assert encoder.usable(np.array([-1, 0, 3, 9, 10])).tolist() == [False, True, False, True, False]
    found = encoder.statistics("pooled")
    numbers = contents.arrays["pooled"][1].astype(np.float64)
    assert (found.mean, found.std) == pytest.approx((numbers.mean(), numbers.std()))
    described = describe(tmp_path)
    assert f"{contents.key}: 3 layers of width 4, 10 inputs, 0 unreadable" in described
    assert f"hidden_states/2: {contents.offsets[-1]} x 4 bfloat16" in described
    assert "caption 'text 9'" in described


def test_an_encoder_is_chosen_by_modality_and_name(tmp_path: Path) -> None:
    write_contents(tmp_path, image_contents(5))
    cache = open_cache(tmp_path)
    assert cache.encoder("image", "tiny").key == fingerprint("image").key
    with pytest.raises(CacheError, match="it holds no text encoder"):
        cache.encoder("text")
    with pytest.raises(CacheError, match="0 image encoders named 'other'; it holds image-tiny"):
        cache.encoder("image", "other")
    with pytest.raises(CacheError, match=r"has no hidden_states/2; it has hidden_states/1, hidden_states/3, pooled"):
        cache.encoder("image").array("hidden_states/2")


@pytest.mark.parametrize("position_bias", [0, 32])
def test_blocks_are_read_back_with_their_spec(tmp_path: Path, position_bias: int) -> None:
    spec = BlockSpec(
        num_attention_heads=12,
        norm_first=False,
        activation="gelu",
        layer_norm_eps=1e-12,
        is_causal=True,
        relative_attention_num_buckets=position_bias,
        relative_attention_max_distance=77,
    )
    block = BlockWeights(spec, {"query_weight": np.eye(3), "mlp_in_bias": np.zeros(5, np.float16)})
    write_contents(tmp_path, image_contents(5))
    storage, key = Storage(tmp_path), fingerprint("image").key
    storage.remove_folder(f"{encoder_group(key)}/blocks/1")
    write_blocks(storage, key, {1: block})
    found = open_cache(tmp_path).encoder("image").block(1)
    assert found.spec == spec
    assert {name: tensor.dtype for name, tensor in found.tensors.items()} == dict.fromkeys(block.tensors, np.float32)
    for name, tensor in block.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], tensor)
    write_blocks(storage, key, {1: block_weights(0)})  # is there already
    assert open_cache(tmp_path).encoder("image").block(1).spec == spec


@pytest.mark.parametrize("layer", [0, NUM_LAYERS])
def test_missing_blocks_are_refused(tmp_path: Path, layer: int) -> None:
    write_contents(tmp_path, image_contents(5))
    with pytest.raises(CacheError, match=rf"no block {layer}; blocks are cached for \[1\]"):
        open_cache(tmp_path).encoder("image").block(layer)


def test_reader_survives_replacement_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_contents(tmp_path, image_contents(5))
    old = reader.read_root(Storage(tmp_path))
    write_contents(tmp_path, image_contents(8))
    assert old is not None
    new = reader.read_root(Storage(tmp_path))
    answers = iter([old, new])
    monkeypatch.setattr(reader, "read_root", lambda storage: next(answers))
    assert len(open_cache(tmp_path).table) == 8


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_cache_behind_a_url(tmp_path: Path, compression: Compression) -> None:
    url = f"memory://{tmp_path.name}/cache"
    for count in (7, 13):  # growth reads the tail shards back
        contents = [image_contents(count, compression=compression), text_contents(count)]
        write_contents(url, *contents)
    assert verify(url)[1] == []
    cache = open_cache(url)
    assert len(cache.table) == 13
    for one in contents:
        encoder = cache.encoder(one.modality)
        for name, (spec, rows) in one.arrays.items():
            wanted = np.random.default_rng(0).integers(0, len(rows), 20)
            np.testing.assert_array_equal(encoder.array(name).read(wanted), from_storage(rows[wanted], spec.dtype))
    assert cache.encoder("image").block(1).spec == block_weights(1).spec
    files = fsspec.filesystem("memory")
    shard = f"/{tmp_path.name}/cache/{encoder_group(contents[0].key)}/pooled/c/1/0"
    data = files.cat_file(shard)
    for damaged in (b"\xff" + data[1:], data[:-1], None):
        files.rm(shard)
        if damaged is not None:
            files.pipe_file(shard, damaged)
        assert "pooled/c/1/0" in verify(url)[1][0]
        with pytest.raises(CacheError, match="pooled/c/1/0"):
            open_cache(url).encoder("image").array("pooled").read(np.array([7]))


def test_a_local_url_is_a_local_folder(tmp_path: Path) -> None:
    write_contents(f"file://{tmp_path}/cache", image_contents(5))
    assert verify(tmp_path / "cache") == (5, [])
    storage = Storage(f"file://{tmp_path}/cache")
    assert storage.local_path("zarr.json") == tmp_path / "cache" / "zarr.json"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a//b", ""])
def test_names_outside_the_cache_are_refused(tmp_path: Path, name: str) -> None:
    for storage in (Storage(tmp_path / "cache"), Storage("memory://cache")):
        for action, data in (
            (storage.read, ()),
            (storage.exists, ()),
            (storage.write, (b"",)),
            (storage.remove_folder, ()),
        ):
            with pytest.raises(CacheError, match="is no name inside a cache"):
                action(name, *data)


def test_an_empty_table_and_no_encoder(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    root = RootManifest(write_table(storage, TableBuilder(None, ()).build()), ())
    write_root(storage, root)
    assert len(read_table(storage, root)) == 0
    assert verify(tmp_path) == (0, [])
    assert describe(tmp_path).endswith(": 0 items")
