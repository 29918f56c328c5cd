"""Files below a cache's root, on a local disk or behind a URL, and the small Zarr groups among them.

A local write goes to a temporary name, then fsync, rename, and fsync of the folder. After a crash a file is therefore
the old one or the new one, complete. Behind a URL, what an object store has accepted has the same property.

Arrays that do not grow (columns of the item table, tensors of blocks) lie in groups of their own, with one chunk each.
The attributes of such a group are written last and list every array with its checksum, because Zarr itself reads a
missing chunk as zeros and does not notice a flipped bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr
from zarr.storage import MemoryStore

from saffe_cache.core.atomic_io import Buffer, hold_folder, remove_partial_files_below
from saffe_cache.core.features import REPAIR_ADVICE, CacheError
from saffe_cache.core.json_schema import whole_number, whole_numbers
from saffe_cache.store.checksums import bytes_of, crc32c
from saffe_cache.store.files import ForeignFiles, LocalFiles
from saffe_cache.store.objects import SCHEMES, ObjectFiles

FORMAT_VERSION = 1
_PLAIN_DTYPES = ("float32", "int64", "uint8")


class _Files(Protocol):
    """What a cache needs of the place where it lies. `read` and `read_range` raise FileNotFoundError."""

    def exists(self, name: str) -> bool: ...
    def read(self, name: str) -> bytes: ...
    def read_buffer(self, name: str) -> Buffer: ...
    def read_range(self, name: str, start: int, stop: int) -> bytes: ...
    def write(self, name: str, *parts: Buffer) -> None: ...
    def create(self, name: str, *parts: Buffer) -> bool: ...
    def replace(self, name: str, data: bytes, was: bytes | None) -> bool: ...
    def list(self, prefix: str) -> list[str]: ...
    def remove(self, name: str) -> None: ...
    def remove_folder(self, name: str) -> None: ...


class Storage:
    """Named byte strings below a root. Names use `/` and never start with it."""

    def __init__(self, root: str | Path) -> None:
        """Raises CacheError if the root is a URL that nothing here opens."""
        self.root = str(root)
        self._local: Path | None = None
        self.objects: ObjectFiles | None = None
        """The object store, if the cache lies in one."""
        scheme, _, below = self.root.partition("://")
        if not below or scheme == "file":
            self._local = Path(below if scheme == "file" else self.root).expanduser().absolute()
            self._files: _Files = LocalFiles(self._local)
        elif scheme in SCHEMES:
            self._files = self.objects = ObjectFiles(self.root)
        else:
            self._files = ForeignFiles(self.root)

    def local_path(self, name: str) -> Path | None:
        """The path of a name on the local disk; None behind a URL.

        Raises CacheError if the name points outside the cache.
        """
        self._check(name)
        return self._local / name if self._local is not None else None

    def exists(self, name: str) -> bool:
        return self._files.exists(self._check(name))

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises CacheError if there is no such file."""
        with self._missing_told(name):
            return self._files.read(self._check(name))

    def read_buffer(self, name: str) -> Buffer:
        """As `read`, for large files: those of the local disk are read into memory that costs fewer page faults."""
        with self._missing_told(name):
            return self._files.read_buffer(self._check(name))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Some bytes of a file. Raises CacheError if there is no such file, or it ends earlier."""
        with self._missing_told(name):
            data = self._files.read_range(self._check(name), start, start + length)
        if len(data) != length:
            raise CacheError(f"{self.root}: {name} ends before byte {start + length}. {REPAIR_ADVICE}")
        return data

    def write(self, name: str, *parts: Buffer) -> None:
        """Write a file; it is durable and complete when this returns."""
        self._files.write(self._check(name), *parts)

    def create(self, name: str, *parts: Buffer) -> bool:
        """Write a file only if there is none of that name, and return whether it was written, durable and complete.

        Of several claimants exactly one gets True. Behind a URL that fsspec opens, two at the same instant may both.
        """
        return self._files.create(self._check(name), *parts)

    def replace(self, name: str, data: bytes, was: bytes | None) -> bool:
        """Write a file only if its content is `was` (None: there is no file), and return whether it was written.

        Of several that replace the same content exactly one gets True. Behind a URL that fsspec opens, two at the same
        instant may both.
        """
        return self._files.replace(self._check(name), data, was)

    def list(self, prefix: str) -> list[str]:
        """Names of all files below a folder, sorted; empty if there is no such folder. Temporary files are left out."""
        return self._files.list(self._check(prefix))

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        self._files.remove(self._check(name))

    def remove_folder(self, name: str) -> None:
        """Remove a folder and its contents, if it exists."""
        self._files.remove_folder(self._check(name))

    def _check(self, name: str) -> str:
        if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise CacheError(f"{self.root}: {name!r} is no name inside a cache.")
        return name

    @contextmanager
    def _missing_told(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise CacheError(f"{self.root}: {name} is missing. {REPAIR_ADVICE}") from None

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file. Raises CacheError if the file is missing, or is not a JSON object."""
        return self.parse_json(name, self.read(name))

    def parse_json(self, name: str, data: bytes) -> dict[str, Any]:
        """The object in the bytes of a JSON file. Raises CacheError if they are no JSON object."""
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CacheError(f"{self.root}: {name} is not JSON ({error}). Restore it from a copy.") from None
        if not isinstance(value, dict):
            raise CacheError(f"{self.root}: {name} is not a JSON object. Restore it from a copy.")
        return value

    @property
    def is_local(self) -> bool:
        return self._local is not None

    @contextmanager
    def writer_lock(self, *, shared: bool = False) -> Iterator[None]:
        """Lock a local cache for one writer, and remove temporary files of a killed one; `claims.held_cache` also holds
        one behind a URL.

        The lock ends with its process, however that ends. Raises FolderInUseError if another process writes to it.

        Args:
            shared: lock it with other workers that share it.
        """
        if self._local is None:  # object stores have no lock that all of them honour
            yield
            return
        with hold_folder(self._local, shared=shared):
            if not shared:
                remove_partial_files_below(self._local)
            yield


