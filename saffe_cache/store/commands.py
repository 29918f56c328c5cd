"""What `saffe cache` does to a cache: look into it, check it, convert it, exchange it. Its help imports no Zarr."""

from __future__ import annotations

from dataclasses import dataclass

from saffe_cache.core.features import Compression, StorageType, printable
from saffe_cache.core.options import positional, require


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show encoders, layers, shapes, splits, sizes, ranges and a few items of a cache."""

    cache: str = positional()
    """The cache."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Read every shard of a cache and compare it with its checksum. Exit status 1 if one is damaged."""

    cache: str = positional()
    """The cache."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Copy a cache, with hidden states of another type or compression."""

    cache: str = positional()
    """The cache."""
    new: str = positional()
    """The cache to write."""
    storage: StorageType | None = None
    """Type of hidden states. Default: unchanged."""
    compression: Compression | None = None
    """Compression of hidden states. Default: unchanged."""
    shard_mb: int = 64
    """Size of a shard in MB."""

    def __post_init__(self) -> None:
        require(self.shard_mb >= 0, "shard_mb", self.shard_mb, "0 (the smallest) or more")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a cache as one HDF5 file."""

    cache: str = positional()
    """The cache."""
    file: str = positional()
    """The HDF5 file to write."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Make a cache from an HDF5 file that `saffe cache export` wrote."""

    file: str = positional()
    """The HDF5 file."""
    cache: str = positional()
    """The cache to write."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What a check found."""

    num_shards: int
    """That were read."""
    problems: list[str]
    """Damaged parts, one line each."""

    @property
    def exit_status(self) -> int:
        return 1 if self.problems else 0

    def __str__(self) -> str:
        total = f"{self.num_shards} shards read, {len(self.problems)} damaged"
        return "\n".join([*map(printable, self.problems), total])


def inspect_cache(config: InspectConfig) -> str:
    """Describe a cache: encoders, layers, shapes, splits, sizes, ranges and a few items.

    Raises:
        CacheError: there is no cache, or it is damaged.
    """
    from saffe_cache.store.inspect import describe_cache

    return describe_cache(config.cache)


def verify_cache(config: VerifyConfig) -> Verified:
    """Read every shard of a cache and compare it with its checksum.

    Raises:
        CacheError: there is no cache, or one of another format version.
    """
    from saffe_cache.store import inspect

    num_shards, problems = inspect.verify_cache(config.cache)
    return Verified(num_shards=num_shards, problems=problems)


def convert_cache(config: ConvertConfig) -> str:
    """Copy a cache, with hidden states of another type or compression, and return the new one's path.

    Raises:
        CacheError: the new cache exists, the old one is damaged, or a number does not fit into the type.
    """
    from saffe_cache.store import convert

    return convert.convert_cache(
        config.cache,
        config.new,
        storage_type=config.storage,
        compression=config.compression,
        shard_mb=config.shard_mb,
    )


def export_cache(config: ExportConfig) -> str:
    """Write a cache as one HDF5 file, and return its path.

    Raises:
        CacheError: a part of the cache is missing or damaged.
        OSError: the file exists, or cannot be written.
    """
    from saffe_cache.store.exchange import export_hdf5

    return export_hdf5(config.cache, config.file)


def import_cache(config: ImportConfig) -> str:
    """Make a cache from an HDF5 file that `export_cache` wrote, and return its path.

    Raises:
        CacheError: a cache exists there, or the file is damaged or something else.
        OSError: the file is absent, or the cache cannot be written.
    """
    from saffe_cache.store.exchange import import_hdf5

    return import_hdf5(config.file, config.cache)
