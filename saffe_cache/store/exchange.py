"""Copies of a cache: one HDF5 file, the usual format for sharing features, and a cache with other storage.

The file mirrors the cache's groups: `encoders/KEY/hidden_states/11` and so on; the item table is `items`. Each group's
attribute `saffe_cache` holds the cache's own attributes as JSON. Imported data is compared with its checksums before it
is committed. The HDF5 library itself may hang on a damaged file, so set a time limit when importing untrusted files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from saffe_cache.core.features import CacheError
from saffe_cache.store.arrays import ArrayFiles
from saffe_cache.store.claims import held_cache
from saffe_cache.store.config import ConvertConfig, ExportConfig, ImportConfig
from saffe_cache.store.dtypes import from_storage, to_storage
from saffe_cache.store.layout import ArraySpec, choose_rows, encoder_group, layers_among, split_view
from saffe_cache.store.manifest import EncoderManifest, weights_type
from saffe_cache.store.parts import ENCODING_TYPE as ITEMS
from saffe_cache.store.parts import table_from_arrays, table_to_arrays, write_table
from saffe_cache.store.reader import EncoderCache, open_cache, weights_from
from saffe_cache.store.root import RootManifest, read_root, write_root
from saffe_cache.store.storage import (
    FORMAT_VERSION,
    Storage,
    check_arrays,
    check_encoding,
    describe_group,
    read_group,
    write_group,
)
from saffe_cache.store.writer import EncoderWriter, Portion, write_weights


def export_hdf5(config: ExportConfig) -> str:
    """Write a cache as an HDF5 file, and return the file's path.

    Raises:
        CacheError: a part of the cache is missing or damaged.
        OSError: the file exists, or cannot be written.
    """
    cache = open_cache(config.cache)
    root = cache.root
    target, partial = Path(config.file), Path(f"{config.file}.partial")
    if target.exists():
        raise FileExistsError(f"{target}: this file exists. Choose another name.")
    try:
        with h5py.File(partial, "w") as file:
            file.attrs["saffe_cache"] = json.dumps({"format_version": FORMAT_VERSION, "encoders": root.encoders})
            columns = table_to_arrays(cache.table)
            _put_group(file.create_group("items"), describe_group(ITEMS, columns, {}), columns)
            for key, encoder in cache.encoders.items():
                _export_encoder(cache.storage, encoder, file.create_group(encoder_group(key)))
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return str(target)


def import_cache(config: ImportConfig) -> str:
    """Make a new cache from a file written by `export_hdf5`, and return the cache's path.

    Raises:
        CacheError: the cache exists, or the file is damaged or has another format.
        OSError: the file is missing, or the cache cannot be written.
    """
    storage, file_path = Storage(config.cache), config.file
    if read_root(storage) is not None:
        raise CacheError(f"{config.cache}: a cache exists there. Import into a new one.")
    with _explained(file_path), h5py.File(file_path, "r") as file, held_cache(storage):
        _refuse_links(file)
        root = json.loads(file.attrs["saffe_cache"])
        if root["format_version"] != FORMAT_VERSION:
            raise CacheError(
                f"{file_path}: format version {root['format_version']}, this release reads {FORMAT_VERSION}. "
                "Use the release that wrote it."
            )
        for key in root["encoders"]:
            _import_encoder(storage, file[encoder_group(key)], f"{file_path}: {key}")
        arrays, _ = _read_group(ITEMS, file["items"], f"{file_path}: items")
        tables = write_table(storage, table_from_arrays(arrays, f"{file_path}: items"))
        write_root(storage, RootManifest(tables, tuple(root["encoders"])))
    return config.cache


def _refuse_links(file: Any) -> None:
    """Raises ValueError if a link is not a hard link; it may point into another file or form a cycle."""
    kinds: dict[str, type] = {}
    file.visititems_links(lambda name, link: kinds.setdefault(name, type(link)) and None)
    for name, kind in kinds.items():
        if kind is not h5py.HardLink:
            raise ValueError(f"{name} is a {kind.__name__}, expected a hard link: all data in the file itself")


def _read(dataset: Any, rows: slice | tuple[()] = ()) -> np.ndarray:
    """
    Raises:
        ValueError: its data are not stored as the exporter does: completely in the file, contiguous, uncompressed.
    """
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{dataset.name} is a group, expected a dataset")
    size = dataset.id.get_storage_size()
    if dataset.is_virtual or dataset.external or dataset.chunks or size != dataset.size * dataset.dtype.itemsize:
        raise ValueError(f"{dataset.name} has {size} bytes in the file, expected {dataset.shape} {dataset.dtype}")
    return np.asarray(dataset[rows])


def _export_encoder(storage: Storage, encoder: EncoderCache, group: Any) -> None:
    """Export the manifest, and each array as one dataset in the stored type (bfloat16 as uint16)."""
    group.attrs["saffe_cache"] = json.dumps(encoder.manifest.to_json())
    for name, array in encoder.manifest.arrays.items():
        spec = array.spec
        dataset = group.create_dataset(name, shape=(array.rows, *spec.stored_shape), dtype=spec.numpy_dtype)
        files = ArrayFiles(storage, encoder.key, name, spec)
        for index, entry in enumerate(array.shards):
            start = index * spec.shard_rows
            dataset[start : start + entry.rows] = files.read(index, entry)
    for name in encoder.weights:
        _export_group(storage, f"{encoder_group(encoder.key)}/{name}", weights_type(name), group.create_group(name))


def _import_encoder(storage: Storage, group: Any, where: str) -> None:
    """Import an encoder's group, and compare it with the checksums in its manifest."""
    promised = EncoderManifest.from_json(json.loads(group.attrs["saffe_cache"]), where)
    manifest = replace(promised, arrays={}, finished_rows=0)
    if encoder_group(manifest.key) != group.name.lstrip("/"):
        raise CacheError(f"{where}: contains the fingerprint of {manifest.key}. Export it again.")
    targets = {name: (array.spec, array.rows) for name, array in promised.arrays.items()}
    with EncoderWriter(storage, manifest, targets) as writer:
        for name, array in promised.arrays.items():
            dataset = group[name]
            if (dataset.shape, dataset.dtype) != ((array.rows, *array.spec.stored_shape), array.spec.numpy_dtype):
                raise CacheError(f"{where}: {name} is {dataset.shape} {dataset.dtype}. {_DAMAGED}")
            for start in range(0, array.rows, array.spec.shard_rows):
                rows = _read(dataset, slice(start, start + array.spec.shard_rows))
                writer.put(Portion({name: (start, rows)}))
        writer.finish(promised.finished_rows)
    for name, array in promised.arrays.items():
        found = [(entry.rows, entry.crc32c) for entry in manifest.arrays[name].shards]
        if found != [(entry.rows, entry.crc32c) for entry in array.shards]:
            raise CacheError(f"{where}: {name} differs from its checksums. {_DAMAGED}")
    for name in EncoderCache(storage, promised).weights:
        folder, of_group = f"{encoder_group(manifest.key)}/{name}", f"{where}: {name}"
        arrays, attributes = _read_group(weights_type(name), group[name], of_group)
        write_group(storage, folder, attributes, arrays)
        weights_from(attributes, arrays, of_group)


