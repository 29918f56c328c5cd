"""What baselines are fitted on, and how they are tuned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from saffe_cache.core.items import Ragged
from saffe_cache.inputs.feature_loader import summaries
from saffe_cache.inputs.pairs import Pairs, mean_text_rows
from saffe_cache.protocols.base import Protocol, SearchProtocol
from saffe_cache.protocols.setting import Setting
from saffe_cache.retrieval.baselines import LinearMap, Rows, fit_ridge, unit_rows
from saffe_cache.retrieval.fitting import MlpFit, fit_mlp
from saffe_cache.retrieval.scores import candidate_scores
from saffe_cache.store.reader import EncoderCache

_MOST_KEPT_BYTES = 2**29
"""Features of photos that are kept in memory; larger ones are read from the cache as often as they are needed."""


class AbsentError(Exception):
    """A baseline does not apply; the message says why, and is empty where another one takes its place."""


@dataclass(frozen=True)
class Material:
    """What baselines are fitted on, and the protocol that scores them."""

    protocol: Protocol
    training: Pairs
    validation: Pairs
    layers: tuple[int, ...]
    """The layers of the photos' hidden states that baselines see."""

    def permuted(self, seed: int) -> Material:
        """The same with permuted pairs, to fit a control on."""
        return replace(self, training=self.training.permuted(seed), validation=self.validation.permuted(seed))

    @property
    def setting(self) -> Setting:
        return self.protocol.setting

    @property
    def gallery(self) -> EncoderCache:
        return self.setting.inputs.gallery

    @property
    def text(self) -> EncoderCache:
        return self.setting.inputs.text

    @property
    def all_pairs(self) -> tuple[Pairs, Pairs, Pairs]:
        """Of training, of validation, and reported."""
        return self.training, self.validation, self.setting.pairs

    @cached_property
    def rows(self) -> list[Rows]:
        """Summaries of the training, validation and reported photos, [photos, 2 P d] each: kept if they are small."""

        def of_pairs(pairs: Pairs) -> Rows:
            return Rows(len(pairs), lambda these: summaries(self.gallery, pairs.rows[these], self.layers))

        return [of_pairs(pairs).kept(_MOST_KEPT_BYTES) for pairs in self.all_pairs]

    @property
    def features(self) -> list[np.ndarray]:
        """The same, whole, in memory."""
        return [rows.whole for rows in self.rows]

    @cached_property
    def validation_search(self) -> SearchProtocol:
        """The search over the validation pairs whose score tunes every baseline."""
        return self.protocol.search_kind(self.setting.spec)(Setting(self.setting.inputs, self.validation))

    def validate(self, gallery: np.ndarray, queries: np.ndarray) -> float:
        """The validation score of unit vectors."""
        return self.validation_search.validation_score(gallery, queries)

    @cached_property
    def validation_queries(self) -> np.ndarray:
        return unit_rows(self.validation_search.queries.vectors)

    def paired_texts(self, pairs: Pairs) -> Rows:
        """Unit vectors of the texts that photos are fused with."""
        paired = pairs.paired_texts
        assert paired is not None
        return Rows(len(pairs), lambda these: unit_rows(self.text.vectors(paired[these])))

    @property
    def bank_photos(self) -> np.ndarray | None:
        """Positions of the training photos of the search correction's bank; None where it needs none."""
        bank = self.setting.bank
        return bank.photos if bank is not None and self.protocol.photos_search else None

    def training_features(self, chosen: np.ndarray) -> np.ndarray:
        """Summaries of some training photos, by position."""
        rows = self.rows[0]
        if rows[:1].nbytes * len(rows) <= _MOST_KEPT_BYTES:
            return np.asarray(rows.whole[chosen])
        return summaries(self.gallery, self.training.rows[chosen], self.layers)

    def own_vectors(self, pairs: Pairs) -> np.ndarray | None:
        """The photo encoder's own vectors, of unit length; None where none are cached."""
        if self.gallery.manifest.vector not in self.gallery.manifest.arrays:
            return None
        return unit_rows(self.gallery.vectors(pairs.rows))

    @property
    def text_means(self) -> Rows:
        """Mean of the unit vectors of each training photo's texts."""
        return mean_text_rows(self.training, self.text)

    def fit_ridge(self, training: Rows, validation: Rows) -> LinearMap:
        """From photos' features, or the texts that they are fused with, to the mean of their texts' vectors."""
        judged = validation.whole
        return fit_ridge(
            training, self.text_means, lambda fit: self.validate(unit_rows(fit(judged)), self.validation_queries)
        )

    @cached_property
    def ridge(self) -> LinearMap:
        return self.fit_ridge(*self.rows[:2])

    @cached_property
    def mlp(self) -> MlpFit:
        """On photos alone."""
        return self.fit_mlp(None, None)

    def fit_mlp(self, known: np.ndarray | None, texts: np.ndarray | None) -> MlpFit:
        """On photos, and the texts that those of training and of validation are fused with, if any."""
        distinct, position = np.unique(self.training.texts.values, return_inverse=True)
        judged = self.rows[1].whole
        return fit_mlp(
            self.rows[0].whole,
            unit_rows(self.text.vectors(distinct)),
            Ragged(self.training.texts.offsets, position),
            lambda fit: self.validate(fit.gallery(judged, texts), fit.queries(self.validation_queries)),
            paired_texts=known,
        )

    def validate_classes(self, scores: np.ndarray) -> float:
        """The validation score of scores [photos, classes]."""
        return candidate_scores(scores, self.validation.labels, intervals=False)[self.protocol.main_metric].value

    def training_labels(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Features and class of each training photo with one class, and how many classes there are.

        Classifiers are fitted on them; AbsentError says why none applies.
        """
        num_classes, labels = len(self.setting.cache.table.class_names), self.training.labels
        chosen = np.flatnonzero(labels.lengths == 1)
        if num_classes < 2:
            raise AbsentError("there is only one class")
        if 2 * len(chosen) < len(self.training):
            raise AbsentError("most photos have several classes")
        return self.rows[0].whole[chosen], labels.values[labels.offsets[chosen]], num_classes
