"""Every measure of every pair of layers, and maps from the best photo layer, from vectors that are already read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from saffe_cache.core.controls import Control
from saffe_cache.core.results import Estimate
from saffe_cache.retrieval.baselines import LinearMap, Ridge, unit_rows
from saffe_cache.retrieval.metrics import paired_bootstrap
from saffe_cache.studies.alignment.config import AlignConfig
from saffe_cache.studies.alignment.maps import (
    Answers,
    answers,
    answers_of_scores,
    maxsim,
    mlp_answers,
)
from saffe_cache.studies.alignment.measures import (
    Grid,
    centered_gram,
    chance_of_neighbours,
    cka_grid,
    grid_of,
    mutual_neighbours_grid,
    permutations,
    principal_components,
    svcca_grid,
    unit_rows_clipped,
)
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
_MLP_EPOCHS = 15
_PERMUTED_FITS = 10
"""Maps fitted on permuted pairs, for the control."""


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """One vector of each photo and text for each layer, and for "own"."""

    photos: Mapping[str, np.ndarray]
    """[photos, d] of each layer; those that are measured on, the judged ones, come first."""
    texts: Mapping[str, np.ndarray]
    """Unit vectors of the distinct texts [texts, t] of each layer."""
    text_of: np.ndarray
    """int64 [photos]: which of the texts; a caption has the number of its photo."""
    num_judged: int
    has_captions: bool
    """Whether each photo has a text of its own, rather than that of its class."""

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
        return self.num_judged if self.has_captions else len(self.texts[OWN])

    def texts_of(self, layer: str, photos: np.ndarray) -> np.ndarray:
        """One row for each of some photos."""
        return np.asarray(self.texts[layer][self.text_of[photos]])

    def searched(self, text_layer: str, photos: np.ndarray) -> Answers:
        """How the judged photos' vectors [judged, t] and the texts find each other."""
        texts = self.texts[text_layer][: self.num_texts]
        return answers(photos, texts, self.text_of[self.judged], texts_search=self.has_captions)


def measures_of(vectors: Vectors, config: AlignConfig) -> tuple[dict[str, Callable[[], LayerMeasure]], dict[str, str]]:
    """What measures each of all pairs of layers, by name; and why a measure is absent."""
    orders = permutations(vectors.num_judged, config.permutations, config.seed)
    deals = permutations(vectors.num_texts, config.permutations, config.seed)
    measures: dict[str, Callable[[], LayerMeasure]] = {
        "cka": partial(_cka, vectors, config, deals),
        "mutual_neighbours": partial(_mutual_neighbours, vectors, config, orders),
        "svcca": partial(_svcca, vectors, config),
        "a_lin": partial(_linear, vectors, config, orders),
    }
    absent = {}
    widths = [{of.shape[1] for of in side.values()} for side in (vectors.photos, vectors.texts)]
    if widths[0] & widths[1]:
        measures["a_0"] = partial(_without_map, vectors, config, deals)
    else:
        ours, theirs = (next(iter(side.values())).shape[1] for side in (vectors.photos, vectors.texts))
        absent["a_0"] = f"vectors of widths {ours} and {theirs} have no cosine"
    if not vectors.has_captions and vectors.num_texts < _LEAST_CLASSES:
        absent["a_new"] = f"{vectors.num_texts} classes; leaving half of them out takes {_LEAST_CLASSES} or more"
    elif not vectors.has_captions:
        measures["a_new"] = partial(_unseen_classes, vectors, config)
    return measures, absent


def _cka(vectors: Vectors, config: AlignConfig, deals: Sequence[np.ndarray]) -> LayerMeasure:
    judged = vectors.judged
    photos = np.stack([centered_gram(unit_rows(of[judged])) for of in vectors.photos.values()])

    def assigned(deal: np.ndarray) -> np.ndarray:
        """The texts' matrices after texts were assigned at random to photos or to classes."""
        return np.stack([centered_gram(of[deal[vectors.text_of[judged]]]) for of in vectors.texts.values()])

    texts = assigned(np.arange(vectors.num_texts))
    return _layer_measure(cka_grid(photos, texts, map(assigned, deals), config.half_samples, config.seed), 0.0)


