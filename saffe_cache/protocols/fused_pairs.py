"""Photos fused with the texts that search for them, one forward pass a pair: every class, or the first results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from saffe_cache.core.items import Ragged
from saffe_cache.core.ranks import concatenated
from saffe_cache.fusion.base import Fusion, Pairing, Texts
from saffe_cache.inputs.feature_loader import FeatureLoader, encode_texts
from saffe_cache.inputs.pairs import Pairs
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.protocols.base import NUM_SHUFFLES, Protocol, SearchProtocol
from saffe_cache.protocols.searches import CLASS_BASELINES, CaptionProtocol, ClassProtocol, dealt_map
from saffe_cache.protocols.setting import (
    Answered,
    Answers,
    Arrangement,
    Queries,
    QueryScores,
    Reordered,
    Setting,
    System,
    Vectors,
)
from saffe_cache.retrieval.metrics import metrics_of
from saffe_cache.retrieval.ranking import ROUNDING, relevant_ranks, top_k
from saffe_cache.retrieval.scores import Scores, candidate_scores, rank_scores, text_scores
from saffe_cache.store.reader import Cache

_PRIOR_PHOTOS = 500
_PAIRS_AT_ONCE = 256


class PairScores(NamedTuple):
    """Scores of photos fused with texts."""

    cosine: np.ndarray
    """cos(f(x, t), g(t))"""
    matching: np.ndarray | None
    """The matching head's logits, where there is one."""


class CandidateProtocol(Protocol):
    """All classes are candidates for every photo."""

    name = "candidate"
    definition = (
        "every photo is fused with every class's text and scored by the cosine of the two (re-ranking, one forward "
        "pass a pair): map over each class's ranking of the photos, top1 and top5 over the classes of each photo; "
        "prior_removed subtracts each class's mean score over training photos; matching scores by the matching head"
    )
    baselines = CLASS_BASELINES
    fuses_pairs = True
    shows_photos_alone = False
    shows_classes = True
    queries: Queries

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.queries = ClassProtocol(setting).queries
        self.class_names = setting.cache.table.class_names
        self._known: dict[Fusion, tuple[PairScores, np.ndarray]] = {}

    @classmethod
    def is_trained_for(cls, spec: RunSpec) -> bool:
        return spec.pairs == "classes" and spec.trains_only_pairs

    @classmethod
    def search_kind(cls, spec: RunSpec) -> type[SearchProtocol]:
        return ClassProtocol

    @classmethod
    def metric_names(cls, cache: Cache, spec: RunSpec) -> list[str]:
        matching = ["map_matching", "top1_matching"] if spec.shape.matches else []
        of_labels = metrics_of("candidates", len(cache.table.class_names))
        return [*metrics_of("classes"), *of_labels, "top1_prior_removed", *matching]

    def answer(self, system: System, arrangement: Arrangement) -> Answered:
        if not isinstance(system, Fusion):
            return super().answer(system, arrangement)
        pairs, prior = self._scores_of(system)
        labels, seed = self.setting.pairs.labels, self.setting.seed
        cosine = pairs.cosine[arrangement.photos]
        scores = candidate_scores(cosine, labels, seed=seed)
        scores["top1_prior_removed"] = candidate_scores(cosine, labels, prior=prior, seed=seed)["top1"]
        if pairs.matching is not None:
            matched = candidate_scores(pairs.matching[arrangement.photos], labels, seed=seed)
            scores |= {"map_matching": matched["map"], "top1_matching": matched["top1"]}
        return Answered(scores, QueryScores(cosine))

    def _scores_of(self, model: Fusion) -> tuple[PairScores, np.ndarray]:
        """A model's scores of all pairs, and the mean score of each class over training photos."""
        if model not in self._known:
            of, queries = self.setting, self.queries
            some = np.random.default_rng(of.seed).permutation(of.training_rows)[:_PRIOR_PHOTOS]
            own, trained = (score_all_pairs(model, of.inputs, rows, queries) for rows in (of.pairs.rows, some))
            self._known[model] = own, trained.cosine.mean(axis=0)
        return self._known[model]

    def search(self, system: System, arrangement: Arrangement) -> QueryScores:
        return QueryScores(super().search(system, arrangement).matrix())

    def score(self, answers: Answers) -> Scores:
        assert isinstance(answers, QueryScores)
        return candidate_scores(answers.values, self.setting.pairs.labels, seed=self.setting.seed)

    def validate(self, model: Fusion) -> float:
        scores = score_all_pairs(model, self.setting.inputs, self.setting.pairs.rows, self.queries).cosine
        return candidate_scores(scores, self.setting.pairs.labels, intervals=False)[self.main_metric].value

    def fused_texts(self) -> np.ndarray | None:
        return np.resize(self.queries.text_rows, len(self.setting.pairs))

    def dealt(self, system: System) -> tuple[float, float]:
        if isinstance(system, Fusion):
            scores = self._scores_of(system)[0].cosine
        else:
            scores = self.search(system, self.setting.honest()).values
        return dealt_map(scores, self.setting.pairs.labels, seed=self.setting.seed)


