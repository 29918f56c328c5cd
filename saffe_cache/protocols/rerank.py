"""The first results of a search are fused with the query and scored again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from saffe_cache.core.features import Ragged
from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.pairs import Pairs
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.protocols.base import NUM_SHUFFLES, Protocol, SearchProtocol
from saffe_cache.protocols.candidate import score_chosen_pairs
from saffe_cache.protocols.caption import CaptionProtocol
from saffe_cache.protocols.classes import ClassProtocol
from saffe_cache.protocols.setting import Answered, Answers, Arrangement, Queries, Reordered, Setting, Vectors
from saffe_cache.retrieval.metrics import metrics_of
from saffe_cache.retrieval.ranking import ROUNDING, InnerProducts, queries_of, relevant_ranks, top_k
from saffe_cache.retrieval.scores import Scores, rank_scores, text_scores
from saffe_cache.store.reader import Cache


class RerankProtocol(Protocol):
    """The first stage searches photos with null text, by captions or by classes."""

    name = "rerank"
    definition = (
        "the first k results of the search with null text are reordered by the score of the fused pair, or by the "
        "matching logit plus the cosine; those below keep their places"
    )
    baselines = ("ridge", "mlp", "zero_shot", "pooled_cosine")
    fuses_pairs = True
    queries: Queries

    def __init__(self, setting: Setting, k: int = 16, most_queries: int = 500) -> None:
        super().__init__(setting)
        self.first_stage = self._first_stage(setting.pairs.kind)(setting)
        self.queries = self.first_stage.queries.sample(most_queries, setting.seed)
        self.class_names = self.first_stage.class_names
        self.num_shuffles = NUM_SHUFFLES if self.class_names else 0
        self._k = min(k, len(setting.pairs))

    @classmethod
    def from_options(cls, setting: Setting, options: Mapping[str, Any]) -> Self:
        return cls(setting, options["rerank_k"], options["rerank_queries"])

    @classmethod
    def select(cls, cache: Cache, spec: RunSpec, split: str) -> Pairs:
        return cls._first_stage(spec.pairs).select(cache, spec, split)

    @classmethod
    def metric_names(cls, cache: Cache, spec: RunSpec) -> list[str]:
        return list(metrics_of("texts"))

    @classmethod
    def search_kind(cls, spec: RunSpec) -> type[SearchProtocol]:
        return cls._first_stage(spec.pairs)

    @staticmethod
    def _first_stage(kind: str) -> type[SearchProtocol]:
        return ClassProtocol if kind == "classes" else CaptionProtocol

    def answer(self, model: Fusion, arrangement: Arrangement) -> Answered:
        of, texts = self.setting, self.queries
        gallery, queries = of.gallery(model, arrangement), of.queries(model, texts)
        ranks = relevant_ranks(gallery, queries, texts.relevant, seed=of.seed)
        first = top_k(InnerProducts(gallery, queries), self._k, seed=of.seed)
        second = score_chosen_pairs(model, of.inputs, of.pairs.rows[arrangement.photos][first], texts)
        scores = second.cosine
        if second.matching is not None:
            scores = second.matching + np.take_along_axis(queries @ gallery.T, first, axis=1)
        after = reranked(ranks, texts.relevant, first, scores)
        found = rank_scores(after, texts.units, len(gallery), seed=of.seed)
        return Answered(found, Reordered(Vectors(gallery, queries), reordered(first, scores)))

    def vectors_answer(self, gallery: np.ndarray, queries: np.ndarray | None) -> Answers:
        assert queries is not None
        return Vectors(gallery, queries)

    def score(self, answers: Answers) -> Scores:
        """Of the first stage: baselines do not fuse."""
        assert isinstance(answers, Vectors)
        return text_scores(*answers, self.relevant, self.units, seed=self.setting.seed)

    def difference_units(self, metric: str) -> np.ndarray | None:
        return None if self.class_names else self.units

    def dealt(self, model: Fusion) -> tuple[float, float] | None:
        return self.first_stage.dealt(model)


def reranked(ranks: Ragged, relevant: Ragged, candidates: np.ndarray, scores: np.ndarray) -> Ragged:
    """Ranks after the first k are reordered by a second score; items below keep their places.

    Where second scores tie, the first order stays. BLIP's second score is the matching logit plus the cosine of the
    first stage (Li et al., 2022).

    Args:
        ranks: of the relevant items in the first order, from `relevant_ranks`.
        relevant: the items that they are the ranks of.
        candidates: int [queries, k], the first k items of the same order, from `top_k` with the same seed.
        scores: [queries, k], the second score of each candidate.

    Returns:
        From 1, ascending, int64.

    Raises:
        ValueError: a score is not finite, or candidates and ranks are not of one order.
    """
    if scores.shape != candidates.shape or not np.isfinite(scores).all():
        raise ValueError(
            f"second scores: {scores.shape} for {candidates.shape} candidates. Give a finite one for each."
        )
    num_items = 1 + max(int(candidates.max()), int(relevant.values.max(initial=0)))
    queries = queries_of(ranks)
    is_relevant = np.isin(
        candidates + num_items * np.arange(len(candidates))[:, None],
        relevant.values + num_items * queries_of(relevant),
    )
    inside = np.flatnonzero(ranks.values <= candidates.shape[1])
    found = is_relevant[queries[inside], ranks.values[inside] - 1]
    if not found.all() or is_relevant.sum() != len(inside):
        raise ValueError("re-ranking: candidates and ranks are not of one order. Take both with the same seed.")
    order = _second_order(scores)
    moved = ranks.values.copy()
    moved[inside] = 1 + np.argsort(order, axis=1)[queries[inside], ranks.values[inside] - 1]
    return Ragged(ranks.offsets, moved[np.lexsort((moved, queries))])


def reordered(candidates: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The candidates [queries, k] in the order of their second scores, in which `reranked` counts."""
    return np.take_along_axis(candidates, _second_order(scores), axis=1)


def _second_order(scores: np.ndarray) -> np.ndarray:
    """Places in the first order, best first; where scores tie, the first order stays."""
    return np.argsort(-np.rint(scores / ROUNDING), axis=1, kind="stable")
