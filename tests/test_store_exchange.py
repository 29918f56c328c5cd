"""A cache as an HDF5 file, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from store_cases import (
    block_weights,
    export_hdf5,
    forget_encoder,
    group_path,
    image_contents,
    import_hdf5,
    memory_folder,
    shard_files,
    text_contents,
    verify,
    write_contents,
)

from saffe_cache.core.features import CacheError
from saffe_cache.store.layout import encoder_group
from saffe_cache.store.manifest import read_encoder, write_encoder
from saffe_cache.store.reader import open_cache
from saffe_cache.store.root import read_root
from saffe_cache.store.storage import Storage, describe_group

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("no_fsync")]
IMAGES, TEXTS = image_contents(13), text_contents(13)


@pytest.fixture(scope="module")
def cache() -> Iterator[Path]:
    with memory_folder() as folder:
        write_contents(folder, IMAGES, TEXTS)
        storage = Storage(folder)
        manifest = read_encoder(storage, IMAGES.key)
        manifest.invalid[3] = "OSError: broken"
        manifest.history.append({"config": {"note": "more than the 64 KiB of an old HDF5 attribute " * 2000}})
        write_encoder(storage, manifest)
        yield folder


@pytest.fixture
def file_path(cache: Path, tmp_path: Path) -> Path:
    return Path(export_hdf5(cache, tmp_path / "cache.h5"))


def test_imported_cache_equals_the_exported_one(cache: Path, file_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    assert import_hdf5(file_path, copy) == str(copy)
    assert shard_files(copy) == shard_files(cache)
    for file in cache.rglob("zarr.json"):
        assert json.loads((copy / file.relative_to(cache)).read_bytes()) == json.loads(file.read_bytes()), file
    assert verify(copy) == verify(cache)
    assert verify(copy)[1] == []
    assert open_cache(copy).encoder("image").block(1).spec == block_weights(1).spec
    assert sorted(tmp_path.iterdir()) == [file_path, copy]


def test_other_programs_find_the_features_in_the_file(file_path: Path) -> None:
    with h5py.File(file_path) as file:
        for contents in (IMAGES, TEXTS):
            for name, (_, rows) in contents.arrays.items():
                dataset = file[f"{encoder_group(contents.key)}/{name}"]
                assert dataset.dtype == rows.dtype
                np.testing.assert_array_equal(dataset[...], rows)
        tensor = file[f"{encoder_group(IMAGES.key)}/blocks/1/query_weight"][...]
        np.testing.assert_array_equal(tensor, block_weights(1).tensors["query_weight"])
        assert bytes(file["items/ids/utf8"][:6]) == b"item 0"


def test_through_a_url(cache: Path, file_path: Path, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/imported"
    import_hdf5(file_path, url)
    assert verify(url)[1] == []
    again = Path(export_hdf5(url, tmp_path / "again.h5"))
    import_hdf5(again, tmp_path / "copy")
    assert shard_files(tmp_path / "copy") == shard_files(cache)


def test_an_unfinished_cache_stays_unfinished(tmp_path: Path) -> None:
    """An encoder without rows, or with fewer in one array."""
    contents = IMAGES.without("hidden_states/3")
    write_contents(tmp_path / "cache", contents)
    storage = Storage(tmp_path / "cache")
    manifest = read_encoder(storage, contents.key)
    manifest.arrays["pooled"].shards.clear()
    manifest.arrays["hidden_states/1"].shards.pop()
    manifest.finished_rows = 0
    write_encoder(storage, manifest)
    import_hdf5(export_hdf5(tmp_path / "cache", tmp_path / "file.h5"), tmp_path / "copy")
    assert read_encoder(Storage(tmp_path / "copy"), contents.key) == manifest
    write_contents(tmp_path / "copy", contents)
    assert verify(tmp_path / "copy")[1] == []


def test_existing_files_and_caches_are_kept(cache: Path, file_path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=r"cache\.h5: this file exists"):
        export_hdf5(cache, file_path)
    with pytest.raises(CacheError, match="a cache exists there"):
        import_hdf5(file_path, cache)
    with pytest.raises(FileNotFoundError, match="No such file"):
        import_hdf5(tmp_path / "none.h5", tmp_path / "copy")
    with pytest.raises(CacheError, match="there is no feature cache"):
        export_hdf5(tmp_path / "none", tmp_path / "none.h5")
    assert list(tmp_path.iterdir()) == [file_path]


def test_a_damaged_cache_is_not_exported(tmp_path: Path) -> None:
    write_contents(tmp_path / "cache", IMAGES)
    shard = group_path(tmp_path / "cache", IMAGES) / "pooled" / "c" / "1" / "0"
    shard.write_bytes(b"\xff" + shard.read_bytes()[1:])
    with pytest.raises(CacheError, match=r"pooled/c/1/0: its rows differ"):
        export_hdf5(tmp_path / "cache", tmp_path / "file.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def change_number(group: Any) -> None:
    group["hidden_states/3"][5, 0, 0] += 1


def shorten(group: Any) -> None:
    rows = group["pooled"][:-1]
    del group["pooled"]
    group["pooled"] = rows


def widen(group: Any) -> None:
    rows = group["pooled"][...].astype("f8")
    del group["pooled"]
    group["pooled"] = rows


def replace_by_group(group: Any) -> None:
    del group["pooled"]
    group.create_group("pooled")


def rename_encoder(group: Any) -> None:
    manifest = json.loads(group.attrs["saffe_cache"])
    manifest["fingerprint"]["revision"] = "1"
    group.attrs["saffe_cache"] = json.dumps(manifest)


def lead_outside(group: Any) -> None:
    manifest = json.loads(group.attrs["saffe_cache"])
    manifest["arrays"]["../../../outside"] = manifest["arrays"].pop("pooled")
    group.attrs["saffe_cache"] = json.dumps(manifest)


def link(group: Any, other: Any) -> None:
    del group["pooled"]
    group["pooled"] = other


def lie_elsewhere(group: Any) -> None:
    """The numbers are those of a file of the reader's, which the importing user may read and others not."""
    rows = group["pooled"][...]
    other = Path(group.file.filename).with_name("other.bin")
    other.write_bytes(rows.tobytes())
    del group["pooled"]
    group.create_dataset("pooled", rows.shape, rows.dtype, external=[(str(other), 0, rows.nbytes)])


