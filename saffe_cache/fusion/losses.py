"""Losses as functions, and the objectives of registry.OBJECTIVES that compute them on a batch. Pure torch.

What each can be trusted with, by how it fails (tests/test_failure_modes.py shows each):

    info_nce        with the null text in the gallery: honest. With matched texts: copies the text.
    siglip          needs its learned bias: with a wrong one, all pairs stay negative for a long time.
    soft_target     the SAFFE release's: no negatives; matched texts are copied, photos ignored.
    pair_info_nce   cannot be won by copying; each candidate keeps a prior of its own, to be subtracted.
    matching        a constant answer is right two times in three: measure its ranking, not its accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from saffe_cache.core.items import Ragged
from saffe_cache.core.ranks import Share
from saffe_cache.fusion.base import Texts, cosines, inner_products
from saffe_cache.fusion.layers import Learning, Mask, States
from saffe_cache.fusion.options import ObjectiveOptions

_IGNORED = -1e9
"""Score of a cell that does not count in a softmax."""


def info_nce(
    gallery: torch.Tensor,
    queries: torch.Tensor,
    positives: torch.Tensor,
    temperature: torch.Tensor,
    ignored: torch.Tensor | None = None,
) -> torch.Tensor:
    """`info_nce_of` the cosines of unit vectors: `gallery` [n, d] and `queries` [m, d]."""
    return info_nce_of(cosines(gallery, queries), positives, temperature, ignored)


def info_nce_of(
    scores: torch.Tensor, positives: torch.Tensor, temperature: torch.Tensor, ignored: torch.Tensor | None = None
) -> torch.Tensor:
    """InfoNCE with several positives per row, in both directions.

        L = 1/2 (l(S, P) + l(S^T, P^T)),  S = scores / temperature
        l(S, P) = -mean_i 1/|P_i| sum_{j in P_i} log softmax(S_i)_j

    With one positive per row it is CLIP's loss (Radford et al. 2021, fig. 3); averaging over the positives
    is SupCon's "out" form (Khosla et al. 2020, eq. 2). It cannot reach 0 if a row has several. A row or column without
    a positive, such as a photo that no query of the batch searches for, is a negative of others alone.

    Args:
        scores: [n, m], of gallery and queries.
        positives: bool [n, m], at least one True.
        temperature: positive scalar.
        ignored: bool [n, m], cells that are neither positive nor negative; None for none.
    """
    scores = _tempered(scores, temperature, ignored)
    return (_one_direction(scores, positives) + _one_direction(scores.T, positives.T)) / 2


def query_nce_of(
    scores: torch.Tensor, positives: torch.Tensor, temperature: torch.Tensor, ignored: torch.Tensor | None = None
) -> torch.Tensor:
    """l(S^T, P^T) alone, of the same: each query against the photos, as a search ranks them."""
    return _one_direction(_tempered(scores, temperature, ignored).T, positives.T)


def _tempered(scores: torch.Tensor, temperature: torch.Tensor, ignored: torch.Tensor | None) -> torch.Tensor:
    scores = scores / temperature
    return scores if ignored is None else scores.masked_fill(ignored, _IGNORED)


def _one_direction(scores: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    weights = positives.to(scores.dtype) / positives.sum(dim=1, keepdim=True).clamp(min=1)
    return -(weights * scores.log_softmax(dim=1)).sum(dim=1).sum() / positives.any(dim=1).sum()


def siglip(
    gallery: torch.Tensor,
    queries: torch.Tensor,
    positives: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    ignored: torch.Tensor | None = None,
) -> torch.Tensor:
    """`siglip_of` the cosines of unit vectors: `gallery` [n, d] and `queries` [m, d]."""
    return siglip_of(cosines(gallery, queries), positives, scale, bias, ignored)


def siglip_of(
    scores: torch.Tensor,
    positives: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    ignored: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every pair is a yes-or-no question (Zhai et al. 2023, algorithm 1).

        L = -1/n sum_ij log sigmoid(y_ij (scale s_ij + bias)),   y_ij = 1 for positives, else -1

    Args as of `info_nce_of`, but no cell need be positive; `scale` is the inverse of a temperature.
    """
    logits = scale * scores + bias
    signs = 2 * positives.to(logits.dtype) - 1
    cells = functional.logsigmoid(signs * logits)
    return -(cells if ignored is None else cells.masked_fill(ignored, 0.0)).sum() / len(scores)