def _mutual_neighbours(vectors: Vectors, config: AlignConfig, orders: Sequence[np.ndarray]) -> LayerMeasure:
    judged, k = vectors.judged, config.neighbours
    photos = np.stack([_similarities(of[judged]) for of in vectors.photos.values()])
    if vectors.has_captions:
        texts = np.stack([_similarities(vectors.texts_of(name, judged)) for name in vectors.texts])
    else:
        classes = vectors.text_of[judged]
        texts = np.repeat((classes[:, None] == classes)[None], len(vectors.texts), axis=0)
    grid = mutual_neighbours_grid(photos, texts, k, orders, config.half_samples, config.seed)
    chance = chance_of_neighbours(texts[0], k)
    return replace(_layer_measure(grid, chance), normalised=_cells((grid.value - chance) / (1 - chance)))


def _similarities(vectors: np.ndarray) -> np.ndarray:
    clipped = unit_rows_clipped(vectors)
    return np.asarray(clipped @ clipped.T)


def _svcca(vectors: Vectors, config: AlignConfig) -> LayerMeasure:
    fitted, judged = vectors.fitted, vectors.judged
    photos = [
        principal_components(unit_rows(of[fitted]), unit_rows(of[judged]), config.components)
        for of in vectors.photos.values()
    ]
    texts = [
        principal_components(vectors.texts_of(name, fitted), vectors.texts_of(name, judged), config.components)
        for name in vectors.texts
    ]
    return _layer_measure(svcca_grid(photos, texts, config.permutations, _RESAMPLES, config.seed), 0.0)


def _linear(vectors: Vectors, config: AlignConfig, orders: Sequence[np.ndarray]) -> LayerMeasure:
    found = []
    for photos in vectors.photos.values():
        ridge = Ridge(photos[vectors.fitted])
        for name in vectors.texts:
            fit, _ = ridge.fit_left_out(vectors.texts_of(name, vectors.fitted))
            found.append(vectors.searched(name, fit(photos[vectors.judged])))
    return _of_answers(vectors, found, [one.null(orders) for one in found], config.seed)


