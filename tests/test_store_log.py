"""The log of an extraction: many writers, gaps, joined records, and a second writer that comes too late."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from saffe_cache.core.features import CacheError
from saffe_cache.store.arrays import ArrayFiles
from saffe_cache.store.layout import ArraySpec, encoder_group
from saffe_cache.store.manifest import EncoderManifest, log_folder, read_encoder, write_encoder
from saffe_cache.store.storage import Storage
from saffe_cache.store.writer import EncoderWriter, Portion, begin_log, end_log
from tests.store_cases import fingerprint

SPEC = ArraySpec(row_shape=(3,), dtype="float32", dimension_names=("image", "d"), chunk_rows=2, shard_rows=4)
ROWS = np.arange(90, dtype=np.float32).reshape(30, 3)
NAME = "pooled"
TARGETS = {NAME: (SPEC, len(ROWS))}


def new_manifest() -> EncoderManifest:
    return EncoderManifest(
        fingerprint=fingerprint("image"), modality="image", num_layers=2, hidden_size=3, vector=NAME, finished_rows=0
    )


def begun(folder: Path) -> tuple[Storage, str]:
    storage, manifest = Storage(folder), new_manifest()
    begin_log(storage, manifest, TARGETS)
    return storage, manifest.key


def write_part(storage: Storage, key: str, rows: range, name: str, *, stop: int | None = None) -> None:
    """Write a part from portions that begin before it and end behind it, as blocks do; stop early if asked."""
    manifest = read_encoder(storage, key)
    with EncoderWriter(storage, manifest, TARGETS, part={NAME: rows}, name=name) as writer:
        for start in range(rows.start // 3 * 3, stop or min(len(ROWS), rows.stop + 3), 3):
            writer.put(Portion({NAME: (start, ROWS[start : start + 3])}, {start: "odd"} if start == 9 else {}))
        if stop is None:
            writer.finish_part()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("c/*/*") if path.is_file()}


def test_parts_in_any_order_make_the_files_of_one_writer(tmp_path: Path) -> None:
    one, manifest = Storage(tmp_path / "one"), new_manifest()
    with EncoderWriter(one, manifest, TARGETS) as writer:
        for start in range(0, len(ROWS), 3):
            writer.put(Portion({NAME: (start, ROWS[start : start + 3])}, {start: "odd"} if start == 9 else {}))
        writer.finish(len(ROWS))
    storage, key = begun(tmp_path / "many")
    for rows in (range(24, 30), range(8, 24), range(8)):
        before = read_encoder(storage, key)
        assert before.arrays[NAME].rows == 0
        write_part(storage, key, rows, f"part{rows.start}")
    merged = read_encoder(storage, key)
    assert (merged.arrays[NAME].rows, merged.arrays[NAME].later, merged.invalid) == (30, {}, {9: "odd"})
    end_log(storage, merged, len(ROWS))
    assert files(tmp_path / "one") == files(tmp_path / "many")
    assert read_encoder(storage, key) == read_encoder(one, key)
    assert not storage.list(f"{encoder_group(key)}/log")


def test_tail_behind_a_gap_grows(tmp_path: Path) -> None:
    storage, key = begun(tmp_path)
    write_part(storage, key, range(24, 26), "interrupted", stop=None)
    write_part(storage, key, range(26, 30), "later")
    write_part(storage, key, range(24), "first")
    manifest = read_encoder(storage, key)
    assert manifest.arrays[NAME].rows == len(ROWS)
    end_log(storage, manifest, len(ROWS))
    files = ArrayFiles(storage, key, NAME, SPEC)
    found = [files.read(index, one) for index, one in enumerate(manifest.arrays[NAME].shards)]
    assert np.array_equal(np.concatenate(found), ROWS)


def test_shards_behind_a_gap_are_known_but_are_no_rows(tmp_path: Path) -> None:
    storage, key = begun(tmp_path)
    write_part(storage, key, range(4), "a")
    write_part(storage, key, range(12, 20), "b")
    array = read_encoder(storage, key).arrays[NAME]
    assert (array.rows, sorted(array.later)) == (4, [3, 4])


def test_writer_that_dies_loses_only_open_shards(tmp_path: Path) -> None:
    storage, key = begun(tmp_path)
    write_part(storage, key, range(8, 24), "a", stop=15)  # shards 2 and 3 are full; the rest is open
    array = read_encoder(storage, key).arrays[NAME]
    assert sorted(array.later) == [2]
    rest = EncoderWriter(storage, read_encoder(storage, key), TARGETS, part={NAME: range(12, 24)})
    with pytest.raises(AssertionError, match="ends at row 12 of 24"), rest:
        rest.finish_part()


def test_log_of_many_shards_has_few_records(tmp_path: Path) -> None:
    storage, manifest = Storage(tmp_path), new_manifest()
    rows = np.arange(4 * 300 * 3, dtype=np.float32).reshape(-1, 3)
    with EncoderWriter(storage, manifest, {NAME: (SPEC, len(rows) + 1)}) as writer:
        for start in range(0, len(rows), 4):
            writer.put(Portion({NAME: (start, rows[start : start + 4])}))
    found = read_encoder(storage, manifest.key)
    assert found.arrays[NAME].rows == len(rows)
    assert len(storage.list(log_folder(found))) < 70


def test_second_writer_of_one_manifest_is_refused(tmp_path: Path) -> None:
    storage, key = begun(tmp_path)
    late = read_encoder(storage, key)
    end_log(storage, read_encoder(storage, key), 0)
    with pytest.raises(CacheError, match="was changed by another process"):
        write_encoder(storage, late)


def test_old_log_of_a_finished_extraction_is_ignored(tmp_path: Path) -> None:
    storage, key = begun(tmp_path)
    write_part(storage, key, range(4), "a")
    folder = log_folder(read_encoder(storage, key))
    kept = {name: storage.read(name) for name in storage.list(folder)}
    manifest = read_encoder(storage, key)
    end_log(storage, manifest, 0)
    for name, data in kept.items():
        storage.write(name, data)  # as if the process had died before it removed them
    begin_log(storage, manifest, TARGETS)
    assert log_folder(manifest) != folder
    assert read_encoder(storage, key).arrays[NAME].rows == 4


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"shards": {"none": {"0": {}}}, "invalid": {}}', b"[]"])
def test_damaged_record_is_named(tmp_path: Path, content: bytes) -> None:
    storage, key = begun(tmp_path)
    folder = log_folder(read_encoder(storage, key))
    storage.write(f"{folder}/writer-000000.json", content)
    with pytest.raises(CacheError, match="writer-000000"):
        read_encoder(storage, key)
