"""The FAISS index over fused vectors. The only importer of faiss.

Items are added in a random order that is saved with the index: where scores tie, the better rank then goes
to nobody in particular. (With a collapsed model all scores tie, and any fixed order would show a pattern.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np


@dataclass(frozen=True)
class RetrievalIndex:
    """A flat inner-product index; `ids[i]` is the item of the index's row i."""

    index: Any
    ids: tuple[str, ...]
    order: np.ndarray
    """int64 [items]: which of the given vectors became row i."""

    def rank(self, queries: np.ndarray, k: int | None = None, block: int = 256) -> Iterator[np.ndarray]:
        """Positions of the k best vectors (all by default) in the order in which they were given.

        Yields int64 [at most `block`, k] for consecutive blocks of queries, so that memory stays bounded.

        Raises:
            ValueError: k exceeds the gallery.
        """
        size = self.index.ntotal
        if k is not None and k > size:
            raise ValueError(f"k={k} exceeds the gallery ({size} items). Use {size} or less.")
        for start in range(0, len(queries), block):
            _, found = self.index.search(np.ascontiguousarray(queries[start : start + block], np.float32), k or size)
            yield self.order[found]


def build_index(vectors: np.ndarray, ids: tuple[str, ...], seed: int = 0) -> RetrievalIndex:
    """Index unit vectors, float32 [items, d].

    Raises:
        ValueError: a vector is not finite or not of unit length, or ids and vectors differ in number.
    """
    if len(ids) != len(vectors):
        raise ValueError(f"index: {len(vectors)} vectors, {len(ids)} ids. Give one id for each vector.")
    norms = np.linalg.norm(vectors, axis=1)
    if not np.allclose(norms, 1, atol=1e-3):
        worst = int(np.nan_to_num(np.abs(norms - 1), nan=np.inf).argmax())
        raise ValueError(f"index: the vector of {ids[worst]} has length {norms[worst]:.4g}, expected 1. Normalise it.")
    order = np.random.default_rng(seed).permutation(len(vectors))
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors[order], np.float32))
    return RetrievalIndex(index, tuple(ids[i] for i in order), order)


def save_index(index: RetrievalIndex, folder: Path) -> None:
    """Write `index.faiss` and `index_ids.json` (the item of each row)."""
    faiss.write_index(index.index, str(folder / "index.faiss"))
    content = {"ids": list(index.ids), "order": index.order.tolist()}
    (folder / "index_ids.json").write_text(json.dumps(content, ensure_ascii=True))


def load_index(folder: Path) -> RetrievalIndex:
    """Read what `save_index` wrote.

    Raises:
        ValueError: the two files do not belong together.
    """
    index = faiss.read_index(str(folder / "index.faiss"))
    content = json.loads((folder / "index_ids.json").read_text())
    if index.ntotal != len(content["ids"]):
        raise ValueError(f"{folder}: the index has {index.ntotal} rows, index_ids.json {len(content['ids'])}. Evaluate again.")
    return RetrievalIndex(index, tuple(content["ids"]), np.array(content["order"], np.int64))
