"""The FAISS index over fused vectors. The only importer of faiss.

Items are added in a random order that is saved with the index, so that ties favour no item. (With a collapsed model all
scores tie, and any fixed order would show a pattern.) That order stays inside: positions and ids are in the order in
which the vectors were given.

| kind | searches | bytes of a vector |
|---|---|---|
| `flat` | all vectors: exact | 4 d |
| `ivf` | those of the `nprobe` nearest of `nlist` k-means clusters | 4 d + 8 |
| `ivf_pq` | the same, in codes of `num_codes` bytes (Jégou et al. 2011, product quantization) | about d / 4 + 8 |
| `hnsw` | a graph of near neighbours (Malkov and Yashunin 2018) | 4 d + 270 |

`ivf` and `ivf_pq` depend on the seed alone. The graph also depends on the timing of threads.

With a search correction, -bias follows each vector, and the length of a query follows the query: their inner product is
then the corrected score. Three zeros follow, so that codes of four coordinates each hold the bias alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from saffe_cache.core.atomic_io import write_whole
from saffe_cache.core.features import IndexKind
from saffe_cache.retrieval.ranking import require_biases, require_k, require_queries, require_unit_length

INDEX_FILES = ("index.faiss", "index_ids.json")
"""What `save_index` writes."""
_GPU_MOST_RANKS = 2048
"""The longest ranking that faiss returns from a GPU."""
_LEAST_PER_CLUSTER, _MOST_PER_CLUSTER = 39, 64
"""Vectors that k-means is fitted to; with fewer than 39 a cluster faiss warns."""
_FEWEST_CLUSTERS: dict[IndexKind, int] = {"ivf": 16, "ivf_pq": 256}  # a byte of a code distinguishes 256 clusters
_CODE_ROUNDS = 10
"""Of k-means for the codes: 25, faiss's default, takes twice as long and finds no more (0.70 and 0.73 of 10)."""
_NEIGHBOURS, _KEPT_IN_BUILDING, _KEPT_IN_SEARCH = 32, 40, 128
"""Of the graph: M, efConstruction, efSearch."""
_BIAS_WIDTH = 4
"""Coordinates that hold a bias."""


