"""Every measure of every pair of layers, and maps from the best photo layer, on a sample of a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property, partial

import numpy as np
import torch

from saffe_cache.core.controls import Control
from saffe_cache.core.items import Ragged
from saffe_cache.inputs.feature_loader import summaries
from saffe_cache.inputs.spec import PairKind
from saffe_cache.retrieval.baselines import Ridge, unit_rows
from saffe_cache.store.reader import EncoderCache
from saffe_cache.studies.alignment import maps, measures
from saffe_cache.studies.alignment.config import AlignConfig
from saffe_cache.studies.alignment.maps import Answers
from saffe_cache.studies.alignment.result import (
    ENOUGH_WITHOUT_MAP,
    BestLayer,
    Cells,
    Evidence,
    LayerMaps,
    LayerMeasure,
    MapScore,
)

OWN = "own"
"""Instead of a layer's number: the encoder's own vector."""
_RESAMPLES = 100
"""Of the judged photos, for SVCCA's intervals."""
_CLASS_HALVES = 6
"""Random halves of the classes that maps are fitted without."""
_LEAST_CLASSES = 4
_PERMUTED_FITS = 10
"""Maps fitted on permuted pairs, for the control."""
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Photos in random order, and the text of each; those that are measured on, the judged ones, come first."""

    config: AlignConfig
    encoders: tuple[EncoderCache, EncoderCache]
    """Of photos and of texts."""
    layers: tuple[list[int], list[int]]
    kind: PairKind
    rows: np.ndarray
    """int64 [photos]: in their encoder's arrays."""
    prompts: Ragged
    """Text rows of each distinct text: one caption, or the prompts of a class."""
    text_of: np.ndarray
    """int64 [photos]: which of the texts; a caption has the number of its photo."""
    num_judged: int
    num_available: int
    """Photos that could be trained on."""

    @property
    def has_captions(self) -> bool:
        """Whether each photo has a text of its own, rather than that of its class."""
        return self.kind == "captions"

    @property
    def judged(self) -> np.ndarray:
        """Positions of the photos that are measured on."""
        return np.arange(self.num_judged)

    @property
    def others(self) -> np.ndarray:
        """Positions of the photos that maps are fitted on."""
        return np.arange(self.num_judged, len(self.text_of))

    @property
    def fitted(self) -> np.ndarray:
        """Those of them that every pair of layers is fitted on: as many as are measured on, if available."""
        return self.others[: self.num_judged]

    @property
    def num_texts(self) -> int:
        """The number that takes part in the search on judged photos: their captions, or all classes."""
        return self.num_judged if self.has_captions else len(self.prompts)

    @cached_property
    def photos(self) -> dict[str, np.ndarray]:
        """[photos, d] of each layer, the mean of all tokens, each normed; and the encoder's own where it is cached."""
        encoder = self.encoders[0]
        found = {str(layer): summaries(encoder, self.rows, (layer,), splits_first=False) for layer in self.layers[0]}
        has_own = encoder.manifest.vector in encoder.manifest.arrays
        return found | ({OWN: encoder.vectors(self.rows)} if has_own else {})

    @cached_property
    def texts(self) -> dict[str, np.ndarray]:
        """Unit vectors of the distinct texts, [texts, t], of each layer and of the encoder's own."""
        encoder, rows = self.encoders[1], self.prompts.values
        read = {str(layer): summaries(encoder, rows, (layer,), splits_first=False) for layer in self.layers[1]}
        read[OWN] = encoder.vectors(rows)
        starts = self.prompts.offsets[:-1]
        return {name: unit_rows(np.add.reduceat(unit_rows(of), starts, axis=0)) for name, of in read.items()}

    def texts_of(self, layer: str, photos: np.ndarray) -> np.ndarray:
        """One row for each of some photos."""
        return np.asarray(self.texts[layer][self.text_of[photos]])

    def photo_tokens(self, layer: int) -> Iterator[torch.Tensor]:
        """Normed tokens of the judged photos [photos, tokens, d], some at a time."""
        self.encoders[0].require_equal_lengths(self.rows[: self.num_judged], "a search by tokens")
        for rows in np.split(self.rows[: self.num_judged], range(_BATCH, self.num_judged, _BATCH)):
            yield maps.normed(torch.from_numpy(self.encoders[0].tokens(rows, (layer,)).states[0]))

    def text_tokens(self, layer: int) -> list[torch.Tensor]:
        """Normed tokens [tokens, t] of each text in the search; for a class, those of its first prompt."""
        tokens = self.encoders[1].tokens(self.prompts.values[self.prompts.offsets[: self.num_texts]], (layer,))
        assert tokens.mask is not None
        return [
            maps.normed(torch.from_numpy(one[mask])) for one, mask in zip(tokens.states[0], tokens.mask, strict=True)
        ]

    def permutations(self, num: int) -> list[np.ndarray]:
        """Random orders of so many photos or texts, for a null."""
        return measures.permutations(num, self.config.permutations, self.config.seed)

    def searched(
        self, text_layer: str, photos: np.ndarray, map_texts: Callable[[np.ndarray], np.ndarray] = np.asarray
    ) -> Answers:
        """How the judged photos' vectors [judged, t] and the texts find each other."""
        texts = map_texts(self.texts[text_layer][: self.num_texts])
        return maps.answers(photos, texts, self.text_of[self.judged], texts_search=self.has_captions)

    def without_map(self, photo_layer: str, text_layer: str, seed: int) -> tuple[Answers, MapScore] | None:
        """By the plain cosine; None where the widths differ, or no such vector is cached."""
        photos, texts = self.photos.get(photo_layer), self.texts[text_layer]
        if photos is None or photos.shape[1] != texts.shape[1]:
            return None
        found = self.searched(text_layer, photos[self.judged])
        return found, found.score(found.null_of_deals(self.permutations(self.num_texts)), seed)