def _export_group(storage: Storage, name: str, encoding_type: str, group: Any) -> None:
    _put_group(group, *read_group(storage, name, encoding_type))


def _put_group(group: Any, attributes: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    group.attrs["saffe_cache"] = json.dumps(attributes)
    for array_name, values in arrays.items():
        group[array_name] = values


def _read_group(encoding_type: str, group: Any, where: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a group of plain arrays, compared with their checksums, and the attributes."""
    attributes = json.loads(group.attrs["saffe_cache"])
    check_encoding(attributes, encoding_type, where)
    names: list[str] = []
    group.visititems(lambda array_name, node: names.append(array_name) if isinstance(node, h5py.Dataset) else None)
    arrays = {array_name: _read(group[array_name]) for array_name in names}
    check_arrays(attributes, arrays, where)
    return arrays, attributes


_FROM_H5PY = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError, OSError),
    *(RuntimeError, SystemError, TypeError, ValueError),
)
_DAMAGED = "The file is damaged. Export it again."


@contextmanager
def _explained(file_path: str) -> Iterator[None]:
    """Turn the many kinds of errors that h5py raises for damaged files into one.

    Raises CacheError if the file is no HDF5 file, is truncated or damaged, or is no exported cache.
    """
    try:
        yield
    except _FROM_H5PY as error:
        if isinstance(error, OSError) and error.errno is not None:  # from the disk, not from HDF5
            raise
        reason = f"{type(error).__name__}: {error}"
        raise CacheError(f"{file_path}: found no complete exported cache ({reason}). {_DAMAGED}") from error


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
    with held_cache(storage):
        tables = write_table(storage, source.table)
        for encoder in source.encoders.values():
            _convert_encoder(storage, encoder, config)
        write_root(storage, RootManifest(tables, tuple(source.encoders)))
    return config.new


def _new_spec(spec: ArraySpec, config: ConvertConfig) -> ArraySpec:
    dtype, compression = config.storage or spec.dtype, config.compression or spec.compression
    one = replace(spec, dtype=dtype, compression=compression, chunk_rows=1, shard_rows=1)
    chunk_rows, shard_rows = choose_rows(one.row_bytes, config.shard_mb * 2**20)
    return replace(one, chunk_rows=chunk_rows, shard_rows=shard_rows)


def _convert_encoder(storage: Storage, encoder: EncoderCache, config: ConvertConfig) -> None:
    old = encoder.manifest
    specs = {name: array.spec for name, array in old.arrays.items()}
    specs |= {name: _new_spec(spec, config) for name, spec in specs.items() if layers_among([split_view(name)[1]])}
    changed = {"converted": {name: spec.described for name, spec in specs.items()}}
    manifest = replace(old, arrays={}, finished_rows=0, history=[*old.history, changed])
    for name in encoder.weights:
        write_weights(storage, old.key, name, encoder.read_weights(name))
    targets = {name: (spec, old.arrays[name].rows) for name, spec in specs.items()}
    with EncoderWriter(storage, manifest, targets) as writer:
        for name, (spec, num_rows) in targets.items():
            array, step = encoder.array(name), max(1, spec.shard_rows // 4)
            for start in range(0, num_rows, step):
                rows = array.read_stored(np.arange(start, min(start + step, num_rows)))
                try:
                    writer.put(Portion({name: (start, _converted(rows, array.spec.dtype, spec.dtype))}))
                except OverflowError as error:
                    where = f"{config.cache}: {encoder.key}: {name}"
                    raise CacheError(f"{where}: {error}. Use --storage bfloat16 or float32.") from None
        writer.finish(old.finished_rows)


def _converted(stored: np.ndarray, old: str, new: str) -> np.ndarray:
    """Stored rows of one type as those of another."""
    return stored if old == new else to_storage(from_storage(stored, old).astype(np.float32), new)
