"""One cell: a system trained on pairs of features, clean or degraded, and judged on photos it has never seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from sklearn.manifold import TSNE

from saffe_cache.inputs.pairs import Pairs
from saffe_cache.retrieval.baselines import LinearMap, unit_rows
from saffe_cache.store.reader import EncoderCache
from saffe_cache.studies.matching.baselines import fit_alignment, fit_baselines, fit_ridge_map, judge_alignment
from saffe_cache.studies.matching.config import FUSIONS, MatchConfig
from saffe_cache.studies.matching.examples import (
    Degradation,
    Examples,
    Inputs,
    PairTokens,
    PairVectors,
    draw_examples,
    draw_judged,
    measure_alignment,
)
from saffe_cache.studies.matching.findings import MadeAlignment, MatchCell, Plane, Planes, SystemScores
from saffe_cache.studies.matching.fusions import fit, scores_of
from saffe_cache.studies.matching.scores import judge

BASELINE_CELL = "baselines"


@dataclass(frozen=True, kw_only=True)
class CellPlan:
    """What is measured together, for one seed."""

    degradation: Degradation = field(default_factory=Degradation)
    negatives: int
    scale: int
    system: str
    """A fusion's name, or "baselines"."""
    seed: int
    is_permuted: bool = False
    """Trained on permuted labels: a control."""

    @property
    def setting(self) -> str:
        return f"1:{self.negatives} {self.degradation}"

    @property
    def name(self) -> str:
        """Of its file, without suffix."""
        permuted = "-permuted" if self.is_permuted else ""
        setting = self.setting.replace(":", "-to-").replace(" ", "-")
        return f"{setting}-{self.scale}-{self.system}{permuted}-seed{self.seed}"


def examples_of(parts: Mapping[str, Pairs], cell: CellPlan) -> tuple[Examples, Examples, Examples]:
    """To train on, to choose on, to report on.

    Raises:
        ValueError: the data cannot support them.
    """
    training = draw_examples(parts["train"], cell.scale, cell.negatives, cell.seed)
    if cell.is_permuted:
        training = training.with_labels_permuted(cell.seed)
    validation, test = (draw_judged(parts[name], cell.negatives, cell.seed) for name in ("validation", "test"))
    return training, validation, test


class Bench:
    """A cache's features, read once, and its photos in parts that share none."""

    def __init__(
        self,
        photo: EncoderCache,
        text: EncoderCache,
        parts: Mapping[str, Pairs],
        token_cells: Sequence[CellPlan],
        layers: tuple[int, int],
    ) -> None:
        """
        Args:
            photo: the encoder of photos (or sounds).
            text: that of texts.
            parts: "train", "validation" and "test"; "aligning" where features are made pre-aligned.
            token_cells: all cells that need hidden states.
            layers: of photos and texts, for these.
        """
        self.photo, self.text, self.parts, self.layers = photo, text, parts, layers
        self._token_cells = token_cells
        self._degraded: tuple[tuple[Degradation, int], PairVectors] | None = None

    @cached_property
    def own(self) -> PairVectors:
        """The encoders' own."""
        rows = [np.unique(np.concatenate([of.rows for of in self.parts.values()]))]
        rows.append(np.unique(np.concatenate([of.texts.values for of in self.parts.values()])))
        return PairVectors.read(self.photo, self.text, *rows)

    @cached_property
    def alignment_map(self) -> LinearMap | None:
        """What makes features pre-aligned; None where they are taken as they are."""
        others = self.parts.get("aligning")
        return fit_alignment(self.own, others, draw_judged(self.parts["validation"], 1, 0)) if others else None

    @cached_property
    def clean(self) -> PairVectors:
        """The vectors that are measured without degradation."""
        return self.own.mapped(self.alignment_map) if self.alignment_map else self.own

    def made_alignment(self) -> MadeAlignment:
        """What the map did to the report's pairs."""
        assert self.alignment_map
        test = draw_judged(self.parts["test"], 1, 0)
        return judge_alignment(self.own, self.parts["aligning"], self.alignment_map, test)

    @cached_property
    def tokens(self) -> PairTokens:
        """Of the photos and texts of these cells only."""
        drawn = [examples for cell in self._token_cells for examples in self.examples(cell)]
        rows = [np.unique(np.concatenate([getattr(one, of) for one in drawn])) for of in ("photos", "texts")]
        return PairTokens.read(self.photo, self.text, rows[0], rows[1], self.layers)

    @property
    def num_tokens(self) -> tuple[int, int] | None:
        """Of a photo, and of a text on average; None if no cell needs them."""
        if not self._token_cells:
            return None
        return self.tokens.photos.shape[1], round(float(self.tokens.lengths.float().mean()))

    def planes(self, cell: CellPlan, count: int) -> Planes:
        """Matching pairs of the report on planes: as they are, if widths agree, and with photos mapped to texts."""
        training, validation, test = self.examples(cell)
        own = np.flatnonzero(test.labels == 1)[:count]
        photos, texts = self.clean.of_photos(test.photos[own]), self.clean.of_texts(test.texts[own])
        ridge = fit_ridge_map(self.clean, training, validation)
        found = {"ridge": embed_pairs(unit_rows(ridge(photos)), texts, cell.seed)}
        if self.clean.widths[0] == self.clean.widths[1]:
            found = {"own": embed_pairs(photos, texts, cell.seed)} | found
        return Planes(planes=found)

    def vectors(self, degradation: Degradation, seed: int) -> PairVectors:
        """Those of a degradation; the last ones are kept in memory."""
        if degradation.kind == "clean":
            return self.clean
        if self._degraded is None or self._degraded[0] != (degradation, seed):
            self._degraded = (degradation, seed), self.clean.degraded(degradation, seed)
        return self._degraded[1]

    def examples(self, cell: CellPlan) -> tuple[Examples, Examples, Examples]:
        """To train on, to choose on, to report on."""
        return examples_of(self.parts, cell)

    def alignment(self, cell: CellPlan) -> Mapping[str, float]:
        """Measured cosines of a cell's features."""
        test = self.examples(cell)[2]
        own = test.labels == 1
        now = self.vectors(cell.degradation, cell.seed)
        places = (
            np.searchsorted(now.photo_rows, test.photos[own]),
            np.searchsorted(now.text_rows, test.texts[own]),
        )
        return measure_alignment((self.clean.photos, self.clean.texts), (now.photos, now.texts), places)


