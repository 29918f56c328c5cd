"""Composed queries: a photo and a text that changes it search photos. The fused side is the query."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from torch.nn import functional

from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.composed import Composed
from saffe_cache.inputs.feature_loader import encode_gallery
from saffe_cache.inputs.pairs import Pairs
from saffe_cache.inputs.spec import ReferenceChoice, RunSpec
from saffe_cache.protocols.base import NULL_GALLERY, NUM_SHUFFLES, Level, SearchProtocol
from saffe_cache.protocols.setting import (
    Answers,
    Arrangement,
    FittedScores,
    Queries,
    QueryScores,
    Reordered,
    Setting,
    System,
    Vectors,
    VectorSystem,
)
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.retrieval.composed import ComposedSearch, composed_scores
from saffe_cache.retrieval.metrics import metrics_of
from saffe_cache.retrieval.ranking import ScoreMatrix
from saffe_cache.retrieval.scores import Scores
from saffe_cache.store.reader import Cache

_REFERENCE = {
    "removed": "the query's own reference photo is not ranked, as in CIRR",
    "kept": "the query's own reference photo is ranked too, as in FashionIQ and CIRCO",
}
_OF_PHOTO, _OF_TEXT = ("composed_image", "composed_image_ridge"), ("composed_text", "composed_text_ridge")
"""Baselines that see a part of the query alone."""
_CONSTANTS = 3
"""Photos, and texts, that take the place of all others in turn."""
_SCORES_AT_ONCE = 512


class ComposedProtocol(SearchProtocol):
    """A query f(photo, text) searches the gallery f(photo, null text).

    Nothing may be found that a part of the query finds alone: where references are shuffled, no more than a text alone
    finds; where texts are, no more than a photo alone. A run that is trained on permuted targets still maps similar
    photos to similar vectors, so it may find what similarity finds untrained.
    """

    name = "composed"
    definition = (
        "each reference photo and its text search the photos; map is the mean over queries of non-interpolated average "
        f"precision, map_at_k the same over the first k, divided by min(relevant, k); {NULL_GALLERY}"
    )
    pair_kind = "composed"
    rankings = ("composed",)
    required_baselines = (*_OF_PHOTO, *_OF_TEXT, "composed_zero_shot")
    baselines = (*required_baselines, "composed_sum", "composed_late", "composed_ridge", "composed_mlp")
    options = ("reference",)
    least_moves = MappingProxyType({"image": 0.05, "text": 0.05})  # of queries, in which either may say most

    def __init__(self, setting: Setting, reference: ReferenceChoice = "removed") -> None:
        super().__init__(setting)
        self.reference = reference
        self._asked: dict[Fusion, np.ndarray] = {}

    @classmethod
    def is_trained_for(cls, spec: RunSpec) -> bool:
        return spec.pairs == "composed"

    @classmethod
    def select(cls, cache: Cache, spec: RunSpec, split: str) -> Pairs:
        if spec.pairs != "composed":
            raise ValueError(
                f"--protocol composed: the run was trained with --pairs {spec.pairs}, it has not learned to compose. "
                "Train with --pairs composed."
            )
        return super().select(cache, spec, split)

    @classmethod
    def metric_names(cls, cache: Cache, spec: RunSpec) -> list[str]:
        table = cache.table
        has_groups = bool(table.labels.take(np.flatnonzero(table.are_queries)).lengths.any())
        names = [f"group_mean_{name}" for name in metrics_of("grouped")] if has_groups else []
        names += [f"subset_{name}" for name in metrics_of("subset")] if len(table.members.values) else []
        return [*metrics_of("composed"), *names]

    @property
    def described(self) -> str:
        return f"{self.definition}; {_REFERENCE[self.reference]}"

    @property
    def composed(self) -> Composed:
        assert self.setting.pairs.composed is not None
        return self.setting.pairs.composed

    def make_queries(self) -> Queries:
        of = self.composed
        rows, references = of.first_texts, of.references
        return Queries(rows, self.setting.inputs.text.vectors(rows), of.targets, references, references=references)

    @cached_property
    def searched(self) -> ComposedSearch:
        of, removes = self.composed, self.reference == "removed"
        return ComposedSearch(of.references, of.targets, of.members, of.groups, self.setting.pairs.labels, removes)

    def search(self, system: System, arrangement: Arrangement) -> Vectors | QueryScores:
        assert not isinstance(system, FittedScores)
        if isinstance(system, Fusion) and system not in self._asked:
            self._asked[system] = self.setting.queries(system, self.queries)
        asked = self._asked[system] if isinstance(system, Fusion) else self.setting.queries(system, self.queries)
        return self._answers(system, self.setting.gallery(system, arrangement), asked)

    def _answers(self, system: VectorSystem, gallery: np.ndarray, asked: np.ndarray) -> Vectors | QueryScores:
        if isinstance(system, Fusion) and system.shape.entry.scores == "own":
            return QueryScores(_similarities(system, gallery, asked, self.setting.inputs.device))
        return Vectors(gallery, asked)

    def score(self, answers: Answers) -> Scores:
        return self._score(answers)

    def score_vectors(self, gallery: np.ndarray, queries: np.ndarray, *, intervals: bool = True) -> Scores:
        return self._score(Vectors(gallery, queries), intervals=intervals)

    def _score(self, answers: Answers, *, intervals: bool = True) -> Scores:
        assert not isinstance(answers, Reordered)
        return composed_scores(answers.part, self.searched, intervals=intervals, seed=self.setting.seed)

    def ranked(self, answers: Answers, queries: np.ndarray) -> ScoreMatrix:
        assert not isinstance(answers, Reordered)
        scores = answers.part(queries, np.arange(len(self.setting.pairs)))
        values = scores if isinstance(scores, np.ndarray) else scores[slice(0, len(queries)), slice(0, scores.shape[1])]
        return self.searched.without_ranked(values, queries)

    def validate(self, model: Fusion) -> float:
        """Nothing is kept: the model's weights change."""
        gallery = encode_gallery(model, self.setting.inputs, self.setting.pairs.rows)
        answers = self._answers(model, gallery, self.setting.queries(model, self.queries, gallery))
        return self._score(answers, intervals=False)[self.main_metric].value

    def validate_gallery(self, gallery: np.ndarray, model: Fusion) -> float:
        """The main metric where the query is the reference photo's vector plus the model's map of its text."""
        adds_text = bool(model.shape.pooled_text)
        weight = model.text_weight.item() if adds_text else 1.0
        vectors = torch.from_numpy(self.queries.vectors).to(self.setting.inputs.device)
        texts = model.text_map(vectors) if adds_text else functional.normalize(vectors, dim=-1)
        return self._validate_sum(gallery, weight * texts.detach().cpu().numpy())

    def validate_late(self, gallery: np.ndarray, model: Fusion) -> float:
        return self.validate_gallery(gallery, model)

    def validate_photos(self, gallery: np.ndarray) -> float:
        return self._validate_sum(gallery, unit_rows(self.queries.vectors))

    def _validate_sum(self, gallery: np.ndarray, texts: np.ndarray) -> float:
        return self.validation_score(gallery, unit_rows(gallery[self.composed.references] + texts))

    def findings(self, own: Scores, baselines: Mapping[str, Scores]) -> list[str]:
        """The check for leaks: what the texts alone give away."""
        alone = {name: baselines[name][self.main_metric].value for name in _OF_TEXT if name in baselines}
        value = own[self.main_metric].value
        if not alone or max(alone.values()) < value:
            return []
        name = max(alone, key=alone.__getitem__)
        found = f"{name} finds {100 * alone[name]:.1f} {self.main_metric}, this system {100 * value:.1f}"
        return [f"the text alone is enough: {found}. The texts may name their targets, or the photo is not used."]

    # What is fused is the query

    @property
    def num_fused(self) -> int:
        return len(self.queries)

    @property
    def fuses_texts(self) -> bool:
        return True

    def fused_vectors(self, system: VectorSystem, photos: np.ndarray, texts: np.ndarray) -> np.ndarray:
        return unit_rows(self.setting.queries(system, self._mixed(photos, texts)))

    def fused_texts(self) -> np.ndarray | None:
        return np.resize(self.queries.text_rows, len(self.setting.pairs))

    def _mixed(self, photos: np.ndarray, texts: np.ndarray) -> Queries:
        """Queries with the references of some and the texts of others; what is relevant is left open."""
        chosen = self.queries.take(photos)
        return replace(chosen, text_rows=self.queries.text_rows[texts], vectors=self.queries.vectors[texts])

    # Controls

    def own_controls(self, system: System, shuffled: np.ndarray) -> dict[str, Scores]:
        """
        references_shuffled   each text with another query's reference photo
        references_constant   all texts with one reference photo: the best of three
        texts_shuffled        each reference photo with another query's text
        texts_constant        all reference photos with one text: the best of three
        """
        assert not isinstance(system, FittedScores)
        gallery = self.setting.gallery(system, self.setting.honest())

        def measured(photos: np.ndarray, texts: np.ndarray) -> Scores:
            return self.score(self._answers(system, gallery, self.setting.queries(system, self._mixed(photos, texts))))

        generator, own = np.random.default_rng((self.setting.seed, 2)), np.arange(len(self.queries))
        order = generator.permutation(len(own))
        others = np.empty_like(own)
        others[order] = np.roll(order, 1)  # none keeps its own
        ones = [np.full(len(own), one) for one in order[:_CONSTANTS]]
        return {
            "references_shuffled": measured(others, own),
            "references_constant": self._best(measured(one, own) for one in ones),
            "texts_shuffled": measured(own, others),
            "texts_constant": self._best(measured(own, one) for one in ones),
        }

    def _best(self, measured: Iterable[Scores]) -> Scores:
        return max(measured, key=lambda scores: scores[self.main_metric].value)

    def control_levels(
        self, system: System, permuted: System | None, measured: Mapping[str, Scores], baselines: Mapping[str, Scores]
    ) -> dict[str, Level]:
        def best(*names: str) -> Level:
            known = {name: of for name, of in {**baselines, **measured}.items() if name in names}
            name = max(known, key=lambda name: known[name][self.main_metric].value)
            score = known[name][self.main_metric]
            return Level(score.value, score.error, f"no more than {name}")

        found = self._chance_levels(system, measured)
        found |= {
            "references_shuffled": best("references_constant", *_OF_TEXT),
            "references_constant": best("references_constant"),
            "texts_shuffled": best("texts_constant", *_OF_PHOTO),
            "texts_constant": best("texts_constant"),
        }
        if "pairs_permuted" in measured:
            found["pairs_permuted"] = best(*_OF_PHOTO, "composed_text", "composed_zero_shot")
        return found

    def _chance_levels(self, system: System, measured: Mapping[str, Scores]) -> dict[str, Level]:
        """Chance, with the spread over shuffles of the gallery, which all queries search."""
        generator, own = np.random.default_rng((self.setting.seed, 1)), self.setting.honest().photos
        values = [
            self._score(self.search(system, Arrangement(generator.permutation(own), own)), intervals=False)
            for _ in range(NUM_SHUFFLES)
        ]
        error = float(np.std([scores[self.main_metric].value for scores in values], ddof=1))
        chance = measured["photos_shuffled"][self.main_metric].chance
        return dict.fromkeys(("photos_shuffled", "photos_constant"), Level(chance, error))


@torch.inference_mode()
def _similarities(model: Fusion, gallery: np.ndarray, queries: np.ndarray, device: str) -> np.ndarray:
    """A model's own scores, float32 [gallery, queries]."""
    photos = torch.from_numpy(gallery).to(device)
    starts = range(0, len(queries), _SCORES_AT_ONCE)
    found = [
        model.similarities(torch.from_numpy(queries[start : start + _SCORES_AT_ONCE]).to(device), photos).cpu().numpy()
        for start in starts
    ]
    return np.concatenate(found).T