@torch.inference_mode()
def score_all_pairs(model: Fusion, inputs: FeatureLoader, rows: np.ndarray, search: Queries) -> PairScores:
    """Each photo with the text of each query: [photos, queries].

    The part of a fusion that needs the photo alone is computed once for it.
    """
    num_texts = len(search.text_rows)
    texts = _texts_of(model, inputs, search, np.arange(num_texts), _encoded(model, inputs, search))

    def score(block: slice) -> np.ndarray:
        pairing = np.divmod(np.arange(len(rows[block]) * num_texts), num_texts)
        return _score_pairs(model, inputs, rows[block], texts, pairing)

    return _in_blocks(score, len(rows), num_texts)


@torch.inference_mode()
def score_chosen_pairs(model: Fusion, inputs: FeatureLoader, rows: np.ndarray, search: Queries) -> PairScores:
    """The photos `rows` [queries, k] with the text of their query: [queries, k]."""
    num_queries, k = rows.shape
    encoded = _encoded(model, inputs, search)

    def score(block: slice) -> np.ndarray:
        distinct, position = np.unique(rows[block], return_inverse=True)
        queries = np.arange(num_queries)[block]
        pairing = position.ravel(), np.arange(len(queries)).repeat(k)
        return _score_pairs(model, inputs, distinct, _texts_of(model, inputs, search, queries, encoded), pairing)

    return _in_blocks(score, num_queries, k)


