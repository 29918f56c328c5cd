"""Searches by vectors: photos for class names (M1), captions (M2, also with fused photos) and other photos (M4)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType

import numpy as np

from saffe_cache.core.items import Ragged
from saffe_cache.inputs.pairs import Pairs, class_vectors, require_classes, select_pairs
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.protocols.base import NULL_GALLERY, NUM_SHUFFLES, Level, Protocol, SearchProtocol
from saffe_cache.protocols.registry import load_protocol, own_protocol
from saffe_cache.protocols.setting import Answers, Arrangement, Queries, QueryScores, Setting, System, Vectors
from saffe_cache.retrieval.metrics import average_precision_of_ranks, metrics_of
from saffe_cache.retrieval.ranking import members, top_k
from saffe_cache.retrieval.scores import (
    NO_BIASES,
    Biases,
    Scores,
    candidate_scores,
    caption_scores,
    class_scores,
    drawn_queries,
    image_scores,
    others_of_classes,
    text_scores,
)
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
    corrects_search = True
    can_leak = True
    # the same query for all classes ranks one class first, which AP sees; which class is nearest stays open
    control_metrics = MappingProxyType({"queries_constant": "top1"})
    photos_search = True
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
        return Queries(rows, class_vectors(table, self.setting.inputs.text), relevant, units, table.class_texts)

    def score_vectors(
        self, gallery: np.ndarray, queries: np.ndarray, *, biases: Biases = NO_BIASES, intervals: bool = True
    ) -> Scores:
        labels, seed = self.setting.pairs.labels, self.setting.seed
        return class_scores(gallery, queries, labels, biases, intervals=intervals, seed=seed)

    def score(self, answers: Answers) -> Scores:
        if not isinstance(answers, QueryScores):
            return super().score(answers)
        scores = candidate_scores(answers.values, self.setting.pairs.labels, seed=self.setting.seed)
        names = self.metric_names(self.setting.cache, self.setting.spec)
        return {name: score for name, score in scores.items() if name in names}

    def dealt(self, system: System) -> tuple[float, float]:
        scores = self.search(system, self.setting.honest()).matrix()
        return dealt_map(scores, self.setting.pairs.labels, seed=self.setting.seed)


def dealt_map(scores: np.ndarray, labels: Ragged, *, deals: int = 200, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of mAP when the class names are dealt at random to the rankings.

    This is the level of rankings that cannot distinguish the classes. It is above the chance of a random order where
    photos of a class are similar: a whole class then ranks high or low. `scores` [photos, classes].
    """
    num_photos, num_classes = scores.shape
    of_classes = members(labels, num_classes)
    of_present = of_classes.take(np.flatnonzero(of_classes.lengths))
    ranks_of = np.empty(num_photos, np.int64)
    precision = np.empty((num_classes, len(of_present)))  # of each ranking, for each class that it may stand for
    for ranking in range(num_classes):
        ranks_of[top_k(scores[:, ranking][None], num_photos, seed=seed)[0]] = np.arange(1, num_photos + 1)
        ranks = Ragged.from_rows(np.sort(ranks_of[photos]) for photos in of_present)
        precision[ranking] = average_precision_of_ranks(ranks)
    generator = np.random.default_rng(seed)
    columns = np.arange(len(of_present))
    drawn = [precision[generator.permutation(num_classes)[: len(columns)], columns].mean() for _ in range(deals)]
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

    def score(self, answers: Answers) -> Scores:
        assert isinstance(answers, Vectors)
        return image_scores(answers.gallery, self.setting.pairs.labels, seed=self.setting.seed)

    def why_no_permuted(self) -> str:
        return "photos of a class are similar whatever a system was trained on"