def measures_of(sample: Sample) -> tuple[dict[str, Callable[[], LayerMeasure]], dict[str, str]]:
    """What measures each of all pairs of layers, by name; and why a measure is absent."""
    wanted = {"cka": _cka, "mutual_neighbours": _mutual_neighbours, "svcca": _svcca, "a_lin": _linear}
    wanted["a_0"], absent = _without_map, {}
    ours, theirs = ([of.shape[1] for of in side.values()] for side in (sample.photos, sample.texts))
    if not set(ours) & set(theirs):
        absent["a_0"] = f"vectors of widths {ours[0]} and {theirs[0]} have no cosine"
    if not sample.has_captions:
        wanted["a_new"] = _unseen_classes
        if sample.num_texts < _LEAST_CLASSES:
            absent["a_new"] = f"{sample.num_texts} classes; leaving half of them out takes {_LEAST_CLASSES} or more"
    return {name: partial(measure, sample) for name, measure in wanted.items() if name not in absent}, absent


def _cka(sample: Sample) -> LayerMeasure:
    text_of = sample.text_of[sample.judged]

    def assigned(deal: np.ndarray) -> np.ndarray:
        """The texts' matrices after texts were assigned at random to photos or to classes."""
        return np.stack([measures.centered_gram(of[deal[text_of]]) for of in sample.texts.values()])

    photos = np.stack([measures.centered_gram(unit_rows(of[sample.judged])) for of in sample.photos.values()])
    texts, deals = assigned(np.arange(sample.num_texts)), sample.permutations(sample.num_texts)
    return measures.measure_cka(photos, texts, map(assigned, deals), sample.config.half_samples, sample.config.seed)


