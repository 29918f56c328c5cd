"""The files of one growing array of an encoder: its shards, and its metadata for other programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from zarr.codecs import BloscCodec

from saffe_cache.core.features import REPAIR_ADVICE, CacheError
from saffe_cache.store.layout import (
    COMPRESSION_LEVEL,
    ArraySpec,
    ShardEntry,
    decode_shard,
    encode_shard,
    encoder_group,
    shard_name,
)
from saffe_cache.store.storage import FORMAT_VERSION, Storage, mark_group, zarr_json


def zarr_codec(dtype: np.dtype) -> Any:
    """The codec in Zarr's metadata."""
    shuffle: Literal["noshuffle", "bitshuffle"] = "noshuffle" if dtype.itemsize == 1 else "bitshuffle"
    return BloscCodec(cname="zstd", clevel=COMPRESSION_LEVEL, shuffle=shuffle, typesize=dtype.itemsize, blocksize=0)


@lru_cache(maxsize=256)
def _array_metadata(spec: ArraySpec, num_rows: int) -> bytes:
    """The `zarr.json` of a growing array with `num_rows` rows, sharded."""
    attributes = {"encoding-type": "saffe-array", "encoding-version": FORMAT_VERSION, "dtype": spec.dtype}
    return zarr_json(
        shape=(num_rows, *spec.stored_shape),
        chunks=(spec.chunk_rows, *spec.stored_shape),
        shards=(spec.shard_rows, *spec.stored_shape),
        dtype=spec.numpy_dtype,
        fill_value=spec.fill_value,
        dimension_names=spec.dimension_names,
        attributes={"saffe_cache": attributes},
        compressors=None if spec.compression == "none" else zarr_codec(spec.numpy_dtype),
    )


@dataclass(frozen=True)
class ArrayFiles:
    """The files of one growing array: its shards, and its `zarr.json` for other programs."""

    storage: Storage
    key: str
    """The encoder's."""
    name: str
    spec: ArraySpec

    @property
    def folder(self) -> str:
        return f"{encoder_group(self.key)}/{self.name}"

    def shard(self, index: int) -> str:
        """The name of a shard's file."""
        return f"{self.folder}/{shard_name(index, self.spec)}"

    def read(self, index: int, entry: ShardEntry) -> np.ndarray:
        """The rows of a shard, as `decode_shard` returns them.

        Raises CacheError if the file is missing, truncated or damaged.
        """
        name = self.shard(index)
        return decode_shard(self.spec, entry, self.storage.read_buffer(name), f"{self.storage.root}: {name}")

    def write(self, index: int, *portions: np.ndarray) -> None:
        """Write a shard of the rows of these portions; the manifest is not changed."""
        self.storage.write(self.shard(index), *encode_shard(self.spec, *portions))

    def write_metadata(self, num_rows: int) -> None:
        """Write the `zarr.json` of an array with `num_rows` rows."""
        *parents, _ = self.name.split("/")
        for depth in range(1, len(parents) + 1):
            mark_group(self.storage, "/".join([encoder_group(self.key), *parents[:depth]]))
        self.storage.write(f"{self.folder}/zarr.json", _array_metadata(self.spec, num_rows))

    def check_metadata(self, num_rows: int) -> None:
        """Check that other programs can find the rows that the manifest counts; this package needs only the manifest.

        Raises CacheError if the array's `zarr.json` is missing or damaged, or states another layout or fewer rows.
        """
        found = self.storage.read_json(f"{self.folder}/zarr.json")
        expected = json.loads(_array_metadata(self.spec, num_rows))
        shape = found.get("shape")
        if isinstance(shape, list) and shape and isinstance(shape[0], int) and shape[0] > num_rows:
            expected["shape"][0] = shape[0]  # written for the final number of rows
        fields = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs")
        wrong = [field for field in fields if found.get(field) != expected[field]]
        if wrong:
            root = self.storage.root
            raise CacheError(f"{root}: {self.folder}/zarr.json misstates {' and '.join(wrong)}. {REPAIR_ADVICE}")