def soft_target(vectors: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.1) -> torch.Tensor:
    """The SAFFE release's loss: a cross-entropy whose "classes" are the d coordinates.

        L = -mean_i sum_j ((1 - smoothing) t_ij + smoothing / d) log softmax(z_i)_j

    For unit vectors it is (1 - smoothing) sum_j t_j + smoothing times ln d, less 0.9 cos(z, t), up to O(1/d): a pull
    on the cosine, without negatives. The value itself says nothing. `vectors` are z [n, d],
    `targets` are t, the texts' own.
    """
    soft = (1 - smoothing) * targets + smoothing / targets.shape[1]
    return -(soft * vectors.log_softmax(dim=1)).sum(dim=1).mean()


def pair_info_nce(scores: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Which of the candidates that a photo was fused with is its own? Cross-entropy; the first one is.

        s_ij = cos(f(x_i, t_j), u_j),   L = -mean_i log softmax(s_i / temperature)_0

    `scores` are s, [n, candidates]; -inf where there is no candidate.
    """
    return -(scores / temperature).log_softmax(dim=1)[:, 0].mean()


def matching(logits: torch.Tensor, is_match: torch.Tensor) -> torch.Tensor:
    """Image-text matching: binary cross-entropy of logits [pairs] (ALBEF, Li et al. 2021, eq. 4)."""
    return functional.binary_cross_entropy_with_logits(logits, is_match.to(logits.dtype))


def distinct_positives(texts: Ragged) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct texts of some photos, and which belongs to which, from the numbers of each photo's texts.

    Returns:
        The distinct numbers [m], ascending; the column of each given number, in order; bool [photos, m].
    """
    distinct, columns = np.unique(texts.values, return_inverse=True)
    positives = np.zeros((len(texts), len(distinct)), bool)
    positives[texts.owners, columns] = True
    return distinct, columns, positives


def draw_negatives(scores: torch.Tensor, positives: torch.Tensor, num_hard: int, num_random: int) -> torch.Tensor:
    """Wrong columns for each row, int64 [rows, negatives]: those with the best scores, and random ones.

    There are num_random random ones and at most num_hard others. A column may be repeated if a row has few wrong ones.
    `scores` [rows, columns] say how much column j looks like a match of row i; `positives` are never drawn.
    """
    wrong = ~positives
    assert wrong.any(dim=1).all(), "a row has no wrong column"
    hard = scores.masked_fill(positives, -math.inf).topk(min(num_hard, scores.shape[1]), dim=1).indices
    is_wrong = wrong.gather(1, hard)
    best = hard[:, :1].expand_as(hard)  # if a row has too few, its hardest one is repeated
    drawn = torch.multinomial(wrong.float(), num_random, replacement=True) if num_random else hard[:, :0]
    return torch.cat([torch.where(is_wrong, hard, best), drawn], dim=1)


class SigmoidScale(nn.Module):
    """SigLIP's learned scale and bias, which start at 10 and -10 (Zhai et al. 2023, sec. 3.2)."""

    learning: ClassVar = {"*": Learning(1.5)}

    def __init__(self, scale: float = 10.0, bias: float = -10.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.log_scale.exp(), self.bias


class Temperature(nn.Module):
    """A learned temperature, kept within [0.01, 0.5]. It starts at 0.07, as in CLIP."""

    learning: ClassVar = {"*": Learning(1.5)}

    def __init__(self, start: float = 0.07) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(start).log())

    def forward(self) -> torch.Tensor:
        # The parameter itself is kept in range, as in CLIP: a clamped value would have no gradient outside the range
        # and could never return.
        with torch.no_grad():
            self.log.clamp_(math.log(0.01), math.log(0.5))
        return self.log.exp()


class FixedTemperature(nn.Module):
    """A temperature that is not learned."""

    value: torch.Tensor

    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(value))

    def forward(self) -> torch.Tensor:
        return self.value


