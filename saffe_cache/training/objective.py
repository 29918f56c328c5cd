"""A run's objective over one batch: a weighted sum of losses.

Most see each photo fused with its paired text (the null text, its first caption, or one of its own texts). `pair` and
`matching` fuse some photos of the batch with several candidate texts: their cost grows with photos times candidates, so
both are bounded. Composed queries are fused pairs that contrast with photos: the reference and the text of each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from saffe_cache.fusion.base import Fused, Fusion, Pairing, Texts, TrainingVectors
from saffe_cache.fusion.losses import Batch, ComposedBatch, Contrast, UnpairedBatch
from saffe_cache.fusion.media import drop_media, present_media, showing
from saffe_cache.fusion.mixing import mixed
from saffe_cache.fusion.options import ObjectiveOptions
from saffe_cache.fusion.registry import OBJECTIVES


def _photos(model: Fusion, batch: Batch | UnpairedBatch, paired: Texts | None = None) -> torch.Tensor:
    """Unit vectors of a batch's photos, with the texts that are paired with the own ones."""
    with batch.photos.drawn():
        return batch.photos.gather(model(batch.states, batch.mask, paired).float())


def _texts(model: Fusion, batch: Batch | UnpairedBatch) -> torch.Tensor:
    """Unit vectors of a batch's texts."""
    with batch.texts.drawn():
        texts = Texts.of_vectors(batch.vectors) if batch.queries is None else batch.queries
        return batch.texts.gather(model.encode_texts(texts).float())


