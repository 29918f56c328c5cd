"""What new models start from: the ridge regression from photos to the texts that describe them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from saffe_cache.core import ranks
from saffe_cache.fusion.base import Fusion
from saffe_cache.fusion.two_way import OtherWay, TwoWayFusion
from saffe_cache.inputs.bank import draw_bank
from saffe_cache.inputs.feature_loader import FeatureLoader, encode_gallery, in_blocks
from saffe_cache.inputs.pairs import Pairs, mean_text_rows
from saffe_cache.protocols.setting import Queries
from saffe_cache.retrieval.baselines import LinearMap, Rows, fit_ridge, unit_rows
from saffe_cache.retrieval.correction import Bank, SearchCorrection
from saffe_cache.retrieval.scores import Biases

if TYPE_CHECKING:
    from saffe_cache.protocols.base import SearchProtocol

_OTHER_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Candidates for the weight of the ridge regression from texts to photos; of equal ones the smallest."""
_OTHER_CORRECTION = SearchCorrection(kind="nnn", k=10, strength=0.5, temperature=0.0)
"""The weight suits searches with this correction as well as those without."""
_TEXT_WEIGHTS = (4.0, 2.0, 1.0, 0.5, 0.25)
"""Candidates for the starting weight of the paired text's vector, relative to the photo's."""