def group_metadata(attributes: Mapping[str, Any]) -> bytes:
    """The `zarr.json` of a group."""
    content = {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}
    return json.dumps(content, indent=1, allow_nan=False).encode()


def write_attributes(storage: Storage, name: str, attributes: Mapping[str, Any]) -> None:
    """Write the `zarr.json` of a group with attributes below the key "saffe_cache". `name` "" is the root."""
    storage.write(f"{name}/zarr.json".lstrip("/"), group_metadata({"saffe_cache": dict(attributes)}))


def read_attributes(storage: Storage, name: str) -> dict[str, Any]:
    """The attributes that `write_attributes` wrote, empty without that key.

    Raises CacheError if its `zarr.json` is missing or not a JSON object.
    """
    return own_attributes(storage, name, storage.read(f"{name}/zarr.json".lstrip("/")))


def own_attributes(storage: Storage, name: str, data: bytes) -> dict[str, Any]:
    """The same of the bytes of a group's `zarr.json`."""
    attributes = storage.parse_json(f"{name}/zarr.json".lstrip("/"), data).get("attributes")
    own = attributes.get("saffe_cache") if isinstance(attributes, dict) else None
    return own if isinstance(own, dict) else {}


def check_encoding(
    attributes: Mapping[str, Any], encoding_type: str, where: str, versions: Sequence[int] = (FORMAT_VERSION,)
) -> None:
    """Raises CacheError if the attributes belong to another kind of node, or to another format version."""
    found = attributes.get("encoding-type"), attributes.get("encoding-version")
    if found[0] != encoding_type or found[1] not in versions:
        raise CacheError(
            f"{where}: its attributes say {found[0]} version {found[1]}, expected {encoding_type} version "
            f"{' or '.join(map(str, versions))}. Restore zarr.json from a copy, or use the release that wrote it."
        )


def mark_group(storage: Storage, name: str) -> None:
    """Make an empty group unless it exists; without it, other programs do not see what lies below."""
    if not storage.exists(f"{name}/zarr.json"):
        storage.write(f"{name}/zarr.json", group_metadata({}))


