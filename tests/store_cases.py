"""Small caches with known rows, and a driver that writes them the way the extraction does."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saffe_cache.core.features import BlockSpec, BlockWeights, Compression, Fingerprint, Modality
from saffe_cache.core.items import Item
from saffe_cache.extraction.exporting import export_cache
from saffe_cache.store.config import ConvertConfig, ExportConfig, ImportConfig, InspectConfig, VerifyConfig
from saffe_cache.store.dtypes import to_storage
from saffe_cache.store.exchange import convert_cache, import_cache
from saffe_cache.store.inspect import inspect_cache, verify_cache
from saffe_cache.store.layout import ArraySpec, encoder_group
from saffe_cache.store.manifest import EncoderManifest, read_encoder, write_encoder
from saffe_cache.store.parts import read_table, remove_unlisted, write_part
from saffe_cache.store.root import RootManifest, read_root, write_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import TableBuilder
from saffe_cache.store.writer import EncoderWriter, Portion, begin_log, write_blocks

NUM_LAYERS, WIDTH = 3, 4


def verify(cache: str | Path) -> tuple[int, list[str]]:
    """Number of shards read, and damaged parts."""
    found = verify_cache(VerifyConfig(cache=str(cache)))
    return found.num_shards, found.problems


def describe(cache: str | Path) -> str:
    return inspect_cache(InspectConfig(cache=str(cache)))


def convert(cache: str | Path, new: str | Path, **options: Any) -> str:
    return convert_cache(ConvertConfig(cache=str(cache), new=str(new), **options))


def export_hdf5(cache: str | Path, file: str | Path) -> str:
    return export_cache(ExportConfig(cache=str(cache), file=str(file)))


def import_hdf5(file: str | Path, cache: str | Path) -> str:
    return import_cache(ImportConfig(file=str(file), cache=str(cache)))


@contextmanager
def without_fsync() -> Iterator[None]:
    """Durability costs milliseconds a file, and no test here cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where there is one, for tests in which thousands of files come and go."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def make_spec(
    dtype: str,
    row_shape: tuple[int, ...],
    chunk_rows: int,
    chunks: int,
    row: str = "row",
    compression: Compression = "none",
) -> ArraySpec:
    return ArraySpec(
        row_shape=row_shape,
        dtype=dtype,
        chunk_rows=chunk_rows,
        shard_rows=chunk_rows * chunks,
        dimension_names=(row, *(f"axis{axis}" for axis in range(len(row_shape)))),
        compression=compression,
    )


def random_rows(spec: ArraySpec, num_rows: int, seed: int) -> np.ndarray:
    """Rows in the stored type."""
    generator = np.random.default_rng(seed)
    if spec.dtype == "int64":
        return generator.integers(0, 2**40, size=(num_rows, *spec.row_shape))
    return to_storage(generator.normal(size=(num_rows, *spec.row_shape)).astype(np.float32), spec.dtype)


@dataclass(frozen=True)
class Contents:
    """What a cache of one encoder shall hold; hidden states are flat where there are `offsets`."""

    modality: Modality
    num_inputs: int
    arrays: Mapping[str, tuple[ArraySpec, np.ndarray]]
    offsets: np.ndarray | None = None

    def first_row(self, name: str, number: int) -> int:
        """Where the rows of an input begin."""
        if self.offsets is not None and name.startswith("hidden_states/"):
            return int(self.offsets[number])
        return number

    @property
    def key(self) -> str:
        return fingerprint(self.modality).key

    def without(self, *names: str) -> Contents:
        kept = {name: array for name, array in self.arrays.items() if name not in names}
        return Contents(self.modality, self.num_inputs, kept, self.offsets)


def fingerprint(modality: Modality) -> Fingerprint:
    return Fingerprint({"modality": modality, "model_id": f"tests/tiny {modality}", "revision": "0" * 40})


def image_contents(num_inputs: int, dtype: str = "float16", compression: Compression = "none") -> Contents:
    """Two layers and a vector; shards of 4, 4 and 6 rows."""
    states = make_spec(dtype, (2, WIDTH), 2, 2, compression=compression)
    vectors = make_spec("float32", (3,), 6, 1)
    arrays = {f"hidden_states/{i}": (states, random_rows(states, 64, i)[:num_inputs]) for i in (1, 3)}
    return Contents("image", num_inputs, arrays | {"pooled": (vectors, random_rows(vectors, 64, 9)[:num_inputs])})


def text_contents(num_inputs: int) -> Contents:
    """One layer as flat bfloat16 tokens with offsets, and two vectors."""
    offsets = np.concatenate([[0], np.cumsum(1 + np.arange(num_inputs) % 3)]).astype(np.int64)
    states, vectors = make_spec("bfloat16", (WIDTH,), 3, 2, "text_token"), make_spec("float32", (3,), 6, 1, "text")
    arrays = {
        "hidden_states/2": (states, random_rows(states, 200, 4)[: offsets[-1]]),
        "pooled": (vectors, random_rows(vectors, 64, 5)[:num_inputs]),
        "projected": (vectors, random_rows(vectors, 64, 6)[:num_inputs]),
        "offsets": (make_spec("int64", (), 8, 1, "text_offset"), offsets),
    }
    return Contents("text", num_inputs, arrays, offsets)


