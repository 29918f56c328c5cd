"""How a system orders the gallery, before it is scored: what both its scores and its details are made of."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from saffe_cache.retrieval.ranking import InnerProducts, top_k
from saffe_cache.retrieval.scores import Scores


class Vectors(NamedTuple):
    """A query's results are the gallery's largest inner products with it."""

    gallery: np.ndarray
    """[n, d], of unit length."""
    queries: np.ndarray
    """[m, d]"""

    def first(self, chosen: np.ndarray, k: int, seed: int) -> np.ndarray:
        """The first k positions in the gallery of some queries, best first, int64 [chosen, k]."""
        return top_k(InnerProducts(self.gallery, self.queries[chosen]), k, seed=seed)


class ClassScores(NamedTuple):
    """A score of each photo with each class; the classes are the queries."""

    values: np.ndarray
    """[photos, classes]"""

    def first(self, chosen: np.ndarray, k: int, seed: int) -> np.ndarray:
        """As `Vectors.first`."""
        return top_k(self.values[:, chosen].T, k, seed=seed)


class Reordered(NamedTuple):
    """A search whose first results were put into another order; below them the first order holds."""

    vectors: Vectors
    """Of the first order."""
    positions: np.ndarray
    """int64 [queries, k]: the first results in their new order."""

    def first(self, chosen: np.ndarray, k: int, seed: int) -> np.ndarray:
        """As `Vectors.first`."""
        first = self.vectors.first(chosen, k, seed)
        width = min(k, self.positions.shape[1])
        first[:, :width] = self.positions[chosen, :width]
        return first


Answers = Vectors | ClassScores | Reordered


class Answered(NamedTuple):
    """A system under a protocol."""

    scores: Scores
    answers: Answers
