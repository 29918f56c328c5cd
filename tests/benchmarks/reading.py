"""Reading: random batches and consecutive blocks of a local cache, beside a plain memory map and other formats.

All formats hold the same rows, and each has to give all of them back, equal, before it is timed. Files are in the page
cache and one process reads: what is compared is the way from there into a batch. Each format is read in the quickest
way that we know of. Those that stream, LitData and WebDataset, do what they are made for: a shuffled pass from the
first file to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import zarr
from safetensors import safe_open
from safetensors.numpy import save_file
from timing import Candidate, Figure, not_installed, take_turns
from writing import LAYER, SHARD_BYTES, array_spec, draw_states, write_array, write_plain

from saffe_cache.store.layout import encoder_group
from saffe_cache.store.reader import EncoderCache
from saffe_cache.store.storage import Storage

NUM_ROWS, BATCH = 4096, 256
NEAR_ROUNDS, FAR_ROUNDS = 60, 7
"""Of candidates that take milliseconds a batch, and of those that take up to a second."""
NEAR_BATCHES = 8
"""That the former read in one turn."""
NOTE = f"{NUM_ROWS} rows of 50 x 768 float16; files in the page cache; one process"
STREAM_NOTE = f"{NOTE}; theirs: a whole shuffled pass in batches of {BATCH}, without workers; ours: random rows"


@dataclass(frozen=True)
class Reader:
    """A format that gives rows by number."""

    rows: Callable[[np.ndarray], np.ndarray]
    """In any order."""
    block: Callable[[int, int], np.ndarray]
    """Consecutive ones, from `start` to `stop`."""


Stream = Callable[[], Iterator[tuple[Any, Any]]]
"""A shuffled pass: batches of row numbers, and their rows."""


def measure(work: Path) -> list[Figure]:
    states = draw_states(NUM_ROWS).astype(np.float16)
    readers = {name: write(work, states) for name, write in READERS.items()}
    streams = {name: write(work, states) for name, write in STREAMS.items()}
    generator = np.random.default_rng(1)
    for name, reader in readers.items():
        if reader:
            check(name, ((rows, reader.rows(rows)) for rows in np.split(generator.permutation(NUM_ROWS), 16)), states)
            check(name, ((slice(i, i + BATCH), reader.block(i, i + BATCH)) for i in range(0, NUM_ROWS, BATCH)), states)
    for name, stream in streams.items():
        if stream:
            check(name, stream(), states)
    batches = [(generator.permutation(NUM_ROWS)[:BATCH],) for _ in range(2 * NEAR_BATCHES)]
    blocks = [(start, start + BATCH) for start in range(0, NUM_ROWS, BATCH)]
    return [
        *compare(
            f"random {BATCH} rows",
            {name: reader and turns(reader.rows, batches) for name, reader in readers.items()},
            {name: stream and whole_pass(stream) for name, stream in streams.items()},
            {"np.memmap": 0.8, "zarr-python": 10.0},
        ),
        *compare(
            f"blocks of {BATCH} rows",
            {name: reader and turns(reader.block, blocks) for name, reader in readers.items()},
            {},
            {"np.memmap": 0.9},
        ),
    ]


def check(name: str, batches: Iterable[tuple[Any, Any]], states: np.ndarray) -> None:
    """Each row comes once, and every bit of it is right."""
    found = np.zeros(len(states), int)
    for rows, values in batches:
        found[rows] += 1
        if not np.array_equal(np.asarray(values).view(np.uint16), states[rows].view(np.uint16)):
            raise AssertionError(f"{name} gives other numbers than were written")
    if not (found == 1).all():
        raise AssertionError(f"{name} gives {found.min()} to {found.max()} times each row")


Turn = Callable[[int], Candidate]
"""A candidate that reads so many batches in a turn."""


def turns(read: Callable[..., np.ndarray], batches: list[tuple[Any, ...]]) -> Turn:
    def of(number: int) -> Candidate:
        ahead = cycle(batches)
        return lambda: sum(len(read(*batch)) for batch in islice(ahead, number))

    return of


def whole_pass(stream: Stream) -> Candidate:
    return lambda: sum(len(values) for _, values in stream())


def compare(
    title: str, readers: Mapping[str, Turn | None], passes: Mapping[str, Candidate | None], targets: Mapping[str, float]
) -> list[Figure]:
    """Ours beside all others; a memory map, which is as quick, in turns of its own with more rounds."""
    near_turns = {name: turn(NEAR_BATCHES) for name, turn in readers.items() if turn and name in ("ours", "np.memmap")}
    near = take_turns(near_turns, NEAR_ROUNDS)
    far_turns = {name: turn(1) for name, turn in readers.items() if turn and name not in near_turns}
    far_turns |= {name: turn for name, turn in passes.items() if turn}
    far = take_turns({"ours": near_turns["ours"], **far_turns}, FAR_ROUNDS)
    figures = [near.rate("ours", f"{title}: rate", "rows/s", note=NOTE)]
    for name in [*readers, *passes]:
        rounds = near if name in near.rates else far
        label, note = f"{title}: rate over {name}'s", STREAM_NOTE if name in passes else NOTE
        if name not in rounds.rates:
            figures.append(not_installed(label))
        elif name != "ours":
            figures.append(rounds.ratio("ours", name, label, at_least=targets.get(name), note=note))
    return figures


def write_ours(work: Path, states: np.ndarray) -> Reader:
    storage = Storage(work / "cache.zarr")
    array = EncoderCache(storage, write_array(storage, array_spec("float16"), states)).array(LAYER)
    return Reader(array.read, array.read_range)


def write_memmap(work: Path, states: np.ndarray) -> Reader:
    write_plain(work / "plain.bin", states)
    mapped = np.memmap(work / "plain.bin", np.float16, "r", shape=states.shape)
    return Reader(lambda rows: np.asarray(mapped[rows]), lambda start, stop: np.array(mapped[start:stop]))


def open_zarr(work: Path, states: np.ndarray) -> Reader:
    """zarr-python on the cache's own array."""
    array: Any = zarr.open_array(array_folder(work), mode="r")
    return Reader(sorted_rows(array.get_orthogonal_selection), lambda start, stop: array[start:stop])