def block_weights(seed: int) -> BlockWeights:
    generator = np.random.default_rng(seed)
    spec = BlockSpec(num_attention_heads=2, norm_first=bool(seed % 2), activation="quick_gelu", layer_norm_eps=1e-6)
    shapes = {"query_weight": (WIDTH, WIDTH), "query_bias": (WIDTH,), "relative_position_bias": (2, 2)}
    return BlockWeights(spec, {name: generator.normal(size=shape).astype("f4") for name, shape in shapes.items()})


def write_contents(path: str | Path, *all_contents: Contents, portion: int = 3) -> None:
    """Write what a cache lacks of its contents, from the committed rows on: first, grown or resumed."""
    storage = Storage(path)
    with storage.writer_lock():
        _write_root(storage, all_contents)
        for contents in all_contents:
            _write_encoder(storage, contents, portion)


def _write_root(storage: Storage, all_contents: tuple[Contents, ...]) -> None:
    was = read_root(storage)
    root = was or RootManifest((), ())
    builder = TableBuilder(read_table(storage, root) if root.tables else None, ("a {}",))
    count = max(contents.num_inputs for contents in all_contents)
    for number in range(count):
        builder.add(make_item(number))
    part = builder.part()
    tables = write_part(storage, root, part) if part else root.tables
    new = [contents for contents in all_contents if contents.key not in root.encoders]
    for contents in new:
        begin_log(storage, _new_manifest(contents), {})
    grown = RootManifest(tables, (*root.encoders, *(contents.key for contents in new)))
    if grown != root:
        write_root(storage, grown, was)
        remove_unlisted(storage, grown)


def _write_encoder(storage: Storage, contents: Contents, portion: int) -> None:
    manifest = read_encoder(storage, contents.key)
    missing = {
        name: array
        for name, array in contents.arrays.items()
        if name not in manifest.arrays or manifest.arrays[name].rows < len(array[1])
    }
    if not missing and manifest.finished_rows == contents.num_inputs:
        return
    layers = [int(name.split("/")[1]) for name in missing if name.startswith("hidden_states/")]
    write_blocks(storage, contents.key, {layer: block_weights(layer) for layer in layers if layer < NUM_LAYERS})
    counts = [_committed_inputs(manifest, contents, name) for name in missing]
    start = min([contents.num_inputs, *counts]) // portion * portion
    targets = {name: (spec, len(rows)) for name, (spec, rows) in missing.items()}
    with EncoderWriter(storage, manifest, targets) as writer:
        if "offsets" in missing:
            writer.put(Portion({"offsets": (0, missing["offsets"][1])}))
        for begin in range(start, contents.num_inputs, portion):
            end = min(begin + portion, contents.num_inputs)
            bounds = {n: (contents.first_row(n, begin), contents.first_row(n, end)) for n in missing if n != "offsets"}
            writer.put(Portion({n: (first, missing[n][1][first:last]) for n, (first, last) in bounds.items()}))
        writer.finish(contents.num_inputs)


def _committed_inputs(manifest: EncoderManifest, contents: Contents, name: str) -> int:
    """Inputs whose rows are all committed."""
    rows = manifest.arrays[name].rows if name in manifest.arrays else 0
    if name == "offsets":
        return contents.num_inputs
    return max(n for n in range(contents.num_inputs + 1) if contents.first_row(name, n) <= rows)


def _new_manifest(contents: Contents) -> EncoderManifest:
    return EncoderManifest(
        fingerprint=fingerprint(contents.modality),
        modality=contents.modality,
        num_layers=NUM_LAYERS,
        hidden_size=WIDTH,
        vector="projected" if "projected" in contents.arrays else "pooled",
    )


def make_item(number: int) -> Item:
    digest = hashlib.sha256(str(number).encode()).digest()
    return Item(id=f"item {number}", split="train", hashes={"image": digest}, captions=(f"text {number}",))


def forget_encoder(path: str | Path, contents: Contents, name: str) -> None:
    """Take an array out of the manifest, as if it had never been asked for."""
    storage = Storage(path)
    manifest = read_encoder(storage, contents.key)
    del manifest.arrays[name]
    write_encoder(storage, manifest)


def shard_files(path: str | Path) -> dict[str, bytes]:
    """Every chunk file of a local cache, by its name."""
    root = Path(path)
    return {
        file.relative_to(root).as_posix(): file.read_bytes()
        for file in sorted(root.rglob("*"))
        if file.is_file() and "c" in file.relative_to(root).parts
    }


def group_path(path: str | Path, contents: Contents) -> Path:
    return Path(path) / encoder_group(contents.key)


def flip(path: Path, position: int) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
