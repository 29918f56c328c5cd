"""Captions search photos, and photos search captions (M2)."""

from __future__ import annotations

import numpy as np

from saffe_cache.core.features import Ragged
from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.protocols.base import NULL_GALLERY, SearchProtocol
from saffe_cache.protocols.setting import Queries
from saffe_cache.retrieval.metrics import metrics_of
from saffe_cache.retrieval.scores import Scores, caption_scores
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

    def difference_units(self, metric: str) -> np.ndarray | None:
        return None if metric.startswith("image_to_text_") else self.units

    def own_controls(self, model: Fusion, shuffled: np.ndarray) -> dict[str, Scores]:
        return {"queries_constant": self.with_constant_queries(model)}
