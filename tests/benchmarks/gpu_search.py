"""Search: faiss on the card against faiss on the CPU, and exact mAP. See gpu.py.

faiss for a GPU is measured where it is installed. gpu_wheels.txt leaves it out: its wheels need CUDA 12's cuBLAS, which
takes hundreds of megabytes. A product and top 10 in torch show what the card can do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import faiss
import numpy as np
import torch
from evaluation import draw_task
from gpu_setup import Setting, no_gpu, timed
from timing import Candidate, Figure, take_turns

from saffe_cache.retrieval.index import IndexKind, RetrievalIndex, build_index, recall_of_index

FOUND = 10


def parts(setting: Setting) -> Iterator[Callable[[], Iterator[Figure]]]:
    vectors, queries = draw_vectors(setting)
    ids = tuple(map(str, range(len(vectors))))
    flat = build_index(vectors, ids)
    yield partial(mean_average_precision, setting)
    yield partial(flat_search, setting, flat, vectors, queries)
    yield partial(coded_search, setting, flat, vectors, queries, ids)


def draw_vectors(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors in clusters, and queries that lie as they do."""
    sizes = setting.sizes
    torch.manual_seed(0)
    with torch.device(setting.device):
        centers = torch.randn(max(10, sizes.vectors // 500), sizes.width)
        drawn = centers[torch.randint(len(centers), (sizes.vectors + sizes.queries,))]
        drawn += torch.randn_like(drawn)
    unit = torch.nn.functional.normalize(drawn, dim=1).cpu().numpy()
    return unit[: sizes.vectors], unit[sizes.vectors :]


def flat_search(setting: Setting, flat: RetrievalIndex, vectors: np.ndarray, queries: np.ndarray) -> Iterator[Figure]:
    name = f"flat, {len(vectors):,} x {vectors.shape[1]}"
    candidates: dict[str, Candidate] = {"cpu": partial(search, flat.faiss_index, queries)}
    if with_faiss_on_gpu(setting):
        on_gpu = faiss.index_cpu_to_all_gpus(flat.faiss_index)
        candidates["gpu"] = partial(search, on_gpu, queries)
    if setting.on_gpu:
        candidates["torch"] = torch_search(setting, vectors, queries)
    rounds = take_turns(candidates, setting.sizes.rounds)
    yield rounds.rate("cpu", f"{name}: faiss on the CPU", "queries/s")
    yield from on_the_card(setting, rounds, "gpu", f"{name}: faiss on the card / on the CPU")
    yield from on_the_card(setting, rounds, "torch", f"{name}: torch's product on the card / faiss on the CPU")


def coded_search(
    setting: Setting, flat: RetrievalIndex, vectors: np.ndarray, queries: np.ndarray, ids: tuple[str, ...]
) -> Iterator[Figure]:
    kind: IndexKind = "ivf_pq"
    name = f"{kind}, {len(vectors):,} x {vectors.shape[1]}"
    coded, seconds = timed(lambda: build_index(vectors, ids, kind=kind))
    yield Figure(name=f"{name}: built on the CPU in", unit="s", value=seconds)
    recall = recall_of_index(coded, flat, queries, FOUND)
    yield Figure(name=f"{name}: of flat's first {FOUND}", unit="found", value=recall)
    candidates: dict[str, Candidate] = {
        "flat": partial(search, flat.faiss_index, queries),
        "cpu": partial(search, coded.faiss_index, queries),
    }
    if with_faiss_on_gpu(setting):
        on_gpu = faiss.index_cpu_to_all_gpus(coded.faiss_index)
        candidates["gpu"] = partial(search, on_gpu, queries)
    rounds = take_turns(candidates, setting.sizes.rounds)
    yield rounds.rate("cpu", f"{name}: faiss on the CPU", "queries/s")
    yield rounds.ratio("cpu", "flat", f"{name}: faiss on the CPU / flat")
    yield from on_the_card(setting, rounds, "gpu", f"{name}: faiss on the card / on the CPU")


def on_the_card(setting: Setting, rounds: Any, candidate: str, name: str) -> list[Figure]:
    if candidate in rounds.rates:
        return [rounds.ratio(candidate, "cpu", name)]
    return (
        [Figure(name=name, unit="ratio", note="faiss for a GPU is not installed")] if setting.on_gpu else no_gpu(name)
    )


def with_faiss_on_gpu(setting: Setting) -> bool:
    return setting.on_gpu and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def search(index: Any, queries: np.ndarray) -> int:
    _, found = index.search(queries, FOUND)
    return len(found)


def torch_search(setting: Setting, vectors: np.ndarray, queries: np.ndarray) -> Candidate:
    gallery, asked = (torch.from_numpy(some).to(setting.device) for some in (vectors, queries))
    return lambda: len((asked @ gallery.T).topk(FOUND).indices.cpu())


def mean_average_precision(setting: Setting) -> Iterator[Figure]:
    """On the CPU, in float64, whatever the device."""
    sizes = setting.sizes
    task = draw_task(sizes.gallery, sizes.map_queries)
    rounds = take_turns({"ours": lambda: len(task.precisions())}, 1)
    name = f"exact mAP, {sizes.gallery:,} items, {sizes.map_queries:,} queries"
    yield rounds.rate("ours", name, "queries/s")
    yield Figure(name=f"{name}: mAP", unit="", value=float(task.precisions().mean()))
