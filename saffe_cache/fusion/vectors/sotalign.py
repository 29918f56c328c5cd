"""SOTAlign: linear maps that follow a closed-form teacher on unpaired data (Roschmann et al. 2026, arXiv 2602.23353).

    loss = siglip + alpha KLOT(K || K*)

    K   cosines of photos and texts in the shared space, K* those of the teacher, a regularised CCA of the pairs
    OT_e(K) = argmin over plans P with marginals 1/n and 1/m of -<P, K> + e <P, log P>        (Sinkhorn)
    KLOT(K || K*) = KL(OT_e*(K*) || OT_e(K)),   dKLOT/dK = (OT_e(K) - OT_e*(K*)) / e

alpha is the objective's weight. The plans have a total mass of 1 as in the authors' code; the paper's have n, and its
alpha is smaller by that factor. e = 0.05, e* = 0.01 and 100 iterations are the paper's. The gradient needs no
derivative of the iterations (the paper's theorem 5.1), and the teacher none at all.

The photos are those of the batch and the unpaired ones, and the texts one of each photo and the unpaired ones: which
belongs to which does not enter the term.

The teacher is a CCA of the training pairs alone. The paper adds 0.1 to the eigenvalues of matrices whose scale it does
not state. Here the ridge is a multiple of the mean eigenvalue, chosen on a tenth of the photos that is left out of a
first fit, and each canonical coordinate counts by its correlation, as in CSA: with few pairs the many that correlate by
chance would drown the rest.

The fusion is one linear map a side to 1,024 dimensions, (s + 1) 1,024 + (k + 1) 1,024 parameters for summaries of width
s and text vectors of width k. The paper takes batches of up to 32,000 items and Lion for 2,000 steps, on 10,000 pairs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from saffe_cache.core.items import Ragged
from saffe_cache.fusion.base import TrainingVectors, cosines
from saffe_cache.fusion.closed_form.cca import canonical
from saffe_cache.fusion.closed_form.moments import Moments, unit
from saffe_cache.fusion.losses import Contrast, Side
from saffe_cache.fusion.options import ObjectiveOptions
from saffe_cache.fusion.vectors.contrastive import ContrastiveFusion

STUDENT_ENTROPY, TEACHER_ENTROPY, ITERATIONS = 0.05, 0.01, 100
RIDGES = (0.1, 1.0, 10.0)
"""Of the teacher, as multiples of the mean eigenvalue."""
_LEFT_OUT = 10
"""One pair in this many is left out to choose the ridge."""
_SCALINGS = 10
"""Iterations on plain scalings before they are absorbed into the potentials again."""


class SotalignFusion(ContrastiveFusion):
    """One linear map into 1,024 dimensions on each side."""

    WIDTH = 1024


@torch.no_grad()
def transport_plan(scores: torch.Tensor, entropy: float, iterations: int = ITERATIONS) -> torch.Tensor:
    """The logarithm of OT_e of `scores` [n, m], by Sinkhorn iterations in the log domain; float64 [n, m].

        u = -ln n - logsumexp_j(K / e + v),   v = -ln m - logsumexp_i(K / e + u),   from v = 0

    At the end each potential is averaged with one more half-update, so that both marginals hold about equally well.
    After a first iteration by logsumexp, a few at a time are products with exp(K / e + u + v), whose columns then sum
    to 1/m: the same numbers, ten times faster, and nothing can overflow.
    """
    logits = scores.double() / entropy
    rows, columns = (-math.log(size) for size in logits.shape)
    over_columns = rows - logits.logsumexp(dim=1)
    over_rows = columns - (logits + over_columns[:, None]).logsumexp(dim=0)
    done = 1
    while done < iterations:
        plan = (logits + over_columns[:, None] + over_rows).exp()
        row_scale, column_scale = plan.new_ones(len(plan)), plan.new_ones(plan.shape[1])
        for _ in range(min(_SCALINGS, iterations - done)):
            row_scale = math.exp(rows) / (plan @ column_scale)
            column_scale = math.exp(columns) / (row_scale @ plan)
            done += 1
        over_columns, over_rows = over_columns + row_scale.log(), over_rows + column_scale.log()
    # over_rows is exact for these over_columns, so one more update of it is itself
    over_columns = (over_columns + rows - (logits + over_rows).logsumexp(dim=1)) / 2
    return logits + over_columns[:, None] + over_rows


class _Klot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, teacher: torch.Tensor, entropy: float, iterations: int) -> torch.Tensor:
        student = transport_plan(scores, entropy, iterations)
        target = teacher.exp()
        ctx.save_for_backward(((student.exp() - target) / entropy).to(scores.dtype))
        return (target * (teacher - student)).sum().to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None, None, None


def klot(
    scores: torch.Tensor,
    teacher: torch.Tensor,
    entropy: float = STUDENT_ENTROPY,
    teacher_entropy: float = TEACHER_ENTROPY,
    iterations: int = ITERATIONS,
) -> torch.Tensor:
    """KLOT(K || K*) of `scores` K and `teacher` K*, [n, m] each; its gradient reaches the scores alone."""
    target = transport_plan(teacher, teacher_entropy, iterations)
    found: torch.Tensor = _Klot.apply(scores, target, entropy, iterations)  # type: ignore[no-untyped-call]
    return found


class Teacher(NamedTuple):
    """Linear maps of both sides' unit vectors, less their means, into a shared space."""

    photo_center: np.ndarray
    photo_map: np.ndarray
    """[D, d]"""
    text_center: np.ndarray
    text_map: np.ndarray
    """[k, d]"""

    @classmethod
    def of(cls, moments: Moments, ridge: float) -> Teacher:
        found = canonical(moments, ridge)
        shares = np.sqrt(found.correlations)
        return cls(moments.photos.mean, found.photo * shares, moments.texts.mean, found.text * shares)

    def score(self, photos: np.ndarray, texts: np.ndarray) -> float:
        """Mean reciprocal rank of each text's photo among all photos, row by row."""
        mapped = unit((photos - self.photo_center) @ self.photo_map)
        scores = unit((texts - self.text_center) @ self.text_map) @ mapped.T
        return float((1 / (scores >= scores.diagonal()[:, None]).sum(axis=1)).mean())


