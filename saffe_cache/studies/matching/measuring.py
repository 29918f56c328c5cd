"""One cell: a system trained on so many pairs of features as they are or degraded, judged on photos never seen."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from saffe_cache.inputs.pairs import Pairs
from saffe_cache.retrieval.baselines import LinearMap, unit_rows
from saffe_cache.store.reader import EncoderCache
from saffe_cache.studies.matching.aligning import fit_alignment, judge_alignment
from saffe_cache.studies.matching.baselines import fit_baselines, fit_ridge_map
from saffe_cache.studies.matching.degrading import Degradation, measure_alignment
from saffe_cache.studies.matching.embedding import embed_pairs
from saffe_cache.studies.matching.examples import Examples, draw_examples, draw_judged
from saffe_cache.studies.matching.fitting import FitOptions, fit, scores_of
from saffe_cache.studies.matching.fusions import FUSIONS
from saffe_cache.studies.matching.inputs import Inputs, Tokens, Vectors
from saffe_cache.studies.matching.scores import judge

BASELINE_CELL = "baselines"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is measured together, once a seed."""

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
        """Of its file."""
        permuted = "-permuted" if self.is_permuted else ""
        setting = self.setting.replace(":", "-to-").replace(" ", "-")
        return f"{setting}-{self.scale}-{self.system}{permuted}-seed{self.seed}"


def examples_of(parts: Mapping[str, Pairs], cell: Cell) -> tuple[Examples, Examples, Examples]:
    """To train on, to choose by, to report on.

    Raises:
        ValueError: the data do not allow them.
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
        token_cells: Sequence[Cell],
        layers: tuple[int, int],
    ) -> None:
        """
        Args:
            photo: the encoder of photos (or sounds).
            text: that of texts.
            parts: "train", "validation" and "test"; "aligning" where features are made pre-aligned.
            token_cells: all cells that will need hidden states.
            layers: of photos and texts, for these.
        """
        self._photo, self._text, self._parts = photo, text, parts
        self._token_cells, self._layers = token_cells, layers
        self._degraded: tuple[tuple[Degradation, int], Vectors] | None = None

    @cached_property
    def own(self) -> Vectors:
        """The encoders' own."""
        rows = [np.unique(np.concatenate([of.rows for of in self._parts.values()]))]
        rows.append(np.unique(np.concatenate([of.texts.values for of in self._parts.values()])))
        return Vectors.read(self._photo, self._text, *rows)

    @cached_property
    def alignment_map(self) -> LinearMap | None:
        """What makes features pre-aligned; None where they are taken as they are."""
        others = self._parts.get("aligning")
        return fit_alignment(self.own, others, draw_judged(self._parts["validation"], 1, 0)) if others else None

    @cached_property
    def clean(self) -> Vectors:
        """What is measured where nothing is degraded."""
        return self.own.mapped(self.alignment_map) if self.alignment_map else self.own

    def made_alignment(self) -> Mapping[str, Any] | None:
        """What the map did to the report's pairs; None without one."""
        if not self.alignment_map:
            return None
        test = draw_judged(self._parts["test"], 1, 0)
        return judge_alignment(self.own, self._parts["aligning"], self.alignment_map, test)

    @cached_property
    def tokens(self) -> Tokens:
        """Of the photos and texts of these cells alone."""
        drawn = [examples for cell in self._token_cells for examples in self.examples(cell)]
        rows = [np.unique(np.concatenate([getattr(one, of) for one in drawn])) for of in ("photos", "texts")]
        return Tokens.read(self._photo, self._text, rows[0], rows[1], self._layers)

    @property
    def num_tokens(self) -> tuple[int, int] | None:
        """Of a photo, and of a text on average; None where no cell needs them."""
        if not self._token_cells:
            return None
        return self.tokens.photos.shape[1], round(float(self.tokens.lengths.float().mean()))

    def plane(self, cell: Cell, count: int) -> dict[str, Any]:
        """Matching pairs of the report on a plane: as they are where widths agree, and with photos mapped to texts."""
        training, validation, test = self.examples(cell)
        own = np.flatnonzero(test.labels == 1)[:count]
        photos, texts = self.clean.of_photos(test.photos[own]), self.clean.of_texts(test.texts[own])
        ridge = fit_ridge_map(self.clean, training, validation)
        found = {"ridge": embed_pairs(unit_rows(ridge(photos)), texts, cell.seed)}
        if self.clean.widths[0] == self.clean.widths[1]:
            found = {"own": embed_pairs(photos, texts, cell.seed)} | found
        return found

    def vectors(self, degradation: Degradation, seed: int) -> Vectors:
        """The last ones are kept."""
        if degradation.kind == "clean":
            return self.clean
        if self._degraded is None or self._degraded[0] != (degradation, seed):
            self._degraded = (degradation, seed), self.clean.degraded(degradation, seed)
        return self._degraded[1]

    def examples(self, cell: Cell) -> tuple[Examples, Examples, Examples]:
        """To train on, to choose by, to report on."""
        return examples_of(self._parts, cell)

    def alignment(self, cell: Cell) -> Mapping[str, float]:
        """Measured cosines of a cell's features."""
        test = self.examples(cell)[2]
        own = test.labels == 1
        now = self.vectors(cell.degradation, cell.seed)
        places = (
            np.searchsorted(now.photo_rows, test.photos[own]),
            np.searchsorted(now.text_rows, test.texts[own]),
        )
        return measure_alignment((self.clean.photos, self.clean.texts), (now.photos, now.texts), places)


def measure_cell(bench: Bench, cell: Cell, options: FitOptions) -> dict[str, Any]:
    """Scores of each system of a cell on test photos, and on these with the photos shuffled."""
    started = time.perf_counter()
    training, validation, test = bench.examples(cell)
    shuffled = test.with_photos_shuffled(cell.seed)
    found: dict[str, Any] = {
        "setting": cell.setting,
        "kind": cell.degradation.kind,
        "level": cell.degradation.level,
        "negatives": cell.negatives,
        "scale": cell.scale,
        "seed": cell.seed,
        "permuted": cell.is_permuted,
        "pairs": {"train": len(training), "validation": len(validation), "test": len(test)},
        "majority": float(max(test.labels.mean(), 1 - test.labels.mean())),
        "systems": {},
    }
    vectors = bench.vectors(cell.degradation, cell.seed)
    if cell.system == BASELINE_CELL:
        for name, baseline in fit_baselines(vectors, training, validation).items():
            found["systems"][name] = {
                "test": judge(baseline.scores(test), test.labels, baseline.threshold),
                "shuffled": judge(baseline.scores(shuffled), test.labels, baseline.threshold),
                "chosen": baseline.chosen,
            }
        found["alignment"] = dict(bench.alignment(cell))
    else:
        assert cell.system in FUSIONS
        inputs: Inputs = bench.tokens if cell.system == "tokens" else vectors
        fitted = fit(cell.system, inputs, training, validation, options, cell.seed)
        found["systems"][cell.system] = {
            "test": judge(scores_of(fitted.model, inputs, test, options.device), test.labels),
            "shuffled": judge(scores_of(fitted.model, inputs, shuffled, options.device), test.labels),
            "best_epoch": fitted.epoch,
            "validation_accuracy": list(fitted.validation),
            "losses": list(fitted.losses),
            "parameters": fitted.num_parameters,
        }
    return found | {"seconds": round(time.perf_counter() - started, 2)}
