"""mAP of the same rankings by other libraries, each asked in the form that it takes most quickly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saffe_cache.core.items import Ragged
from saffe_cache.retrieval.metrics import average_precision_of_ranks
from saffe_cache.retrieval.ranking import InnerProducts, relevant_ranks


@dataclass(frozen=True)
class Task:
    """What is searched, by unit vectors."""

    gallery: np.ndarray
    """float32 [items, d]"""
    labels: np.ndarray
    """The class of each item."""
    queries: np.ndarray
    classes: np.ndarray
    """That each query searches."""

    @property
    def relevant(self) -> Ragged:
        members = [np.flatnonzero(self.labels == label) for label in range(1 + self.labels.max())]
        return Ragged.from_rows(members[label] for label in self.classes)

    def precisions(self) -> np.ndarray:
        """Average precision of each query, as a report has it."""
        return average_precision_of_ranks(relevant_ranks(InnerProducts(self.gallery, self.queries), self.relevant))

    def save(self, folder: Path) -> None:
        for name, values in vars(self).items():
            np.save(folder / f"{name}.npy", values)


@dataclass(frozen=True)
class Captions:
    """Queries with one relevant item each, as captions that search their photos."""

    gallery: np.ndarray
    """float32 [items, d]"""
    queries: np.ndarray
    """float32 [m, d], of unit length"""
    items: np.ndarray
    """int64 [m]: the relevant one of each query."""

    @property
    def relevant(self) -> Ragged:
        return Ragged(np.arange(len(self.items) + 1), self.items)

    def ranks(self) -> np.ndarray:
        """From 1, int64 [m], as a report has them."""
        return relevant_ranks(InnerProducts(self.gallery, self.queries), self.relevant).values

    def save(self, folder: Path) -> None:
        for name, values in vars(self).items():
            np.save(folder / f"{name}.npy", values)


Judge = Callable[[np.ndarray, slice], float]
"""mAP of scores, float32 [queries, items], of some of the queries."""


def with_scikit_learn(task: Task) -> Judge | None:
    metrics = optional_module("sklearn.metrics")

    def judge(scores: np.ndarray, some: slice) -> float:
        found = [
            metrics.average_precision_score(task.labels == label, of_query)
            for label, of_query in zip(task.classes[some], scores, strict=True)
        ]
        return float(np.mean(found))

    return metrics and judge


def with_torchmetrics(task: Task) -> Judge | None:
    retrieval = optional_module("torchmetrics.retrieval")

    def judge(scores: np.ndarray, some: slice) -> float:
        metric = retrieval.RetrievalMAP()
        targets = torch.from_numpy(task.classes[some, None] == task.labels)
        queries = torch.arange(len(scores))[:, None].expand(scores.shape)
        positive = torch.from_numpy(scores).flatten() + 1  # it takes items of negative scores for irrelevant
        metric.update(positive, targets.flatten(), indexes=queries.flatten())
        return float(metric.compute())

    return retrieval and judge


def with_pytrec_eval(task: Task) -> Judge | None:
    library = optional_module("pytrec_eval")
    if library is None:
        return None
    names = [str(item) for item in range(len(task.gallery))]
    first = list(task.relevant)[: JUDGES["pytrec_eval"][1]]
    relevant = {str(number): {names[item]: 1 for item in items} for number, items in enumerate(first)}
    evaluator = library.RelevanceEvaluator(relevant, {"map"})

    def judge(scores: np.ndarray, some: slice) -> float:
        run = {str(number): dict(zip(names, row.tolist(), strict=True)) for number, row in enumerate(scores)}
        return float(np.mean([of_query["map"] for of_query in evaluator.evaluate(run).values()]))

    return judge


def with_ranx(task: Task) -> Judge | None:
    library, numba = optional_module("ranx"), optional_module("numba")
    if library is None:
        return None
    first = list(task.relevant)[: JUDGES["ranx"][1]]
    relevant = numba.typed.List([np.stack([items, np.ones(len(items))], axis=1) for items in first])

    def judge(scores: np.ndarray, some: slice) -> float:
        order = np.argsort(-scores, axis=1)
        ranked = np.take_along_axis(scores, order, axis=1)
        runs = numba.typed.List(np.stack([order, ranked], axis=2).astype(np.float64))
        return float(library.evaluate(relevant, runs, "map"))

    return judge


JUDGES: Mapping[str, tuple[Callable[[Task], Judge | None], int, float]] = {
    "scikit-learn": (with_scikit_learn, 50, 1.0),
    "torchmetrics": (with_torchmetrics, 20, 1.0),
    "ranx": (with_ranx, 10, 5.0),
    "pytrec_eval": (with_pytrec_eval, 5, 5.0),
}
"""How each is asked, the queries that it judges in a turn, and the target of our rate over its."""


def optional_module(name: str) -> Any:
    """A module, None where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        return None
