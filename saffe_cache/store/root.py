"""The root of a cache: its current item table and its encoders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from saffe_cache.core.features import CacheError
from saffe_cache.core.json_schema import whole_number
from saffe_cache.store.layout import encoder_group
from saffe_cache.store.storage import FORMAT_VERSION, Storage, group_metadata, own_attributes


@dataclass(frozen=True)
class RootManifest:
    """The root group: the parts of the item table and the encoders."""

    tables: tuple[str, ...]
    """Names of the parts below `tables`, oldest first."""
    encoders: tuple[str, ...]
    """Keys, oldest first."""
    version: int = 2
    """The format version: 1 for a table that is one group of plain columns."""
    stored: bytes | None = field(default=None, compare=False, repr=False)
    """The file that it was read from."""

    def to_json(self) -> dict[str, Any]:
        tables = {"table": int(self.tables[0])} if self.version == FORMAT_VERSION else {"tables": list(self.tables)}
        return {
            "encoding-type": "saffe-cache",
            "format_version": self.version,
            **tables,
            "encoders": list(self.encoders),
        }


_ROOT_VERSIONS = (FORMAT_VERSION, RootManifest.version)


def read_root(storage: Storage) -> RootManifest | None:
    """The root manifest, or None if there is no cache yet.

    Raises CacheError if it is no feature cache, or one of another format version.
    """
    if not storage.exists("zarr.json"):
        return None
    stored = storage.read("zarr.json")
    content = own_attributes(storage, "", stored)
    if "format_version" not in content:
        raise CacheError(f"{storage.root}: found a Zarr group, expected a feature cache. Choose another --cache.")
    version = content["format_version"]
    if version not in _ROOT_VERSIONS or isinstance(version, bool):
        raise CacheError(
            f"{storage.root}: format version {version}, this release reads {' and '.join(map(str, _ROOT_VERSIONS))}. "
            "Use the release that wrote it, or extract into a new cache."
        )
    try:
        tables: tuple[str, ...]
        if version == FORMAT_VERSION:
            tables = (str(whole_number(content, "table")),)
        else:
            tables = _names(content, "tables", "parts")
            if not all(re.fullmatch(r"[1-9][0-9]{0,17}-[0-9a-f]{8}", name) for name in tables) or not tables:
                raise ValueError(f"tables: {tables!r:.60}, expected names such as 1-0a1b2c3d")
        encoders = _names(content, "encoders", "keys")
        for key in encoders:
            storage.local_path(encoder_group(key))  # raises if it points outside the cache
        return RootManifest(tables, encoders, version, stored)
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{storage.root}: zarr.json lacks or misstates {error}. Restore it from a copy.") from None


def _names(content: Mapping[str, Any], name: str, what: str) -> tuple[str, ...]:
    if not isinstance(content[name], list):
        raise ValueError(f"{name}: {content[name]!r:.60}, expected a list of {what}")
    return tuple(map(str, content[name]))


def write_root(storage: Storage, root: RootManifest, was: RootManifest | None = None) -> None:
    """Commit a root in place of the one that was read before; None for a new cache.

    Raises CacheError if another writer has committed one in the meantime.
    """
    data = group_metadata({"saffe_cache": root.to_json()})
    if not storage.replace("zarr.json", data, was.stored if was else None):
        raise CacheError(
            f"{storage.root}: another process has written to the cache in the meantime, and this one has changed "
            "nothing. Run it again."
        )


def existing_root(storage: Storage) -> RootManifest:
    """The root manifest. Raises CacheError if there is no cache, or one of another format version."""
    root = read_root(storage)
    if root is None:
        raise CacheError(f"{storage.root}: there is no feature cache. Make one with saffe extract.")
    return root