def _mutual_neighbours(sample: Sample) -> LayerMeasure:
    config, judged = sample.config, sample.judged
    photos = np.stack([_similarities(of[judged]) for of in sample.photos.values()])
    if sample.has_captions:
        texts = np.stack([_similarities(sample.texts_of(name, judged)) for name in sample.texts])
    else:
        classes = sample.text_of[judged]
        texts = np.repeat((classes[:, None] == classes)[None], len(sample.texts), axis=0)
    orders = sample.permutations(sample.num_judged)
    return measures.measure_mutual_neighbours(
        photos, texts, config.neighbours, orders, config.half_samples, config.seed
    )


def _similarities(vectors: np.ndarray) -> np.ndarray:
    clipped = measures.unit_rows_clipped(vectors)
    return np.asarray(clipped @ clipped.T)


def _svcca(sample: Sample) -> LayerMeasure:
    config, parts = sample.config, (sample.fitted, sample.judged)
    photos = [[unit_rows(of[part]) for part in parts] for of in sample.photos.values()]
    texts = [[sample.texts_of(name, part) for part in parts] for name in sample.texts]
    ours, theirs = (
        [measures.principal_components(fitted, judged, config.components) for fitted, judged in side]
        for side in (photos, texts)
    )
    return measures.measure_svcca(ours, theirs, config.permutations, _RESAMPLES, config.seed)


def _linear(sample: Sample) -> LayerMeasure:
    scores: list[list[MapScore | None]] = []
    orders = sample.permutations(sample.num_judged)
    for photos in sample.photos.values():
        ridge = Ridge(photos[sample.fitted])
        scores.append([])
        for name in sample.texts:
            fit, _ = ridge.fit_left_out(sample.texts_of(name, sample.fitted))
            found = sample.searched(name, fit(photos[sample.judged]))
            scores[-1].append(found.score(found.null(orders), sample.config.seed))
    return _of_scores(sample, scores)


def _without_map(sample: Sample) -> LayerMeasure:
    """Cosines where both vectors have one width."""
    found = [[sample.without_map(layer, name, sample.config.seed) for name in sample.texts] for layer in sample.photos]
    return _of_scores(sample, [[one and one[1] for one in row] for row in found])


def _of_scores(sample: Sample, scores: list[list[MapScore | None]]) -> LayerMeasure:
    """R@1 and median ranks of all pairs."""
    cells: dict[str, Cells] = {
        field.name: tuple(tuple(None if one is None else getattr(one, field.name) for one in row) for row in scores)
        for field in fields(MapScore)
    }
    return LayerMeasure(chance=1 / sample.num_texts, **cells)


