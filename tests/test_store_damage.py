"""Damaged caches are found by `verify`, and refused by readers, in words that name the place."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from store_cases import (
    flip,
    group_path,
    image_contents,
    make_spec,
    memory_folder,
    text_contents,
    verify,
    without_fsync,
    write_contents,
)

from saffe_cache.core.atomic_io import Buffer
from saffe_cache.core.features import CacheError
from saffe_cache.store.layout import ShardEntry, decode_shard, describe_shard, encode_shard, encoder_group, shard_name
from saffe_cache.store.manifest import read_encoder, write_encoder
from saffe_cache.store.reader import open_cache
from saffe_cache.store.root import read_root
from saffe_cache.store.storage import Storage

pytestmark = pytest.mark.filterwarnings("error")

IMAGES, TEXTS = image_contents(13), text_contents(13)
SHARDS = sum(math.ceil(len(rows) / spec.shard_rows) for one in (IMAGES, TEXTS) for spec, rows in one.arrays.values())


@pytest.fixture(scope="module")
def sound_cache() -> Iterator[Path]:
    with memory_folder() as folder, without_fsync():
        write_contents(folder, IMAGES, TEXTS)
        yield folder


@pytest.fixture
def cache(sound_cache: Path) -> Iterator[Path]:
    """A copy to be damaged."""
    with memory_folder() as folder:
        yield shutil.copytree(sound_cache, folder / "cache")


def test_intact_cache_has_no_problems(sound_cache: Path) -> None:
    assert verify(sound_cache) == (SHARDS, [])


@pytest.mark.parametrize("contents", [IMAGES, TEXTS], ids=lambda contents: contents.modality)
def test_every_flipped_bit_of_counted_rows_and_index_is_found(cache: Path, contents) -> None:
    """In the tail shard of each array: the rows that count, and the index behind the padding."""
    for name, (spec, rows) in contents.arrays.items():
        last = (len(rows) - 1) // spec.shard_rows
        counted = (len(rows) - last * spec.shard_rows) * spec.row_bytes
        shard = group_path(cache, contents) / name / "c" / str(last) / "/".join("0" * len(spec.row_shape))
        size = shard.stat().st_size
        for position in [*range(0, counted, 7), counted - 1, *range(size - spec.index_bytes, size)]:
            flip(shard, position)
            part = "its rows differ" if position < counted else "its chunk index is damaged"
            _, [problem] = verify(cache)
            assert str(shard.relative_to(cache)) in problem
            assert part in problem
            flip(shard, position)
    assert verify(cache)[1] == []


def test_every_flipped_bit_of_a_compressed_shard_is_found() -> None:
    """By whoever verifies, and by whoever reads a row of it. In a chunk's header some bits change no number."""
    contents = image_contents(8, compression="zstd")
    with memory_folder() as folder, without_fsync():
        write_contents(folder, contents)
        shard = group_path(folder, contents) / "hidden_states/1/c/1/0/0"
        starts = np.frombuffer(shard.read_bytes()[-36:-4], "<u8")[::2]
        assert len(starts) == 2
        for position in range(shard.stat().st_size):
            flip(shard, position)
            problems = verify(folder)[1]
            array = open_cache(folder).encoder("image").array("hidden_states/1")
            if problems or not any(start <= position < start + 4 for start in starts):
                assert len(problems) == 1
                assert re.search("its (rows differ|chunk index is damaged|chunk . cannot be decompr)", problems[0])
                with pytest.raises(CacheError, match="hidden_states/1/c/1/0/0: "):
                    array.read(np.array([6, 0]))
            else:
                np.testing.assert_array_equal(array.read(np.arange(8)), contents.arrays["hidden_states/1"][1])
            flip(shard, position)
        assert verify(folder)[1] == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(("damage", "words"), [(Path.unlink, "missing"), (cut, "truncated"), (empty, "truncated")])
