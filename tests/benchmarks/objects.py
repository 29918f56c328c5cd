"""Caches in an object store: writing, streamed training and random rows, from a real S3 server on this machine.

The server is the one of the tests, written in Python, behind a proxy that adds the latency of a store in the same
region. It is far slower than a store with large files; what counts is what we add to it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from streaming import shard_by_shard, windows
from timing import Candidate, Figure, not_installed, take_turns
from writing import LAYER, array_spec, draw_states, write_array

from saffe_cache.store.layout import encoder_group
from saffe_cache.store.manifest import EncoderManifest
from saffe_cache.store.reader import EncoderCache
from saffe_cache.store.storage import Storage

sys.path.append(str(Path(__file__).parents[1]))
from s3_server import BUCKET, s3_server

SHARD_MB, NUM_SHARDS, LATENCY, NUM_ROWS, REQUESTS = 4, 12, 0.02, 64, 32
ROUNDS = 5
NAMES = (
    "S3: rate of writing shards, over a local disk's",
    "S3: rate of a streamed epoch, over a local disk's",
    "S3: random rows, over as many requests by the bare client",
    "S3: random rows in pieces, over those by whole shards",
)
OTHERS = {"zarr-python on obstore": "obstore", "tensorstore": "tensorstore"}
"""Other readers of the same objects, and the package that each needs."""
NOTE = f"{NUM_SHARDS} shards of {SHARD_MB} MiB, plain float16; moto behind a proxy that waits {1e3 * LATENCY:.0f} ms"


def measure(work: Path) -> list[Figure]:
    if not (find_spec("obstore") and find_spec("moto")):
        return [not_installed(name) for name in (*NAMES, *map(_streamed_over, OTHERS))]
    with _server():
        return _measured(work)


def _streamed_over(name: str) -> str:
    return f"S3: rate of a streamed epoch, over {name}'s"


def _measured(work: Path) -> list[Figure]:
    spec = array_spec("float16")
    spec = replace(spec, shard_rows=max(1, SHARD_MB * 2**20 // spec.chunk_bytes) * spec.chunk_rows)
    states = np.resize(draw_states(256).astype(np.float16), (NUM_SHARDS * spec.shard_rows, *spec.row_shape))
    numbers = count()

    def writing(root: str) -> Candidate:
        def turn() -> int:
            write_array(Storage(f"{root}/{next(numbers)}"), spec, states)
            return int(states.nbytes)

        return turn

    near, far = Storage(work / "cache"), Storage(f"s3://{BUCKET}/cache")
    manifest = write_array(near, spec, states)
    write_array(far, spec, states)
    written = take_turns({"local": writing(str(work)), "s3": writing(f"s3://{BUCKET}")}, 2)
    others = {
        name: shard_by_shard(partial(open_elsewhere, name, far, manifest), spec.shard_rows, states)
        for name, package in OTHERS.items()
        if find_spec(package)
    }
    epochs = {"local": windows(near, manifest, states), "s3": windows(far, manifest, states), **others}
    streamed = take_turns(epochs, 3)
    scattered = take_turns(
        {
            "ours": rows_by_us(far, manifest, states),
            "client": rows_by_client(far, manifest),
            "whole": rows_by_shards(far, manifest, states),
        },
        ROUNDS,
    )
    rows_note = f"{NOTE}; {NUM_ROWS} rows of {spec.row_bytes / 1e3:.0f} kB"
    return [
        written.ratio("s3", "local", NAMES[0], note=NOTE),
        streamed.ratio("s3", "local", NAMES[1], note=NOTE),
        *(
            streamed.ratio("s3", name, _streamed_over(name), note=NOTE)
            if name in others
            else not_installed(_streamed_over(name))
            for name in OTHERS
        ),
        scattered.ratio("ours", "client", NAMES[2], note=f"{rows_note}, {REQUESTS} threads with obstore.get_range"),
        scattered.ratio("ours", "whole", NAMES[3], note=rows_note),
    ]


def _drawn(states: np.ndarray) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(0)
    while True:
        yield generator.integers(1, len(states), NUM_ROWS)


def rows_by_us(storage: Storage, manifest: EncoderManifest, states: np.ndarray) -> Candidate:
    array, drawn = EncoderCache(storage, manifest).array(LAYER), _drawn(states)

    def turn() -> int:
        rows = next(drawn)
        np.testing.assert_array_equal(array.read_stored(rows), states[rows])
        return len(rows)

    return turn


def rows_by_client(storage: Storage, manifest: EncoderManifest) -> Candidate:
    """One request a row."""
    import obstore
    from obstore.store import S3Store

    spec = manifest.arrays[LAYER].spec
    store = S3Store.from_url(storage.root, client_options={"allow_http": True})
    names = [name for name in storage.list("encoders") if f"/{LAYER}/c/" in name]
    names.sort(key=lambda name: int(name.split("/c/")[1].split("/")[0]))
    drawn, threads = _drawn(np.empty(NUM_SHARDS * spec.shard_rows)), ThreadPoolExecutor(REQUESTS)

    def get(row: int) -> int:
        shard, within = divmod(row, spec.shard_rows)
        start = within * spec.row_bytes
        return len(bytes(obstore.get_range(store, names[shard], start=start, length=spec.row_bytes)))

    def turn() -> int:
        found = list(threads.map(get, next(drawn).tolist()))
        assert set(found) == {spec.row_bytes}
        return len(found)

    return turn


def open_elsewhere(name: str, storage: Storage, manifest: EncoderManifest) -> Any:
    """The array by another reader; slices of it are read when they become an array of numpy's."""
    folder = f"{encoder_group(manifest.key)}/{LAYER}"
    if name == "tensorstore":
        import tensorstore

        place = {"endpoint": os.environ["AWS_ENDPOINT_URL"], "aws_region": os.environ["AWS_REGION"]}
        files = {"driver": "s3", "bucket": BUCKET, "path": f"{storage.root.split(BUCKET)[1][1:]}/{folder}/", **place}
        return tensorstore.open({"driver": "zarr3", "kvstore": files}, read=True).result()
    import zarr
    from obstore.store import S3Store

    store = S3Store.from_url(f"{storage.root}/{folder}", client_options={"allow_http": True})
    return zarr.open_array(zarr.storage.ObjectStore(store, read_only=True), mode="r")


def rows_by_shards(storage: Storage, manifest: EncoderManifest, states: np.ndarray) -> Candidate:
    """Every shard is loaded that has one of the rows, as before there were pieces."""
    drawn = _drawn(states)

    def turn() -> int:
        array, rows = EncoderCache(storage, manifest).array(LAYER), next(drawn)
        array._pieces = None
        np.testing.assert_array_equal(array.read_stored(rows), states[rows])
        return len(rows)

    return turn


@contextmanager
def _server() -> Iterator[None]:
    before = dict(os.environ)
    with s3_server() as server:
        server.latency_seconds = LATENCY
        os.environ.update(server.environment)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