class LateStart:
    """Starts models as late fusion: a ridge regression and a weight of the text, both chosen by validation."""

    def __init__(self, inputs: FeatureLoader, training: Pairs, search: SearchProtocol) -> None:
        """`search`: over the validation pairs. Of composed pairs, those with captions are regressed on."""
        self._inputs, self._search, self._validation = inputs, search, search.setting.pairs
        self._pairs = training.described()
        self._ridges: dict[bool, tuple[LinearMap, np.ndarray]] = {}

    def set(self, model: Fusion, linear: nn.Linear) -> None:
        """Set the ridge regression of the photo, and the weight of the paired text, if any.

        `linear` is the linear path of a new model. Everything else starts at zero, so the model's output for a photo is
        known without running it. Where no photo has a caption, it stays as it was drawn.
        """
        if not len(self._pairs):
            return
        best, mapped = self._ridge(model)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(best.weight))
            linear.bias.copy_(torch.from_numpy(best.bias))
            if model.shape.pooled_text and (self._pairs.composed is not None or self._pairs.paired_texts is not None):
                scores = {}
                for weight in _TEXT_WEIGHTS:
                    model.text_weight.fill_(weight)
                    scores[weight] = self._search.validate_late(unit_rows(mapped), model.eval())
                model.text_weight.fill_(max(scores, key=scores.__getitem__))

    def _ridge(self, model: Fusion) -> tuple[LinearMap, np.ndarray]:
        """The ridge regression from what a model's linear path sees to the photos' texts, and the validation photos.

        Validation picks its strength.
        """
        known = None if model.fuses_first else model.shape.maps_queries  # where all else that is new is equal
        if known is not None and known in self._ridges:
            return self._ridges[known]
        model.eval()
        training, validation = self._features(self._pairs, model), self._features(self._validation, model).whole
        best = fit_ridge(
            training, self._text_means, lambda fit: self._search.validate_gallery(unit_rows(fit(validation)), model)
        )
        found = best, best(validation)
        if known is not None:
            self._ridges[known] = found
        return found

    def ridge(self) -> LinearMap | None:
        """The ridge regression from the photos' summaries to their texts, the baseline: that of any model whose linear
        path sees the photo alone. None where no photo has a caption."""
        for best, _ in self._ridges.values():
            return best
        if not len(self._pairs):
            return None
        training, validation = (
            computed_rows(pairs.rows, self._inputs.summaries) for pairs in (self._pairs, self._validation)
        )
        photos = validation.whole
        return fit_ridge(training, self._text_means, lambda fit: self._search.validate_photos(unit_rows(fit(photos))))

    def add_other_way(self, model: TwoWayFusion) -> float:
        """Set the ridge regression from texts to photos that searches best beside a trained model, or none; returns
        the validation score.

        Where searches may be corrected, the best has the highest mean of the scores with and without correction: what
        corrects hubs is of less use where the other way has few.
        """
        model.other_way = None
        alone = encode_gallery(model, self._inputs, self._validation.rows)
        summaries = [computed_rows(pairs.rows, self._inputs.summaries) for pairs in (self._pairs, self._validation)]
        training, validation = Rows(len(summaries[0]), lambda rows: unit_rows(summaries[0][rows])), summaries[1].whole
        mean_text = self._text_means.whole.mean(axis=0)

        def gallery_of(way: OtherWay | None, weight: float) -> np.ndarray:
            model.other_way = way
            if way is None:
                return alone
            way.weight.fill_(weight)
            both = way.with_photos(*(torch.from_numpy(one).to(self._inputs.device) for one in (alone, validation)))
            return both.cpu().numpy()

        def score(way: OtherWay | None, weight: float) -> float:
            gallery = gallery_of(way, weight)
            measured = (self._search.validate_gallery(gallery, model) + self._corrected(gallery, model)) / 2
            return ranks.agreed(lambda: measured)

        def way_of(fit: LinearMap, *, centred: bool) -> OtherWay:
            centre = fit(mean_text) if centred else np.zeros_like(fit.bias)
            return OtherWay.of(fit.weight, fit.bias - centre, centre).to(self._inputs.device)

        best = fit_ridge(self._text_means, training, lambda fit: score(way_of(fit, centred=False), 1.0))
        ways = [way_of(best, centred=centred) for centred in (False, True)]
        way = max(ways, key=lambda one: score(one, 1.0))
        weights = {weight: score(way if weight else None, weight) for weight in _OTHER_WEIGHTS}
        chosen = max(weights, key=weights.__getitem__)
        return self._search.validate_gallery(gallery_of(way if chosen else None, chosen), model)

    def _corrected(self, gallery: np.ndarray, model: Fusion) -> float:
        """The main metric with search correction, or without it where there is none; 0 if a training text is mapped to
        nothing, as where all are equal."""
        if self._bank is None:
            return self._search.validate_gallery(gallery, model)
        setting = self._search.setting
        bank = setting.queries(model, Queries.of_texts(self._inputs, self._bank.texts))
        if np.linalg.norm(bank, axis=1).min() < 0.999:
            return 0.0
        biases = Biases(self._bank.correction.biases(gallery, bank))
        return self._search.validation_score(gallery, setting.queries(model, self._search.queries), biases)

    @cached_property
    def _bank(self) -> Bank | None:
        """Of a correction; None where the protocol has none, or too few texts train."""
        if not self._search.corrects_search:
            return None
        inputs, reported = self._inputs, self._validation.texts.values
        try:
            return draw_bank(_OTHER_CORRECTION, inputs.cache, inputs.spec, self._pairs, reported)
        except ValueError:
            return None

    def _features(self, pairs: Pairs, model: Fusion) -> Rows:
        """What the linear path of a model sees."""
        paired = pairs.paired_texts if model.fuses_first else None

        def features(places: np.ndarray) -> torch.Tensor:
            texts = None if paired is None else self._inputs.texts(paired[places])
            return model.linear_features(*self._inputs.photos(pairs.rows[places]), texts)

        return computed_rows(np.arange(len(pairs)), features)

    @property
    def _text_means(self) -> Rows:
        return mean_text_rows(self._pairs, self._inputs.text)


def computed_rows(inputs: np.ndarray, compute: Callable[[np.ndarray], torch.Tensor]) -> Rows:
    """What is computed of some inputs, a block at a time."""
    return Rows(len(inputs), lambda rows: in_blocks(lambda these: compute(inputs[rows][these]), len(inputs[rows])))
