"""Photos search the other photos of their class (M4)."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from saffe_cache.core.features import Ragged
from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.protocols.base import NULL_GALLERY, NUM_SHUFFLES, Protocol, SearchProtocol
from saffe_cache.protocols.registry import load_protocol, own_protocol
from saffe_cache.protocols.setting import Answered, Answers, Arrangement, Vectors
from saffe_cache.retrieval.metrics import metrics_of
from saffe_cache.retrieval.scores import Scores, image_scores, others_of_classes
from saffe_cache.store.reader import Cache


class ImageProtocol(Protocol):
    """The gallery searches itself; a photo is not among its own results."""

    name = "image"
    definition = f"each photo searches the other photos of its class (M4); {NULL_GALLERY}"
    baselines = ("summary_cosine", "ridge", "pooled_cosine")
    num_shuffles = NUM_SHUFFLES

    @classmethod
    def metric_names(cls, cache: Cache, spec: RunSpec) -> list[str]:
        return list(metrics_of("images"))

    @classmethod
    def search_kind(cls, spec: RunSpec) -> type[SearchProtocol]:
        return load_protocol(own_protocol(spec)).search_kind(spec)

    @cached_property
    def relevant(self) -> Ragged:
        return others_of_classes(self.setting.pairs.labels)

    @property
    def units(self) -> np.ndarray:
        return np.arange(len(self.setting.pairs))

    def answer(self, model: Fusion, arrangement: Arrangement) -> Answered:
        answers = self.vectors_answer(self.setting.gallery(model, arrangement))
        return Answered(self.score(answers), answers)

    def vectors_answer(self, gallery: np.ndarray, queries: np.ndarray | None = None) -> Vectors:
        return Vectors(gallery, gallery)

    def score(self, answers: Answers) -> Scores:
        assert isinstance(answers, Vectors)
        return image_scores(answers.gallery, self.setting.pairs.labels, seed=self.setting.seed)

    def why_no_permuted(self) -> str:
        return "photos of a class are similar whatever the run was trained on"