@dataclass(frozen=True)
class RetrievalIndex:
    """An inner-product index; `ids[i]` is the item of the vector that was given as the i-th."""

    faiss_index: Any
    """Its rows are in a random order, which only `rank` and `search` undo."""
    ids: tuple[str, ...]
    order: np.ndarray
    """int64 [items]: which of the given vectors became row i of `faiss_index`."""
    has_biases: bool = False
    """Whether a search correction is in its rows."""

    @property
    def width(self) -> int:
        """Of the vectors, and of queries."""
        return int(self.faiss_index.d) - _BIAS_WIDTH * self.has_biases

    def search(
        self, queries: np.ndarray, k: int, block: int = 256, *, corrected: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best items of each query, or all if there are fewer, best first.

        `corrected`: whether the search correction applies, if the index has one.

        Returns:
            scores: float32 [queries, k].
            ids: objects [queries, k]; None, with the score -inf, at the end of a row where an approximate index finds
                fewer.

        Raises:
            ValueError: k is below 1, or the queries are not finite or of another width.
        """
        scores, positions = self.nearest(queries, k, block, corrected=corrected)
        names = np.array([*self.ids, None], object)  # -1 takes the last
        return scores, names[positions]

    def nearest(
        self, queries: np.ndarray, k: int, block: int = 256, *, corrected: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores as of `search`, and positions in `ids`, int64 [queries, k], -1 where there is none."""
        k = min(k, max(1, len(self.order)))
        require_k(k, len(self.order))
        require_queries(queries, self.width, "index")
        found = list(self._search_blocks(queries, k, block, corrected))
        scores = np.concatenate([np.zeros((0, k), np.float32), *(scores for scores, _ in found)])
        positions = np.concatenate([np.zeros((0, k), np.int64), *(positions for _, positions in found)])
        return np.where(positions < 0, np.float32(-np.inf), scores), positions

    def rank(self, queries: np.ndarray, k: int | None = None, block: int = 256) -> Iterator[np.ndarray]:
        """Positions of the k best vectors (all by default) in the order in which they were given.

        -1 stands at the end of a row where an approximate index finds fewer. Yields int64 [at most `block`, k] for
        consecutive blocks of queries, so that memory stays bounded.

        Raises:
            ValueError: k exceeds the gallery, or the queries are not finite or of another width.
        """
        k = len(self.order) if k is None else k
        require_k(k, len(self.order))
        require_queries(queries, self.width, "index")
        return (positions for _, positions in self._search_blocks(queries, k, block))

    def _search_blocks(
        self, queries: np.ndarray, k: int, block: int, corrected: bool = True
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        index = self.faiss_index
        if self.has_biases:
            queries = with_biases(queries, -np.linalg.norm(queries, axis=1) * corrected)
        is_exact_on_gpu = isinstance(index, (faiss.IndexFlat, faiss.IndexIVFFlat)) and k <= _GPU_MOST_RANKS
        if len(queries) > block and is_exact_on_gpu and faiss.get_num_gpus():  # for fewer, copying takes longer
            index = faiss.index_cpu_to_all_gpus(index)
        for start in range(0, len(queries), block):
            scores, found = index.search(np.ascontiguousarray(queries[start : start + block], np.float32), k)
            yield scores, np.where(found < 0, -1, self.order[found])

    @property
    def parameters(self) -> dict[str, int]:
        """What decides how much an approximate index finds, and how fast; nothing for a flat one."""
        index = self.faiss_index
        if isinstance(index, faiss.IndexHNSW):
            return {"neighbours": _NEIGHBOURS, "kept_in_search": index.hnsw.efSearch}
        if not isinstance(index, faiss.IndexIVF):
            return {}
        codes = {"num_codes": index.pq.M} if isinstance(index, faiss.IndexIVFPQ) else {}
        return {"nlist": index.nlist, "nprobe": index.nprobe, **codes}


def require_size(kind: IndexKind, num_vectors: int) -> None:
    """Raise ValueError if the gallery is too small for what the kind of index has to learn from it."""
    least, found = _FEWEST_CLUSTERS.get(kind, 0) * _LEAST_PER_CLUSTER, f"index {kind}: {num_vectors} vectors"
    if num_vectors < least:
        raise ValueError(f"{found}, it learns its clusters from {least} or more. Use flat or hnsw.")


def with_biases(vectors: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """The rows of an index with a search correction, [items, d + 4]: vectors [items, d], -biases [items], zeros."""
    zeros = np.zeros((len(vectors), _BIAS_WIDTH - 1), vectors.dtype)
    return np.concatenate([vectors, -np.asarray(biases, vectors.dtype)[:, None], zeros], axis=1)


def build_index(
    vectors: np.ndarray,
    ids: tuple[str, ...],
    seed: int = 0,
    kind: IndexKind = "flat",
    biases: np.ndarray | None = None,
) -> RetrievalIndex:
    """Index unit vectors, float32 [items, d], with the biases of a search correction, if any, float32 [items].

    Raises:
        ValueError: a vector is not finite or not of unit length, ids and vectors differ in number, or there are too
            few vectors for the kind of index.
    """
    require_size(kind, len(vectors))
    if len(ids) != len(vectors):
        raise ValueError(f"index: {len(vectors)} vectors, {len(ids)} ids. Give one id for each vector.")
    require_unit_length(vectors, "index", ids.__getitem__)
    require_biases(biases, len(vectors))
    rows = vectors if biases is None else with_biases(vectors, biases)
    order = np.random.default_rng(seed).permutation(len(vectors))
    index, ordered = _empty_index(kind, len(vectors), rows.shape[1], seed), rows[order].astype(np.float32)
    index.train(ordered)
    index.add(ordered)
    return RetrievalIndex(index, tuple(ids), order, biases is not None)


def _empty_index(kind: IndexKind, num_vectors: int, width: int, seed: int) -> Any:
    """An index with parameters for this number of vectors. The seed does not reach the graph's own draws."""
    index: Any
    flat, by = faiss.IndexFlatIP(width), faiss.METRIC_INNER_PRODUCT
    if kind == "flat":
        return flat
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, _NEIGHBOURS, by)
        index.hnsw.efConstruction, index.hnsw.efSearch = _KEPT_IN_BUILDING, _KEPT_IN_SEARCH
        return index
    num_lists = min(round(2 * math.sqrt(num_vectors)), num_vectors // _LEAST_PER_CLUSTER)
    if kind == "ivf":
        index = faiss.IndexIVFFlat(flat, width, num_lists, by)
        fits = [index.cp]
    else:
        num_codes = max(size for size in range(1, max(1, width // 4) + 1) if width % size == 0)
        index = faiss.IndexIVFPQ(flat, width, num_lists, num_codes, 8, by)
        index.pq.cp.niter = _CODE_ROUNDS
        fits = [index.cp, index.pq.cp]
    index.nprobe = max(8, num_lists // 16)
    for fit in fits:
        fit.seed, fit.max_points_per_centroid = seed, _MOST_PER_CLUSTER
    return index


def serialized(index: RetrievalIndex) -> memoryview:
    """The bytes of a file that `map_index` opens."""
    data: np.ndarray = faiss.serialize_index(index.faiss_index)
    return data.data


def map_index(path: Path, ids: tuple[str, ...], order: np.ndarray, has_biases: bool = False) -> RetrievalIndex:
    """Open an index whose vectors stay in its file, memory-mapped; ValueError if it does not have as many as there are
    ids, FileNotFoundError if it is missing. (FAISS before 1.10 reads flat indices and graphs into memory.)"""
    try:
        index = faiss.read_index(str(path), getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP))
    except RuntimeError as error:
        path.stat()  # a file that is missing is an OSError, as of other readers
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not readable as a FAISS index ({reason:.200}). Index again.") from None
    if not index.ntotal == len(ids) == len(order):
        raise ValueError(f"{path}: {index.ntotal} vectors, expected {len(ids)}, one for each id. Index again.")
    return RetrievalIndex(index, ids, order, has_biases)


def flat_rows(index: RetrievalIndex) -> np.ndarray:
    """The rows of a flat index in their order, float32 [items, d], or [items, d + 4] as of `with_biases`; a view, which
    needs the index."""
    flat = index.faiss_index
    return np.asarray(faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d))


def recall_of_index(index: RetrievalIndex, exact: RetrievalIndex, queries: np.ndarray, k: int) -> float:
    """Share of an exact index's first k that another finds among its own first k, mean over queries."""
    found, expected = (np.concatenate(list(one.rank(queries, k))) for one in (index, exact))
    return float(np.mean([np.isin(*of_query).mean() for of_query in zip(found, expected, strict=True)]))


def save_index(index: RetrievalIndex, folder: Path) -> int:
    """Write `index.faiss`, whose size in bytes is returned, and `index_ids.json` with its SHA-256 and ids of rows."""
    data = faiss.serialize_index(index.faiss_index).tobytes()
    ids = [index.ids[position] for position in index.order]
    content = {"sha256": hashlib.sha256(data).hexdigest(), "ids": ids, "order": index.order.tolist()}
    content |= {"has_biases": True} if index.has_biases else {}
    write_whole(folder / "index.faiss", data)
    write_whole(folder / "index_ids.json", json.dumps(content, ensure_ascii=True).encode())
    return len(data)


def load_index(folder: Path) -> RetrievalIndex:
    """Read what `save_index` wrote; ValueError where the two files do not belong together."""
    data = (folder / "index.faiss").read_bytes()
    content = json.loads((folder / "index_ids.json").read_text())
    if hashlib.sha256(data).hexdigest() != content["sha256"]:
        raise ValueError(f"{folder}: index.faiss is not the file that index_ids.json describes. Evaluate again.")
    index, order = faiss.deserialize_index(np.frombuffer(data, np.uint8)), np.array(content["order"], np.int64)
    ids = tuple(content["ids"][row] for row in np.argsort(order))
    return RetrievalIndex(index, ids, order, content.get("has_biases", False))
