"""The caches of a recipe's `storage`: made of the one that is given, once for what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from saffe_cache.core.features import CacheError
from saffe_cache.store.convert import convert_cache
from saffe_cache.store.manifest import content_hash, read_root
from saffe_cache.store.reader import Cache
from saffe_cache.store.storage import Storage

_NARROWER: Mapping[str, tuple[str, ...]] = {
    "float32": ("float16", "bfloat16", "int8", "float8"),
    "float16": ("int8", "float8"),
}
"""What a storage type holds enough for."""


def stored_as(path: str, cache: Cache, storage: str | None, folder: Path) -> str:
    """The path of the cache, or of one in `folder` with its hidden states in another type.

    The latter is named after what the cache holds: data that are added, or another cache, make another one.

    Raises:
        CacheError: its own type has not the numbers of the other.
    """
    own = {
        encoder.manifest.arrays[f"hidden_states/{layer}"].spec.dtype
        for encoder in cache.encoders.values()
        for layer in encoder.manifest.layers
    }
    if storage is None or own == {storage}:
        return path
    if any(storage not in _NARROWER.get(dtype, ()) for dtype in own):
        raise CacheError(
            f"{path}: it stores {', '.join(sorted(own))}, from which {storage} cannot be made. Extract a cache with "
            "--storage float32."
        )
    converted = folder / f"{storage}-{content_hash(cache.storage)}.zarr"
    if read_root(Storage(converted)) is None:  # a conversion that was killed has none
        convert_cache(path, converted, storage_type=storage)
    return str(converted)