def describe_group(encoding_type: str, arrays: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a group of plain arrays: `fields`, and each array's shape, type and checksum."""
    listed = {
        name: {
            "shape": list(values.shape),
            "dtype": values.dtype.name,
            "crc32c": crc32c([np.ascontiguousarray(values)]),
        }
        for name, values in arrays.items()
    }
    return {"encoding-type": encoding_type, "encoding-version": FORMAT_VERSION, **fields, "arrays": listed}


def write_group(storage: Storage, name: str, attributes: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a group of plain arrays, its attributes (by `describe_group`) last. Array names may contain `/`."""
    for array_name, values in arrays.items():
        assert values.dtype.name in _PLAIN_DTYPES, f"{array_name} is {values.dtype}"
        parts = array_name.split("/")
        for depth in range(1, len(parts)):
            mark_group(storage, "/".join([name, *parts[:depth]]))
        storage.write(f"{name}/{array_name}/zarr.json", _plain_metadata(array_name, values.shape, values.dtype.name))
        if values.size:
            storage.write(f"{name}/{array_name}/{_only_chunk(values.ndim)}", bytes_of(np.ascontiguousarray(values)))
    write_attributes(storage, name, attributes)


def read_group(
    storage: Storage, name: str, encoding_type: str, versions: Sequence[int] = (FORMAT_VERSION,)
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The attributes of a group of plain arrays, and the arrays by their names below it.

    Raises CacheError if something is missing, or an array differs from its checksum.
    """
    where = f"{storage.root}: {name}"
    attributes = read_attributes(storage, name)
    check_encoding(attributes, encoding_type, where, versions)
    try:
        listed = [(key, whole_numbers(one, "shape"), str(one["dtype"])) for key, one in attributes["arrays"].items()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CacheError(f"{where}: zarr.json lacks or misstates {error}. Restore it from a copy.") from None
    arrays = {}
    for key, shape, dtype in listed:
        data = storage.read(f"{name}/{key}/{_only_chunk(len(shape))}") if math.prod(shape) else b""
        if dtype not in _PLAIN_DTYPES or len(data) != math.prod(shape) * np.dtype(dtype).itemsize:
            raise CacheError(f"{where}/{key}: {len(data)} bytes, expected {shape} {dtype}. {REPAIR_ADVICE}")
        arrays[key] = np.frombuffer(data, dtype).reshape(shape).copy()
    check_arrays(attributes, arrays, where)
    return attributes, arrays


class PlainArray:
    """A plain array whose bytes are read, and compared with their checksum, when they are asked for.

    A local file is mapped at once, so that its bytes stay even if a writer removes it.
    """

    def __init__(self, storage: Storage, group: str, name: str, attributes: Mapping[str, Any]) -> None:
        """
        Args:
            attributes: the group's.

        Raises:
            KeyError, TypeError, ValueError: they do not describe the array.
        """
        entry = attributes["arrays"][name]
        self._shape, self._dtype = whole_numbers(entry, "shape"), np.dtype(str(entry["dtype"]))
        if self._dtype.name not in _PLAIN_DTYPES:
            raise ValueError(f"dtype: {self._dtype}")
        self._crc32c, self._storage = whole_number(entry, "crc32c"), storage
        self._where, self._file = f"{storage.root}: {group}/{name}", f"{group}/{name}/{_only_chunk(len(self._shape))}"
        path = storage.local_path(self._file)
        is_mapped = path is not None and path.is_file() and path.stat().st_size > 0
        self._mapped = np.memmap(path, np.uint8, "r") if path is not None and is_mapped else None

    def read(self) -> np.ndarray:
        """The array; it cannot be written to. Raises CacheError if it is missing or differs from its checksum."""
        count = math.prod(self._shape)
        data: np.ndarray | None = self._mapped
        if data is None:
            data = np.frombuffer(self._storage.read(self._file) if count else b"", np.uint8)
        if len(data) != count * self._dtype.itemsize:
            raise CacheError(f"{self._where}: {len(data)} bytes, expected {self._shape} {self._dtype}. {REPAIR_ADVICE}")
        if crc32c([data]) != self._crc32c:
            raise CacheError(f"{self._where} differs from its checksum. {REPAIR_ADVICE}")
        return np.asarray(data).view(self._dtype).reshape(self._shape)


def check_arrays(attributes: Mapping[str, Any], arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Compare a group's arrays with its attributes.

    Raises CacheError if an array is missing or additional, or differs in shape, type or checksum.
    """
    promised, found = attributes.get("arrays"), describe_group("", arrays, {})["arrays"]
    unknown = [name for name, values in arrays.items() if values.dtype.name not in _PLAIN_DTYPES]
    if promised != found or unknown:
        listed = promised if isinstance(promised, dict) else {}
        names = unknown or [name for name in {**listed, **found} if listed.get(name) != found.get(name)]
        raise CacheError(f"{where}: {', '.join(sorted(names))} differ from the checksums. {REPAIR_ADVICE}")


@lru_cache(maxsize=256)
def _plain_metadata(name: str, shape: tuple[int, ...], dtype: str) -> bytes:
    """The `zarr.json` of an array that does not grow: one chunk."""
    return zarr_json(
        shape=shape,
        chunks=tuple(max(1, length) for length in shape),
        dtype=dtype,
        dimension_names=[f"{name}.{axis}" for axis in range(len(shape))],
    )


def _only_chunk(num_axes: int) -> str:
    return "/".join(["c", *["0"] * num_axes])


def zarr_json(*, compressors: Any = None, **options: Any) -> bytes:
    """The `zarr.json` that zarr-python writes for an array; takes some milliseconds."""
    files: dict[str, Any] = {}
    zarr.create_array(MemoryStore(files), compressors=compressors, filters=None, **options)
    return bytes(files["zarr.json"].to_bytes())
