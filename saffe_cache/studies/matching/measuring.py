"""One cell: a system trained on pairs of features, clean or degraded, and judged on photos it has never seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.manifold import TSNE

from saffe_cache.inputs.pairs import Pairs
from saffe_cache.retrieval.baselines import LinearMap, unit_rows
from saffe_cache.store.reader import EncoderCache
from saffe_cache.studies.matching.baselines import Scorer, fit_baselines, fit_ridge_map, judge_alignment
from saffe_cache.studies.matching.config import FUSIONS, MatchConfig, QueryModality
from saffe_cache.studies.matching.examples import (
    Degradation,
    Examples,
    Inputs,
    PairTokens,
    PairVectors,
    draw_judged,
    matching_examples,
)
from saffe_cache.studies.matching.findings import MadeAlignment, MatchCell, MatchCost, Plane, SystemScores
from saffe_cache.studies.matching.fusions import fit, measure_cost, scores_of
from saffe_cache.studies.matching.planning import BASELINE_CELL, CellPlan, examples_of
from saffe_cache.studies.matching.scores import judge


class Bench:
    """A cache's features, read once, and its photos in parts that share none."""

    def __init__(
        self,
        photo: EncoderCache,
        text: EncoderCache,
        parts: Mapping[str, Pairs],
        cells: Iterable[CellPlan],
        layers: tuple[int, int],
    ) -> None:
        """
        Args:
            photo: the encoder of photos (or sounds).
            text: that of texts.
            parts: "train", "validation" and "test"; "aligning" where features are made pre-aligned.
            cells: all that will be measured: hidden states of the photos and texts in those of tokens are read.
            layers: of photos and texts, for these.
        """
        self.photo, self.text, self.parts, self.layers = photo, text, parts, layers
        self._token_cells = [cell for cell in cells if cell.system == "tokens"]
        self.vectors = lru_cache(1)(self._vectors)
        """Unit vectors of a degradation and a seed; the last ones are kept in memory."""

    @cached_property
    def own(self) -> PairVectors:
        """The encoders' own."""
        parts = self.parts.values()
        rows = (np.concatenate([of.rows for of in parts]), np.concatenate([of.texts.values for of in parts]))
        return PairVectors.read(self.photo, self.text, *map(np.unique, rows))

    @cached_property
    def alignment_map(self) -> LinearMap | None:
        """The ridge regression that makes features pre-aligned; None where they are taken as they are."""
        others = self.parts.get("aligning")
        if others is None:
            return None
        return fit_ridge_map(self.own, matching_examples(others), draw_judged(self.parts["validation"], 1, 0))

    @cached_property
    def clean(self) -> PairVectors:
        """The vectors that are measured without degradation."""
        return self.own.mapped(self.alignment_map) if self.alignment_map else self.own

    def _vectors(self, degradation: Degradation, seed: int) -> PairVectors:
        return self.clean if degradation.kind == "clean" else self.clean.degraded(degradation, seed)

    @cached_property
    def tokens(self) -> PairTokens:
        """Of the photos and texts of the cells that need them."""
        drawn = [examples for cell in self._token_cells for examples in self.examples(cell)]
        photos, texts = (np.unique(np.concatenate([getattr(one, of) for one in drawn])) for of in ("photos", "texts"))
        return PairTokens.read(self.photo, self.text, photos, texts, self.layers)

    def examples(self, cell: CellPlan) -> tuple[Examples, Examples, Examples]:
        """See `examples_of`."""
        return examples_of(self.parts, cell)

    def made_alignment(self) -> MadeAlignment:
        """What the map did to the report's pairs."""
        assert self.alignment_map
        test = draw_judged(self.parts["test"], 1, 0)
        return judge_alignment(self.own, self.parts["aligning"], self.alignment_map, test)

    def cost(self, fusion: str, query_modality: QueryModality) -> MatchCost:
        """Of a fusion at these widths, and of tokens at the number of a photo's and of a text's on average."""
        if fusion != "tokens":
            return measure_cost(fusion, self.clean.widths, (1, 1), query_modality)
        counts = self.tokens.photos.shape[1], round(float(self.tokens.lengths.float().mean()))
        return measure_cost(fusion, self.tokens.widths, counts, query_modality)

    @property
    def planes(self) -> tuple[str, ...]:
        """Names of the planes: photos as they are, if widths agree, and mapped to texts by a ridge regression."""
        return ("own", "ridge") if self.clean.are_comparable else ("ridge",)

    def plane(self, name: str, cell: CellPlan, count: int) -> Plane:
        """Matching pairs of the report on one of the planes."""
        training, validation, test = self.examples(cell)
        own = np.flatnonzero(test.labels == 1)[:count]
        photos, texts = self.clean.of_photos(test.photos[own]), self.clean.of_texts(test.texts[own])
        if name == "ridge":
            photos = unit_rows(fit_ridge_map(self.clean, training, validation)(photos))
        return embed_pairs(photos, texts, cell.seed)


def measure_cell(bench: Bench, cell: CellPlan, config: MatchConfig, device: str) -> MatchCell:
    """Scores of each system of a cell on test photos, and on these with the photos shuffled."""
    training, validation, test = bench.examples(cell)
    shuffled = test.with_photos_shuffled(cell.seed)
    vectors = bench.vectors(cell.degradation, cell.seed)
    found: dict[str, tuple[Scorer, float, dict[str, Any]]]
    if cell.system == BASELINE_CELL:
        baselines = fit_baselines(vectors, training, validation)
        found = {name: (one.scores, one.threshold, {"chosen": one.chosen}) for name, one in baselines.items()}
    else:
        assert cell.system in FUSIONS
        inputs: Inputs = bench.tokens if cell.system == "tokens" else vectors
        model, fitted = fit(cell.system, inputs, training, validation, config, cell.seed, device)
        how = {"best_epoch": fitted.best_epoch, "validation_accuracy": fitted.scores, "losses": fitted.losses}
        found = {cell.system: (partial(scores_of, model, inputs, device=device), 0.0, how)}
    return MatchCell(
        pairs={"train": len(training), "validation": len(validation), "test": len(test)},
        majority=float(max(test.labels.mean(), 1 - test.labels.mean())),
        systems={
            name: SystemScores(
                test=judge(scores(test), test.labels, threshold),
                shuffled=judge(scores(shuffled), test.labels, threshold),
                **how,
            )
            for name, (scores, threshold, how) in found.items()
        },
        alignment=vectors.alignment(bench.clean, test) if cell.system == BASELINE_CELL else {},
    )


def embed_pairs(photos: np.ndarray, texts: np.ndarray, seed: int) -> Plane:
    """Matching pairs, unit vectors [pairs, d] each, on a plane."""
    count = len(photos)
    method = TSNE(metric="cosine", init="random", random_state=seed, perplexity=min(30.0, (2 * count - 1) / 3))
    places = method.fit_transform(np.concatenate([photos, texts]))
    nearest = cdist(places[:count], places[count:]).argmin(axis=1)
    rounded = [tuple(place) for place in np.round(places.astype(float), 3).tolist()]
    return Plane(
        photos=tuple(rounded[:count]),
        texts=tuple(rounded[count:]),
        own_is_nearest=float((nearest == np.arange(count)).mean()),
    )
