"""Options of the verbs of `saffe cache`, whose help imports no Zarr."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saffe_cache.core.features import Compression, StorageType
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
class StatusConfig:
    """Show how far the extraction into a cache is: ranges that are done, running (with the age of the last heartbeat),
    failed, dead and free."""

    cache: str = positional()
    """The cache."""
    json: bool = False
    """Print JSON."""


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
    """Write a cache as one HDF5 file, or its hidden states and vectors as plain numbers for other programs."""

    cache: str = positional()
    """The cache."""
    file: str = positional()
    """The file to write; of the formats zarr and safetensors, the folder."""
    decoded: bool = False
    """Write plain numbers instead of the cache's storage types: hidden states as float16, or as float32 where a layer
    has a magnitude beyond float16's 65,504, which is reported. No cache can be made from it."""
    format: Literal["hdf5", "zarr", "safetensors"] = "hdf5"
    """With --decoded: one HDF5 file, a Zarr v3 group, or a folder with one safetensors file for each input (with
    input_ids for language models)."""

    def __post_init__(self) -> None:
        expected = "hdf5, or --decoded with it"
        require(self.decoded or self.format == "hdf5", "format", self.format, expected)


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Make a cache from an HDF5 file that `saffe cache export` wrote."""

    file: str = positional()
    """The HDF5 file."""
    cache: str = positional()
    """The cache to write."""