def test_missing_and_truncated_shards_are_found_and_refused(
    cache: Path, damage: Callable[[Path], None], words: str
) -> None:
    name = f"{encoder_group(IMAGES.key)}/hidden_states/3/c/1/0/0"
    damage(cache / name)
    assert verify(cache)[0] == SHARDS
    [problem] = verify(cache)[1]
    assert name in problem
    assert words in problem
    array = open_cache(cache).encoder("image").array("hidden_states/3")
    np.testing.assert_array_equal(array.read(np.arange(4)), IMAGES.arrays["hidden_states/3"][1][:4])
    with pytest.raises(CacheError, match=rf"{re.escape(name)} is missing or truncated"):
        array.read(np.array([0, 4]))


@pytest.mark.parametrize("contents", [IMAGES, TEXTS], ids=lambda contents: contents.modality)
def test_flipped_bit_is_found_before_its_shard_is_read(cache: Path, contents) -> None:
    """Also where the shard is memory-mapped; rows that lie in others can be read."""
    encoder = open_cache(cache).encoder(contents.modality)
    for name, (spec, rows) in contents.arrays.items():
        if len(rows) <= spec.shard_rows:
            continue
        shard = group_path(cache, contents) / name / "c/1" / "/".join("0" * len(spec.row_shape))
        flip(shard, spec.row_bytes - 1)
        array = encoder.array(name)
        assert len(array.read(np.arange(spec.shard_rows))) == spec.shard_rows
        for use in (array.read, array.hold, array.read_stored):
            with pytest.raises(CacheError, match=f"{name}/c/1.*: its rows differ from the manifest's checksum"):
                use(np.array([0, spec.shard_rows]))


def test_swapped_shards_are_found(cache: Path) -> None:
    folder = group_path(cache, IMAGES) / "hidden_states/1/c"
    (folder / "0").rename(folder / "x")
    (folder / "1").rename(folder / "0")
    (folder / "x").rename(folder / "1")
    problems = verify(cache)[1]
    assert len(problems) == 2
    assert all(f"hidden_states/1/c/{index}/0/0: its rows differ" in problems[index] for index in (0, 1))


@pytest.mark.parametrize("name", ["tables/{part}/items/c/0", "encoders/{key}/blocks/1/query_weight/c/0/0"])
@pytest.mark.parametrize("damage", [Path.unlink, cut, lambda path: flip(path, 0)])
def test_tables_and_blocks_are_verified(cache: Path, name: str, damage: Callable[[Path], None]) -> None:
    [part] = open_cache(cache).root.tables
    damage(cache / name.format(key=IMAGES.key, part=part))
    count, [problem] = verify(cache)
    assert count == SHARDS
    assert name.format(key=IMAGES.key, part=part).rsplit("/c/")[0].rsplit("/", 1)[1] in problem
    with pytest.raises(CacheError):
        open_cache(cache).encoder("image").block(1)


@pytest.mark.parametrize("damage", [Path.unlink, cut, lambda path: flip(path, 0), lambda path: flip(path, -1)])
def test_damaged_inputs_are_refused_when_used(cache: Path, damage: Callable[[Path], None]) -> None:
    """They are not read when a cache is opened."""
    [part] = open_cache(cache).root.tables
    damage(cache / f"tables/{part}/text/c/0")
    count, [problem] = verify(cache)
    assert count == SHARDS
    inputs = open_cache(cache).table.inputs
    assert len(inputs["image"].content_hash) == 13
    for column in ("texts", "content_hash"):
        with pytest.raises(CacheError, match=rf"tables/{part}/text"):
            getattr(inputs["text"], column)
    assert f"tables/{part}/text" in problem


@pytest.mark.parametrize("change", [{"shape": [3, 3]}, {"data_type": "float64"}, {"codecs": []}, {"shape": None}])
def test_metadata_for_other_programs_is_verified(cache: Path, change: dict[str, object]) -> None:
    path = group_path(cache, IMAGES) / "pooled" / "zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    assert f"pooled/zarr.json misstates {next(iter(change))}" in verify(cache)[1][0]
    path.write_text("{")
    assert "pooled/zarr.json is not JSON" in verify(cache)[1][0]


