"""How opening, growing and pairing scale with the number of items: `python tests/benchmarks/scale.py 10000 100000`.

Makes a synthetic cache of each size in a temporary folder (5 captions an item, rows of 2 numbers), and measures in one
process each: opening it, adding one item (as an extraction does it: the table read, the item added, its part and the
root committed), selecting all pairs, and reading the texts. Prints seconds (in brackets those of CPU time, which other
processes on the machine do not change), peak memory in MB (of the whole process, with the imports) and the table's
bytes on disk.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from saffe_cache.core.features import Fingerprint, Modality
from saffe_cache.core.items import Item
from saffe_cache.inputs.pairs import select_pairs
from saffe_cache.store.layout import ArraySpec
from saffe_cache.store.manifest import EncoderManifest
from saffe_cache.store.parts import Part, read_table, remove_unlisted, write_part
from saffe_cache.store.reader import open_cache
from saffe_cache.store.root import RootManifest, read_root, write_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import TableBuilder
from saffe_cache.store.writer import EncoderWriter, Portion

CAPTIONS = 5


def item(number: int) -> Item:
    return Item(
        id=f"train/{number // 1000:06d}/{number:09d}.jpg",
        split="test" if number % 20 == 0 else "train",
        hashes={"image": hashlib.sha256(number.to_bytes(8, "big")).digest()},
        captions=tuple(f"caption {place} of photo {number}: a photo of something" for place in range(CAPTIONS)),
    )


def write_encoder(storage: Storage, modality: Modality, count: int) -> str:
    manifest = EncoderManifest(Fingerprint({"modality": modality, "model_id": "tiny"}), modality, 1, 2, "pooled")
    spec = ArraySpec(
        row_shape=(2,), dtype="float32", chunk_rows=1024, shard_rows=2**20, dimension_names=(modality, "pooled")
    )
    with EncoderWriter(storage, manifest, {"pooled": (spec, count)}) as writer:
        for start in range(0, count, 2**20):
            writer.put(Portion({"pooled": (start, np.ones((min(2**20, count - start), 2), np.float32))}))
        writer.finish(count)
    return manifest.key


def commit(storage: Storage, part: Part, encoders: tuple[str, ...]) -> None:
    was = read_root(storage)
    root = RootManifest(write_part(storage, was or RootManifest((), ()), part), encoders)
    write_root(storage, root, was)
    remove_unlisted(storage, root)


def make(cache: str, count: int) -> None:
    """The cache; its items arrive in two growths, so that the table has two parts."""
    storage = Storage(cache)
    keys = write_encoder(storage, "image", count), write_encoder(storage, "text", count * CAPTIONS)
    for start, stop in ((0, count * 9 // 10), (count * 9 // 10, count)):
        root = read_root(storage)
        builder = TableBuilder(read_table(storage, root) if root else None, ())
        for number in range(start, stop):
            builder.add(item(number))
        part = builder.part()
        assert part is not None
        commit(storage, part, keys)


def open_it(cache: str, count: int) -> None:
    assert len(open_cache(cache).table) >= count


def add_one(cache: str, count: int) -> None:
    storage = Storage(cache)
    root = read_root(storage)
    assert root is not None
    table = read_table(storage, root)
    builder = TableBuilder(table, ())
    assert builder.add(item(len(table)))
    part = builder.part()
    assert part is not None
    commit(storage, part, root.encoders)


def pairs(cache: str, count: int) -> None:
    opened = open_cache(cache)
    found = select_pairs(opened.table, opened.encoder("image"), opened.encoder("text"), "train", "captions")
    assert len(found) == count - -(-count // 20)


def texts(cache: str, count: int) -> None:
    held = open_cache(cache).table.inputs["text"].texts
    assert held is not None
    assert held[len(held) - 1].endswith("something")


STEPS = {"make": make, "open": open_it, "select_pairs": pairs, "texts": texts, "add one": add_one}


def measured(step: str, cache: Path, count: int) -> list[float]:
    """Seconds of a step, its CPU seconds, and its process's peak memory in MB."""
    command = [sys.executable, __file__, "--step", step, "--cache", cache, str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(number) for number in done.stdout.split()]


def table_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in (cache / "tables").rglob("*") if path.is_file())


def rows(sizes: list[int]) -> Iterator[str]:
    yield "items | " + " | ".join(f"{step}: s (CPU s); MB" for step in STEPS) + " | table, MB"
    for count in sizes:
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder) / "cache"
            found = [measured(step, cache, count) for step in STEPS]
            told = " | ".join(f"{seconds:.2f} ({cpu:.2f}); {megabytes:.0f}" for seconds, cpu, megabytes in found)
            yield f"{count} | {told} | {table_bytes(cache) / 1e6:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", type=int, nargs="+")
    parser.add_argument("--step", choices=STEPS)
    parser.add_argument("--cache")
    config = parser.parse_args()
    if not config.step:
        for line in rows(config.sizes):
            print(line, flush=True)
        return
    start, cpu = time.perf_counter(), time.process_time()
    STEPS[config.step](config.cache, config.sizes[0])
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(seconds, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
