"""Made v2.tar.xz, the golden cache of format version 2: `python tests/golden/make_v2.py`.

It was run once, with the release that wrote version 2, and shall not be run again: the archive is there to show that
later releases still read what that one wrote. The contents are fixed formulas, which tests/test_store_golden.py
states once more. Version 1 was made by the same program of its release; the table of version 2 has a second part.
"""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from saffe_cache.core.features import BlockSpec, BlockWeights, Fingerprint
from saffe_cache.core.items import Item
from saffe_cache.store.dtypes import to_storage
from saffe_cache.store.layout import ArraySpec
from saffe_cache.store.manifest import EncoderManifest
from saffe_cache.store.parts import write_part, write_table
from saffe_cache.store.root import RootManifest, write_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import TableBuilder
from saffe_cache.store.writer import EncoderWriter, Portion, write_blocks

NUM_IMAGES, NUM_TEXTS = 5, 7
BLOCK = BlockWeights(
    BlockSpec(num_attention_heads=2, norm_first=True, activation="gelu", layer_norm_eps=1e-6),
    {"query_weight": np.eye(4, dtype=np.float32), "query_bias": np.arange(4, dtype=np.float32)},
)


def numbers(*shape: int) -> np.ndarray:
    """0, 0.25, 0.5 and so on: exact in every storage type."""
    return (np.arange(np.prod(shape)).reshape(shape) / 4).astype(np.float32)


def make_item(number: int) -> Item:
    return Item(
        id=f"train/{number}.png",
        split="test" if number == 4 else "train",
        hashes={"image": hashlib.sha256(bytes([number])).digest()},
        captions=(f"caption {number}", "ein Bär \ud800") if number < 4 or number == 6 else (),
        labels=("polar_bear",) if number % 2 else ("fox", "polar_bear"),
        problem="OSError: cut short" if number == 5 else "",
    )


def make_table(storage: Storage) -> tuple[str, ...]:
    """6 items, and a part with another one and new captions of the second."""
    builder = TableBuilder(None, ("a photo of a {}.",))
    for number in range(6):
        builder.add(make_item(number))
    table = builder.build()
    tables = write_table(storage, table)
    builder = TableBuilder(table, ("a photo of a {}.",), may_change=True)
    builder.add(make_item(6))
    builder.add(replace(make_item(1), captions=("caption 0",)))
    part = builder.part()
    assert part is not None
    return write_part(storage, RootManifest(tables, ()), part)


def make_encoder(storage: Storage, manifest: EncoderManifest, arrays: dict[str, tuple[ArraySpec, np.ndarray]]) -> str:
    layers = [int(name.split("/")[1]) for name in arrays if name.startswith("hidden_states/")]
    write_blocks(storage, manifest.key, {layer: BLOCK for layer in layers if layer < manifest.num_layers})
    targets = {name: (spec, len(rows)) for name, (spec, rows) in arrays.items()}
    with EncoderWriter(storage, manifest, targets) as writer:
        writer.put(Portion({name: (0, rows) for name, (_, rows) in arrays.items()}, dict(manifest.invalid)))
        manifest.history.append({"config": {"data": "golden"}, "saffe_cache": "0.1.0"})
        writer.finish(NUM_IMAGES if manifest.modality == "image" else NUM_TEXTS)
    return manifest.key


def make_arrays(**arrays: tuple[str, np.ndarray, tuple[str, ...]]) -> dict[str, tuple[ArraySpec, np.ndarray]]:
    """Two rows a chunk, four a shard."""
    made = {}
    for name, (dtype, values, names) in arrays.items():
        spec = ArraySpec(row_shape=values.shape[1:], dtype=dtype, chunk_rows=2, shard_rows=4, dimension_names=names)
        made[name.replace("__", "/")] = (spec, to_storage(values, dtype))
    return made


def make_cache(path: Path) -> None:
    storage = Storage(path)
    tables = make_table(storage)
    image = EncoderManifest(
        fingerprint=Fingerprint({"modality": "image", "model_id": "golden/vit", "revision": "0" * 40}),
        modality="image",
        num_layers=3,
        hidden_size=4,
        vector="pooled",
        invalid={3: "ValueError: no picture"},
    )
    states = numbers(NUM_IMAGES, 2, 4)
    states[3] = np.nan
    image_arrays = make_arrays(
        hidden_states__2=("float16", states, ("image", "token", "hidden")),
        hidden_states__3=("float32", states * 2, ("image", "token", "hidden")),
        pooled=("float32", states[:, 0], ("image", "pooled_dimension")),
    )
    text = EncoderManifest(
        fingerprint=Fingerprint({"modality": "text", "model_id": "golden/bert", "prompt": "{}"}),
        modality="text",
        num_layers=3,
        hidden_size=4,
        vector="projected",
    )
    offsets = np.array([0, 1, 3, 6, 7, 9, 12, 13])
    text_arrays = make_arrays(
        hidden_states__1=("bfloat16", numbers(13, 4), ("text_token", "hidden")),
        pooled=("float32", numbers(NUM_TEXTS, 4), ("text", "pooled_dimension")),
        projected=("float32", -numbers(NUM_TEXTS, 3), ("text", "projected_dimension")),
        offsets=("int64", offsets, ("text_offset",)),
    )
    keys = (make_encoder(storage, image, image_arrays), make_encoder(storage, text, text_arrays))
    write_root(storage, RootManifest(tables, keys))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        make_cache(Path(folder) / "v2.zarr")
        with tarfile.open(Path(__file__).with_name("v2.tar.xz"), "w:xz") as archive:
            archive.add(Path(folder) / "v2.zarr", "v2.zarr")