def test_unreadable_files_are_reported_as_problems(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Storage.read_buffer

    def read(self: Storage, name: str) -> Buffer:
        if name.endswith("pooled/c/0/0"):
            raise OSError(5, "Input/output error", name)
        return real(self, name)

    monkeypatch.setattr(Storage, "read_buffer", read)
    assert [problem.startswith("[Errno 5]") for problem in verify(cache)[1]] == [True, True]


def test_no_cache_is_refused(tmp_path: Path) -> None:
    assert read_root(Storage(tmp_path)) is None
    for action in (open_cache, verify):
        with pytest.raises(CacheError, match=r"there is no feature cache\. Make one with saffe extract"):
            action(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"zarr_format": 3, "node_type": "group", "attributes": {}}', "found a Zarr group, expected a feature cache"),
        ('{"zarr_format": 3, "node_type": "group"}', "found a Zarr group, expected a feature cache"),
        ('{"attributes": {"saffe_cache": 1}}', "found a Zarr group, expected a feature cache"),
        ('{"attributes": {"saffe_cache": {"format_version": 3}}}', "format version 3, this release reads 1 and 2"),
        (
            '{"attributes": {"saffe_cache": {"format_version": true}}}',
            "format version True, this release reads 1 and 2",
        ),
        ('{"attributes": {"saffe_cache": {"format_version": 2, "table": 1, "encoders": []}}}', "misstates 'tables'"),
        ('{"attributes": {"saffe_cache": {"format_version": 2, "tables": [], "encoders": []}}}', "expected names such"),
        (
            '{"attributes": {"saffe_cache": {"format_version": 2, "tables": ["../1-0a1b2c3d"], "encoders": []}}}',
            "expected names such as",
        ),
        ('{"attributes": {"saffe_cache": {"format_version": 1}}}', "lacks or misstates 'table'"),
        ('{"attributes": {"saffe_cache": {"format_version": 1, "table": "x", "encoders": []}}}', "misstates"),
        ('{"attributes": {"saffe_cache": {"format_version": 1, "table": 1, "encoders": 5}}}', "misstates encoders: 5"),
        ('{"attributes": {"saffe_cache": {"format_version": 1, "table": Infinity, "encoders": []}}}', "table: inf"),
        ('{"attributes": {"saffe_cache": {"format_version": 1, "table": 1, "encoders": "abc"}}}', "a list of keys"),
        ('{"attributes": {"saffe_cache": {"format_version": 1, "table": 1, "encoders": [".."]}}}', "no name inside"),
        (
            '{"attributes": {"saffe_cache": {"format_version": 1, "table": 1, "encoders": ["\\u0000"]}}}',
            "no name inside",
        ),
        ("[" * 100_000, "zarr.json is not JSON"),
        ("{", "zarr.json is not JSON"),
        ("\xff", "zarr.json is not JSON"),
        ("[]", "zarr.json is not a JSON object"),
    ],
)
def test_other_roots_are_refused(cache: Path, text: str, words: str) -> None:
    (cache / "zarr.json").write_bytes(text.encode("latin-1"))
    for action in (open_cache, verify):
        with pytest.raises(CacheError, match=words):
            action(cache)


FIELDS = ["fingerprint", "modality", "num_layers", "hidden_size", "vector", "finished_rows", "invalid", "history"]


@pytest.mark.parametrize("field", [*FIELDS, "arrays"])
def test_a_manifest_that_lacks_a_field_is_refused(cache: Path, field: str) -> None:
    path = group_path(cache, IMAGES) / "zarr.json"
    content = json.loads(path.read_bytes())
    del content["attributes"]["saffe_cache"][field]
    path.write_text(json.dumps(content))
    words = rf"{encoder_group(IMAGES.key)}: its manifest lacks or misstates '{field}'"
    with pytest.raises(CacheError, match=words):
        open_cache(cache)
    count, [problem] = verify(cache)  # the other encoder is verified all the same
    assert 0 < count < SHARDS
    assert re.search(words, problem)


