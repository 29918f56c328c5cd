"""Time of single searches in a large index of each kind, one after another on one core. See `pipelines/LOG.md`.

    python tests/benchmarks/million.py [--items 1000000] [--width 384] [--kinds flat,ivf,ivf_pq,hnsw] [--work FOLDER]

Vectors lie in clusters, with noise within them. Indices are written to FOLDER, unless they are there from an earlier
call, and searched as `saffe search` opens them, memory-mapped. Times are processor time, because other jobs may be
running: the median over queries, of the best of three rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np

from saffe_cache.core.features import IndexKind
from saffe_cache.retrieval.index import RetrievalIndex, build_index, map_index, serialized

QUERIES, FOUND, ROUNDS = 100, 10, 3


def draw(items: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around one center for 500 of them, and queries that lie as they do."""
    generator = np.random.default_rng(0)
    centers = generator.standard_normal((max(10, items // 500), width), dtype=np.float32)
    vectors = centers[generator.integers(len(centers), size=items + QUERIES)]
    for start in range(0, len(vectors), 2**16):
        part = vectors[start : start + 2**16]
        part += generator.standard_normal(part.shape, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors[:items], vectors[items:]


def milliseconds(index: RetrievalIndex, queries: np.ndarray) -> float:
    """Of one query, after one round that reads the files."""
    rounds = []
    for _ in range(1 + ROUNDS):
        taken = []
        for query in queries:
            start = time.thread_time()
            index.nearest(query[None], FOUND)
            taken.append(1000 * (time.thread_time() - start))
        rounds.append(float(np.median(taken)))
    return min(rounds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--kinds", default="flat,ivf,ivf_pq,hnsw")
    parser.add_argument("--work")
    options = parser.parse_args()
    vectors, queries = draw(options.items, options.width)
    ids = tuple(map(str, range(options.items)))
    exact, kinds = np.zeros((0, FOUND)), options.kinds.split(",")
    work = Path(options.work or tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    threads = faiss.omp_get_max_threads()
    for kind in kinds:
        exact = report(kind, vectors, queries, ids, exact, work / f"{kind}.faiss")
        faiss.omp_set_num_threads(threads)


def report(
    kind: IndexKind, vectors: np.ndarray, queries: np.ndarray, ids: tuple[str, ...], exact: np.ndarray, path: Path
) -> np.ndarray:
    """Build, write, open and search one kind; prints a line and returns flat's results."""
    start = time.process_time()
    if not path.exists():
        built = build_index(vectors, ids, kind=kind)
        path.write_bytes(serialized(built))
        np.save(path.with_suffix(".npy"), built.order)
        del built
    seconds = time.process_time() - start
    index = map_index(path, ids, np.load(path.with_suffix(".npy")))
    faiss.omp_set_num_threads(1)
    found = index.nearest(queries, FOUND)[1]
    exact = found if kind == "flat" else exact
    recall = np.mean([np.isin(expected, row).mean() for expected, row in zip(exact, found, strict=True)])
    size = path.stat().st_size / len(ids)
    print(
        f"{kind}: {milliseconds(index, queries):.2f} ms a query, {recall:.3f} of flat's first {FOUND}, built in "
        f"{seconds:.0f} s, {size:.0f} bytes an item, {index.parameters}",
        flush=True,
    )
    return exact


if __name__ == "__main__":
    main()
