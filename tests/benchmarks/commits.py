"""What the commits of many shards cost: python tests/benchmarks/commits.py [SHARDS]

Writes two arrays of tiny shards, and prints processor time, and the bytes of manifests and records beside those of the
shards themselves; then the time to read the finished manifest.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter

import numpy as np

from saffe_cache.core.features import Fingerprint
from saffe_cache.store.layout import ArraySpec
from saffe_cache.store.manifest import EncoderManifest, read_encoder
from saffe_cache.store.storage import Storage
from saffe_cache.store.writer import EncoderWriter, Portion


class Counted(Storage):
    """Counts the bytes that are written, by kind."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.bytes = Counter[str]()

    def write(self, name, *parts) -> None:
        self._count(name, *parts)
        super().write(name, *parts)

    def create(self, name, *parts) -> bool:
        self._count(name, *parts)
        return super().create(name, *parts)

    def replace(self, name, data, was) -> bool:
        self._count(name, data)
        return super().replace(name, data, was)

    def _count(self, name: str, *parts) -> None:
        kind = "shards" if "/c/" in name else "manifests and records"
        self.bytes[kind] += sum(memoryview(part).nbytes for part in parts)


def main(num_shards: int) -> None:
    spec = ArraySpec(row_shape=(8,), dtype="float32", dimension_names=("image", "d"))
    fingerprint = Fingerprint({"modality": "image", "model_id": "tiny"})
    manifest = EncoderManifest(fingerprint=fingerprint, modality="image", num_layers=1, hidden_size=8, vector="pooled")
    with tempfile.TemporaryDirectory() as folder:
        storage, rows = Counted(folder), np.zeros((num_shards, 8), np.float32)
        started, processor = time.perf_counter(), time.process_time()
        with EncoderWriter(storage, manifest, dict.fromkeys(("pooled", "projected"), (spec, num_shards))) as writer:
            for start in range(num_shards):
                writer.put(Portion(dict.fromkeys(("pooled", "projected"), (start, rows[start : start + 1]))))
            writer.finish(num_shards)
        processor, total = time.process_time() - processor, time.perf_counter() - started
        started = time.perf_counter()
        read_encoder(storage, manifest.key)
        reading = time.perf_counter() - started
    written = ", ".join(f"{kind} {count / 1e6:.1f} MB" for kind, count in sorted(storage.bytes.items()))
    print(f"{num_shards} shards of 2 arrays: {processor:.1f} s of processor, {total:.1f} s; written: {written}")
    print(f"the finished manifest is read in {reading:.2f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4000)
