"""Rows from an object store: in pieces, checked as far as pieces can be, and copies on the local disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from s3_server import BUCKET, S3Proxy

from saffe_cache.core.features import CacheError
from saffe_cache.store import pieces
from saffe_cache.store.arrays import ArrayFiles
from saffe_cache.store.layout import ArraySpec, ShardEntry, describe_shard
from saffe_cache.store.rows import RowReader
from saffe_cache.store.storage import Storage

SHARDS, SHARD_ROWS = 3, 64
SPEC = ArraySpec(row_shape=(2048,), dtype="float16", chunk_rows=8, shard_rows=SHARD_ROWS, dimension_names=("row", "x"))
ROWS = np.random.default_rng(0).standard_normal((SHARDS * SHARD_ROWS, 2048)).astype(np.float16)


@pytest.fixture
def files(s3: S3Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArrayFiles:
    monkeypatch.setattr(pieces, "_GAP_BYTES", SPEC.row_bytes)
    files = ArrayFiles(Storage(f"s3://{BUCKET}/{tmp_path.name}/cache"), "key", "pooled", SPEC)
    for index in range(SHARDS):
        files.write(index, shard(index))
    s3.sent_bytes, s3.requests[:] = 0, []
    return files


def shard(index: int) -> np.ndarray:
    return ROWS[index * SHARD_ROWS : (index + 1) * SHARD_ROWS]


def entries() -> list[ShardEntry]:
    return [describe_shard(SPEC, shard(index)) for index in range(SHARDS)]


def gets(s3: S3Proxy) -> int:
    return sum(method == "GET" for method, _ in s3.requests)


def test_few_rows_are_read_in_pieces(s3: S3Proxy, files: ArrayFiles) -> None:
    reader = RowReader(files, entries())
    for wanted in ([5], [190, 7, 70, 70, 5, 8], [3, 66], [191]):
        np.testing.assert_array_equal(reader.read_stored(np.array(wanted)), ROWS[wanted])
    assert s3.sent_bytes < 12 * SPEC.row_bytes
    assert gets(s3) == 1 + 3 + 2 + 1  # 5, 7 and 8 lie near one another


def test_rows_one_after_the_other_come_from_checked_shards(s3: S3Proxy, files: ArrayFiles) -> None:
    reader = RowReader(files, entries())
    for start in range(0, len(ROWS), 4):
        np.testing.assert_array_equal(reader.read_range(start, start + 4), ROWS[start : start + 4])
    assert gets(s3) == SHARDS
    damage(files, 1)
    with pytest.raises(CacheError, match="pooled/c/1/0: its rows differ from the manifest's checksum"):
        RowReader(files, entries()).read_range(0, len(ROWS))


def test_many_and_few_rows_of_shards_mix(files: ArrayFiles) -> None:
    reader, wanted = RowReader(files, entries()), np.array([3, *range(70, 110), 1, 130, 2])
    np.testing.assert_array_equal(reader.read_stored(wanted), ROWS[wanted])


def test_held_rows_are_requested_ahead(s3: S3Proxy, files: ArrayFiles) -> None:
    reader, wanted = RowReader(files, entries()), np.array([9, 1, 150, *range(64, 100)])
    reader.hold(wanted)
    np.testing.assert_array_equal(reader.read_stored(wanted), ROWS[wanted])
    requests = gets(s3)
    np.testing.assert_array_equal(reader.read_stored(np.array([150, 1])), ROWS[[150, 1]])
    assert gets(s3) == requests == 4
    np.testing.assert_array_equal(reader.read_stored(np.array([150, 30])), ROWS[[150, 30]])


def test_truncated_and_missing_objects_are_noticed(files: ArrayFiles) -> None:
    name = files.shard(2)
    data = files.storage.read(name)
    for left in (data[:-1], data[:100], None):
        files.storage.remove(name)
        if left is not None:
            files.storage.write(name, left)
        with pytest.raises(CacheError, match="pooled/c/2/0 is missing or truncated"):
            RowReader(files, entries()).read_stored(np.array([190]))


def test_replaced_object_is_compared_with_its_checksum(files: ArrayFiles) -> None:
    reader = RowReader(files, entries())
    reader.read_stored(np.array([190]))
    damage(files, 2)
    with pytest.raises(CacheError, match="pooled/c/2/0: its rows differ from the manifest's checksum"):
        reader.read_stored(np.array([150]))


def test_shard_that_has_grown_is_read_on(files: ArrayFiles) -> None:
    """A writer extends the last shard while somebody reads by the manifest from before."""
    short = [*entries()[:2], describe_shard(SPEC, shard(2)[:20])]
    files.write(2, shard(2)[:20])
    reader = RowReader(files, short)
    np.testing.assert_array_equal(reader.read_stored(np.array([140])), ROWS[[140]])
    files.write(2, shard(2))
    np.testing.assert_array_equal(reader.read_stored(np.array([145, 131])), ROWS[[145, 131]])


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAFFE_CACHE_DIR", str(tmp_path / "copies"))
    return tmp_path / "copies"


def test_whole_shards_are_kept_on_the_local_disk(s3: S3Proxy, files: ArrayFiles, copies: Path) -> None:
    np.testing.assert_array_equal(RowReader(files, entries()).read_range(0, len(ROWS)), ROWS)
    assert gets(s3) == len(list(copies.iterdir())) == SHARDS
    for wanted in (np.arange(len(ROWS)), np.array([100, 2, 180])):
        np.testing.assert_array_equal(RowReader(files, entries()).read_stored(wanted), ROWS[wanted])
    assert gets(s3) == SHARDS
    one = sorted(copies.iterdir())[0]
    one.write_bytes(b"\1" + one.read_bytes()[1:])
    np.testing.assert_array_equal(RowReader(files, entries()).read_range(0, len(ROWS)), ROWS)
    assert gets(s3) == SHARDS + 1


def test_shard_is_kept_once_half_was_read_in_pieces(s3: S3Proxy, files: ArrayFiles, copies: Path) -> None:
    reader = RowReader(files, entries())
    for start in range(1, 40, 4):
        wanted = np.array([start, start + 2])
        np.testing.assert_array_equal(reader.read_stored(wanted), ROWS[wanted])
        assert not copies.exists()
    for start in range(1, 60, 4):
        reader.read_stored(np.array([start, start + 2]))
    assert len(list(copies.iterdir())) == 1
    assert s3.sent_bytes < 2 * SHARD_ROWS * SPEC.row_bytes


def test_copies_stay_below_their_bound(files: ArrayFiles, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = SPEC.shard_file_bytes(SHARD_ROWS)
    monkeypatch.setenv("SAFFE_CACHE_DIR_GB", str(2.5 * one / 1e9))
    np.testing.assert_array_equal(RowReader(files, entries()).read_range(0, len(ROWS)), ROWS)
    assert len(list(copies.iterdir())) == 2


def damage(files: ArrayFiles, index: int) -> None:
    """Replace a shard by one of the same size with another row."""
    rows = shard(index).copy()
    rows[50] += 1
    files.write(index, rows)
