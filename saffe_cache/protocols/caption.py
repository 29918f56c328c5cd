"""Captions search photos, and photos search captions (M2); or captions search photos fused with their first caption."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from saffe_cache.core.features import Ragged
from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.pairs import Pairs, select_pairs
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.protocols.base import NULL_GALLERY, Level, SearchProtocol
from saffe_cache.protocols.setting import Arrangement, Queries
from saffe_cache.retrieval.metrics import metrics_of
from saffe_cache.retrieval.ranking import members
from saffe_cache.retrieval.scores import Scores, caption_scores, text_scores
from saffe_cache.store.reader import Cache


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

    def score_vectors(self, gallery: np.ndarray, queries: np.ndarray, *, intervals: bool = True) -> Scores:
        return caption_scores(gallery, queries, self.queries.units, intervals=intervals, seed=self.setting.seed)


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

    @classmethod
    def is_trained_for(cls, spec: RunSpec) -> bool:
        return spec.gallery_text == "first_caption"

    @classmethod
    def select(cls, cache: Cache, spec: RunSpec, split: str) -> Pairs:
        if spec.gallery_text != "first_caption":
            raise ValueError(
                f"--protocol metadata: the run was trained with --gallery-text {spec.gallery_text}, it has not learned "
                "to fuse. Train with --gallery-text first_caption."
            )
        gallery, text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
        return select_pairs(cache.table, gallery, text, split, cls.pair_kind, first_paired=True)

    def make_queries(self) -> Queries:
        pairs = self.setting.pairs
        rows, query_of = np.unique(pairs.texts.values, return_inverse=True)
        relevant = members(Ragged(pairs.texts.offsets, query_of), len(rows))
        units = relevant.values[relevant.offsets[:-1]]
        return Queries(rows, self.setting.inputs.text.vectors(rows), relevant, units)

    def score_vectors(self, gallery: np.ndarray, queries: np.ndarray, *, intervals: bool = True) -> Scores:
        of, seed = self.queries, self.setting.seed
        return text_scores(gallery, queries, of.relevant, of.units, intervals=intervals, seed=seed)

    def own_controls(self, model: Fusion, shuffled: np.ndarray) -> dict[str, Scores]:
        """texts_shuffled: each place has another's text; photos stay."""
        return {"texts_shuffled": self.measure(model, Arrangement(self.setting.honest().photos, shuffled))}

    def control_levels(
        self, model: Fusion, permuted: Fusion | None, measured: Mapping[str, Scores], baselines: Mapping[str, Scores]
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