def _unseen_classes(vectors: Vectors, config: AlignConfig) -> LayerMeasure:
    """R@1 of classes that the ridge regression has not seen, among these; mean over random halves of the classes.

    Half of the classes vary as all would: see `half_sample_deviations`. With few classes they vary much.
    """
    orders = permutations(vectors.num_texts, _CLASS_HALVES, config.seed)
    unseen = [np.sort(order[vectors.num_texts // 2 :]) for order in orders]
    deals = permutations(len(unseen[0]), config.permutations, config.seed)
    shape = (_CLASS_HALVES, len(vectors.photos), len(vectors.texts))
    values, nulls = np.zeros(shape), np.zeros((config.permutations, *shape))
    for half, classes in enumerate(unseen):
        fitted = vectors.fitted[~np.isin(vectors.text_of[vectors.fitted], classes)]
        judged = vectors.judged[np.isin(vectors.text_of[vectors.judged], classes)]
        rows = np.searchsorted(classes, vectors.text_of[judged])
        for row, photos in enumerate(vectors.photos.values()):
            ridge = Ridge(photos[fitted])
            for column, (name, texts) in enumerate(vectors.texts.items()):
                fit, _ = ridge.fit_left_out(vectors.texts_of(name, fitted))
                found = answers(fit(photos[judged]), texts[classes], rows, texts_search=False)
                values[half, row, column] = found.recall_at_1
                nulls[:, half, row, column] = found.null_of_deals(deals)
    grid = grid_of(values.mean(axis=0), values.std(axis=0, ddof=1), nulls.mean(axis=1))
    of_shares = replace(grid, low=np.maximum(grid.low, 0), high=np.minimum(grid.high, 1))
    return _layer_measure(of_shares, 1 / len(unseen[0]))


def _without_map(vectors: Vectors, config: AlignConfig, deals: Sequence[np.ndarray]) -> LayerMeasure:
    """Cosines where both vectors have one width."""
    found = [
        vectors.searched(name, photos[vectors.judged]) if photos.shape[1] == texts.shape[1] else None
        for photos in vectors.photos.values()
        for name, texts in vectors.texts.items()
    ]
    nulls = [None if one is None else one.null_of_deals(deals) for one in found]
    return _of_answers(vectors, found, nulls, config.seed)


def _of_answers(
    vectors: Vectors, found: Sequence[Answers | None], nulls: Sequence[np.ndarray | None], seed: int
) -> LayerMeasure:
    """R@1 and median ranks of all pairs."""
    absent, shape = math.nan, (len(vectors.photos), len(vectors.texts))
    intervals = np.array([(absent, absent) if one is None else one.interval(seed) for one in found])
    grid = Grid(
        value=np.array([absent if one is None else one.recall_at_1 for one in found]).reshape(shape),
        low=intervals[:, 0].reshape(shape),
        high=intervals[:, 1].reshape(shape),
        null_mean=np.array([absent if null is None else null.mean() for null in nulls]).reshape(shape),
        null_high=np.array([absent if null is None else np.quantile(null, 0.95) for null in nulls]).reshape(shape),
    )
    ranks = np.array([absent if one is None else one.median_rank for one in found]).reshape(shape)
    return replace(_layer_measure(grid, 1 / vectors.num_texts), median_rank=_cells(ranks))


def _layer_measure(grid: Grid, chance: float) -> LayerMeasure:
    return LayerMeasure(chance=chance, **{name: _cells(of) for name, of in vars(grid).items()})


def _cells(values: np.ndarray) -> Cells:
    """None where a value is NaN, which JSON does not have."""
    return tuple(tuple(None if math.isnan(value) else float(value) for value in row) for row in values)


def best_layer(vectors: Vectors) -> str:
    """The photo layer that predicts the texts' own vectors best.

    By the error of left-out photos among those that maps are fitted on; the judged ones play no part in the choice.
    """
    targets = vectors.texts_of(OWN, vectors.others)
    errors = {
        name: Ridge(of[vectors.others]).fit_left_out(targets)[1] for name, of in vectors.photos.items() if name != OWN
    }
    return min(errors, key=lambda name: errors[name])


@dataclass(frozen=True, kw_only=True)
class TokenStates:
    """Normed tokens of the judged photos and of the texts that take part in the search."""

    gallery_layer: str
    photos: Iterable[torch.Tensor]
    """[photos, tokens, d], some at a time"""
    text_layer: str
    texts: Sequence[torch.Tensor]
    """[tokens, t] of each."""


def measure_best_layer(vectors: Vectors, tokens: TokenStates, config: AlignConfig) -> BestLayer:
    """R@1 of each kind of map on the judged photos, and the evidence for the advice."""
    orders = permutations(vectors.num_judged, config.permutations, config.seed)
    layer, others, judged = tokens.gallery_layer, vectors.others, vectors.judged
    features = vectors.photos[layer]
    ridge = Ridge(features[others])
    to_own, to_tokens = (ridge.fit_left_out(vectors.texts_of(name, others)) for name in (OWN, tokens.text_layer))
    linear = vectors.searched(OWN, to_own[0](features[judged]))
    linear_mean = vectors.searched(tokens.text_layer, to_tokens[0](features[judged]))
    mlp = mlp_answers(
        (features[others], vectors.text_of[others]),
        (features[judged], vectors.text_of[judged]),
        vectors.texts[OWN],
        vectors.num_texts,
        _MLP_EPOCHS,
        config.seed,
        texts_search=vectors.has_captions,
    )
    text_mean = vectors.texts_of(tokens.text_layer, others).mean(axis=0)
    scores = maxsim(tokens.photos, tokens.texts, to_tokens[0], text_mean)
    late = answers_of_scores(scores, vectors.text_of[judged], texts_search=vectors.has_captions)
    own = vectors.photos.get(OWN)
    is_comparable = own is not None and own.shape[1] == vectors.texts[OWN].shape[1]
    zero = vectors.searched(OWN, own[judged]) if own is not None and is_comparable else None
    found = []
    if zero is not None:
        deals = permutations(vectors.num_texts, config.permutations, config.seed)
        found.append(_layer_maps(vectors, (OWN, OWN), None, {"a_0": (zero, zero.null_of_deals(deals))}))
    for layers, fit, systems in (
        ((layer, OWN), to_own, {"a_lin": linear, "a_mlp": mlp}),
        ((layer, tokens.text_layer), to_tokens, {"a_lin": linear_mean, "a_tok": late}),
    ):
        found.append(
            _layer_maps(vectors, layers, fit, {name: (one, one.null(orders)) for name, one in systems.items()})
        )
    evidence = Evidence(
        a_0=None if zero is None else zero.recall_at_1,
        without_map=None if zero is None else _gap(zero, linear, ENOUGH_WITHOUT_MAP),
        a_lin=linear.recall_at_1,
        a_mlp=mlp.recall_at_1,
        mlp_gain=_gap(mlp, linear),
        null=max(float(np.quantile(one.null(orders), 0.95)) for one in (linear, mlp)),
        a_tok=late.recall_at_1,
        token_gain=_gap(late, linear_mean),
    )
    return BestLayer(
        maps=tuple(found), evidence=evidence, control=_permuted_control(vectors, ridge, layer, config.seed)
    )


def _permuted_control(vectors: Vectors, ridge: Ridge, layer: str, seed: int) -> Control:
    """Maps fitted on permuted pairs, which must find nothing.

    Photos of one class are found or missed together, so no more answers are independent than there are texts.
    """
    targets, judged = vectors.texts_of(OWN, vectors.others), vectors.photos[layer][vectors.judged]
    found = [
        vectors.searched(OWN, ridge.fit_left_out(targets[order])[0](judged)).recall_at_1
        for order in permutations(len(targets), _PERMUTED_FITS, seed)
    ]
    chance = 1 / vectors.num_texts
    error = math.sqrt(chance * (1 - chance) / (min(vectors.num_judged, vectors.num_texts) * _PERMUTED_FITS))
    return Control.at_most("linear map of permuted pairs", "R@1", float(np.mean(found)), chance, error)


def _layer_maps(
    vectors: Vectors,
    layers: tuple[str, str],
    ridge: tuple[LinearMap, float] | None,
    systems: Mapping[str, tuple[Answers, np.ndarray]],
) -> LayerMaps:
    """`ridge` with its left-out error; `systems`: the answers of each, and its null."""
    scores = {}
    for name, (one, null) in systems.items():
        low, high = one.interval(0)
        scores[name] = MapScore(
            value=one.recall_at_1,
            low=low,
            high=high,
            null_mean=float(null.mean()),
            null_high=float(np.quantile(null, 0.95)),
            median_rank=one.median_rank,
        )
    return LayerMaps(
        gallery_layer=layers[0],
        text_layer=layers[1],
        chance=1 / vectors.num_texts,
        scores=scores,
        ridge_strength=None if ridge is None else ridge[0].strength,
        left_out_error=None if ridge is None else ridge[1],
    )


def _gap(system: Answers, other: Answers, part: float = 1.0) -> Estimate:
    """R@1 of a system less (a fraction of) another's."""
    difference = system.hits - part * other.hits
    mean, low, high = paired_bootstrap(difference, np.arange(len(difference)))
    return Estimate(value=mean, low=low, high=high)