def _in_blocks(score: Callable[[slice], np.ndarray], count: int, width: int) -> PairScores:
    """The scores of `count` rows of `width` pairs, as many together as are fused at once."""
    size = max(1, _PAIRS_AT_ONCE // width)
    blocks = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    scores = concatenated(blocks, lambda block: score(block).reshape(block.stop - block.start, width, -1))
    cosine, *matching = (np.ascontiguousarray(scores[..., kind]) for kind in range(scores.shape[2]))
    return PairScores(cosine, matching[0] if matching else None)


def _encoded(model: Fusion, inputs: FeatureLoader, search: Queries) -> np.ndarray | None:
    """Unit vectors of all queries if the model reads their tokens: all ranks compute them together, before pairs."""
    return encode_texts(model, inputs, search.prompts) if model.shape.entry.query_tokens else None


def _texts_of(
    model: Fusion, inputs: FeatureLoader, search: Queries, queries: np.ndarray, encoded: np.ndarray | None
) -> tuple[Texts, torch.Tensor]:
    """Texts of some queries, to be fused, and their unit vectors."""
    texts = inputs.texts(search.text_rows[queries])
    own = torch.from_numpy((search.vectors if encoded is None else encoded)[queries]).to(inputs.device)
    return texts, model.encode_queries(own) if encoded is None else own


def _score_pairs(
    model: Fusion,
    inputs: FeatureLoader,
    rows: np.ndarray,
    given: tuple[Texts, torch.Tensor],
    pairing: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Scores of photos by row and texts, paired by position: [pairs, 1], or with the matching head's [pairs, 2]."""
    (texts, vectors), (photo, text) = given, (torch.from_numpy(side).to(inputs.device) for side in pairing)
    fused, queries = model.fuse(*inputs.photos(rows), texts, Pairing(photo, text)), vectors[text]
    scores = [(fused.vectors * queries).sum(dim=-1), *([model.match(fused, queries)] if model.shape.matches else [])]
    return np.stack([score.float().cpu().numpy() for score in scores], axis=1)


class RerankProtocol(Protocol):
    """The first stage searches photos with null text, by captions or by classes; its first results are fused."""

    name = "rerank"
    definition = (
        "the first k results of the search with null text are reordered by the score of the fused pair, or by the "
        "matching logit plus the cosine; those below keep their places"
    )
    baselines = ("ridge", "mlp", "zero_shot", "pooled_cosine")
    fuses_pairs = True
    options = ("rerank_k", "rerank_queries")
    queries: Queries

    def __init__(self, setting: Setting, rerank_k: int = 16, rerank_queries: int = 500) -> None:
        super().__init__(setting)
        self.first_stage = _first_stage(setting.pairs.kind)(setting)
        self.queries = self.first_stage.queries.sample(rerank_queries, setting.seed)
        self.class_names = self.first_stage.class_names
        self.num_shuffles = NUM_SHUFFLES if self.class_names else 0
        self._k = min(rerank_k, len(setting.pairs))

    @classmethod
    def select(cls, cache: Cache, spec: RunSpec, split: str) -> Pairs:
        return _first_stage(spec.pairs).select(cache, spec, split)

    @classmethod
    def search_kind(cls, spec: RunSpec) -> type[SearchProtocol]:
        return _first_stage(spec.pairs)

    def answer(self, system: System, arrangement: Arrangement) -> Answered:
        if not isinstance(system, Fusion):
            return super().answer(system, arrangement)
        of, texts = self.setting, self.queries
        gallery, queries = of.gallery(system, arrangement), of.queries(system, texts)
        answers = Vectors(gallery, queries)
        ranks = relevant_ranks(answers.scores(), texts.relevant, seed=of.seed)
        first = top_k(answers.scores(), self._k, seed=of.seed)
        second = score_chosen_pairs(system, of.inputs, of.pairs.rows[arrangement.photos][first], texts)
        scores = second.cosine
        if second.matching is not None:
            scores = second.matching + np.take_along_axis(queries @ gallery.T, first, axis=1)
        after = reranked(ranks, texts.relevant, first, scores)
        found = rank_scores(after, texts.units, len(gallery), seed=of.seed)
        if self.class_names:  # too few to resample
            found = {name: replace(score, units=None) for name, score in found.items()}
        reordered = np.take_along_axis(first, _second_order(scores), axis=1)
        return Answered(found, Reordered(answers, reordered))

    def score(self, answers: Answers) -> Scores:
        """Of the first stage: baselines do not fuse."""
        assert isinstance(answers, Vectors)
        return text_scores(answers.gallery, answers.queries, self.relevant, self.queries.units, seed=self.setting.seed)

    def dealt(self, system: System) -> tuple[float, float] | None:
        return self.first_stage.dealt(system)


def _first_stage(kind: str) -> type[SearchProtocol]:
    return ClassProtocol if kind == "classes" else CaptionProtocol


def reranked(ranks: Ragged, relevant: Ragged, candidates: np.ndarray, scores: np.ndarray) -> Ragged:
    """Ranks after the first k are reordered by a second score; items below keep their places.

    Where second scores tie, the first order stays. BLIP's second score is the matching logit plus the cosine of the
    first stage (Li et al., 2022).

    `ranks` are those of the `relevant` items in the first order, from `relevant_ranks`. `candidates`, int [queries, k],
    are the first k items of that order, from `top_k` with the same seed; `scores` [queries, k] are their second scores.
    """
    if scores.shape != candidates.shape or not np.isfinite(scores).all():
        found = f"second scores: {scores.shape} for {candidates.shape} candidates"
        raise ValueError(f"{found}. Give a finite one for each.")
    num_items = 1 + max(int(candidates.max()), int(relevant.values.max(initial=0)))
    queries = ranks.owners
    is_relevant = np.isin(
        candidates + num_items * np.arange(len(candidates))[:, None],
        relevant.values + num_items * relevant.owners,
    )
    inside = np.flatnonzero(ranks.values <= candidates.shape[1])
    found = is_relevant[queries[inside], ranks.values[inside] - 1]
    if not found.all() or is_relevant.sum() != len(inside):
        raise ValueError("re-ranking: candidates and ranks are not of one order. Take both with the same seed.")
    order = _second_order(scores)
    moved = ranks.values.copy()
    moved[inside] = 1 + np.argsort(order, axis=1)[queries[inside], ranks.values[inside] - 1]
    return Ragged(ranks.offsets, moved[np.lexsort((moved, queries))])


def _second_order(scores: np.ndarray) -> np.ndarray:
    """Places in the first order, best first; where scores tie, the first order stays."""
    return np.argsort(-np.rint(scores / ROUNDING), axis=1, kind="stable")
