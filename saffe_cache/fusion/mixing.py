"""Mixup of cached features: a batch of pairs becomes as many mixed pairs (FuseMix, Vouitsis et al. 2023, sec. 4.2).

    x~_i = lambda x_i + (1 - lambda) x_p(i),   t~_ik = lambda t_ik + (1 - lambda) t_p(i)k,   lambda ~ Beta(alpha, alpha)

x_i is what the fusion reads of a photo, as it is cached, and t_ik the own vectors of its texts, in random order: all of
them, but at most `MOST_TEXTS`. One lambda is drawn for a batch, and used for photos and texts. p is a cycle through the
batch in random order, so that no photo is its own partner; if the partner has fewer texts, some are used again. Mixed
texts t~_ik are the positives of mixed photo i. The other cells are negatives, except those of which we know that they
share a photo or a text: these are ignored.

The paper has one text for each photo; of five captions, mixing only one that is drawn finds fewer photos (see the log).
It halves the batch and mixes one half with the other. A cycle keeps as many pairs as the batch has, and each is in two
of them; the cells that share one are among the ignored ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from saffe_cache.core.ranks import Share
from saffe_cache.fusion.losses import Batch

MOST_TEXTS = 5
"""Texts of a photo that are mixed: a class may have a hundred prompts, which would all be mixed for each photo."""


class Mix(NamedTuple):
    """How the pairs of a batch are mixed."""

    weight: float
    """lambda: of each pair's own photo and text."""
    partners: torch.Tensor
    """p, int64 [pairs], on the CPU."""

    def of(self, values: torch.Tensor, rows: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """Mixed `values` [pairs, ...]; those of some rows."""
        return torch.lerp(values[self.partners[rows].to(values.device)], values[rows], self.weight)


def draw_mix(alpha: float, count: int) -> Mix:
    """Drawn with torch's generator of the CPU, as all ranks do alike."""
    weight = torch.distributions.Beta(alpha, alpha).sample().item()
    order = torch.randperm(count)
    partners = torch.empty_like(order)
    partners[order] = order.roll(1)
    return Mix(weight, partners)


class MixedTexts(NamedTuple):
    """The mixed texts of a batch, ordered by photo. On the CPU."""

    photos: torch.Tensor
    """int64 [mixed]: the photo i that each belongs to."""
    texts: torch.Tensor
    """int64 [mixed]: column of its own text."""
    others: torch.Tensor
    """int64 [mixed]: column of the partner's text."""
    starts: torch.Tensor
    """int64 [photos]: the first one of each photo."""


def pair_texts(positives: torch.Tensor, partners: torch.Tensor) -> MixedTexts:
    """Pair texts of each photo with those of its partner, in an order that is drawn with torch's generator of the CPU.

    `positives`, bool [photos, texts], says which text describes which photo: at least one each.
    """
    photos, texts = positives.cpu().nonzero().unbind(1)
    shuffled = torch.rand(len(photos)).argsort()
    shuffled = shuffled[photos[shuffled].argsort(stable=True)]
    counts = photos.bincount(minlength=len(positives))
    texts, starts = texts[shuffled], counts.cumsum(0) - counts
    place = torch.arange(len(photos)) - starts[photos]
    photos, place = photos[place < MOST_TEXTS], place[place < MOST_TEXTS]
    of_partner = partners[photos]
    others = texts[starts[of_partner] + place % counts[of_partner].clamp(max=MOST_TEXTS)]
    kept = counts.clamp(max=MOST_TEXTS)
    return MixedTexts(photos, texts[starts[photos] + place], others, kept.cumsum(0) - kept)


def shared_cells(positives: torch.Tensor, partners: torch.Tensor, mixed: MixedTexts) -> torch.Tensor:
    """bool [photos, mixed]: which mixed photo and mixed text have parts that belong together, if it is not its own."""
    of_photos = positives | positives[partners]
    shared = of_photos[:, mixed.texts] | of_photos[:, mixed.others]
    shared[mixed.photos, torch.arange(len(mixed.photos))] = False
    return shared


def mixed(batch: Batch, alpha: float) -> Batch:
    """The mixed pairs of a batch, in the order of its photos. This rank has the mixed photos of its own photos."""
    mix = draw_mix(alpha, batch.photos.total)
    texts = pair_texts(batch.positives, mix.partners)
    share, device = Share.of(len(texts.photos)), batch.positives.device
    states = [mix.of(batch.photos.gather(state), batch.photos.own) for state in batch.states]
    vectors, (own, others) = batch.texts.gather(batch.vectors), (one[share.own].to(device) for one in texts[1:3])
    positives = torch.zeros(batch.photos.total, share.total, dtype=torch.bool, device=device)
    positives[texts.photos, torch.arange(share.total)] = True
    return batch._replace(
        texts=share,
        states=states,
        text_rows=batch.text_rows[texts.texts.numpy()],
        vectors=torch.lerp(vectors[others], vectors[own], mix.weight),
        positives=positives,
        ignored=shared_cells(batch.positives.cpu(), mix.partners, texts).to(device),
        own=texts.starts.to(device),
    )