def be_virtual(group: Any) -> None:
    layout = h5py.VirtualLayout((13, 3), "f4")
    layout[...] = h5py.VirtualSource("other.h5", "x", (13, 3))
    del group["pooled"]
    group.create_virtual_dataset("pooled", layout)


def claim_more(group: Any) -> None:
    """A dataset of which nothing was ever written takes no byte of the file, and any memory of who reads it."""
    del group["pooled"]
    group.create_dataset("pooled", (13, 3), "f4")


def swap(group: Any, name: str, values: np.ndarray) -> None:
    """Of a type that is not stored, with attributes that are true of it."""
    attributes = json.loads(group.attrs["saffe_cache"])
    attributes["arrays"] |= describe_group("", {name: values}, {})["arrays"]
    group.attrs["saffe_cache"] = json.dumps(attributes)
    del group[name]
    group[name] = values


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change_number, r"hidden_states/3 differs from its checksums"),
        (shorten, r"pooled is \(12, 3\) float32"),
        (widen, r"pooled is \(13, 3\) float64"),
        (replace_by_group, "AttributeError"),
        (lambda group: group.pop("pooled"), "object 'pooled' doesn't exist"),
        (lambda group: group["blocks/1/query_weight"].write_direct(np.zeros((4, 4), "f4")), "query_weight differ from"),
        (lambda group: group["blocks/1"].pop("query_bias"), "query_bias differ from"),
        (lambda group: group["blocks/1"].create_dataset("more", data=[1.0]), "more differ from"),
        (lambda group: group.pop("blocks"), "component not found"),
        (lambda group: group.attrs.pop("saffe_cache"), "attribute.*saffe_cache"),
        (lambda group: group.attrs.create("saffe_cache", "[]"), "found no complete exported cache"),
        (lambda group: group.attrs.create("saffe_cache", "{}"), "expected saffe-encoder version 1"),
        (lambda group: group.parent.pop(group.name), "doesn't exist"),
        (rename_encoder, "contains the fingerprint of"),
        (lead_outside, "is no name inside a cache"),
        (
            lambda group: link(group, h5py.SoftLink(group["hidden_states/1"].name)),
            "pooled is a SoftLink, expected a hard link: all",
        ),
        (
            lambda group: link(group, h5py.ExternalLink("other.h5", "/x")),
            "pooled is a ExternalLink, expected a hard link: all data",
        ),
        (lie_elsewhere, r"pooled has \d+ bytes in the file, expected \(13, 3\) float32"),
        (be_virtual, r"pooled has \d+ bytes in the file, expected \(13, 3\) float32"),
        (claim_more, r"pooled has 0 bytes in the file, expected \(13, 3\) float32"),
        (lambda group: swap(group["blocks/1"], "query_bias", np.zeros(4)), "query_bias differ from the checksums"),
        (lambda group: group.file["items/rows/image"].write_direct(np.zeros(13, int)), "rows/image differ from"),
        (lambda group: group.file.pop("items"), "object 'items' doesn't exist"),
        (lambda group: group.file.attrs.pop("saffe_cache"), "attribute.*saffe_cache"),
        (lambda group: group.file.attrs.create("saffe_cache", '{"format_version": 2}'), "format version 2"),
    ],
)
def test_damaged_files_are_refused(file_path: Path, tmp_path: Path, damage: Callable[[Any], None], words: str) -> None:
    sound = file_path.read_bytes()
    with h5py.File(file_path, "r+") as file:
        damage(file[encoder_group(IMAGES.key)])
    with pytest.raises(CacheError, match=words):
        import_hdf5(file_path, tmp_path / "copy")
    assert read_root(Storage(tmp_path / "copy")) is None
    assert not list(tmp_path.rglob("outside"))
    file_path.write_bytes(sound)
    import_hdf5(file_path, tmp_path / "copy")  # over what the refused import left
    assert verify(tmp_path / "copy")[1] == []


