"""Shards open for reading: mapped, or loaded ahead and let go of."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from store_cases import image_contents, shard_files, write_contents

from saffe_cache.core.atomic_io import Buffer
from saffe_cache.core.features import CacheError, Compression
from saffe_cache.store import rows
from saffe_cache.store.arrays import ArrayFiles
from saffe_cache.store.layout import COMPRESSIONS
from saffe_cache.store.manifest import read_encoder
from saffe_cache.store.rows import OpenShards
from saffe_cache.store.storage import Storage

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("no_fsync")]
NAME = "hidden_states/1"


class CountingStorage(Storage):
    """Which shards were fetched."""

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self.fetched: list[int] = []

    def read_buffer(self, name: str) -> Buffer:
        self.fetched.append(int(name.split("/c/")[1].split("/")[0]))
        return super().read_buffer(name)


def open_shards(root: Path, compression: Compression = "zstd") -> tuple[CountingStorage, OpenShards]:
    contents = image_contents(60, compression=compression)
    write_contents(root, contents)
    storage = CountingStorage(root)
    array = read_encoder(storage, contents.key).arrays[NAME]
    storage.fetched.clear()
    return storage, OpenShards(ArrayFiles(storage, contents.key, NAME, array.spec), array.shards)


def expected(index: int) -> np.ndarray:
    return image_contents(60).arrays[NAME][1][4 * index : 4 * index + 4].reshape(4, -1)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_many_threads_read_many_shards_with_few_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: Compression
) -> None:
    monkeypatch.setattr(rows, "_MAX_MAPPED", 3)
    monkeypatch.setattr(rows, "_SPARE_BYTES", 3 * 4 * 16)
    monkeypatch.setattr(rows, "_MIN_SPARE", 1)
    _, opened = open_shards(tmp_path, compression)
    failures: list[int] = []

    def read(seed: int) -> None:
        drawn = np.random.default_rng(seed).integers(0, 15, 60).tolist()
        failures.extend(index for index in drawn if not np.array_equal(opened[index], expected(index)))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(opened._mapped) + len(opened._loaded) == 3


def test_sequential_reads_fetch_each_shard_once_and_prefetch(tmp_path: Path) -> None:
    storage, opened = open_shards(tmp_path)
    for index in range(15):
        opened[index]
        if 0 < index < 14:
            assert index + 1 in opened._loaded
    assert sorted(storage.fetched) == list(range(15))


def test_random_reads_fetch_only_requested_shards(tmp_path: Path) -> None:
    storage, opened = open_shards(tmp_path)
    for index in (0, 7, 3, 12):
        opened[index]
    assert storage.fetched == [0, 7, 3, 12]


def test_held_shards_are_prefetched_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_SPARE_BYTES", 1)
    monkeypatch.setattr(rows, "_MIN_SPARE", 1)
    storage, opened = open_shards(tmp_path)
    opened.hold([2, 9, 4])
    for _ in range(3):
        for index in (9, 2, 0, 4, 14):
            np.testing.assert_array_equal(opened[index], expected(index))
    assert [storage.fetched.count(index) for index in (2, 4, 9)] == [1, 1, 1]
    opened.hold([4, 5])
    opened[5]
    assert set(opened._loaded) == {4, 5}
    assert storage.fetched.count(4) == 1


def test_repaired_shard_is_read_again(tmp_path: Path) -> None:
    _, opened = open_shards(tmp_path)
    name = next(name for name in shard_files(tmp_path) if f"{NAME}/c/3/" in name)
    sound = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(sound[:-9])
    for _ in range(2):
        with pytest.raises(CacheError, match=f"{NAME}/c/3/0/0: its chunk index is damaged"):
            opened[3]
    (tmp_path / name).write_bytes(sound)
    np.testing.assert_array_equal(opened[3], expected(3))


def test_mapped_shards_are_not_fetched(tmp_path: Path) -> None:
    storage, opened = open_shards(tmp_path, "none")
    for first, stop in ((0, 4), (3, 4), (1, 3)):
        opened.will_need(3, first, stop)
    np.testing.assert_array_equal(opened[3], expected(3))
    assert storage.fetched == []


def test_mapped_shard_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_MAX_MAPPED", 1)
    checked = []
    real = rows.check_rows
    monkeypatch.setattr(rows, "check_rows", lambda *given: (checked.append(given[-1]), real(*given)))
    _, opened = open_shards(tmp_path, "none")
    for index in (3, 4, 3, 3, 4):
        np.testing.assert_array_equal(opened[index], expected(index))
    assert [where.rsplit("/c/")[1] for where in checked] == ["3/0/0", "4/0/0"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_mapped_shards_keep_no_file_open(tmp_path: Path) -> None:
    _, opened = open_shards(tmp_path, "none")
    for index in range(15):
        opened[index]
    files = [os.readlink(one) for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
    assert not [name for name in files if name.startswith(str(tmp_path))]
    assert Path("/proc/self/maps").read_text().count(str(tmp_path)) == 15
    opened._mapped.clear()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
