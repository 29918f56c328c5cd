"""Zarr's own files made in memory, so that each goes to disk by one atomic write.

Arrays that do not grow (columns of the item table, tensors of blocks) lie in groups of their own, one chunk
each. The group's attributes are written last and list every array with its checksum: Zarr itself takes a
missing chunk for zeros and notices no flipped bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.storage import MemoryStore

from saffe_cache.core.features import CacheError
from saffe_cache.core.json_schema import whole_numbers
from saffe_cache.store.compression import zarr_codec
from saffe_cache.store.layout import ADVICE, ArraySpec
from saffe_cache.store.storage import Storage

FORMAT_VERSION = 1
_PLAIN_DTYPES = ("float32", "int64", "uint8")


def group_metadata(attributes: Mapping[str, Any]) -> bytes:
    """The `zarr.json` of a group."""
    return json.dumps(
        {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}, indent=1, allow_nan=False
    ).encode()


@lru_cache(maxsize=256)
def array_metadata(spec: ArraySpec, num_rows: int) -> bytes:
    """The `zarr.json` of a growing array with `num_rows` rows, sharded."""
    attributes = {"encoding-type": "saffe-array", "encoding-version": FORMAT_VERSION, "dtype": spec.dtype}
    return _zarr_json(
        shape=(num_rows, *spec.stored_shape),
        chunks=(spec.chunk_rows, *spec.stored_shape),
        shards=(spec.shard_rows, *spec.stored_shape),
        dtype=spec.numpy_dtype,
        fill_value=spec.fill_value,
        dimension_names=spec.dimension_names,
        attributes={"saffe_cache": attributes},
        compressors=None if spec.compression == "none" else zarr_codec(spec.numpy_dtype),
    )


@lru_cache(maxsize=256)
def _plain_metadata(name: str, shape: tuple[int, ...], dtype: str) -> bytes:
    """The `zarr.json` of an array that does not grow: one chunk."""
    return _zarr_json(
        shape=shape,
        chunks=tuple(max(1, length) for length in shape),
        dtype=dtype,
        dimension_names=[f"{name}.{axis}" for axis in range(len(shape))],
    )


def _zarr_json(*, compressors: Any = None, **options: Any) -> bytes:
    """What zarr-python writes for an array; it takes milliseconds for that."""
    files: dict[str, Any] = {}
    zarr.create_array(MemoryStore(files), compressors=compressors, filters=None, **options)
    return bytes(files["zarr.json"].to_bytes())


def check_array_metadata(storage: Storage, name: str, spec: ArraySpec, num_rows: int) -> None:
    """Do other programs find the rows that the manifest counts? We ourselves need the manifest alone.

    Raises:
        CacheError: the array's `zarr.json` is missing or damaged, or tells of another layout or of fewer rows.
    """
    found = storage.read_json(f"{name}/zarr.json")
    expected = json.loads(array_metadata(spec, num_rows))
    shape = found.get("shape")
    if isinstance(shape, list) and shape and isinstance(shape[0], int) and shape[0] > num_rows:
        expected["shape"][0] = shape[0]  # made for rows that are still to come
    fields = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs")
    wrong = [field for field in fields if found.get(field) != expected[field]]
    if wrong:
        raise CacheError(f"{storage.root}: {name}/zarr.json misstates {' and '.join(wrong)}. {ADVICE}")


def shard_name(index: int, spec: ArraySpec) -> str:
    """Zarr's default chunk key."""
    return "/".join(["c", str(index), *["0"] * len(spec.stored_shape)])


def read_attributes(storage: Storage, name: str) -> dict[str, Any]:
    """What a node says of itself under "saffe_cache"; empty where it says nothing. `name` "" is the root.

    Raises:
        CacheError: its `zarr.json` is missing or not a JSON object.
    """
    attributes = storage.read_json(f"{name}/zarr.json".lstrip("/")).get("attributes")
    own = attributes.get("saffe_cache") if isinstance(attributes, dict) else None
    return own if isinstance(own, dict) else {}


