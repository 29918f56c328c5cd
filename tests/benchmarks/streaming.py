"""Shards that have to be loaded: compressed ones beside other readers of the same array, and far ones fetched ahead.

All read one array of zstd-compressed chunks: ours in windows of shards, the others shard by shard, as suits them best.
A far storage is a local one that takes a while to answer, as an object store does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from timing import Candidate, Figure, not_installed, take_turns
from writing import LAYER, array_spec, draw_states, write_array

from saffe_cache.core.atomic_io import Buffer
from saffe_cache.store.layout import ArraySpec, encoder_group
from saffe_cache.store.manifest import EncoderManifest
from saffe_cache.store.reader import EncoderCache
from saffe_cache.store.rows import RowReader
from saffe_cache.store.storage import Storage
from saffe_cache.training.batches import draw_order

SHARD_MB, NUM_SHARDS, WINDOW, BATCH = 16, 12, 3, 64
LATENCY = 0.1
ROUNDS = 5
NOTE = f"{NUM_SHARDS} shards of {SHARD_MB} MiB of float16 noise, zstd; decompressed in threads, one a shard"
FAR_NOTE = f"the same, {1000 * LATENCY:.0f} ms until a shard comes; a window of {WINDOW} shards is fetched ahead"


class FarStorage(Storage):
    """Takes a while to answer."""

    def read_buffer(self, name: str) -> Buffer:
        time.sleep(LATENCY)
        return super().read_buffer(name)


def measure(work: Path) -> list[Figure]:
    spec = compressed_spec()
    states = np.resize(draw_states(256).astype(np.float16), (NUM_SHARDS * spec.shard_rows, *spec.row_shape))
    manifest = write_array(Storage(work), spec, states)
    path = work / encoder_group(manifest.key) / LAYER
    opened = partial(zarr.open_array, path, mode="r")
    near = {
        "ours": windows(Storage(work), manifest, states),
        "zarr-python": shard_by_shard(opened, spec.shard_rows, states),
    }
    if pipeline := zarrs_pipeline():
        near["zarrs"] = shard_by_shard(opened, spec.shard_rows, states, pipeline)
    far = {
        "held": windows(FarStorage(work), manifest, states),
        "not held": windows(FarStorage(work), manifest, states, holds=False),
    }
    rounds, distant = take_turns(near, ROUNDS), take_turns(far, 2)
    label = "compressed, window by window: rate over {}'s"
    return [
        rounds.rate("ours", "compressed, window by window: rate", "MB/s", 1e-6, note=NOTE),
        rounds.ratio("ours", "zarr-python", label.format("zarr-python"), note=NOTE),
        rounds.ratio("ours", "zarrs", label.format("zarr-python with zarrs"), note=NOTE)
        if pipeline
        else not_installed(label.format("zarr-python with zarrs")),
        distant.ratio("held", "not held", "far storage: rate with windows held over without", note=FAR_NOTE),
    ]


def compressed_spec() -> ArraySpec:
    spec = array_spec("float16")
    chunks = max(1, SHARD_MB * 2**20 // spec.chunk_bytes)
    return replace(spec, shard_rows=chunks * spec.chunk_rows, compression="zstd")


def windows(storage: Storage, manifest: EncoderManifest, states: np.ndarray, *, holds: bool = True) -> Candidate:
    """A shuffled epoch, as a streamed training reads it; without `holds` rows alone are asked for."""

    def turn() -> int:
        array = EncoderCache(storage, manifest).array(LAYER)
        return sum(_checked(rows, array.read_stored(rows), states) for rows in _batches(array, len(states), holds))

    return turn


def _batches(array: RowReader, count: int, holds: bool) -> Iterator[np.ndarray]:
    order = draw_order(np.arange(count) // array.spec.shard_rows, WINDOW, 0, 0)
    assert order.windows is not None
    held = -1
    for start in range(0, count, BATCH):
        last = int(order.windows[start : start + BATCH][-1]) + 1
        if holds and last != held:
            held = last
            array.hold(order.pairs[(order.windows >= order.windows[start]) & (order.windows <= last)])
        yield np.sort(order.pairs[start : start + BATCH])


def shard_by_shard(opened: Callable[[], Any], rows: int, states: np.ndarray, pipeline: str | None = None) -> Candidate:
    """Another library's array, in slices of a shard's rows."""

    def turn() -> int:
        with zarr.config.set({"codec_pipeline.path": pipeline} if pipeline else {}):
            array = opened()
            parts = [slice(start, start + rows) for start in range(0, len(states), rows)]
            return sum(_checked(part, np.asarray(array[part]), states) for part in parts)

    return turn


def _checked(rows: np.ndarray | slice, found: np.ndarray, states: np.ndarray) -> int:
    """Bytes; the first and the last row must be right."""
    expected = states[rows] if isinstance(rows, slice) else states[rows[[0, -1]]]
    if not (np.array_equal(found[0], expected[0]) and np.array_equal(found[-1], expected[-1])):
        raise AssertionError(f"{rows} are not the rows that were written")
    return int(found.nbytes)


def zarrs_pipeline() -> str | None:
    """The codec pipeline written in Rust, where it is installed."""
    try:
        import zarrs
    except ImportError:
        return None
    return f"{zarrs.__name__}.ZarrsCodecPipeline"