@pytest.mark.parametrize("field", ["row_shape", "dtype", "chunk_rows", "shard_rows", "dimension_names", "shards"])
def test_a_manifest_whose_array_lacks_a_field_is_refused(cache: Path, field: str) -> None:
    path = group_path(cache, IMAGES) / "zarr.json"
    content = json.loads(path.read_bytes())
    del content["attributes"]["saffe_cache"]["arrays"]["pooled"][field]
    path.write_text(json.dumps(content))
    with pytest.raises(CacheError, match=f"lacks or misstates '{field}'"):
        open_cache(cache)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update({"encoding-version": 3}), "saffe-encoder version 3, expected saffe-encoder version 1 or 2"),
        (lambda m: m.update({"encoding-type": "x"}), "x version 1, expected saffe-encoder"),
        (lambda m: m.update({"modality": "../../smell"}), "modality"),
        (lambda m: m.update({"arrays": []}), "misstates"),
        (lambda m: m["fingerprint"].pop("model_id"), "fingerprint: "),
        (lambda m: m.update({"invalid": {"first": "x"}}), "misstates"),
        (lambda m: m["fingerprint"].update({"revision": "1"}), "contains the fingerprint of image-tiny-image-"),
        (lambda m: m["arrays"]["pooled"].update({"dtype": "float64"}), "dtype: 'float64'"),
        (lambda m: m["arrays"]["pooled"].update({"chunk_rows": 0}), "chunk_rows 0"),
        (lambda m: m["arrays"]["pooled"]["shards"][0].update({"rows": 5}), r"rows of the shards: \[5, 6, 1\]"),
        (lambda m: m["arrays"]["pooled"]["shards"][2].update({"rows": 7}), r"rows of the shards: \[6, 6, 7\]"),
        (lambda m: m["arrays"]["pooled"]["shards"][0].update({"crc": 5}), "crc"),
        (lambda m: m["arrays"]["pooled"]["shards"][0].update({"rows": 6.0}), r"rows: 6\.0, expected int"),
        (lambda m: m["arrays"]["pooled"]["shards"][0].update({"mean": "x"}), "mean: 'x', expected float"),
        (lambda m: m["arrays"]["pooled"]["shards"][0].update({"m2": -1.0}), r"m2: -1\.0, expected 0 or more"),
        (lambda m: m["arrays"]["pooled"]["shards"][0].update({"count": 10**30}), "count: 1000"),
        (lambda m: m["arrays"]["pooled"].update({"row_shape": [0]}), r"row_shape \(0,\): expected lengths"),
        (lambda m: m["arrays"]["pooled"].update({"row_shape": "3"}), "row_shape: '3', expected a list"),
        (lambda m: m["arrays"]["pooled"].update({"chunk_rows": 2**40, "shard_rows": 2**40}), "expected below 2 GiB"),
        (lambda m: m["arrays"].update({"hidden_states/01": m["arrays"].pop("hidden_states/1")}), "hidden_states/01"),
        (lambda m: m["arrays"].update({"hidden_states/x": m["arrays"].pop("hidden_states/1")}), "hidden_states/x"),
        (lambda m: m.update({"finished_rows": float("inf")}), "finished_rows: inf, expected a whole number"),
        (lambda m: m.update({"num_layers": -1}), "num_layers: -1"),
        (lambda m: m.update({"invalid": {"9" * 30: "x"}}), "expected the number of an input"),
        (lambda m: m["fingerprint"].update({"modality": "../image"}), "the encoder's modality"),
        (lambda m: m["fingerprint"].update({"nan": float("nan")}), "Out of range float"),
        (lambda m: m.update({"fingerprint": [["model_id", "x"], ["modality", "image"], [1, 2]]}), "expected an object"),
    ],
)
def test_inconsistent_manifest_is_refused(cache: Path, change: Callable[[dict], None], words: str) -> None:
    path = group_path(cache, IMAGES) / "zarr.json"
    content = json.loads(path.read_bytes())
    change(content["attributes"]["saffe_cache"])
    path.write_text(json.dumps(content))
    with pytest.raises(CacheError, match=words):
        read_encoder(Storage(cache), IMAGES.key)


