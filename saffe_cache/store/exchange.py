"""A cache as one HDF5 file, and back: the form in which the field passes features around.

The file mirrors the cache's groups: `encoders/KEY/hidden_states/11` and so on; the item table is `items`. An
attribute `saffe_cache` of each group holds the cache's own attributes as JSON. Damaged shards are not
exported, and what is imported is compared with the checksums before it counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from saffe_cache.features import CacheError
from saffe_cache.store.layout import check_shard
from saffe_cache.store.manifest import EncoderManifest, RootManifest, encoder_group, read_root, write_root
from saffe_cache.store.reader import EncoderCache, block_spec, open_cache
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import ENCODING_TYPE as ITEMS
from saffe_cache.store.table import table_from_arrays
from saffe_cache.store.writer import EncoderWriter, Portion
from saffe_cache.store.zarr_files import (
    FORMAT_VERSION,
    check_arrays,
    check_encoding,
    mark_group,
    read_group,
    shard_name,
    write_group,
)


def export_hdf5(cache_path: str | Path, file_path: str | Path) -> str:
    """Write a cache as an HDF5 file, and return the file's path.

    Raises:
        CacheError: a part of the cache is missing or damaged.
        OSError: the file exists, or cannot be written.
    """
    cache = open_cache(cache_path)
    root = read_root(cache.storage)
    assert root is not None
    target, partial = Path(file_path), Path(f"{file_path}.partial")
    if target.exists():
        raise FileExistsError(f"{target} exists. Choose another name.")
    try:
        with h5py.File(partial, "w") as file:
            file.attrs["saffe_cache"] = json.dumps({"format_version": FORMAT_VERSION, "encoders": root.encoders})
            _export_group(cache.storage, f"tables/{root.table}", ITEMS, file.create_group("items"))
            for key, encoder in cache.encoders.items():
                _export_encoder(cache.storage, encoder, file.create_group(encoder_group(key)))
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return str(target)


def import_hdf5(file_path: str | Path, cache_path: str | Path) -> str:
    """Make a new cache from a file that `export_hdf5` wrote, and return the cache's path.

    Raises:
        CacheError: a cache is there already, or the file is damaged or something else.
        OSError: the file is not there, or the cache cannot be written.
    """
    storage = Storage(cache_path)
    if read_root(storage) is not None:
        raise CacheError(f"{cache_path}: there is a cache already. Import into a new one.")
    with _open_hdf5(Path(file_path)) as file, storage.writer_lock():
        root = _attributes(file, str(file_path))
        if root.get("format_version") != FORMAT_VERSION or not isinstance(root.get("encoders"), list):
            raise CacheError(
                f"{file_path}: format version {root.get('format_version')}, this release reads {FORMAT_VERSION}. "
                "Use the release that wrote it."
            )
        for key in root["encoders"]:
            _import_encoder(storage, _group(file, encoder_group(key), str(file_path)), f"{file_path}: {key}")
        mark_group(storage, "tables")
        items = _group(file, "items", str(file_path))
        table_from_arrays(_import_group(storage, "tables/1", ITEMS, items, f"{file_path}: items"), str(file_path))
        write_root(storage, RootManifest(1, tuple(root["encoders"])))
    return str(cache_path)


def _export_encoder(storage: Storage, encoder: EncoderCache, group: Any) -> None:
    """The manifest, and one dataset an array in the stored type: bfloat16 as uint16."""
    group.attrs["saffe_cache"] = json.dumps(encoder.manifest.to_json())
    for name, array in encoder.manifest.arrays.items():
        spec = array.spec
        dataset = group.create_dataset(name, shape=(array.rows, *spec.row_shape), dtype=spec.numpy_dtype)
        for index, entry in enumerate(array.shards):
            shard = f"{encoder_group(encoder.key)}/{name}/{shard_name(index, spec)}"
            data = storage.read(shard)
            check_shard(spec, entry, data, f"{storage.root}: {shard}")
            rows = np.frombuffer(data[: entry.rows * spec.row_bytes], spec.numpy_dtype)
            start = index * spec.shard_rows
            dataset[start : start + entry.rows] = rows.reshape(entry.rows, *spec.row_shape)
    for layer in encoder.block_layers:
        name = f"blocks/{layer}"
        _export_group(storage, f"{encoder_group(encoder.key)}/{name}", "saffe-block", group.create_group(name))


def _import_encoder(storage: Storage, group: Any, where: str) -> None:
    """Write an encoder's group, and compare what was written with what its manifest promises."""
    promised = EncoderManifest.from_json(_attributes(group, where), where)
    manifest = replace(promised, arrays={}, finished_rows=0)
    if encoder_group(manifest.key) != group.name.lstrip("/"):
        raise CacheError(f"{where}: holds the fingerprint of {manifest.key}. Export it again.")
    targets = {name: (array.spec, array.rows) for name, array in promised.arrays.items()}
    with EncoderWriter(storage, manifest, targets) as writer:
        for name, array in promised.arrays.items():
            dataset = _dataset(group, name, where)
            if (dataset.shape, dataset.dtype) != ((array.rows, *array.spec.row_shape), array.spec.numpy_dtype):
                raise CacheError(f"{where}: {name} is {dataset.shape} {dataset.dtype}. {_DAMAGED}")
            for start in range(0, array.rows, array.spec.shard_rows):
                stop = min(start + array.spec.shard_rows, array.rows)
                writer.put(Portion({name: (start, _rows(dataset, slice(start, stop), where))}))
        writer.finish(promised.finished_rows)
    for name, array in promised.arrays.items():
        found = [(entry.rows, entry.crc32c) for entry in manifest.arrays[name].shards]
        if found != [(entry.rows, entry.crc32c) for entry in array.shards]:
            raise CacheError(f"{where}: {name} differs from its checksums. {_DAMAGED}")
    mark_group(storage, f"{encoder_group(manifest.key)}/blocks")
    for layer in EncoderCache(storage, promised).block_layers:
        of_block, name = _group(group, f"blocks/{layer}", where), f"{encoder_group(manifest.key)}/blocks/{layer}"
        _import_group(storage, name, "saffe-block", of_block, f"{where}: block {layer}")
        block_spec(_attributes(of_block, where), where)


