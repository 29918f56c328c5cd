"""Fusions of the media of an item: a mapping from each modality to its tokens, of which any may be missing.

All return one vector for each item, in the space of the texts. A missing medium is a learned null: a summary of its
own for `concat`, nothing for `sum`, and one token of its own for `union` and `cross`. Tokens are layer-normed and
mapped to one width; an embedding says which medium they are of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.core.features import Modality
from saffe_cache.fusion.layers import Dropout

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


def make_fusion(name: str, widths: Mapping[Modality, int], size: int) -> nn.Module:
    """With starting weights from torch's generator; `widths` of the media's tokens, `size` of the texts' vectors."""
    made: nn.Module = {"concat": Concat, "sum": Sum, "union": Union, "cross": Cross}[name](widths, size)
    return made


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


def _mlp(width: int, size: int) -> nn.Module:
    return nn.Sequential(Dropout(DROPOUT), nn.Linear(width, INNER), nn.GELU(), Dropout(DROPOUT), nn.Linear(INNER, size))


class Concat(nn.Module):
    """An MLP on the concatenated summaries."""

    def __init__(self, widths: Mapping[Modality, int], size: int) -> None:
        super().__init__()
        self.summaries = nn.ModuleDict({name: Summary(width) for name, width in widths.items()})
        self.mlp = _mlp(2 * sum(widths.values()), size)

    def forward(self, media: Media) -> torch.Tensor:
        summaries = [self.summaries[name](media[name]) for name in self.summaries]  # type: ignore[index]
        return self.mlp(torch.cat(summaries, dim=1))  # type: ignore[no-any-return]


class Sum(nn.Module):
    """The sum of one MLP's vector for each medium: a long vector counts more. Each is also trained alone."""

    def __init__(self, widths: Mapping[Modality, int], size: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: Concat({name: width}, size) for name, width in widths.items()})

    def parts(self, media: Media) -> list[torch.Tensor]:
        """The vector of each medium; zeros where it is missing."""
        return [
            head({name: media[name]}) * media[name].is_present[:, None]  # type: ignore[index]
            for name, head in self.heads.items()
        ]

    def forward(self, media: Media) -> torch.Tensor:
        return torch.stack(self.parts(media)).sum(dim=0)


class Union(nn.Module):
    """Learned queries attend to the tokens of all media together; an MLP makes a vector of what they find."""

    def __init__(self, widths: Mapping[Modality, int], size: int) -> None:
        super().__init__()
        self.inward = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, WIDTH)) for name, width in widths.items()}
        )
        self.medium = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(WIDTH)) for name in widths})
        self.null = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(WIDTH)) for name in widths})
        self.queries = nn.Parameter(torch.randn(QUERIES, WIDTH) / WIDTH**0.5)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(QUERIES * WIDTH)
        self.mlp = _mlp(QUERIES * WIDTH, size)

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

    def __init__(self, widths: Mapping[Modality, int], size: int) -> None:
        super().__init__(widths, size)
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