@pytest.mark.parametrize("kind", [SystemError, OverflowError, MemoryError, RecursionError])
def test_all_errors_of_h5py_are_explained(
    file_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """A fuzzer saw a SystemError of its links on a damaged file."""

    def fail(*_: object) -> None:
        raise kind("broken")

    monkeypatch.setattr(h5py.File, "visititems_links", fail)
    with pytest.raises(CacheError, match=rf"found no complete exported cache \({kind.__name__}: broken\)"):
        import_hdf5(file_path, tmp_path / "copy")


@pytest.mark.parametrize("size", [0, 100, -1000])
def test_truncated_files_are_refused(file_path: Path, tmp_path: Path, size: int) -> None:
    file_path.write_bytes(file_path.read_bytes()[:size])
    with pytest.raises(CacheError, match=r"cache\.h5: found no complete exported cache"):
        import_hdf5(file_path, tmp_path / "copy")


@pytest.mark.slow
def test_flipped_bytes_are_refused_or_harmless(file_path: Path, cache: Path, tmp_path: Path) -> None:
    """Anywhere in the file: what is imported equals the exported cache, else it is refused in our own words."""
    sound = file_path.read_bytes()
    refused = 0
    for position in np.random.default_rng(1).choice(len(sound), 25, replace=False):
        file_path.write_bytes(sound[:position] + bytes([sound[position] ^ 0xFF]) + sound[position + 1 :])
        with memory_folder() as folder:
            try:
                import_hdf5(file_path, folder / "copy")
            except CacheError:
                refused += 1
                continue
            assert shard_files(folder / "copy") == shard_files(cache)
    assert refused


def test_an_array_that_was_dropped_is_not_exported(tmp_path: Path) -> None:
    write_contents(tmp_path / "cache", IMAGES)
    forget_encoder(tmp_path / "cache", IMAGES, "pooled")
    with h5py.File(export_hdf5(tmp_path / "cache", tmp_path / "file.h5")) as file:
        assert "pooled" not in file[encoder_group(IMAGES.key)]
