"""Other readers of a cache's own files: zarr-python, alone, with zarrs or on obstore, and tensorstore. See bench.py.

Each gives all rows back, equal, before it is timed. Two tasks, of plain and of compressed shards in the page cache:

- whole shards in order, opened anew in each turn, as a streamed epoch does. Ours compares every row with its checksum
  meanwhile, "checked before" in another turn; the others compare the index of a shard alone, the one checksum that
  Zarr's own metadata mention;
- random rows of an open array.

A rate is rows per second; processor time, of all threads, is what counts beside other jobs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from reading import Reader, check, row_by_row, sorted_rows
from streaming import zarrs_pipeline
from timing import Candidate, Figure, not_installed, take_turns
from writing import LAYER, array_spec, draw_states, write_array, write_plain

from saffe_cache.store.layout import COMPRESSIONS, encoder_group
from saffe_cache.store.manifest import EncoderManifest
from saffe_cache.store.reader import EncoderCache
from saffe_cache.store.storage import Storage

SHARD_MB, NUM_SHARDS, NUM_ROWS = 8, 8, 64
ROUNDS = 7
Open = Callable[[Path, EncoderManifest], Reader]
NOTE = f"{NUM_SHARDS} shards of {SHARD_MB} MiB of 50 x 768 float16, 13 rows a chunk; {NUM_ROWS} random rows a turn"


def measure(work: Path) -> list[Figure]:
    return [figure for compression in COMPRESSIONS for figure in _measure(work / compression, compression)]


def _measure(work: Path, compression: Any) -> list[Figure]:
    spec = replace(array_spec("float16"), compression=compression)
    spec = replace(spec, shard_rows=SHARD_MB * 2**20 // spec.chunk_bytes * spec.chunk_rows)
    states = np.resize(draw_states(256).astype(np.float16), (NUM_SHARDS * spec.shard_rows, *spec.row_shape))
    manifest = write_array(Storage(work), spec, states)
    readers: dict[str, Open | None] = dict(READERS)
    if compression == "none":
        write_plain(work / "plain.bin", states)
        readers["np.memmap"] = partial(open_memmap, shape=states.shape)
        opened_before = open_ours(work, manifest)
        readers["ours, checked before"] = lambda *_: opened_before
    generator = np.random.default_rng(1)
    starts = range(0, len(states), spec.shard_rows)
    tasks: dict[str, dict[str, Candidate]] = {"whole shards": {}, f"{NUM_ROWS} random rows": {}}
    for name, opened in readers.items():
        if opened is not None:
            reader = opened(work, manifest)
            check(name, ((rows, reader.rows(rows)) for rows in np.split(generator.permutation(len(states)), 4)), states)
            check(name, ((slice(i, i + spec.shard_rows), reader.block(i, i + spec.shard_rows)) for i in starts), states)
            tasks["whole shards"][name] = whole_shards(partial(opened, work, manifest), starts)
            tasks[f"{NUM_ROWS} random rows"][name] = random_rows(reader, len(states))
    titles = {title: f"{'plain' if compression == 'none' else compression}, {title}" for title in tasks}
    return [figure for title in tasks for figure in compare(titles[title], tasks[title], readers)]


def whole_shards(opened: Callable[[], Reader], starts: range) -> Candidate:
    def turn() -> int:
        reader = opened()
        return sum(len(reader.block(start, start + starts.step)) for start in starts)

    return turn


def random_rows(reader: Reader, count: int) -> Candidate:
    generator = np.random.default_rng(0)
    return lambda: len(reader.rows(generator.permutation(count)[:NUM_ROWS]))


def compare(title: str, candidates: Mapping[str, Candidate], readers: Mapping[str, Any]) -> list[Figure]:
    elapsed = take_turns(candidates, ROUNDS)
    busy = take_turns(candidates, ROUNDS, clock=time.process_time)
    figures = [elapsed.rate("ours", f"{title}: rate", "rows/s", note=NOTE)]
    for name in readers:
        if name not in candidates:
            figures.append(not_installed(f"{title}: rate over {name}'s"))
        elif name != "ours":
            figures.append(elapsed.ratio("ours", name, f"{title}: rate over {name}'s", note=NOTE))
            figures.append(busy.ratio("ours", name, f"{title}: {name}'s processor time over ours", note=NOTE))
    return figures


def open_ours(work: Path, manifest: EncoderManifest) -> Reader:
    array = EncoderCache(Storage(work), manifest).array(LAYER)
    return Reader(array.read_stored, lambda start, stop: array.read_stored(np.arange(start, stop)))


def open_memmap(work: Path, manifest: EncoderManifest, *, shape: tuple[int, ...]) -> Reader:
    mapped = np.memmap(work / "plain.bin", np.float16, "r", shape=shape)
    return Reader(lambda rows: np.asarray(mapped[rows]), lambda start, stop: np.array(mapped[start:stop]))


def open_zarr(work: Path, manifest: EncoderManifest, pipeline: str | None = None, on_obstore: bool = False) -> Reader:
    settings = {"codec_pipeline.path": pipeline} if pipeline else {}
    store: Any = work / encoder_group(manifest.key) / LAYER
    if on_obstore:
        from obstore.store import LocalStore

        store = zarr.storage.ObjectStore(LocalStore(store), read_only=True)
    with zarr.config.set(settings):
        array: Any = zarr.open_array(store, mode="r")
    by_row = row_by_row(array, array.shape[1:])

    def rows(wanted: np.ndarray) -> np.ndarray:
        """zarrs leaves all but slices to zarr-python, which takes longer than a call for each row."""
        with zarr.config.set(settings):
            return by_row(wanted) if pipeline else sorted_rows(array.get_orthogonal_selection)(wanted)

    def block(start: int, stop: int) -> np.ndarray:
        with zarr.config.set(settings):
            return np.asarray(array[start:stop])

    return Reader(rows, block)


def open_tensorstore(work: Path, manifest: EncoderManifest) -> Reader:
    import tensorstore

    files = {"driver": "file", "path": str(work / encoder_group(manifest.key) / LAYER)}
    array = tensorstore.open({"driver": "zarr3", "kvstore": files}, read=True).result()
    return Reader(
        sorted_rows(lambda rows: array[rows].read().result()), lambda start, stop: array[start:stop].read().result()
    )


READERS: Mapping[str, Open | None] = {
    "ours": open_ours,
    f"zarr-python {zarr.__version__}": open_zarr,
    "zarrs": partial(open_zarr, pipeline=zarrs_pipeline()) if zarrs_pipeline() else None,
    "zarr-python on obstore": partial(open_zarr, on_obstore=True) if find_spec("obstore") else None,
    "tensorstore": open_tensorstore if find_spec("tensorstore") else None,
}
"""None: it is not installed."""
