"""The FAISS index over fused vectors. The only importer of faiss.

Items are added in a random order that is saved with the index: where scores tie, the better rank then goes
to nobody in particular. (With a collapsed model all scores tie, and any fixed order would show a pattern.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from saffe_cache.durable import write_whole

_GPU_MOST_RANKS = 2048
"""The longest ranking that faiss returns from a GPU."""


@dataclass(frozen=True)
class RetrievalIndex:
    """A flat inner-product index; `ids[i]` is the item of the index's row i."""

    index: Any
    ids: tuple[str, ...]
    order: np.ndarray
    """int64 [items]: which of the given vectors became row i."""

    def rank(self, queries: np.ndarray, k: int | None = None, block: int = 256) -> Iterator[np.ndarray]:
        """Positions of the k best vectors (all by default) in the order in which they were given.

        Returns int64 [at most `block`, k] for consecutive blocks of queries, so that memory stays bounded.

        Raises:
            ValueError: k exceeds the gallery, or the queries are not finite or of another width.
        """
        size, width = self.index.ntotal, self.index.d
        k = size if k is None else k
        if not 1 <= k <= size:
            raise ValueError(f"k={k} exceeds the gallery ({size} items). Use 1 to {size}.")
        if queries.ndim != 2 or queries.shape[1] != width:
            raise ValueError(f"queries: shape {queries.shape}, the index has vectors of width {width}. Give those.")
        finite = np.isfinite(queries).all(axis=1)
        if not finite.all():
            raise ValueError(f"queries: row {int(finite.argmin())} is not finite. Leave it out, or mend the model.")
        return self._rank_blocks(queries, k, block)

    def _rank_blocks(self, queries: np.ndarray, k: int, block: int) -> Iterator[np.ndarray]:
        index = self.index
        if k <= _GPU_MOST_RANKS and faiss.get_num_gpus():
            index = faiss.index_cpu_to_all_gpus(index)
        for start in range(0, len(queries), block):
            _, found = index.search(np.ascontiguousarray(queries[start : start + block], np.float32), k)
            yield self.order[found]


def build_index(vectors: np.ndarray, ids: tuple[str, ...], seed: int = 0) -> RetrievalIndex:
    """Index unit vectors, float32 [items, d].

    Raises:
        ValueError: a vector is not finite or not of unit length, or ids and vectors differ in number.
    """
    if len(ids) != len(vectors):
        raise ValueError(f"index: {len(vectors)} vectors, {len(ids)} ids. Give one id for each vector.")
    norms = np.linalg.norm(vectors, axis=1)
    errors = np.nan_to_num(np.abs(norms - 1), nan=np.inf)
    if (errors > 1e-3).any():
        worst = int(errors.argmax())
        raise ValueError(f"index: the vector of {ids[worst]} has length {norms[worst]:.4g}, expected 1. Normalise it.")
    order = np.random.default_rng(seed).permutation(len(vectors))
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors[order], np.float32))
    return RetrievalIndex(index, tuple(ids[i] for i in order), order)


def save_index(index: RetrievalIndex, folder: Path) -> None:
    """Write `index.faiss`, and `index_ids.json` with the item of each row and the SHA-256 of the other file."""
    data = faiss.serialize_index(index.index).tobytes()
    content = {"sha256": hashlib.sha256(data).hexdigest(), "ids": list(index.ids), "order": index.order.tolist()}
    write_whole(folder / "index.faiss", data)
    write_whole(folder / "index_ids.json", json.dumps(content, ensure_ascii=True).encode())


def load_index(folder: Path) -> RetrievalIndex:
    """Read what `save_index` wrote.

    Raises:
        ValueError: the two files do not belong together.
    """
    data = (folder / "index.faiss").read_bytes()
    content = json.loads((folder / "index_ids.json").read_text())
    if hashlib.sha256(data).hexdigest() != content["sha256"]:
        raise ValueError(f"{folder}: index.faiss is not the file that index_ids.json describes. Evaluate again.")
    index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
    return RetrievalIndex(index, tuple(content["ids"]), np.array(content["order"], np.int64))
