"""Class names search photos (M1); and photos search the other photos of their class (M4)."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from saffe_cache.core.features import Ragged
from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.pairs import Pairs, class_vectors, require_classes
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.protocols.base import NULL_GALLERY, NUM_SHUFFLES, Protocol, SearchProtocol
from saffe_cache.protocols.registry import load_protocol, own_protocol
from saffe_cache.protocols.setting import Answered, Answers, Arrangement, ClassScores, Queries, Setting, Vectors
from saffe_cache.retrieval.ranking import members, top_k
from saffe_cache.retrieval.scores import Scores, candidate_scores, class_scores, image_scores, others_of_classes
from saffe_cache.store.reader import Cache

CLASS_BASELINES = ("ridge", "mlp", "zero_shot", "pooled_cosine", "linear_probe", "class_means", "zlap")


class ClassProtocol(SearchProtocol):
    """The photos of a class are relevant to its name."""

    name = "class"
    definition = (
        "each class's text searches the photos (M1); map is the mean over classes of non-interpolated average "
        "precision over the whole ranking, map_at_100 the same over its first 100, divided by min(relevant, 100); "
        f"top1 is the share of photos whose nearest class text is theirs (M5); {NULL_GALLERY}"
    )
    rankings = ("classes", "labels")
    baselines = CLASS_BASELINES
    can_leak = True
    shows_classes = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.class_names = setting.cache.table.class_names

    @classmethod
    def is_trained_for(cls, spec: RunSpec) -> bool:
        return spec.pairs == "classes" and not spec.trains_only_pairs

    @classmethod
    def select(cls, cache: Cache, spec: RunSpec, split: str) -> Pairs:
        pairs = super().select(cache, spec, split)
        require_classes(pairs, cache.table, split)
        return pairs

    def make_queries(self) -> Queries:
        table, pairs = self.setting.cache.table, self.setting.pairs
        rows = np.array([prompts[0] for prompts in table.class_texts], np.int64)
        relevant = members(pairs.labels, len(rows))
        units = np.array([photos[0] if len(photos) else -1 for photos in relevant], np.int64)
        return Queries(rows, class_vectors(table, self.setting.inputs.text), relevant, units)

    def score_vectors(self, gallery: np.ndarray, queries: np.ndarray, *, intervals: bool = True) -> Scores:
        return class_scores(gallery, queries, self.setting.pairs.labels, intervals=intervals, seed=self.setting.seed)

    def score(self, answers: Answers) -> Scores:
        if not isinstance(answers, ClassScores):
            return super().score(answers)
        scores = candidate_scores(answers.values, self.setting.pairs.labels, seed=self.setting.seed)
        names = self.metric_names(self.setting.cache, self.setting.spec)
        return {name: score for name, score in scores.items() if name in names}

    def control_metric(self, control: str) -> str:
        # the same query for all classes ranks one class first, which AP sees; which class is nearest stays open
        return "top1" if control == "queries_constant" else self.main_metric

    def dealt(self, model: Fusion) -> tuple[float, float]:
        gallery = self.setting.gallery(model, self.setting.honest())
        scores = gallery @ self.setting.queries(model, self.queries).T
        return dealt_map(scores, self.setting.pairs.labels, seed=self.setting.seed)


def dealt_map(scores: np.ndarray, labels: Ragged, *, deals: int = 200, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of mAP when the class names are dealt at random to the rankings.

    This is the level of rankings that cannot distinguish the classes. It is above the chance of a random order where
    photos of a class are similar: a whole class then ranks high or low. `scores` [photos, classes].
    """
    num_photos, num_classes = scores.shape
    of_classes = members(labels, num_classes)
    present = np.flatnonzero(of_classes.lengths)
    sizes = of_classes.lengths[present]
    owners, starts = np.repeat(present, sizes), np.cumsum(sizes) - sizes
    counts = 1 + np.arange(len(owners)) - np.repeat(starts, sizes)
    ranks_of = np.empty(num_photos, np.int64)
    precision = np.empty((num_classes, len(present)))  # of each ranking, for each class that it may stand for
    for ranking in range(num_classes):
        ranks_of[top_k(scores[:, ranking][None], num_photos, seed=seed)[0]] = np.arange(1, num_photos + 1)
        ranks = ranks_of[of_classes.values]
        ranks = ranks[np.lexsort((ranks, owners))]
        precision[ranking] = np.add.reduceat(counts / ranks, starts) / sizes
    generator = np.random.default_rng(seed)
    columns = np.arange(len(present))
    drawn = [precision[generator.permutation(num_classes)[: len(present)], columns].mean() for _ in range(deals)]
    return float(np.mean(drawn)), float(np.std(drawn))


class ImageProtocol(Protocol):
    """The gallery searches itself; a photo is not among its own results."""

    name = "image"
    definition = f"each photo searches the other photos of its class (M4); {NULL_GALLERY}"
    rankings = ("images",)
    baselines = ("summary_cosine", "ridge", "pooled_cosine")
    num_shuffles = NUM_SHUFFLES

    @classmethod
    def search_kind(cls, spec: RunSpec) -> type[SearchProtocol]:
        return load_protocol(own_protocol(spec)).search_kind(spec)

    @cached_property
    def relevant(self) -> Ragged:
        return others_of_classes(self.setting.pairs.labels)

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