class UnpairedBatch(NamedTuple):
    """Photos and texts of a step that were drawn independently of each other; fields as of `Batch`."""

    photos: Share
    texts: Share
    states: States
    mask: Mask
    vectors: torch.Tensor
    queries: Texts | None = None


class ComposedBatch(NamedTuple):
    """Queries of a step that are a photo and a text each; the same on every rank."""

    text_rows: np.ndarray
    """int64 [texts]: the distinct texts."""
    texts: torch.Tensor
    """int64 [queries]: the text of each query."""
    references: torch.Tensor
    """int64 [queries]: the photo of the batch that each query is about."""
    positives: torch.Tensor
    """bool [photos, queries]: which photos each query searches for."""


class Batch(NamedTuple):
    """The data of one step. What is as large as the photos or texts themselves is that of this rank's alone."""

    photos: Share
    """This rank's photos."""
    texts: Share
    """This rank's among the distinct texts."""
    states: States
    """Of the own photos."""
    mask: Mask
    paired_texts: Texts | None
    """The texts that are paired with the own photos; None for null text."""
    text_rows: np.ndarray
    """int64 [texts]: the batch's distinct texts."""
    vectors: torch.Tensor
    """The text encoder's own vectors of the own texts, [own texts, d]."""
    positives: torch.Tensor
    """bool [photos, texts]: which texts describe which photo."""
    own: torch.Tensor
    """int64 [photos]: one text of each photo, drawn at random; the paired one if texts are matched."""
    queries: Texts | None = None
    """The own texts with their tokens, for a fusion that reads them; None where `vectors` are all that is read."""
    ignored: torch.Tensor | None = None
    """bool [photos, texts]: cells that are neither positive nor negative; None for none."""
    unpaired: UnpairedBatch | None = None
    composed: ComposedBatch | None = None
    """Composed queries; the texts are then captions of some of the photos, or none at all."""


class Side(NamedTuple):
    """Photos, or texts, as the encoder has them and in the shared space, one row for each."""

    own: torch.Tensor
    """The photos' summaries, or the text encoder's own vectors."""
    mapped: torch.Tensor
    """Unit vectors."""


class Contrast(NamedTuple):
    """What an objective sees of one batch: the same on every rank, and all of the batch."""

    batch: Batch
    photos: torch.Tensor
    """Unit vectors [n, d] of the photos, each with its paired text or the null text."""
    queries: torch.Tensor
    """Unit vectors [m, d] of the batch's distinct texts."""
    fuse: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """Unit vectors [pairs, d] of photos by row, fused with texts by column, int64 [pairs] each."""
    match: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """Logits [pairs] of the same."""
    summarize: Callable[[States, Mask], torch.Tensor]
    """Summaries of photos, [photos, summary_size]."""
    unpaired: tuple[torch.Tensor, torch.Tensor] | None = None
    """Unit vectors of the unpaired photos, and of the unpaired texts."""
    similarities: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = inner_products
    """Scores of queries with photos, [m, n]."""
    of_single_media: Callable[[], list[tuple[torch.Tensor, torch.Tensor]]] = list
    """Unit vectors [n, d] of the items of which one medium is shown, and bool [n], which have it: for each medium."""

    @property
    def scores(self) -> torch.Tensor:
        """Of photos with queries, [n, m]."""
        return self.similarities(self.queries, self.photos).T

    def photo_side(self) -> Side:
        """The batch's photos, followed by the unpaired ones."""
        side = Side(self.batch.photos.gather(self.summarize(self.batch.states, self.batch.mask)), self.photos)
        if self.batch.unpaired is None or self.unpaired is None:
            return side
        more = self.batch.unpaired
        own = more.photos.gather(self.summarize(more.states, more.mask))
        return Side(torch.cat([side.own, own]), torch.cat([side.mapped, self.unpaired[0]]))

    def text_side(self) -> Side:
        """One text of each photo of the batch, each once, followed by the unpaired ones."""
        chosen = torch.unique(self.batch.own)
        side = Side(self.text_vectors()[chosen], self.queries[chosen])
        if self.batch.unpaired is None or self.unpaired is None:
            return side
        own = self.batch.unpaired.texts.gather(self.batch.unpaired.vectors)
        return Side(torch.cat([side.own, own]), torch.cat([side.mapped, self.unpaired[1]]))

    def text_vectors(self) -> torch.Tensor:
        """The text encoder's own vectors of the batch's distinct texts, [m, d]."""
        return self.batch.texts.gather(self.batch.vectors)

    def draw_photos(self, most: int) -> torch.Tensor:
        """Share of some photos, int64 [at most `most`], drawn with torch's generator."""
        return torch.randperm(len(self.photos), device=self.photos.device)[:most]


