"""The baselines of composed queries, fitted on a run's own training queries and tuned on its validation queries.

They see the summaries of photos (see `baselines`) and the text encoder's own vectors. Ridge regressions go from the
reference photo, the text or both to the mean of the targets, in a space of the photos' principal directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from saffe_cache.evaluation.material import AbsentError, Material
from saffe_cache.fusion.layers import parameter_groups, zero_linear
from saffe_cache.fusion.losses import Temperature, info_nce
from saffe_cache.inputs.composed import Composed, draw_composed
from saffe_cache.inputs.pairs import Pairs, in_one_space
from saffe_cache.protocols.setting import FittedVectors
from saffe_cache.retrieval import fitting
from saffe_cache.retrieval.baselines import LinearMap, Rows, fit_ridge, fuse_late, tune_late_fusion, unit_rows

PRINCIPAL = 512
"""Directions of the photos' features that ridge regressions see and go to."""
EPOCHS = 20
_Compose = Callable[[np.ndarray, np.ndarray], np.ndarray]


def composed_of(pairs: Pairs) -> Composed:
    assert pairs.composed is not None
    return pairs.composed


@dataclass(frozen=True)
class ComposedMaterial:
    """What these baselines are fitted on."""

    of: Material

    @cached_property
    def photos(self) -> list[np.ndarray]:
        """Principal coordinates of the centred training, validation and reported photos, float32 [photos, k]."""
        first, *others = self.of.features
        center = first.mean(axis=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            size = min(PRINCIPAL, *first.shape)
            axes = torch.svd_lowrank(torch.from_numpy(unit_rows(first - center)), q=size)[2].numpy()
        return [unit_rows(of - center) @ axes for of in (first, *others)]

    @cached_property
    def galleries(self) -> list[np.ndarray]:
        """The same as unit vectors: what queries search."""
        return [unit_rows(of) for of in self.photos]

    @cached_property
    def texts(self) -> list[np.ndarray]:
        """Unit vectors of the queries' texts."""
        return [unit_rows(self.of.text.vectors(composed_of(pairs).first_texts)) for pairs in self.of.all_pairs]

    def inputs(self, part: int, kind: str) -> np.ndarray:
        """What a ridge regression sees of queries: of part 0 (training) or 1 (validation)."""
        photos = self.photos[part][composed_of(self.of.all_pairs[part]).references]
        return self.joined(photos, self.texts[part], kind)

    @staticmethod
    def joined(photos: np.ndarray, texts: np.ndarray, kind: str) -> np.ndarray:
        return {"image": photos, "text": texts, "both": np.concatenate([photos, texts], axis=1)}[kind]

    def validate(self, queries: np.ndarray) -> float:
        return self.of.validate(self.galleries[1], queries)

    def ridge(self, kind: str) -> LinearMap:
        """From the queries' reference photos, texts or both to the mean of their targets."""
        targets = composed_of(self.of.training).targets
        sums = np.add.reduceat(self.galleries[0][targets.values], targets.offsets[:-1], axis=0)
        means = (sums / targets.lengths[:, None]).astype(np.float32)
        judged = self.inputs(1, kind)
        return fit_ridge(_rows(self.inputs(0, kind)), _rows(means), lambda fit: self.validate(unit_rows(fit(judged))))

    def searching(self, compose: _Compose) -> FittedVectors:
        """A system whose gallery is that of the reported photos."""
        gallery = self.galleries[2]
        return FittedVectors(lambda at: gallery[at.photos], compose=compose)

    def mapped(self, kind: str) -> _Compose:
        """The queries of a ridge regression."""
        fit, photos = self.ridge(kind), self.photos[2]
        return lambda references, texts: unit_rows(fit(self.joined(photos[references], texts, kind)))

    def late(self, weight: float | None) -> FittedVectors:
        """A weighted sum of the ridge regressions of photo and text; validation picks the weight, if it is None."""
        image, text = self.ridge("image"), self.ridge("text")
        if weight is None:
            parts = [unit_rows(fit(self.inputs(1, kind))) for fit, kind in ((image, "image"), (text, "text"))]
            weight = tune_late_fusion(parts[0], parts[1], self.validate)
        photos, chosen = self.photos[2], weight

        def compose(references: np.ndarray, texts: np.ndarray) -> np.ndarray:
            return fuse_late(unit_rows(image(photos[references])), unit_rows(text(texts)), chosen)

        return self.searching(compose)


def _rows(values: np.ndarray) -> Rows:
    return Rows(len(values), values.__getitem__)


def image_alone(of: Material) -> FittedVectors:
    """The reference photo's own features search."""
    gallery = ComposedMaterial(of).galleries[2]
    return FittedVectors(lambda at: gallery[at.photos], compose=lambda references, _: gallery[references])


def ridge_of(of: Material, kind: str) -> FittedVectors:
    known = ComposedMaterial(of)
    return known.searching(known.mapped(kind))


def late(of: Material, weight: float | None = None) -> FittedVectors:
    return ComposedMaterial(of).late(weight)


def of_one_space(of: Material, *, with_photo: bool) -> FittedVectors:
    """The own vectors of an image-text model: of the text, or the sum of photo and text; untrained."""
    own = of.own_vectors(of.setting.pairs) if in_one_space(of.gallery, of.text) else None
    if own is None:
        raise AbsentError
    gallery = own

    def compose(references: np.ndarray, texts: np.ndarray) -> np.ndarray:
        return unit_rows(gallery[references] + texts) if with_photo else texts

    return FittedVectors(lambda at: gallery[at.photos], compose=compose)


class _Mlp(nn.Module):
    """Queries unit(A x + B t + mlp([x; t])) and gallery unit(A x + mlp(x)), of standardised photos x and texts t."""

    center: torch.Tensor
    scale: torch.Tensor

    def __init__(self, photos: torch.Tensor, text_size: int, size: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("center", photos.mean(dim=0))
        self.register_buffer("scale", photos.std(dim=0, correction=0) + 1e-6)
        width = photos.shape[1]
        self.photo_map, self.text_map = nn.Linear(width, size), nn.Linear(text_size, size)
        self.of_photo, self.of_both = (
            nn.Sequential(
                nn.Dropout(dropout),
                nn.Linear(inputs, fitting.INNER_SIZE),
                nn.GELU(),
                nn.Dropout(dropout),
                zero_linear(fitting.INNER_SIZE, size),
            )
            for inputs in (width, width + text_size)
        )

    def gallery(self, photos: torch.Tensor) -> torch.Tensor:
        inputs = (photos - self.center) / self.scale
        return functional.normalize(self.photo_map(inputs) + self.of_photo(inputs), dim=1)

    def queries(self, photos: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        inputs, scaled = (photos - self.center) / self.scale, texts * texts.shape[1] ** 0.5
        both = self.of_both(torch.cat([inputs, scaled], dim=1))
        return functional.normalize(self.photo_map(inputs) + self.text_map(scaled) + both, dim=1)


def concat_mlp(of: Material) -> FittedVectors:
    """Trained with InfoNCE over queries and photos; validation picks dropout and epoch."""
    photos = [torch.from_numpy(np.asarray(one, np.float32)) for one in of.features]
    model = max((_fit_mlp(of, photos, dropout) for dropout in fitting.DROPOUTS), key=lambda scored: scored[0])[1]
    gallery = _computed(model.gallery, photos[2])

    def compose(references: np.ndarray, texts: np.ndarray) -> np.ndarray:
        return _computed(model.queries, photos[2][references], torch.from_numpy(texts))

    return FittedVectors(lambda at: gallery[at.photos], compose=compose)


def _fit_mlp(of: Material, photos: list[torch.Tensor], dropout: float) -> tuple[float, _Mlp]:
    """The best validation score and its weights."""
    training, judged = composed_of(of.training), composed_of(of.validation)
    generator, steps = np.random.default_rng(0), count()
    judged_texts = torch.from_numpy(unit_rows(of.text.vectors(judged.first_texts)))
    size = fitting.batch_size(fitting.BATCH_SIZE, len(training))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, temperature = _Mlp(photos[0], judged_texts.shape[1], PRINCIPAL, dropout), Temperature()
        groups = [*parameter_groups(model, fitting.LEARNING_RATE, fitting.WEIGHT_DECAY)]
        optimizer = fitting.adamw(
            [*groups, {"params": temperature.parameters()}], fitting.LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98)
        )
        total = EPOCHS * (len(training) // size)

        def run_epoch(epoch: int) -> float:
            order, losses = generator.permutation(len(training)), 0.0
            for start in range(0, len(order) - size + 1, size):
                drawn = draw_composed(training, np.sort(order[start : start + size]), generator)
                texts = torch.from_numpy(unit_rows(of.text.vectors(drawn.text_rows)))[drawn.texts]
                own = photos[0][drawn.photos]
                queries = model.queries(own[drawn.references], texts)
                loss = info_nce(model.gallery(own), queries, torch.from_numpy(drawn.positives), temperature())
                fitting.update(optimizer, loss, fitting.warmed_cosine(next(steps), total, total // 10))
                losses += float(loss.detach())
            return losses

        def judge(epoch: int) -> float:
            model.eval()
            queries = _computed(model.queries, photos[1][judged.references], judged_texts)
            return of.validate(_computed(model.gallery, photos[1]), queries)

        fitted = fitting.fit_epochs(model, EPOCHS, run_epoch, judge, patience=fitting.PATIENCE)
    return fitted.best_score, model


@torch.inference_mode()
def _computed(compute: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> np.ndarray:
    blocks = [slice(start, start + fitting.ROWS_AT_ONCE) for start in range(0, len(inputs[0]), fitting.ROWS_AT_ONCE)]
    return np.concatenate([compute(*(of[block] for of in inputs)).numpy() for block in blocks])