class CaptionProtocol(SearchProtocol):
    """One photo is relevant to a caption: its own."""

    name = "caption"
    definition = (
        "each caption searches the photos, one of which is relevant, so that mean average precision equals mrr (M2); "
        f"each photo searches the captions; {NULL_GALLERY}"
    )
    main_metric = "mrr"
    pair_kind = "captions"
    baselines = ("ridge", "mlp", "zero_shot", "pooled_cosine")
    can_leak = True
    corrects_search = True
    photos_search = True

    @classmethod
    def is_trained_for(cls, spec: RunSpec) -> bool:
        return spec.pairs == "captions" and spec.gallery_text != "first_caption"

    @classmethod
    def metric_names(cls, cache: Cache, spec: RunSpec) -> list[str]:
        names = list(metrics_of("captions"))
        return [*names, *(f"image_to_text_{name}" for name in names)]

    def make_queries(self) -> Queries:
        pairs, text = self.setting.pairs, self.setting.inputs.text
        rows = pairs.texts.values
        relevant = Ragged(np.arange(len(rows) + 1), pairs.owners)
        return Queries(rows, text.vectors(rows), relevant, pairs.owners)

    def score_vectors(
        self, gallery: np.ndarray, queries: np.ndarray, *, biases: Biases = NO_BIASES, intervals: bool = True
    ) -> Scores:
        owners, seed, most = self.queries.units, self.setting.seed, self.most_queries
        return caption_scores(gallery, queries, owners, biases, intervals=intervals, seed=seed, most=most)

    def validation_score(self, gallery: np.ndarray, queries: np.ndarray, biases: Biases = NO_BIASES) -> float:
        owners, seed = self.queries.units, self.setting.seed
        scores = caption_scores(gallery, queries, owners, biases, intervals=False, seed=seed, photos_search=False)
        return scores[self.main_metric].value


class MetadataProtocol(SearchProtocol):
    """The other captions of a photo search for it.

    Controls must find no more than the texts alone, or the photos alone: baselines, and the run itself with one photo
    everywhere, which is a level and no test.
    """

    name = "metadata"
    definition = (
        "each text searches photos that are fused with their first caption; relevant are the photos that it "
        "describes; map is the mean over texts of non-interpolated average precision; the gallery is f(photo, caption)"
    )
    pair_kind = "captions"
    required_baselines = ("text_only", "text_only_linear", "image_only_ridge")
    baselines = (*required_baselines, "late_fusion_ridge", "image_only_mlp", "concat_mlp", "late_fusion_mlp")
    shows_photos_alone = False
    corrects_search = True

    @classmethod
    def is_trained_for(cls, spec: RunSpec) -> bool:
        return spec.gallery_text == "first_caption"

    @classmethod
    def select(cls, cache: Cache, spec: RunSpec, split: str) -> Pairs:
        if spec.gallery_text != "first_caption":
            remedy = "Choose --protocol caption" if spec.media else "Train with --gallery-text first_caption"
            raise ValueError(
                f"--protocol metadata: the run was trained with --gallery-text {spec.gallery_text}, it has not learned "
                f"to fuse texts. {remedy}."
            )
        gallery, text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
        return select_pairs(cache.table, gallery, text, split, cls.pair_kind, first_paired=True)

    def make_queries(self) -> Queries:
        pairs = self.setting.pairs
        rows, query_of = np.unique(pairs.texts.values, return_inverse=True)
        relevant = members(Ragged(pairs.texts.offsets, query_of), len(rows))
        units = relevant.values[relevant.offsets[:-1]]
        return Queries(rows, self.setting.inputs.text.vectors(rows), relevant, units)

    def score_vectors(
        self, gallery: np.ndarray, queries: np.ndarray, *, biases: Biases = NO_BIASES, intervals: bool = True
    ) -> Scores:
        of, seed, bias = self.queries, self.setting.seed, biases.gallery
        chosen = drawn_queries(len(of), self.most_queries, seed)
        relevant = of.relevant if len(chosen) == len(of) else of.relevant.take(chosen)
        return text_scores(gallery, queries[chosen], relevant, of.units[chosen], bias, intervals=intervals, seed=seed)

    def own_controls(self, system: System, shuffled: np.ndarray) -> dict[str, Scores]:
        """texts_shuffled: each place has another's text; photos stay."""
        return {"texts_shuffled": self.measure(system, Arrangement(self.setting.honest().photos, shuffled))}

    def control_levels(
        self, system: System, permuted: System | None, measured: Mapping[str, Scores], baselines: Mapping[str, Scores]
    ) -> dict[str, Level]:
        constant = {"photos_constant": measured["photos_constant"]}
        texts, photos = (
            {name: scores for name, scores in baselines.items() if name.startswith(kind)}
            for kind in ("text_only", "image_only")
        )
        levels = dict.fromkeys(measured, self._best(texts | constant))
        return levels | {"texts_shuffled": self._best(photos), "photos_constant": self._best(constant)}

    def _best(self, systems: Mapping[str, Scores]) -> Level:
        """What the best of some systems finds."""
        name = max(systems, key=lambda name: systems[name][self.main_metric].value)
        score = systems[name][self.main_metric]
        return Level(score.value, score.error, f"no more than {name}")