def _export_group(storage: Storage, name: str, encoding_type: str, group: Any) -> None:
    attributes, arrays = read_group(storage, name, encoding_type)
    group.attrs["saffe_cache"] = json.dumps(attributes)
    for array_name, values in arrays.items():
        group[array_name] = values


def _import_group(storage: Storage, name: str, encoding_type: str, group: Any, where: str) -> Mapping[str, np.ndarray]:
    """A group of plain arrays; it counts only once it is compared with its checksums."""
    attributes = _attributes(group, where)
    check_encoding(attributes, encoding_type, where)
    names: list[str] = []
    group.visititems(lambda array_name, node: names.append(array_name) if isinstance(node, h5py.Dataset) else None)
    arrays = {array_name: _rows(group[array_name], slice(None), where) for array_name in names}
    check_arrays(attributes, arrays, where)
    write_group(storage, name, attributes, arrays)
    return arrays


_DAMAGED = "The file is damaged; export it again."


def _open_hdf5(path: Path) -> Any:
    """
    Raises:
        FileNotFoundError: there is no such file.
        CacheError: it is no HDF5 file, or is cut short.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file.")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise CacheError(f"{path}: not a whole HDF5 file ({error}). {_DAMAGED}") from None


def _attributes(group: Any, where: str) -> dict[str, Any]:
    try:
        value = json.loads(group.attrs["saffe_cache"])
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise CacheError(f"{where}: no attributes of a feature cache ({error}). Give a file made by export.") from None
    if not isinstance(value, dict):
        raise CacheError(f"{where}: its attributes are not a JSON object. {_DAMAGED}")
    return value


def _group(parent: Any, name: str, where: str) -> Any:
    return _member(parent, name, h5py.Group, where)


def _dataset(parent: Any, name: str, where: str) -> Any:
    return _member(parent, name, h5py.Dataset, where)


def _member(parent: Any, name: str, kind: type, where: str) -> Any:
    try:
        found = parent[name]
    except (KeyError, OSError, RuntimeError) as error:
        raise CacheError(f"{where}: {name} cannot be read ({error}). {_DAMAGED}") from None
    if not isinstance(found, kind):
        raise CacheError(f"{where}: {name} is no {kind.__name__.lower()}. {_DAMAGED}")
    return found


def _rows(dataset: Any, rows: slice, where: str) -> np.ndarray:
    try:
        return np.asarray(dataset[rows])
    except (OSError, RuntimeError) as error:
        raise CacheError(f"{where}: {dataset.name} cannot be read ({error}). {_DAMAGED}") from None