def measure_cell(bench: Bench, cell: CellPlan, config: MatchConfig, device: str) -> MatchCell:
    """Scores of each system of a cell on test photos, and on these with the photos shuffled."""
    training, validation, test = bench.examples(cell)
    shuffled = test.with_photos_shuffled(cell.seed)
    vectors = bench.vectors(cell.degradation, cell.seed)
    systems, alignment = {}, {}
    if cell.system == BASELINE_CELL:
        for name, baseline in fit_baselines(vectors, training, validation).items():
            systems[name] = SystemScores(
                test=judge(baseline.scores(test), test.labels, baseline.threshold),
                shuffled=judge(baseline.scores(shuffled), test.labels, baseline.threshold),
                chosen=baseline.chosen,
            )
        alignment = dict(bench.alignment(cell))
    else:
        assert cell.system in FUSIONS
        inputs: Inputs = bench.tokens if cell.system == "tokens" else vectors
        model, fitted = fit(cell.system, inputs, training, validation, config, cell.seed, device)
        systems[cell.system] = SystemScores(
            test=judge(scores_of(model, inputs, test, device), test.labels),
            shuffled=judge(scores_of(model, inputs, shuffled, device), test.labels),
            best_epoch=fitted.best_epoch,
            validation_accuracy=fitted.scores,
            losses=fitted.losses,
        )
    return MatchCell(
        setting=cell.setting,
        kind=cell.degradation.kind,
        level=cell.degradation.level,
        negatives=cell.negatives,
        scale=cell.scale,
        permuted=cell.is_permuted,
        pairs={"train": len(training), "validation": len(validation), "test": len(test)},
        majority=float(max(test.labels.mean(), 1 - test.labels.mean())),
        systems=systems,
        alignment=alignment,
    )


def embed_pairs(photos: np.ndarray, texts: np.ndarray, seed: int) -> Plane:
    """Matching pairs on a plane.

    Args:
        photos: unit vectors [pairs, d].
        texts: unit vectors [pairs, d], in the same order.
        seed: of the start.
    """
    count = len(photos)
    method = TSNE(metric="cosine", init="random", random_state=seed, perplexity=min(30.0, (2 * count - 1) / 3))
    places = method.fit_transform(np.concatenate([photos, texts]))
    nearest = np.linalg.norm(places[:count, None] - places[None, count:], axis=2).argmin(axis=1)
    rounded = np.round(places.astype(float), 3).tolist()
    return Plane(
        photos=tuple(map(tuple, rounded[:count])),
        texts=tuple(map(tuple, rounded[count:])),
        own_is_nearest=float((nearest == np.arange(count)).mean()),
    )
