"""Mixup of cached features: a batch of pairs becomes as many mixed pairs (FuseMix, Vouitsis et al. 2023, sec. 4.2).

    x~_i = lambda x_i + (1 - lambda) x_p(i),   t~_i = lambda t_i + (1 - lambda) t_p(i),   lambda ~ Beta(alpha, alpha)

x_i is what the fusion reads of a photo, as it is cached, and t_i one of its texts' own vectors, drawn at random. One
lambda is drawn for a batch, and used for photos and texts. p is a cycle through the batch in random order, so that no
photo is its own partner. Mixed pair i is the positive of itself. The other cells are negatives, except those of which
we know that they share a photo or a text: these are ignored.

The paper halves the batch and mixes one half with the other. A cycle keeps as many pairs as the batch has, and each is
in two of them; the cells that share one are among the ignored ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from saffe_cache.fusion.losses import Batch


class Mix(NamedTuple):
    """How the pairs of a batch are mixed."""

    weight: float
    """lambda: of each pair's own photo and text."""
    partners: torch.Tensor
    """p, int64 [pairs], on the CPU."""

    def of(self, values: torch.Tensor, rows: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """Mixed `values` [pairs, ...]; those of some rows."""
        return self.weight * values[rows] + (1 - self.weight) * values[self.partners[rows].to(values.device)]


def draw_mix(alpha: float, count: int) -> Mix:
    """Drawn with torch's generator of the CPU, as all ranks do alike."""
    weight = torch.distributions.Beta(alpha, alpha).sample().item()
    order = torch.randperm(count)
    partners = torch.empty_like(order)
    partners[order] = order.roll(1)
    return Mix(weight, partners)


def shared_cells(positives: torch.Tensor, own: torch.Tensor, partners: torch.Tensor) -> torch.Tensor:
    """bool [pairs, pairs]: which mixed photo and mixed text have parts that belong together, except for the diagonal.

    `positives`, bool [pairs, texts], says which text describes which photo; `own` [pairs] which one was drawn.
    """
    drawn = positives[:, own]  # photo i and the text that was drawn for photo j
    of_photos = drawn | drawn[partners]
    shared = of_photos | of_photos[:, partners]
    return shared.fill_diagonal_(False)


def mixed(batch: Batch, alpha: float) -> Batch:
    """The mixed pairs of a batch, in the order of its photos. This rank has those of its own photos."""
    mix = draw_mix(alpha, batch.photos.total)
    own = batch.photos.own
    states = [mix.of(batch.photos.gather(state), own) for state in batch.states]
    vectors = mix.of(batch.texts.gather(batch.vectors)[batch.own], own)
    partners = mix.partners.to(batch.own.device)
    pairs = torch.arange(batch.photos.total, device=batch.own.device)
    return batch._replace(
        texts=batch.photos,
        states=states,
        text_rows=batch.text_rows[batch.own.cpu().numpy()],
        vectors=vectors,
        positives=pairs[:, None] == pairs,
        ignored=shared_cells(batch.positives, batch.own, partners),
        own=pairs,
    )