def check_encoding(
    attributes: Mapping[str, Any], encoding_type: str, where: str, versions: Sequence[int] = (FORMAT_VERSION,)
) -> None:
    """
    Raises:
        CacheError: the attributes are those of another kind of node, or of another version.
    """
    found = attributes.get("encoding-type"), attributes.get("encoding-version")
    if found[0] != encoding_type or found[1] not in versions:
        raise CacheError(
            f"{where}: its attributes say {found[0]} version {found[1]}, expected {encoding_type} version "
            f"{' or '.join(map(str, versions))}. Restore zarr.json from a copy, or use the release that wrote it."
        )


def mark_group(storage: Storage, name: str) -> None:
    """Make a bare group unless there is one: without it, other programs do not see what lies below."""
    if not storage.exists(f"{name}/zarr.json"):
        storage.write(f"{name}/zarr.json", group_metadata({}))


def describe_group(encoding_type: str, arrays: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a group of plain arrays: `fields`, and each array's shape, type and checksum."""
    listed = {
        name: {"shape": list(values.shape), "dtype": values.dtype.name, "crc32c": google_crc32c.value(values.tobytes())}
        for name, values in arrays.items()
    }
    return {"encoding-type": encoding_type, "encoding-version": FORMAT_VERSION, **fields, "arrays": listed}


def write_group(storage: Storage, name: str, attributes: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a group of plain arrays, its attributes (by `describe_group`) last. Array names may hold `/`."""
    for array_name, values in arrays.items():
        assert values.dtype.name in _PLAIN_DTYPES, f"{array_name} is {values.dtype}"
        parts = array_name.split("/")
        for depth in range(1, len(parts)):
            mark_group(storage, "/".join([name, *parts[:depth]]))
        storage.write(f"{name}/{array_name}/zarr.json", _plain_metadata(array_name, values.shape, values.dtype.name))
        if values.size:
            storage.write(f"{name}/{array_name}/{_only_chunk(values.ndim)}", values.tobytes())
    storage.write(f"{name}/zarr.json", group_metadata({"saffe_cache": dict(attributes)}))


def read_group(storage: Storage, name: str, encoding_type: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The attributes of a group of plain arrays, and the arrays by their names below it.

    Raises:
        CacheError: something is missing, or an array differs from its checksum.
    """
    where = f"{storage.root}: {name}"
    attributes = read_attributes(storage, name)
    check_encoding(attributes, encoding_type, where)
    try:
        shapes = {key: whole_numbers(one, "shape") for key, one in attributes["arrays"].items()}
        dtypes = {key: str(one["dtype"]) for key, one in attributes["arrays"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CacheError(f"{where}: zarr.json lacks or misstates {error}. Restore it from a copy.") from None
    arrays = {}
    for key, shape in shapes.items():
        data = storage.read(f"{name}/{key}/{_only_chunk(len(shape))}") if math.prod(shape) else b""
        if dtypes[key] not in _PLAIN_DTYPES or len(data) != math.prod(shape) * np.dtype(dtypes[key]).itemsize:
            raise CacheError(f"{where}/{key}: {len(data)} bytes, expected {shape} {dtypes[key]}. {ADVICE}")
        arrays[key] = np.frombuffer(data, dtypes[key]).reshape(shape).copy()
    check_arrays(attributes, arrays, where)
    return attributes, arrays


def check_arrays(attributes: Mapping[str, Any], arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Compare a group's arrays with what its attributes promise.

    Raises:
        CacheError: an array differs in shape, type or checksum, or there are others.
    """
    promised, found = attributes.get("arrays"), describe_group("", arrays, {})["arrays"]
    unknown = [name for name, values in arrays.items() if values.dtype.name not in _PLAIN_DTYPES]
    if promised != found or unknown:
        listed = promised if isinstance(promised, dict) else {}
        names = unknown or [name for name in {**listed, **found} if listed.get(name) != found.get(name)]
        raise CacheError(f"{where}: {', '.join(sorted(names))} differ from the checksums. {ADVICE}")


def _only_chunk(num_axes: int) -> str:
    return "/".join(["c", *["0"] * num_axes])
