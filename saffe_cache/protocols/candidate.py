"""Every photo is fused with every class's text (re-ranking, one forward pass a pair)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from saffe_cache.fusion.base import Fusion, Pairing, Texts
from saffe_cache.inputs.feature_loader import FamInputs
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.protocols.base import Protocol, SearchProtocol
from saffe_cache.protocols.classes import CLASS_BASELINES, ClassProtocol, dealt_map, label_units
from saffe_cache.protocols.setting import Answered, Answers, Arrangement, ClassScores, Queries, Setting
from saffe_cache.retrieval.metrics import metrics_of
from saffe_cache.retrieval.scores import Scores, candidate_scores
from saffe_cache.store.reader import Cache

_PRIOR_PHOTOS = 500
_PAIRS_AT_ONCE = 256


class PairScores(NamedTuple):
    """Scores of photos fused with texts."""

    cosine: np.ndarray
    """cos(f(x, t), g(t))"""
    matching: np.ndarray | None
    """The matching head's logits, where there is one."""


class _Known(NamedTuple):
    """Scores of a model."""

    pairs: PairScores
    prior: np.ndarray
    """The mean score of each class over training photos."""


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
        self._known: dict[Fusion, _Known] = {}

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

    def answer(self, model: Fusion, arrangement: Arrangement) -> Answered:
        pairs, prior = self._scores_of(model)
        labels, seed = self.setting.pairs.labels, self.setting.seed
        cosine = pairs.cosine[arrangement.photos]
        scores = candidate_scores(cosine, labels, seed=seed)
        scores["top1_prior_removed"] = candidate_scores(cosine, labels, prior=prior, seed=seed)["top1"]
        if pairs.matching is not None:
            matched = candidate_scores(pairs.matching[arrangement.photos], labels, seed=seed)
            scores |= {"map_matching": matched["map"], "top1_matching": matched["top1"]}
        return Answered(scores, ClassScores(cosine))

    def _scores_of(self, model: Fusion) -> _Known:
        if model not in self._known:
            of, queries = self.setting, self.queries
            some = np.random.default_rng(of.seed).permutation(of.training_rows)[:_PRIOR_PHOTOS]
            own = score_all_pairs(model, of.inputs, of.pairs.rows, queries)
            self._known[model] = _Known(own, score_all_pairs(model, of.inputs, some, queries).cosine.mean(axis=0))
        return self._known[model]

    def vectors_answer(self, gallery: np.ndarray, queries: np.ndarray | None) -> Answers:
        assert queries is not None
        return ClassScores(gallery @ queries.T)

    def score(self, answers: Answers) -> Scores:
        assert isinstance(answers, ClassScores)
        return candidate_scores(answers.values, self.setting.pairs.labels, seed=self.setting.seed)

    def validate(self, model: Fusion) -> float:
        scores = score_all_pairs(model, self.setting.inputs, self.setting.pairs.rows, self.queries).cosine
        return candidate_scores(scores, self.setting.pairs.labels, intervals=False)[self.main_metric].value

    def difference_units(self, metric: str) -> np.ndarray | None:
        return label_units(metric, len(self.setting.pairs))

    def fused_texts(self) -> np.ndarray | None:
        return np.resize(self.queries.text_rows, len(self.setting.pairs))

    def dealt(self, model: Fusion) -> tuple[float, float]:
        return dealt_map(self._scores_of(model).pairs.cosine, self.setting.pairs.labels, seed=self.setting.seed)


@torch.inference_mode()
def score_all_pairs(model: Fusion, inputs: FamInputs, rows: np.ndarray, search: Queries) -> PairScores:
    """Each photo with the text of each query: [photos, queries].

    The part of a fusion that needs the photo alone is computed once for it.
    """
    num_texts = len(search.text_rows)
    block = max(1, _PAIRS_AT_ONCE // num_texts)
    texts, vectors = _texts_of(model, inputs, search, np.arange(num_texts))
    parts = []
    for start in range(0, len(rows), block):
        these = rows[start : start + block]
        pairing = np.divmod(np.arange(len(these) * num_texts), num_texts)
        parts.append(_score_pairs(model, inputs, these, texts, vectors, pairing))
    return _stack(parts, num_texts)


@torch.inference_mode()
def score_chosen_pairs(model: Fusion, inputs: FamInputs, rows: np.ndarray, search: Queries) -> PairScores:
    """The photos `rows` [queries, k] with the text of their query: [queries, k]."""
    k = rows.shape[1]
    block = max(1, _PAIRS_AT_ONCE // k)
    parts = []
    for start in range(0, len(rows), block):
        distinct, position = np.unique(rows[start : start + block], return_inverse=True)
        queries = np.arange(start, min(start + block, len(rows)))
        texts, vectors = _texts_of(model, inputs, search, queries)
        pairing = position.ravel(), np.arange(len(queries)).repeat(k)
        parts.append(_score_pairs(model, inputs, distinct, texts, vectors, pairing))
    return _stack(parts, k)


def _texts_of(model: Fusion, inputs: FamInputs, search: Queries, queries: np.ndarray) -> tuple[Texts, torch.Tensor]:
    """Texts of some queries, to be fused, and their unit vectors."""
    texts = inputs.texts(search.text_rows[queries])
    return texts, model.encode_queries(torch.from_numpy(search.vectors[queries]).to(inputs.device))


def _score_pairs(
    model: Fusion,
    inputs: FamInputs,
    rows: np.ndarray,
    texts: Texts,
    vectors: torch.Tensor,
    pairing: tuple[np.ndarray, np.ndarray],
) -> PairScores:
    """Scores [pairs] of photos by row and texts, paired by position; `vectors` are the texts' as queries."""
    states, mask = inputs.photos(rows)
    index = Pairing(*(torch.from_numpy(side).to(inputs.device) for side in pairing))
    fused, queries = model.fuse(states, mask, texts, index), vectors[index.text]
    matching = model.match(fused, queries).float().cpu().numpy() if model.shape.matches else None
    return PairScores((fused.vectors * queries).sum(dim=-1).float().cpu().numpy(), matching)


def _stack(parts: list[PairScores], width: int) -> PairScores:
    cosine = np.concatenate([part.cosine for part in parts]).reshape(-1, width)
    if parts[0].matching is None:
        return PairScores(cosine, None)
    return PairScores(
        cosine, np.concatenate([part.matching for part in parts if part.matching is not None]).reshape(-1, width)
    )