@pytest.mark.parametrize(
    "text", ["not JSON", "[]", "{}", '{"attributes": null}', '{"attributes": {"saffe_cache": []}}']
)
def test_a_manifest_of_another_kind_is_refused(cache: Path, text: str) -> None:
    (group_path(cache, IMAGES) / "zarr.json").write_text(text)
    with pytest.raises(CacheError, match=rf"{encoder_group(IMAGES.key)}"):
        read_encoder(Storage(cache), IMAGES.key)


def test_a_missing_encoder_is_refused(cache: Path) -> None:
    shutil.rmtree(group_path(cache, IMAGES))
    with pytest.raises(CacheError, match=rf"{encoder_group(IMAGES.key)}/zarr.json is missing"):
        open_cache(cache)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["spec"].update({"rotary": True}), "rotary"),
        (lambda m: m["spec"].pop("norm_first"), "norm_first"),
        (lambda m: m["spec"].update({"num_attention_heads": "2"}), "num_attention_heads: '2', expected int"),
        (lambda m: m["arrays"]["query_weight"].update({"shape": [-4, -4]}), "shape: -4, expected a whole number"),
        (lambda m: m["arrays"]["query_weight"].update({"shape": [float("inf")]}), "shape: inf"),
        (lambda m: m.pop("spec"), "spec"),
        (lambda m: m.pop("arrays"), "arrays"),
        (lambda m: m["arrays"].pop("query_bias") and m["arrays"]["query_weight"].update({"crc32c": 1}), "query_weight"),
        (lambda m: m["arrays"]["query_weight"].update({"dtype": "object"}), "object"),
        (lambda m: m["arrays"]["query_weight"].update({"shape": [4]}), "query_weight"),
        (lambda m: m["arrays"].update({"../../../../x": {"shape": [1], "dtype": "uint8"}}), "no name inside a cache"),
    ],
)
def test_damaged_block_attributes_are_refused(cache: Path, change: Callable[[dict], None], words: str) -> None:
    path = group_path(cache, IMAGES) / "blocks" / "1" / "zarr.json"
    content = json.loads(path.read_bytes())
    change(content["attributes"]["saffe_cache"])
    path.write_text(json.dumps(content))
    with pytest.raises(CacheError, match=words):
        open_cache(cache).encoder("image").block(1)


@pytest.mark.parametrize("change", [{0: 1}, {5: 2}, {13: 1}], ids=["not from 0", "decreasing", "decreasing at the end"])
def test_offsets_that_do_not_ascend_are_refused(cache: Path, change: dict[int, int]) -> None:
    """With a checksum that is true of them: else a text would have the tokens of others, or more than memory holds."""
    storage, offsets = Storage(cache), TEXTS.offsets.copy()
    for place, value in change.items():
        offsets[place] = value
    manifest = read_encoder(storage, TEXTS.key)
    spec = manifest.arrays["offsets"].spec
    parts = [offsets[start : start + spec.shard_rows] for start in range(0, len(offsets), spec.shard_rows)]
    manifest.arrays["offsets"].shards = [describe_shard(spec, part) for part in parts]
    for index, part in enumerate(parts):
        storage.write(f"{encoder_group(TEXTS.key)}/offsets/{shard_name(index, spec)}", *encode_shard(spec, part))
    write_encoder(storage, manifest)
    with pytest.raises(CacheError, match="its offsets do not ascend from 0 for 13 inputs"):
        open_cache(cache).encoder("text").tokens(np.array([0, 1]), (2,))


def test_chunk_larger_than_memory_is_refused() -> None:
    """Numpy is asked for it before a byte is decompressed."""
    spec = make_spec("float32", (2**20,), 500, 2**20, compression="zstd")
    index = np.full((spec.shard_rows // spec.chunk_rows, 2), 2**64 - 1, "<u8")
    index[:, 0], index[:, 1] = np.arange(len(index)), 1
    data = bytes(len(index)) + index.tobytes()
    data += google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    with pytest.raises(
        CacheError, match=r"shard: (not enough memory for its \d+ decompressed bytes|its chunk 0 cannot)"
    ):
        decode_shard(spec, ShardEntry(rows=spec.shard_rows, crc32c=0), data, "shard")
