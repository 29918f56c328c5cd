"""A run's objective: a weighted sum of losses over one batch.

Most losses see each photo fused with its paired text (the null text, its first caption, or one of its own texts).
`pair` and `matching` fuse some photos of the batch with several candidate texts: their cost grows with photos times
candidates, so both are bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from saffe_cache.fusion.base import Fused, Fusion, Pairing, Texts
from saffe_cache.fusion.losses import Contrast
from saffe_cache.fusion.options import ObjectiveOptions
from saffe_cache.fusion.registry import OBJECTIVES


class Batch(NamedTuple):
    """The data of one step."""

    states: list[torch.Tensor]
    """P times [photos, tokens, d]."""
    mask: torch.Tensor | None
    paired_texts: Texts | None
    """The texts that are paired with the photos; None for null text."""
    text_rows: np.ndarray
    """int64 [texts]: the batch's distinct texts."""
    vectors: torch.Tensor
    """The text encoder's own vectors of these texts, [texts, d]."""
    positives: torch.Tensor
    """bool [photos, texts]: which texts describe which photo."""
    own: torch.Tensor
    """int64 [photos]: one text of each photo, drawn at random; the paired one if texts are matched."""


class Objective(nn.Module):
    """The weighted sum, and the losses' own learned scalars."""

    def __init__(self, options: ObjectiveOptions, read_texts: Callable[[np.ndarray], Texts]) -> None:
        """`read_texts` reads texts by their rows."""
        super().__init__()
        self._options, self._read_texts = options, read_texts
        self.losses = nn.ModuleDict({name: OBJECTIVES[name].make(options) for name in options.objective})

    def scalars(self) -> dict[str, float]:
        """The learned scalars, for the log."""
        return {name: float(value.detach()) for name, value in self.losses.named_parameters()}

    def forward(self, model: Fusion, batch: Batch) -> torch.Tensor:
        """The loss of a batch; draws at random from torch's generator."""
        paired = batch.paired_texts
        if paired is not None and self._options.text_dropout:
            dropped = torch.rand(len(paired.mask), device=paired.mask.device) < self._options.text_dropout
            paired = paired.without(dropped)
        self._check(batch.positives)
        photos = model(batch.states, batch.mask, paired).float()
        queries = model.encode_queries(batch.vectors).float()
        fuse = partial(self._fuse, model, batch)
        contrast = Contrast(photos, queries, batch.positives, batch.own, batch.vectors, fuse, model.match)
        losses = [weight * self.losses[name](contrast) for name, weight in self._options.objective.items()]
        return torch.stack(losses).sum()

    def _check(self, positives: torch.Tensor) -> None:
        """Raise ValueError if a loss over fused pairs finds no wrong partner for some photo or text."""
        over_pairs = {name: OBJECTIVES[name] for name in self._options.objective if OBJECTIVES[name].fuses_pairs}
        no_text = bool(over_pairs) and bool(positives.all(dim=1).any())
        needs_photos = any(entry.needs_wrong_photos for entry in over_pairs.values())
        if no_text or (needs_photos and bool(positives.all(dim=0).any())):
            raise ValueError(
                f"--objective {', '.join(over_pairs)}: a photo of the batch has no wrong text in it, or a text no "
                "wrong photo. Give several classes, or a larger --batch-size."
            )

    def _fuse(self, model: Fusion, batch: Batch, photos: torch.Tensor, columns: torch.Tensor) -> Fused:
        """Fuse photos of the batch, by position, with texts of the batch, by column; each side is computed once."""
        distinct_photos, gallery = torch.unique(photos, return_inverse=True)
        distinct_columns, text = torch.unique(columns, return_inverse=True)
        texts = self._read_texts(batch.text_rows[distinct_columns.cpu().numpy()])
        mask = None if batch.mask is None else batch.mask[distinct_photos]
        return model.fuse([state[distinct_photos] for state in batch.states], mask, texts, Pairing(gallery, text))