def open_tensorstore(work: Path, states: np.ndarray) -> Reader | None:
    """tensorstore on the cache's own array."""
    try:
        import tensorstore
    except ModuleNotFoundError:
        return None
    files = {"driver": "file", "path": str(array_folder(work))}
    array = tensorstore.open({"driver": "zarr3", "kvstore": files}, read=True).result()
    return Reader(
        sorted_rows(lambda rows: array[rows].read().result()), lambda start, stop: array[start:stop].read().result()
    )


def write_hdf5(work: Path, states: np.ndarray) -> Reader:
    """Chunked by row, and read row by row: its own indexing takes a hundred times as long."""
    with h5py.File(work / "states.h5", "w") as file:
        file.create_dataset("states", data=states, chunks=(1, *states.shape[1:]))
    dataset = h5py.File(work / "states.h5", "r")["states"]
    return Reader(row_by_row(dataset, states.shape[1:]), lambda start, stop: dataset[start:stop])


def write_safetensors(work: Path, states: np.ndarray) -> Reader:
    save_file({"states": states}, work / "states.safetensors")
    part = safe_open(work / "states.safetensors", "numpy").get_slice("states")
    return Reader(row_by_row(part, states.shape[1:]), lambda start, stop: part[start:stop])


def write_litdata(work: Path, states: np.ndarray) -> Stream | None:
    """Tensors, and one sample decoded at a time: arrays decoded by the batch take thirty times as long."""
    try:
        from litdata import StreamingDataLoader, StreamingDataset
        from litdata.streaming import Cache
    except ModuleNotFoundError:
        return None
    folder = work / "litdata"
    folder.mkdir()
    cache = Cache(str(folder), chunk_bytes=SHARD_BYTES)
    for number, row in enumerate(torch.from_numpy(states)):
        cache[number] = {"number": number, "states": row}
    cache.done()
    cache.merge()

    def stream() -> Iterator[tuple[Any, Any]]:
        dataset = StreamingDataset(str(folder), shuffle=True, batch_decode=False)
        for batch in StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0):
            yield batch["number"].numpy(), batch["states"].numpy()

    return stream


def write_webdataset(work: Path, states: np.ndarray) -> Stream | None:
    """Shards in shuffled order, samples through a buffer of one batch."""
    try:
        import webdataset
    except ModuleNotFoundError:
        return None
    folder = work / "webdataset"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxsize=SHARD_BYTES, verbose=0) as writer:
        for number, row in enumerate(states):
            writer.write({"__key__": str(number), "npy": row})
    shards = sorted(map(str, folder.iterdir()))

    def stream() -> Iterator[tuple[Any, Any]]:
        samples = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(BATCH).decode()
        for keys, values in samples.to_tuple("__key__", "npy").batched(BATCH):
            yield np.array(keys, int), values

    return stream


READERS: Mapping[str, Callable[[Path, np.ndarray], Reader | None]] = {
    "ours": write_ours,
    "np.memmap": write_memmap,
    "zarr-python": open_zarr,
    "tensorstore": open_tensorstore,
    "h5py": write_hdf5,
    "safetensors": write_safetensors,
}
STREAMS: Mapping[str, Callable[[Path, np.ndarray], Stream | None]] = {
    "LitData": write_litdata,
    "WebDataset": write_webdataset,
}
"""None from any of these: it is not installed."""


def array_folder(work: Path) -> Path:
    (folder,) = (work / "cache.zarr").glob(f"{encoder_group('*')}/{LAYER}")
    return folder


def sorted_rows(read: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Rows in any order by way of ascending ones: twice as quick for formats that read whole chunks."""

    def rows_in_any_order(rows: np.ndarray) -> np.ndarray:
        order = np.argsort(rows)
        found = read(rows[order])
        result = np.empty_like(found)
        result[order] = found
        return result

    return rows_in_any_order


def row_by_row(source: Any, row_shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    def rows_in_any_order(rows: np.ndarray) -> np.ndarray:
        result = np.empty((len(rows), *row_shape), np.float16)
        for place, row in enumerate(rows.tolist()):
            result[place] = source[row]
        return result

    return rows_in_any_order
