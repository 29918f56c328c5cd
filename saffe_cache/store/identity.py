"""What a cache holds, as one hash: what is made of the cache is known by it."""

from __future__ import annotations

from saffe_cache.core.features import short_hash
from saffe_cache.store.manifest import read_encoder
from saffe_cache.store.reader import existing_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.zarr_files import read_attributes


def content_hash(storage: Storage) -> str:
    """Over the item table and all rows, by the checksums that their manifests keep; when they were written is left out.

    Raises:
        CacheError: there is no cache, or one of another format version.
    """
    root = existing_root(storage)
    encoders = [read_encoder(storage, key).to_json() | {"history": []} for key in root.encoders]
    return short_hash({"table": read_attributes(storage, f"tables/{root.table}"), "encoders": encoders})
