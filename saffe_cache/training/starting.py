"""What new models start from: the ridge regression from photos to the texts that describe them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from saffe_cache.core import ranks
from saffe_cache.core.items import Ragged
from saffe_cache.fusion.base import Fusion, TrainingVectors
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.with_kernels import Kernels, WithKernels
from saffe_cache.inputs.bank import draw_bank
from saffe_cache.inputs.feature_loader import FeatureLoader, encode_gallery, in_blocks
from saffe_cache.inputs.pairs import Pairs, mean_text_rows
from saffe_cache.protocols.setting import Queries
from saffe_cache.retrieval.baselines import LinearMap, Rows, fit_ridge, unit_rows
from saffe_cache.retrieval.correction import Bank, SearchCorrection
from saffe_cache.retrieval.scores import Biases

if TYPE_CHECKING:
    from saffe_cache.protocols.base import SearchProtocol

_KERNEL_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Candidates for the weight of the kernel ridge regressions; of equal ones the smallest."""
_CORRECTION = SearchCorrection(kind="nnn", k=10, strength=0.5, temperature=0.0)
"""The weight suits searches with this correction as well as those without."""
_TEXT_WEIGHTS = (4.0, 2.0, 1.0, 0.5, 0.25)
"""Candidates for the starting weight of the paired text's vector, relative to the photo's."""


class _Vectors(NamedTuple):
    """Vectors of the validation photos, of the texts that search them, and of the bank of a correction, on the CPU."""

    gallery: torch.Tensor
    queries: torch.Tensor
    bank: torch.Tensor
    """Without rows where nothing is corrected."""

    @property
    def searched(self) -> tuple[np.ndarray, np.ndarray]:
        return self.gallery.numpy(), self.queries.numpy()


class LateStart:
    """Starts models as late fusion: a ridge regression and a weight of the text, both chosen by validation."""

    def __init__(self, inputs: FeatureLoader, training: Pairs, search: SearchProtocol) -> None:
        """`search`: over the validation pairs. Of composed pairs, those with captions are regressed on."""
        self._inputs, self._search, self._validation = inputs, search, search.setting.pairs
        self._pairs = training.described()
        self._ridges: dict[bool, tuple[LinearMap, np.ndarray]] = {}
        self._fitted_kernels: tuple[Kernels, _Vectors] | None = None

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

    def add_kernels(self, model: WithKernels) -> float:
        """Set kernel ridge regressions beside a trained model with the weight that searches best, or none; returns the
        validation score.

        Where searches may be corrected, the best has the highest mean of the scores with and without correction: what
        corrects hubs is of less use where the kernels have few.
        """
        model.kernels = None
        alone, (kernels, others) = self._own_vectors(model), self._kernels(model.shape)
        scores = {}
        for weight in _KERNEL_WEIGHTS:
            kernels.weight.fill_(weight)
            scores[weight] = self._scores(_Vectors(*map(kernels.beside, alone, others)) if weight else alone)
        chosen = max(scores, key=lambda one: scores[one][1])
        if chosen:
            model.kernels = deepcopy(kernels)
            model.kernels.weight.fill_(chosen)
        return scores[chosen][0]

    def _kernels(self, shape: FusionShape) -> tuple[Kernels, _Vectors]:
        """The regressions, of which each model takes a copy, and what they make of the validation photos and the texts:
        the same for all models."""
        if self._fitted_kernels is None:
            kernels = Kernels(shape).to(self._inputs.device)
            search = self._search

            def validate() -> float:
                score = search.validation_score(*self._kernel_searches(kernels))  # by all ranks together
                return ranks.agreed(lambda: score)

            kernels.regressions.fit(training_vectors(self._inputs, self._pairs, validate))
            gallery, queries = map(torch.from_numpy, self._kernel_searches(kernels))
            bank = queries[:0]
            if self._bank is not None:
                bank = torch.from_numpy(self._kernel_texts(kernels, self._inputs.text.vectors(self._bank.texts)))
            self._fitted_kernels = kernels, _Vectors(gallery, queries, bank)
        return self._fitted_kernels

    def _scores(self, vectors: _Vectors) -> tuple[float, float]:
        """The validation score without search correction, and the mean with and without."""
        plain = self._search.validation_score(*vectors.searched)
        measured = plain, (plain + self._corrected(vectors, plain)) / 2
        return ranks.agreed(lambda: measured)

    def _own_vectors(self, model: Fusion) -> _Vectors:
        """What a model makes of the validation photos, their queries and the bank."""
        setting, inputs = self._search.setting, self._inputs
        queries = setting.queries(model, self._search.queries)
        of_bank = None if self._bank is None else Queries.of_texts(inputs, self._bank.texts)
        bank = queries[:0] if of_bank is None else setting.queries(model, of_bank)
        vectors = encode_gallery(model, inputs, self._validation.rows), queries, bank
        return _Vectors(*map(torch.from_numpy, vectors))

    def _kernel_searches(self, kernels: Kernels) -> tuple[np.ndarray, np.ndarray]:
        """What the regressions make of the validation photos, and of the texts that search them."""
        photos = torch.from_numpy(self._validation_photos).to(self._inputs.device)
        gallery = in_blocks(lambda rows: kernels.of_photos(photos[rows]), len(photos), 1024)
        return gallery, self._kernel_texts(kernels, self._search.queries.vectors)

    def _kernel_texts(self, kernels: Kernels, own: np.ndarray) -> np.ndarray:
        """What they make of texts, by the text encoder's own vectors."""
        device = self._inputs.device
        return in_blocks(lambda rows: kernels.of_texts(torch.from_numpy(own[rows]).to(device)), len(own), 1024)

    @cached_property
    def _validation_photos(self) -> np.ndarray:
        """Summaries of the validation photos."""
        return computed_rows(self._validation.rows, self._inputs.summaries).whole

    def _corrected(self, vectors: _Vectors, plain: float) -> float:
        """The main metric with search correction, or `plain` where there is none; 0 if a training text is mapped to
        nothing, as where all are equal."""
        if self._bank is None:
            return plain
        bank = vectors.bank.numpy()
        if np.linalg.norm(bank, axis=1).min() < 0.999:
            return 0.0
        gallery, queries = vectors.searched
        return self._search.validation_score(gallery, queries, Biases(self._bank.correction.biases(gallery, bank)))

    @cached_property
    def _bank(self) -> Bank | None:
        """Of a correction; None where the protocol has none, or too few texts train."""
        if not self._search.corrects_search:
            return None
        inputs, reported = self._inputs, self._validation.texts.values
        try:
            return draw_bank(_CORRECTION, inputs.cache, inputs.spec, self._pairs, reported)
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


def training_vectors(inputs: FeatureLoader, pairs: Pairs, validate: Callable[[], float]) -> TrainingVectors:
    """What fusions in closed form are fitted on, of some pairs."""
    texts = pairs.texts
    distinct, places = np.unique(texts.values, return_inverse=True)
    photos = computed_rows(pairs.rows, inputs.summaries).whole
    return TrainingVectors(photos, unit_rows(inputs.text.vectors(distinct)), Ragged(texts.offsets, places), validate)


def computed_rows(inputs: np.ndarray, compute: Callable[[np.ndarray], torch.Tensor]) -> Rows:
    """What is computed of some inputs, a block at a time."""
    return Rows(len(inputs), lambda rows: in_blocks(lambda these: compute(inputs[rows][these]), len(inputs[rows])))
