"""Features in main memory, read in the same way as those of a cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from saffe_cache.core.features import BlockWeights, CacheError
from saffe_cache.core.items import ItemTable
from saffe_cache.store.dtypes import from_storage
from saffe_cache.store.layout import ArraySpec
from saffe_cache.store.manifest import EncoderManifest
from saffe_cache.store.reader import Cache, EncoderCache
from saffe_cache.store.root import RootManifest
from saffe_cache.store.rows import RowReader
from saffe_cache.store.storage import Storage


class HeldRows(RowReader):
    """The rows of one array."""

    def __init__(self, spec: ArraySpec, stored: np.ndarray) -> None:
        """`stored`: [n, *stored_shape]."""
        self.spec, self._stored, self.is_mapped = spec, stored, True

    def __len__(self) -> int:
        return len(self._stored)

    def hold(self, rows: np.ndarray) -> None:
        """They are in memory."""

    def read_stored(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._stored[rows])

    def read(self, rows: np.ndarray) -> np.ndarray:
        return from_storage(self.read_stored(rows), self.spec.dtype)


class HeldEncoder(EncoderCache):
    """What is in memory of one encoder: rows of arrays, and blocks."""

    def __init__(
        self,
        manifest: EncoderManifest,
        stored: Mapping[str, np.ndarray] | None = None,
        *,
        blocks: Mapping[int, BlockWeights] | None = None,
        usual_tokens: int = 0,
        where: str = "memory",
    ) -> None:
        """
        Args:
            manifest: says how arrays are stored, how many inputs there are, and which are invalid.
            stored: the arrays that have rows.
            usual_tokens: of each sound that a run was trained on; 0 if their number differed.
            where: for error messages.
        """
        super().__init__(Storage(where), manifest)
        self._stored, self._blocks, self._usual_tokens = stored or {}, blocks or {}, usual_tokens

    def array(self, name: str) -> RowReader:
        if name not in self.manifest.arrays:
            raise CacheError(
                f"{self._storage.root}: {self.key} has no {name}; it has {', '.join(sorted(self.manifest.arrays))}."
            )
        spec = self.manifest.arrays[name].spec
        stored = self._stored.get(name)
        return HeldRows(spec, np.empty((0, *spec.stored_shape), spec.numpy_dtype) if stored is None else stored)

    def block(self, layer: int) -> BlockWeights:
        if layer not in self._blocks:
            raise CacheError(f"{self._storage.root}: {self.key} has no block {layer}. Train again.")
        return self._blocks[layer]

    def num_tokens(self, layer: int) -> int:
        """As in the cache that a run was trained on, as long as these inputs have that many."""
        if not self.manifest.is_ragged:
            return super().num_tokens(layer)
        if "offsets" not in self._stored:
            return self._usual_tokens
        lengths = np.diff(self.offsets) * math.prod(self.array(f"hidden_states/{layer}").spec.row_shape[:-1])
        return self._usual_tokens if (lengths[self.usable(np.arange(len(lengths)))] == self._usual_tokens).all() else 0


class HeldCache(Cache):
    """An item table and encoders in memory."""

    def __init__(self, table: ItemTable, encoders: Mapping[str, EncoderCache], where: str = "memory") -> None:
        self.storage, self.root = Storage(where), RootManifest((), tuple(encoders))
        self.table, self.encoders = table, encoders


def without_rows(manifest: EncoderManifest) -> EncoderManifest:
    """The manifest of an encoder that has encoded nothing yet, with the same arrays."""
    arrays = {name: replace(array, shards=[]) for name, array in manifest.arrays.items()}
    return replace(manifest, arrays=arrays, finished_rows=0, invalid={}, history=[])