def _unseen_classes(sample: Sample) -> LayerMeasure:
    """R@1 of classes that the ridge regression has not seen, among these; mean over random halves of the classes.

    Half of the classes vary as all would: see `half_sample_deviations`. With few classes they vary much.
    """
    orders = measures.permutations(sample.num_texts, _CLASS_HALVES, sample.config.seed)
    unseen = [np.sort(order[sample.num_texts // 2 :]) for order in orders]
    deals = sample.permutations(len(unseen[0]))
    shape = (_CLASS_HALVES, len(sample.photos), len(sample.texts))
    values, nulls = np.zeros(shape), np.zeros((len(deals), *shape))
    for half, classes in enumerate(unseen):
        fitted = sample.fitted[~np.isin(sample.text_of[sample.fitted], classes)]
        judged = sample.judged[np.isin(sample.text_of[sample.judged], classes)]
        rows = np.searchsorted(classes, sample.text_of[judged])
        for row, photos in enumerate(sample.photos.values()):
            ridge = Ridge(photos[fitted])
            for column, (name, texts) in enumerate(sample.texts.items()):
                fit, _ = ridge.fit_left_out(sample.texts_of(name, fitted))
                found = maps.answers(fit(photos[judged]), texts[classes], rows, texts_search=False)
                values[half, row, column] = found.recall_at_1
                nulls[:, half, row, column] = found.null_of_deals(deals)
    deviations = values.std(axis=0, ddof=1)
    return measures.layer_measure(values.mean(axis=0), deviations, nulls.mean(axis=1), 1 / len(unseen[0]), (0, 1))


def best_layer(sample: Sample) -> str:
    """The photo layer that predicts the texts' own vectors best.

    By the error of left-out photos among those that maps are fitted on; the judged ones play no part in the choice.
    """
    targets = sample.texts_of(OWN, sample.others)
    layers = [name for name in sample.photos if name != OWN]
    return min(layers, key=lambda name: Ridge(sample.photos[name][sample.others]).fit_left_out(targets)[1])


def measure_best_layer(sample: Sample) -> BestLayer:
    """R@1 of each kind of map on the judged photos, and the evidence for the advice."""
    layer, text_layer, others, judged = best_layer(sample), str(sample.layers[1][-1]), sample.others, sample.judged
    features, text_of = sample.photos[layer], sample.text_of
    ridge = Ridge(features[others])
    ridges = {name: ridge.fit_left_out(sample.texts_of(name, others)) for name in (OWN, text_layer)}
    linear, linear_mean = (sample.searched(name, fit(features[judged])) for name, (fit, _) in ridges.items())
    search: dict[str, bool] = {"texts_search": sample.has_captions}
    fit = maps.fit_text_mlp(features[others], text_of[others], sample.texts[OWN], sample.config.seed, **search)
    mlp = sample.searched(OWN, fit.gallery(features[judged]), fit.queries)
    tokens = sample.photo_tokens(int(layer)), sample.text_tokens(int(text_layer))
    text_mean = sample.texts_of(text_layer, others).mean(axis=0)
    late = maps.answers_of_scores(maps.maxsim(*tokens, ridges[text_layer][0], text_mean), text_of[judged], **search)
    orders = sample.permutations(sample.num_judged)
    a_lin, a_mlp, a_lin_mean, a_tok = (one.score(one.null(orders), 0) for one in (linear, mlp, linear_mean, late))
    plain, chance = sample.without_map(OWN, OWN, seed=0), 1 / sample.num_texts
    found = []
    if plain:
        found.append(LayerMaps(gallery_layer=OWN, text_layer=OWN, chance=chance, scores={"a_0": plain[1]}))
    for name, scores in ((OWN, {"a_lin": a_lin, "a_mlp": a_mlp}), (text_layer, {"a_lin": a_lin_mean, "a_tok": a_tok})):
        ridge_fit = {"ridge_strength": ridges[name][0].strength, "left_out_error": ridges[name][1]}
        found.append(LayerMaps(gallery_layer=layer, text_layer=name, chance=chance, scores=scores, **ridge_fit))
    evidence = Evidence(
        a_0=plain and plain[1].value,
        without_map=plain and plain[0].gap(linear, ENOUGH_WITHOUT_MAP),
        a_lin=a_lin.value,
        a_mlp=a_mlp.value,
        mlp_gain=mlp.gap(linear),
        null=max(a_lin.null_high, a_mlp.null_high),
        a_tok=a_tok.value,
        token_gain=late.gap(linear_mean),
    )
    return BestLayer(maps=tuple(found), evidence=evidence, control=_permuted_control(sample, ridge, features[judged]))


def _permuted_control(sample: Sample, ridge: Ridge, judged: np.ndarray) -> Control:
    """Maps fitted on permuted pairs, which must find nothing.

    Photos of one class are found or missed together, so no more answers are independent than there are texts.
    """
    targets, chance = sample.texts_of(OWN, sample.others), 1 / sample.num_texts
    found = [
        sample.searched(OWN, ridge.fit_left_out(targets[order])[0](judged)).recall_at_1
        for order in measures.permutations(len(targets), _PERMUTED_FITS, sample.config.seed)
    ]
    error = math.sqrt(chance * (1 - chance) / (min(sample.num_judged, sample.num_texts) * _PERMUTED_FITS))
    return Control.at_most("linear map of permuted pairs", "R@1", float(np.mean(found)), chance, error)