def fit_teacher(photos: np.ndarray, texts: np.ndarray, positives: Ragged) -> Teacher:
    """A teacher of pairs; arguments as of `Moments.of`."""
    is_left_out = np.arange(len(photos)) % _LEFT_OUT == 0
    fitted, left_out = np.flatnonzero(~is_left_out), np.flatnonzero(is_left_out)
    moments = Moments.of(photos[fitted], texts, positives.take(fitted))
    first_texts = texts[positives.values[positives.offsets[left_out]]]
    best = max(RIDGES, key=lambda ridge: Teacher.of(moments, ridge).score(photos[left_out], first_texts))
    return Teacher.of(Moments.of(photos, texts, positives), best)


class Transport(nn.Module):
    """KLOT of a batch's photos and texts and of the unpaired ones, to the teacher's plan."""

    photo_center: torch.Tensor
    photo_map: torch.Tensor
    text_center: torch.Tensor
    text_map: torch.Tensor

    def __init__(self, options: ObjectiveOptions) -> None:
        super().__init__()

    def fit(self, seen: TrainingVectors) -> None:
        """Fit the teacher, before the first step."""
        teacher = fit_teacher(unit(seen.photos), seen.texts.astype(np.float64), seen.positives)
        for name, value in teacher._asdict().items():
            self.register_buffer(name, torch.from_numpy(np.asarray(value, np.float32)))

    def forward(self, seen: Contrast) -> torch.Tensor:
        photos, texts = seen.photo_side(), seen.text_side()
        with torch.no_grad():
            teacher = cosines(
                _taught(photos, self.photo_center, self.photo_map), _taught(texts, self.text_center, self.text_map)
            )
        return klot(cosines(photos.mapped, texts.mapped), teacher)


def _taught(side: Side, center: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Unit vectors of a side in the teacher's space."""
    with torch.autocast(center.device.type, enabled=False):
        return functional.normalize((functional.normalize(side.own.float(), dim=-1) - center) @ weight, dim=-1)
