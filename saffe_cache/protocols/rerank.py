"""The first results of a search are fused with the query and scored again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.pairs import Pairs
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.protocols.base import NUM_SHUFFLES, Protocol, SearchProtocol
from saffe_cache.protocols.caption import CaptionProtocol
from saffe_cache.protocols.classes import ClassProtocol
from saffe_cache.protocols.pair_scores import score_chosen_pairs
from saffe_cache.protocols.setting import Answered, Answers, Arrangement, Reordered, Setting, Vectors
from saffe_cache.retrieval.candidates import reordered, reranked_scores
from saffe_cache.retrieval.metrics import metrics_of
from saffe_cache.retrieval.ranking import InnerProducts, relevant_ranks, top_k
from saffe_cache.retrieval.scores import Scores, text_scores
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
        of, asked = self.setting, self.queries
        assert asked is not None
        gallery, queries = of.gallery(model, arrangement), of.queries(model, asked)
        ranks = relevant_ranks(gallery, queries, asked.relevant, seed=of.seed)
        first = top_k(InnerProducts(gallery, queries), self._k, seed=of.seed)
        second = score_chosen_pairs(model, of.inputs, of.pairs.rows[arrangement.photos][first], asked)
        scores = second.cosine
        if second.matching is not None:
            scores = second.matching + np.take_along_axis(queries @ gallery.T, first, axis=1)
        found = reranked_scores(ranks, asked.relevant, first, scores, asked.units, len(gallery), seed=of.seed)
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
