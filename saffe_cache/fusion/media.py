"""Fusions of the media of an item: a mapping from each modality to its tokens, of which any may be missing.

    f(x) = unit(g(x_image, x_audio, ...))

All return one vector for each item, in the space of the texts. A missing medium is a learned null: a summary of its
own for `Concat`, nothing for `Sum`, and one token of its own for `Union` and `Cross`. Tokens are layer-normed and
mapped to one width; an embedding says which medium they are of.

`MediaSum` and the others are these as fusions of a run: the layers of each medium lie side by side in its tokens, and
training drops media at random (`drop_media`), never the last one of an item.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.core.features import Modality
from saffe_cache.core.ranks import Share
from saffe_cache.fusion.base import ROW_BY_ROW, Blocks, Fused, Fusion, Pairing, Texts, gathered, of_media
from saffe_cache.fusion.layers import Dropout, Mask, States
from saffe_cache.fusion.losses import Contrast, InfoNce, info_nce
from saffe_cache.fusion.options import FusionShape

WIDTH, HEADS, QUERIES, DROPOUT = 128, 4, 4, 0.2
INNER = 512


class Medium(NamedTuple):
    """One medium of some items."""

    tokens: torch.Tensor
    """float [n, tokens, width]; zeros where the mask is False."""
    mask: torch.Tensor
    """bool [n, tokens]: real tokens; none of an item that lacks the medium."""

    @property
    def is_present(self) -> torch.Tensor:
        """bool [n]"""
        return self.mask.any(dim=1)

    def take(self, rows: torch.Tensor) -> Medium:
        return Medium(self.tokens[rows], self.mask[rows])

    def without(self, dropped: torch.Tensor) -> Medium:
        """Without the medium of some items, bool [n]."""
        return Medium(self.tokens, self.mask & ~dropped[:, None])


Media = Mapping[Modality, Medium]
Widths = Mapping[Modality, int]
"""Of the tokens of each medium."""


class Summary(nn.Module):
    """First token and mean of all, normed; a learned null where the medium is missing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.size = 2 * width
        self.null = nn.Parameter(torch.zeros(self.size))

    def forward(self, medium: Medium) -> torch.Tensor:
        counts = medium.mask.sum(dim=1, keepdim=True).clamp(min=1)
        mean = (medium.tokens.float() * medium.mask[..., None]).sum(dim=1) / counts
        both = (functional.layer_norm(one, one.shape[1:]) for one in (medium.tokens[:, 0].float(), mean))
        return torch.where(medium.is_present[:, None], torch.cat(list(both), dim=1), self.null)


def _mlp(width: int, size: int, dropout: float) -> nn.Module:
    return nn.Sequential(Dropout(dropout), nn.Linear(width, INNER), nn.GELU(), Dropout(dropout), nn.Linear(INNER, size))


class Concat(nn.Module):
    """An MLP on the concatenated summaries."""

    def __init__(self, widths: Widths, size: int, dropout: float = DROPOUT) -> None:
        super().__init__()
        self.summaries = nn.ModuleDict({name: Summary(width) for name, width in widths.items()})
        self.mlp = _mlp(2 * sum(widths.values()), size, dropout)

    def forward(self, media: Media) -> torch.Tensor:
        summaries = [self.summaries[name](media[name]) for name in self.summaries]  # type: ignore[index]
        return self.mlp(torch.cat(summaries, dim=1))  # type: ignore[no-any-return]


class Sum(nn.Module):
    """The sum of one MLP's vector for each medium: a long vector counts more. Each is also trained alone."""

    def __init__(self, widths: Widths, size: int, dropout: float = DROPOUT) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: Concat({name: width}, size, dropout) for name, width in widths.items()})

    def parts(self, media: Media) -> list[torch.Tensor]:
        """The vector of each medium; zeros where it is missing."""
        return [head({name: media[name]}) * media[name].is_present[:, None] for name, head in self.heads.items()]  # type: ignore[index]

    def forward(self, media: Media) -> torch.Tensor:
        return torch.stack(self.parts(media)).sum(dim=0)


class Union(nn.Module):
    """Learned queries attend to the tokens of all media together; an MLP makes a vector of what they find."""

    def __init__(self, widths: Widths, size: int, dropout: float = DROPOUT) -> None:
        super().__init__()
        self.inward = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, WIDTH)) for name, width in widths.items()}
        )
        self.medium = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(WIDTH)) for name in widths})
        self.null = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(WIDTH)) for name in widths})
        self.queries = nn.Parameter(torch.randn(QUERIES, WIDTH) / WIDTH**0.5)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(QUERIES * WIDTH)
        self.mlp = _mlp(QUERIES * WIDTH, size, dropout)

    def forward(self, media: Media) -> torch.Tensor:
        mapped = self.exchanged({name: self._mapped(name, media[name]) for name in self.inward})  # type: ignore[index]
        tokens = torch.cat([one.tokens for one in mapped.values()], dim=1)
        mask = torch.cat([one.mask for one in mapped.values()], dim=1)
        queries = self.queries.expand(len(tokens), -1, -1)
        found, _ = self.attention(queries, tokens, tokens, key_padding_mask=~mask, need_weights=False)
        return self.mlp(self.norm(found.flatten(1)))  # type: ignore[no-any-return]

    def exchanged(self, media: Mapping[str, Medium]) -> Mapping[str, Medium]:
        """What the media's tokens become before they are pooled."""
        return media

    def _mapped(self, name: str, medium: Medium) -> Medium:
        """Tokens of one width, behind a null token that counts where the medium is missing."""
        tokens = self.inward[name](medium.tokens.float()) + self.medium[name]
        null = self.null[name].expand(len(tokens), 1, -1)
        mask = torch.cat([~medium.is_present[:, None], medium.mask], dim=1)
        return Medium(torch.cat([null, tokens], dim=1), mask)