class _Loss(nn.Module):
    """Called with the `Contrast` of a batch."""

    def __init__(self, options: ObjectiveOptions) -> None:
        super().__init__()
        self._options = options


class InfoNce(_Loss):
    """`info_nce` with a learned temperature, or a fixed one."""

    def __init__(self, options: ObjectiveOptions) -> None:
        super().__init__(options)
        self.temperature = Temperature() if options.temperature is None else FixedTemperature(options.temperature)

    def forward(self, seen: Contrast) -> torch.Tensor:
        return info_nce_of(seen.scores, seen.batch.positives, self.temperature(), seen.batch.ignored)


class QueryNce(InfoNce):
    """The direction of `info_nce` in which each query is contrasted with the photos."""

    def forward(self, seen: Contrast) -> torch.Tensor:
        return query_nce_of(seen.scores, seen.batch.positives, self.temperature(), seen.batch.ignored)


class Siglip(_Loss):
    """`siglip` with a learned scale and bias."""

    def __init__(self, options: ObjectiveOptions) -> None:
        super().__init__(options)
        self.sigmoid = SigmoidScale()

    def forward(self, seen: Contrast) -> torch.Tensor:
        scale, bias = self.sigmoid()
        return siglip_of(seen.scores, seen.batch.positives, scale, bias, seen.batch.ignored)


class SoftTarget(_Loss):
    """`soft_target` with the text encoder's own vector as the target."""

    def forward(self, seen: Contrast) -> torch.Tensor:
        return soft_target(seen.photos, functional.normalize(seen.text_vectors()[seen.batch.own], dim=-1))


class Pair(_Loss):
    """`pair_info_nce` of some photos, each fused with its own text and with hard and random wrong ones."""

    def __init__(self, options: ObjectiveOptions) -> None:
        super().__init__(options)
        self.temperature = Temperature()

    def forward(self, seen: Contrast) -> torch.Tensor:
        chosen, negatives = seen.draw_photos(self._options.pair_photos), self._options.negatives
        num_hard = (negatives + 1) // 2
        scores = seen.photos[chosen].detach() @ seen.queries.detach().T
        wrong = draw_negatives(scores, seen.batch.positives[chosen], num_hard, negatives - num_hard)
        columns = torch.cat([seen.batch.own[chosen, None], wrong], dim=1)
        fused = seen.fuse(chosen.repeat_interleave(columns.shape[1]), columns.flatten())
        agreement = (fused.float() * seen.queries[columns.flatten()]).sum(dim=-1)
        return pair_info_nce(agreement.view_as(columns), self.temperature())


class Matching(_Loss):
    """`matching` of some photos: each with its own text, with a hard wrong text, and its text with a wrong photo."""

    def forward(self, seen: Contrast) -> torch.Tensor:
        chosen = seen.draw_photos(self._options.pair_photos)
        own = seen.batch.own[chosen]
        scores = seen.photos.detach() @ seen.queries.detach().T
        wrong_texts = _draw_likely(scores[chosen], seen.batch.positives[chosen])
        wrong_photos = _draw_likely(scores[:, own].T, seen.batch.positives[:, own].T)
        texts = torch.cat([own, wrong_texts, own])
        logits = seen.match(torch.cat([chosen, chosen, wrong_photos]), texts)
        return matching(logits.float(), torch.arange(len(texts), device=logits.device) < len(chosen))


def _draw_likely(scores: torch.Tensor, positives: torch.Tensor, sharpness: float = 20.0) -> torch.Tensor:
    """A wrong column for each row, drawn by softmax over cosines (ALBEF, sec. 3.2): int64 [rows]."""
    weights = (scores * sharpness).masked_fill(positives, -torch.inf).softmax(dim=1)
    return torch.multinomial(weights, 1).squeeze(1)
