"""Copy a cache with other storage of its hidden states: another type, compression or shard size.

Nothing is encoded again. Encoders keep their fingerprints, so that a run trained on one of the two caches can be
evaluated on the other. The root is written last: an interrupted conversion leaves no cache, and starts from the
beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from saffe_cache.core.features import CacheError
from saffe_cache.store.config import ConvertConfig
from saffe_cache.store.dtypes import to_storage
from saffe_cache.store.layout import ArraySpec, choose_rows
from saffe_cache.store.manifest import RootManifest, layers_among, read_root, write_root
from saffe_cache.store.reader import EncoderCache, open_cache
from saffe_cache.store.rows import RowReader
from saffe_cache.store.storage import Storage, mark_group, read_group, write_group
from saffe_cache.store.table import ENCODING_TYPE as ITEMS
from saffe_cache.store.writer import EncoderWriter, Portion, write_blocks, write_language_model


def convert_cache(config: ConvertConfig) -> str:
    """Write the new cache, and return its path.

    Raises:
        CacheError: the new cache exists, the old one is damaged or unfinished, or a value exceeds the type's range.
    """
    source, storage = open_cache(config.cache), Storage(config.new)
    if read_root(storage) is not None:
        raise CacheError(f"{config.new}: a cache exists there. Convert into a new one.")
    unfinished = [key for key, encoder in source.encoders.items() if not encoder.manifest.finished_rows]
    if unfinished:
        raise CacheError(f"{config.cache}: {unfinished[0]} is unfinished. Run saffe extract again, then convert.")
    root = read_root(source.storage)
    assert root is not None
    with storage.writer_lock():
        mark_group(storage, "tables")
        attributes, columns = read_group(source.storage, f"tables/{root.table}", ITEMS)
        write_group(storage, "tables/1", attributes, columns)
        for encoder in source.encoders.values():
            specs = {
                name: _new_spec(array.spec, config) if layers_among([name]) else array.spec
                for name, array in encoder.manifest.arrays.items()
            }
            _convert_encoder(storage, encoder, specs, f"{config.cache}: {encoder.key}")
        write_root(storage, RootManifest(1, tuple(source.encoders)))
    return config.new


def _new_spec(spec: ArraySpec, config: ConvertConfig) -> ArraySpec:
    dtype, compression = config.storage or spec.dtype, config.compression or spec.compression
    one = replace(spec, dtype=dtype, compression=compression, chunk_rows=1, shard_rows=1)
    chunk_rows, shard_rows = choose_rows(one.row_bytes, config.shard_mb * 2**20)
    return replace(one, chunk_rows=chunk_rows, shard_rows=shard_rows)


def _convert_encoder(storage: Storage, encoder: EncoderCache, specs: dict[str, ArraySpec], where: str) -> None:
    old = encoder.manifest
    changed = {"converted": {name: spec.described for name, spec in specs.items()}}
    manifest = replace(old, arrays={}, finished_rows=0, history=[*old.history, changed])
    write_blocks(storage, old.key, {layer: encoder.block(layer) for layer in encoder.block_layers})
    if old.is_language_model:
        write_language_model(storage, old.key, encoder.language_model())
    targets = {name: (spec, old.arrays[name].rows) for name, spec in specs.items()}
    with EncoderWriter(storage, manifest, targets) as writer:
        for name, spec in specs.items():
            try:
                for portion in _portions(name, encoder.array(name), spec):
                    writer.put(portion)
            except OverflowError as error:
                raise CacheError(f"{where}: {name}: {error}. Use --storage bfloat16 or float32.") from None
        writer.finish(old.finished_rows)


def _portions(name: str, array: RowReader, spec: ArraySpec) -> Iterator[Portion]:
    """An array's rows in the new type, in portions of a quarter of a shard."""
    step = max(1, spec.shard_rows // 4)
    for start in range(0, len(array), step):
        rows = np.arange(start, min(start + step, len(array)))
        if spec.dtype == array.dtype:
            stored = array.read_stored(rows)
        else:
            stored = to_storage(array.read(rows).astype(np.float32), spec.dtype)
        yield Portion({name: (start, stored)})
