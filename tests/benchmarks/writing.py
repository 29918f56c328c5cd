"""Writing: the cache's writer, with its checksums, statistics and fsync, beside a plain file of the same bytes.

The writer gets rows in their storage type, as the encoder's thread hands them over, and commits shard by shard. The
plain file is written from start to end by the same portions, and synced once.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from timing import Figure, take_turns

from saffe_cache.core.features import Fingerprint
from saffe_cache.store.dtypes import to_storage
from saffe_cache.store.layout import STORAGE_DTYPES, ArraySpec, choose_rows
from saffe_cache.store.manifest import ArrayManifest, EncoderManifest
from saffe_cache.store.reader import EncoderCache
from saffe_cache.store.storage import Storage
from saffe_cache.store.writer import EncoderWriter, Portion

ROW_SHAPE = (50, 768)
LAYER = "hidden_states/1"
SHARD_BYTES = 64 * 2**20
"""As `--shard-mb` of the extraction has it where nothing is said."""
PORTION_ROWS = 32
TURN_SHARDS = 6
ROUNDS = 7
TARGET = 0.7
NOTE = (
    f"{TURN_SHARDS} shards of 64 MiB in portions of {PORTION_ROWS} rows; both end with fsync, the plain file once, "
    "ours every shard and every commit. Checksums and statistics are taken beside the write"
)


def measure(work: Path) -> list[Figure]:
    return [figure for dtype in STORAGE_DTYPES for figure in _measure_type(work, dtype)]


def _measure_type(work: Path, dtype: str) -> list[Figure]:
    spec = array_spec(dtype)
    drawn = to_storage(draw_states(256), dtype)
    rows = np.resize(drawn, (TURN_SHARDS * spec.shard_rows, *drawn.shape[1:]))
    cache, plain = work / "cache.zarr", work / "plain.bin"

    def ours() -> int:
        write_array(Storage(cache), spec, rows)
        return rows.nbytes

    def baseline() -> int:
        write_plain(plain, rows)
        return rows.nbytes

    def clear() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        plain.unlink(missing_ok=True)
        os.sync()  # else the disk gives the room back in the next turn's time

    check(Storage(cache), write_array(Storage(cache), spec, rows), rows)
    rounds = take_turns({"ours": ours, "plain": baseline}, ROUNDS, before=clear)
    clear()
    return [
        rounds.ratio("ours", "plain", f"{dtype}: rate over a plain file's", at_least=TARGET, note=NOTE),
        rounds.rate("ours", f"{dtype}: rate", "MB/s", 1e-6),
    ]


def check(storage: Storage, manifest: EncoderManifest, rows: np.ndarray) -> None:
    """
    Raises:
        AssertionError: other rows are read than were written.
    """
    array = EncoderCache(storage, manifest).array(LAYER)
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        if not np.array_equal(array.read_stored(np.arange(start, start + len(part))), part):
            raise AssertionError(f"rows {start} and on are not those that were written")


def draw_states(num_rows: int) -> np.ndarray:
    """float32 [num_rows, *ROW_SHAPE]."""
    return np.random.default_rng(0).standard_normal((num_rows, *ROW_SHAPE), dtype=np.float32)


def array_spec(dtype: str) -> ArraySpec:
    """As the extraction would choose it."""
    names = ("image", "token", "feature")
    one = ArraySpec(row_shape=ROW_SHAPE, dtype=dtype, chunk_rows=1, shard_rows=1, dimension_names=names)
    chunk_rows, shard_rows = choose_rows(one.row_bytes, SHARD_BYTES)
    return ArraySpec(
        row_shape=ROW_SHAPE, dtype=dtype, chunk_rows=chunk_rows, shard_rows=shard_rows, dimension_names=names
    )


def write_array(storage: Storage, spec: ArraySpec, rows: np.ndarray) -> EncoderManifest:
    """Write rows in their storage type as the one array of an encoder, LAYER."""
    manifest = EncoderManifest(
        fingerprint=Fingerprint({"modality": "image", "model_id": "drawn"}),
        modality="image",
        num_layers=1,
        hidden_size=ROW_SHAPE[-1],
        vector="pooled",
        arrays={LAYER: ArrayManifest(spec)},
    )
    with EncoderWriter(storage, manifest, {LAYER: (spec, len(rows))}) as writer:
        for start in range(0, len(rows), PORTION_ROWS):
            writer.put(Portion({LAYER: (start, rows[start : start + PORTION_ROWS])}))
        writer.finish(len(rows))
    return manifest


def write_plain(path: Path, rows: np.ndarray) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(rows), PORTION_ROWS):
            file.write(rows[start : start + PORTION_ROWS].data)
        os.fsync(file.fileno())