def _of_single_media(model: Fusion, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Unit vectors of a batch's items of which one medium is shown, and which of them have it, for each medium."""
    shape, states, mask = model.shape, batch.states, batch.mask
    present, found = present_media(shape, states, mask), []
    for place, has_medium in enumerate(present.T):
        shown = torch.zeros_like(present)
        shown[:, place] = True
        alone = batch._replace(mask=showing(shape, states, mask, shown))
        found.append((_photos(model, alone), batch.photos.gather(has_medium)))
    return found


class Objective(nn.Module):
    """The weighted sum, and the losses' own learned scalars."""

    def __init__(
        self, options: ObjectiveOptions, read_texts: Callable[[np.ndarray], Texts], *, is_composed: bool = False
    ) -> None:
        """`read_texts` reads texts by their rows; `is_composed`: composed queries search, and captions beside them."""
        super().__init__()
        self._options, self._read_texts = options, read_texts
        self.losses = self._made()
        self.caption_losses = self._made() if is_composed and options.caption_weight else nn.ModuleDict()

    def _made(self) -> nn.ModuleDict:
        return nn.ModuleDict({name: OBJECTIVES[name].make(self._options) for name in self._options.objective})

    def fit(self, seen: Callable[[], TrainingVectors]) -> None:
        """Fit what losses compare with, before the first step."""
        taught = [loss for name, loss in self.losses.items() if OBJECTIVES[name].has_teacher]
        if taught:
            vectors = seen()
            for loss in taught:
                loss.fit(vectors)  # type: ignore[operator]

    def scalars(self) -> dict[str, float]:
        """The learned scalars, for the log."""
        of_captions = {f"captions.{name}": value for name, value in self.caption_losses.named_parameters()}
        named = dict(self.losses.named_parameters()) | of_captions
        return {name: float(value.detach()) for name, value in named.items()}

    def forward(self, model: Fusion, batch: Batch) -> torch.Tensor:
        """The loss of a batch; draws at random from torch's generator."""
        if self._options.mixup:
            batch = mixed(batch, self._options.mixup)
        paired = batch.paired_texts
        if paired is not None and self._options.text_dropout:
            dropped = torch.rand(batch.photos.total, device=paired.mask.device) < self._options.text_dropout
            paired = paired.without(dropped[batch.photos.own])
        self._check(batch.positives)
        photos = _photos(model, self._with_dropped_media(model, batch), paired)
        if batch.composed is None:
            return self._sum(self.losses, self._contrast(model, batch, photos, _texts(model, batch)))
        loss = self._of_composed(model, batch, batch.composed, photos)
        if len(batch.text_rows):
            captions = self._contrast(model, batch, photos, _texts(model, batch))
            loss = loss + self._options.caption_weight * self._sum(self.caption_losses, captions)
        return loss

    def _with_dropped_media(self, model: Fusion, batch: Batch) -> Batch:
        """The batch as it is trained on, in which items lack some of their media."""
        rate = self._options.modality_dropout
        if not rate:
            return batch
        return batch._replace(mask=drop_media(model.shape, batch.states, batch.mask, rate, batch.photos))

    def _of_composed(self, model: Fusion, batch: Batch, of: ComposedBatch, photos: torch.Tensor) -> torch.Tensor:
        """The sum over photos and the composed queries that search for them."""
        batch = batch._replace(text_rows=of.text_rows, positives=of.positives)
        if model.composes_vectors:  # on every rank alike
            queries = model.compose_queries(
                photos[of.references], self._read_texts(of.text_rows).rows(of.texts)
            ).float()
        else:
            queries = self._of_pairs(model, batch, lambda fused, _: fused.vectors.float(), of.references, of.texts)
        contrast = self._contrast(model, batch, photos, queries)
        return self._sum(self.losses, contrast._replace(similarities=model.similarities))

    def _sum(self, made: nn.ModuleDict, contrast: Contrast) -> torch.Tensor:
        losses = [weight * made[name](contrast) for name, weight in self._options.objective.items()]
        return torch.stack(losses).sum()

    def _contrast(self, model: Fusion, batch: Batch, photos: torch.Tensor, queries: torch.Tensor) -> Contrast:
        unpaired = None
        if batch.unpaired is not None:
            unpaired = _photos(model, batch.unpaired), _texts(model, batch.unpaired)

        def match(fused: Fused, columns: torch.Tensor) -> torch.Tensor:
            return model.match(fused, queries[columns].detach())

        fuse = partial(self._of_pairs, model, batch, lambda fused, _: fused.vectors)
        matched = partial(self._of_pairs, model, batch, match)
        single = partial(_of_single_media, model, batch)
        return Contrast(batch, photos, queries, fuse, matched, model.summaries, unpaired, of_single_media=single)

    def _check(self, positives: torch.Tensor) -> None:
        """Raise ValueError if a loss over fused pairs finds no wrong partner for some photo or text."""
        over_pairs = {name: OBJECTIVES[name] for name in self._options.objective if OBJECTIVES[name].fuses_pairs}
        no_text = bool(over_pairs) and bool(positives.all(dim=1).any())
        needs_photos = any(entry.needs_wrong_photos for entry in over_pairs.values())
        if no_text or (needs_photos and bool(positives.all(dim=0).any())):
            raise ValueError(
                f"--objective {', '.join(over_pairs)}: an item of the batch has no wrong text in it, or a text no "
                "wrong item. Give several classes, or a larger --batch-size."
            )

    def _of_pairs(
        self,
        model: Fusion,
        batch: Batch,
        compute: Callable[[Fused, torch.Tensor], torch.Tensor],
        photos: torch.Tensor,
        columns: torch.Tensor,
    ) -> torch.Tensor:
        """What is computed of photos of the batch, by position, fused with texts, by column, where the photos are."""
        pairs = batch.photos.owning(photos)
        own, places = columns[pairs.own], photos[pairs.own] - batch.photos.start
        with pairs.drawn():
            # without a pair of its own, a rank computes one in vain, of any photo that it has
            fused = self._fuse(model, batch, places % batch.photos.num_own, own)
            return pairs.gather(compute(fused, own))

    def _fuse(self, model: Fusion, batch: Batch, photos: torch.Tensor, columns: torch.Tensor) -> Fused:
        """Fuse own photos, by position, with texts of the batch, by column; each side is computed once."""
        distinct_photos, gallery = torch.unique(photos, return_inverse=True)
        distinct_columns, text = torch.unique(columns, return_inverse=True)
        texts = self._read_texts(batch.text_rows[distinct_columns.cpu().numpy()])
        mask = None if batch.mask is None else batch.mask[distinct_photos]
        return model.fuse([state[distinct_photos] for state in batch.states], mask, texts, Pairing(gallery, text))
