"""A run's objective: a weighted sum of losses over one batch.

`info_nce`, `siglip` and `soft_target` look at each photo fused with what lies beside it (the null text, its first
caption, or one of its own texts). `pair` and `matching` fuse some photos of the batch with several candidate texts:
their cost grows with photos times candidates, so both are bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from saffe_cache.fusion.base import Fused, Fusion, Pairing, Texts
from saffe_cache.fusion.losses import (
    SigmoidScale,
    Temperature,
    draw_negatives,
    info_nce,
    matching,
    pair_info_nce,
    siglip,
    soft_target,
)
from saffe_cache.training.batches import Batch

TermName = Literal["info_nce", "siglip", "soft_target", "pair", "matching"]
OVER_PAIRS = ("pair", "matching")


@dataclass(frozen=True, kw_only=True)
class TermOptions:
    """What the objective is made of; the fields are described in TrainConfig."""

    objective: Mapping[str, float]
    negatives: int
    pair_photos: int
    text_dropout: float


class Objective(nn.Module):
    """The weighted sum, and the losses' own learned scalars."""

    def __init__(self, options: TermOptions, read_texts: Callable[[np.ndarray], Texts]) -> None:
        """`read_texts` gives texts by their rows, to be fused."""
        super().__init__()
        self._options, self._read_texts = options, read_texts
        terms = options.objective
        if "info_nce" in terms:
            self.temperature = Temperature()
        if "siglip" in terms:
            self.sigmoid = SigmoidScale()
        if "pair" in terms:
            self.pair_temperature = Temperature()

    def scalars(self) -> dict[str, float]:
        """The learned scalars, for the log."""
        return {name: float(value.detach()) for name, value in self.named_parameters()}

    def forward(self, model: Fusion, batch: Batch) -> torch.Tensor:
        """The loss of a batch; draws at random from torch's generator."""
        beside = batch.beside
        if beside is not None and self._options.text_dropout:
            dropped = torch.rand(len(beside.mask), device=beside.mask.device) < self._options.text_dropout
            beside = beside.without(dropped)
        self._check(batch.positives)
        photos = model(batch.states, batch.mask, beside).float()
        queries = model.encode_queries(batch.vectors).float()
        losses = [
            weight * self._term(name, model, batch, photos, queries) for name, weight in self._options.objective.items()
        ]
        return torch.stack(losses).sum()

    def _check(self, positives: torch.Tensor) -> None:
        """
        Raises:
            ValueError: pair or matching find no wrong partner for some photo or text.
        """
        terms = self._options.objective
        no_text = any(name in OVER_PAIRS for name in terms) and bool(positives.all(dim=1).any())
        if no_text or ("matching" in terms and bool(positives.all(dim=0).any())):
            raise ValueError(
                "--objective pair, matching: a photo of the batch has no wrong text in it, or a text no wrong photo. "
                "Give several classes, or a larger --batch-size."
            )

    def _term(
        self, name: str, model: Fusion, batch: Batch, photos: torch.Tensor, queries: torch.Tensor
    ) -> torch.Tensor:
        match name:
            case "info_nce":
                return info_nce(photos, queries, batch.positives, self.temperature())
            case "siglip":
                return siglip(photos, queries, batch.positives, *self.sigmoid())
            case "soft_target":
                return soft_target(photos, nn.functional.normalize(batch.vectors[batch.own], dim=-1))
            case "pair":
                return self._pair(model, batch, photos, queries)
            case _:
                return self._matching(model, batch, photos, queries)

    def _pair(self, model: Fusion, batch: Batch, photos: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Some photos of the batch, each fused with its own text and with hard and random wrong ones."""
        chosen = torch.randperm(len(photos), device=photos.device)[: self._options.pair_photos]
        num_hard = (self._options.negatives + 1) // 2
        scores = photos[chosen].detach() @ queries.detach().T
        wrong = draw_negatives(scores, batch.positives[chosen], num_hard, self._options.negatives - num_hard)
        columns = torch.cat([batch.own[chosen, None], wrong], dim=1)
        fused = self._fuse(model, batch, chosen.repeat_interleave(columns.shape[1]), columns.flatten())
        agreement = (fused.vectors.float() * queries[columns.flatten()]).sum(dim=-1)
        return pair_info_nce(agreement.view_as(columns), self.pair_temperature())

    def _matching(self, model: Fusion, batch: Batch, photos: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Each photo with its own text, with a hard wrong text, and its text with a hard wrong photo."""
        chosen = torch.randperm(len(photos), device=photos.device)[: self._options.pair_photos]
        own = batch.own[chosen]
        scores = photos.detach() @ queries.detach().T
        wrong_texts = _draw_likely(scores[chosen], batch.positives[chosen])
        wrong_photos = _draw_likely(scores[:, own].T, batch.positives[:, own].T)
        texts = torch.cat([own, wrong_texts, own])
        fused = self._fuse(model, batch, torch.cat([chosen, chosen, wrong_photos]), texts)
        logits = model.match(fused, queries[texts])
        return matching(logits.float(), torch.arange(len(texts), device=logits.device) < len(chosen))

    def _fuse(self, model: Fusion, batch: Batch, photos: torch.Tensor, columns: torch.Tensor) -> Fused:
        """Photos of the batch by position, each with a text of the batch by column; each side is computed once."""
        distinct_photos, gallery = torch.unique(photos, return_inverse=True)
        distinct_columns, text = torch.unique(columns, return_inverse=True)
        texts = self._read_texts(batch.text_rows[distinct_columns.cpu().numpy()])
        mask = None if batch.mask is None else batch.mask[distinct_photos]
        return model.fuse([state[distinct_photos] for state in batch.states], mask, texts, Pairing(gallery, text))


def _draw_likely(scores: torch.Tensor, positives: torch.Tensor, sharpness: float = 20.0) -> torch.Tensor:
    """A wrong column for each row, drawn by softmax over cosines (ALBEF, sec. 3.2): int64 [rows]."""
    weights = (scores * sharpness).masked_fill(positives, -torch.inf).softmax(dim=1)
    return torch.multinomial(weights, 1).squeeze(1)
