"""A cache as one HDF5 file, and back: the form in which the field passes features around.

The file mirrors the cache's groups: `encoders/KEY/hidden_states/11` and so on, with the manifests as JSON
attributes. Imported shards are compared with the manifest's checksums before they count.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from saffe_cache.features import BlockSpec, BlockWeights, CacheError
from saffe_cache.store.manifest import EncoderManifest, RootManifest, encoder_group, read_root, write_root
from saffe_cache.store.reader import RowReader, open_cache
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import table_from_arrays, table_to_arrays, write_table
from saffe_cache.store.writer import EncoderWriter, Portion, write_blocks

_PORTION_ROWS = 1024


def export_hdf5(cache_path: str | Path, file_path: str | Path) -> str:
    """Write a cache as an HDF5 file, and return the file's path.

    Raises:
        CacheError: a shard is damaged.
        OSError: the file exists, or cannot be written.
    """
    cache = open_cache(cache_path)
    target, partial = Path(file_path), Path(f"{file_path}.partial")
    if target.exists():
        raise FileExistsError(f"{target} exists. Choose another name.")
    with h5py.File(partial, "w") as file:
        file.attrs["saffe_cache_encoders"] = json.dumps(list(cache.encoders))
        for name, values in table_to_arrays(cache.table).items():
            file[f"items/{name}"] = values
        for key, encoder in cache.encoders.items():
            group = file.create_group(encoder_group(key))
            group.attrs["saffe_cache"] = json.dumps(encoder.manifest.to_json())
            for name in encoder.manifest.arrays:
                _export_array(encoder.array(name), group, name)
            for layer in encoder.block_layers:
                block = encoder.block(layer)
                of_block = group.create_group(f"blocks/{layer}")
                of_block.attrs["spec"] = json.dumps(vars(block.spec))
                for name, values in block.tensors.items():
                    of_block[name] = values
    partial.replace(target)
    return str(target)


def import_hdf5(file_path: str | Path, cache_path: str | Path) -> str:
    """Make a new cache from a file that `export_hdf5` wrote, and return the cache's path.

    Raises:
        CacheError: a cache is there already, or the file's rows differ from its checksums.
    """
    storage = Storage(cache_path)
    if read_root(storage) is not None:
        raise CacheError(f"{cache_path}: there is a cache already. Import into a new one.")
    with h5py.File(file_path, "r") as file, storage.writer_lock():
        keys = json.loads(file.attrs["saffe_cache_encoders"])
        for key in keys:
            group = file[encoder_group(key)]
            promised = EncoderManifest.from_json(json.loads(group.attrs["saffe_cache"]), f"{file_path}: {key}")
            _import_encoder(storage, group, promised, f"{file_path}: {key}")
        write_table(storage, "tables/1", table_from_arrays(_all_arrays(file["items"]), f"{file_path}: items"))
        write_root(storage, RootManifest(1, tuple(keys)))
    return str(cache_path)


def _export_array(reader: RowReader, group: Any, name: str) -> None:
    """One dataset, in the stored type: bfloat16 as uint16."""
    first = reader.read_stored(np.arange(min(1, len(reader))))
    dataset = group.create_dataset(name, shape=(len(reader), *reader.row_shape), dtype=first.dtype)
    for start in range(0, len(reader), _PORTION_ROWS):
        stop = min(start + _PORTION_ROWS, len(reader))
        dataset[start:stop] = reader.read_stored(np.arange(start, stop))


def _import_encoder(storage: Storage, group: Any, promised: EncoderManifest, where: str) -> None:
    """Write an encoder's group, and compare what was written with what its manifest promises."""
    manifest = replace(promised, arrays={}, finished_rows=0)
    blocks = {
        int(layer): BlockWeights(BlockSpec(**json.loads(of_block.attrs["spec"])), _all_arrays(of_block))
        for layer, of_block in group.get("blocks", {}).items()
    }
    write_blocks(storage, manifest.key, blocks)
    targets = {name: (array.spec, array.rows) for name, array in promised.arrays.items()}
    with EncoderWriter(storage, manifest, targets) as writer:
        for name, array in promised.arrays.items():
            for start in range(0, array.rows, _PORTION_ROWS):
                rows = group[name][start : min(start + _PORTION_ROWS, array.rows)]
                writer.put(Portion({name: (start, rows.astype(array.spec.numpy_dtype))}))
        writer.finish(promised.finished_rows)
    for name, array in promised.arrays.items():
        if manifest.arrays[name].shards != array.shards:
            raise CacheError(f"{where}: {name} differs from its checksums: the file is damaged. Export it again.")


def _all_arrays(group: Any) -> dict[str, np.ndarray]:
    """Every dataset below a group, by its name there."""
    found: dict[str, np.ndarray] = {}
    group.visititems(lambda name, node: found.update({name: node[()]}) if isinstance(node, h5py.Dataset) else None)
    return found