class Cross(Union):
    """`union`, after the tokens of each medium have attended to the union of the others'."""

    def __init__(self, widths: Widths, size: int, dropout: float = DROPOUT) -> None:
        super().__init__(widths, size, dropout)
        self.asking = nn.ModuleDict({name: nn.LayerNorm(WIDTH) for name in widths})
        self.others = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def exchanged(self, media: Mapping[str, Medium]) -> Mapping[str, Medium]:
        if len(media) == 1:
            return media
        normed = {name: self.asking[name](one.tokens) for name, one in media.items()}
        found = {}
        for name, medium in media.items():
            keys = torch.cat([normed[other] for other in media if other != name], dim=1)
            mask = torch.cat([media[other].mask for other in media if other != name], dim=1)
            answer, _ = self.others(normed[name], keys, keys, key_padding_mask=~mask, need_weights=False)
            found[name] = Medium(medium.tokens + answer, medium.mask)
        return found


class MediaFusion(Fusion):
    """One of these as the fusion of a run, with a map of the queries. No text enters it."""

    kind: ClassVar[type[nn.Module]]

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        widths = {one.name: one.num_layers * one.hidden_size for one in shape.media}
        self.inner = self.kind(widths, shape.text_size, shape.dropout)
        self._make_text_maps()

    def fuse(
        self, states: States, mask: Mask = None, texts: Texts | None = None, pairing: Pairing = ROW_BY_ROW
    ) -> Fused:
        parts, media = of_media(self.shape, states, mask), {}
        for medium, (own, own_mask) in zip(self.shape.media, parts, strict=True):
            assert own_mask is not None
            media[medium.name] = Medium(torch.cat(list(own), dim=2), own_mask)
        vectors = functional.normalize(self.inner(media).float(), dim=-1)
        kept = [gathered(state, pairing.gallery) for state in states]
        return Fused(gathered(vectors, pairing.gallery), kept, gathered(mask, pairing.gallery))


class MediaConcat(MediaFusion):
    kind = Concat


class MediaSum(MediaFusion):
    kind = Sum


class MediaUnion(MediaFusion):
    kind = Union


class MediaCross(MediaFusion):
    kind = Cross


def present_media(shape: FusionShape, states: States, mask: Mask) -> torch.Tensor:
    """bool [items, media]: which media an item has."""
    parts = [own for _, own in of_media(shape, states, mask) if own is not None]
    return torch.stack([own.any(dim=1) for own in parts], dim=1)


def showing(shape: FusionShape, states: States, mask: Mask, shown: torch.Tensor) -> torch.Tensor:
    """The mask, bool [items, tokens], of items of which only the media of bool [items, media] are shown."""
    parts = [own for _, own in of_media(shape, states, mask) if own is not None]
    return torch.cat([own & is_shown[:, None] for own, is_shown in zip(parts, shown.T, strict=True)], dim=1)


def drop_media(shape: FusionShape, states: States, mask: Mask, rate: float, items: Share) -> torch.Tensor:
    """The mask with some media of some items missing, by `media_left`."""
    return showing(shape, states, mask, media_left(present_media(shape, states, mask), rate, items))


def media_left(present: torch.Tensor, rate: float, items: Share) -> torch.Tensor:
    """bool [items, media]: the present media without some, each gone with the probability `rate`; one of an item's is
    left.

    Drawn with torch's generator of the CPU for all items of a batch, as all ranks do alike; `items` are this rank's.
    """
    draws, order = (torch.rand(items.total, present.shape[1])[items.own].to(present.device) for _ in range(2))
    left = present & (draws >= rate)
    last = torch.where(present, order, -1.0).argmax(dim=1)
    left[torch.arange(len(left), device=left.device), last] |= ~left.any(dim=1)
    return left


def nce_alone(
    media: Iterable[tuple[torch.Tensor, torch.Tensor]],
    queries: torch.Tensor,
    positives: torch.Tensor,
    temperature: torch.Tensor,
) -> torch.Tensor:
    """`info_nce` of the items of which one medium is shown, which the others lack: mean over the media.

    Args:
        media: unit vectors [n, d] of the items, and bool [n], which have the medium: for each.
        queries: unit vectors [m, d].
        positives: bool [n, m].
        temperature: positive scalar.
    """
    losses = []
    for vectors, has_medium in media:
        own = positives[has_medium]
        texts = own.any(dim=0)
        if texts.any():
            losses.append(info_nce(vectors[has_medium], queries[texts], own[:, texts], temperature))
    return torch.stack(losses).mean()


class MediaAlone(InfoNce):
    """`nce_alone` of a batch."""

    def forward(self, seen: Contrast) -> torch.Tensor:
        return nce_alone(seen.of_single_media(), seen.queries, seen.batch.positives, self.temperature())
