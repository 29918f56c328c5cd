"""Zarr's own files made in memory, so that each goes to disk by one atomic write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from saffe_cache.store.layout import ArraySpec
from saffe_cache.store.storage import Storage


def group_metadata(attributes: Mapping[str, Any]) -> bytes:
    """The `zarr.json` of a group."""
    return json.dumps(
        {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}, indent=1, allow_nan=False
    ).encode()


def array_metadata(spec: ArraySpec, num_rows: int) -> bytes:
    """The `zarr.json` of a growing array with `num_rows` rows, sharded and uncompressed."""
    files: dict[str, Any] = {}
    zarr.create_array(
        MemoryStore(files),
        shape=(num_rows, *spec.row_shape),
        chunks=(spec.chunk_rows, *spec.row_shape),
        shards=(spec.shard_rows, *spec.row_shape),
        dtype=spec.numpy_dtype,
        compressors=None,
        filters=None,
        fill_value=spec.fill_value,
        dimension_names=spec.dimension_names,
        attributes={"encoding-type": "saffe-array", "encoding-version": 1, "dtype": spec.dtype},
    )
    return bytes(files["zarr.json"].to_bytes())


def shard_name(index: int, spec: ArraySpec) -> str:
    """Zarr's default chunk key."""
    return "/".join(["c", str(index), *["0"] * len(spec.row_shape)])


def write_group(
    storage: Storage, name: str, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]
) -> None:
    """Write a small group of plain arrays, its metadata last. Array names may hold `/`."""
    files: dict[str, Any] = {}
    group = zarr.open_group(MemoryStore(files), mode="w", zarr_format=3)
    for array_name, values in arrays.items():
        group.create_array(
            array_name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=tuple(max(1, length) for length in values.shape),
            compressors=None,
            dimension_names=[f"{array_name}.{axis}" for axis in range(values.ndim)],
        )[...] = values
    for key, value in files.items():
        if key != "zarr.json":
            storage.write(f"{name}/{key}", bytes(value.to_bytes()))
    storage.write(f"{name}/zarr.json", group_metadata(attributes))


def read_group(storage: Storage, name: str) -> dict[str, np.ndarray]:
    """All arrays of a small group, by their names below it."""
    group = zarr.open_group(storage.zarr_location, path=name, mode="r")
    found = {}
    for array_name, member in group.members(max_depth=None):
        if isinstance(member, zarr.Array):
            found[array_name] = np.asarray(member[...])
    return found
