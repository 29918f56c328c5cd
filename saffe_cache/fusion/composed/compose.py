"""Our fusion for composed queries: the photo's own gallery vector, gated by the text, plus the text, plus a residual.

    x = W (s - mean)                    whitened summary of the photo
    g(x) = L y + mlp(y), y = LN(x)      gallery vector: r = unit(g(x))
    c = [LN(r); LN(t)]
    f(x, t) = unit( a R r * 2 sigmoid(gate(c)) + b unit(u(t)) + residual(c) / 16 )

s is the photo's summary with spreads: first token, mean and standard deviation of the others, of each layer. Lower
layers hold colour and texture, upper ones the kind of thing, and spreads tell a print from a plain cloth, so that it
should read several layers. t is the text encoder's own vector, of unit length, and u(t) = U t + mlp(t). A text alone
searches as unit(K t), by a map of its own: a caption describes a photo, a composed query's text only what is to change.

`mean` and W are computed once from the training photos (`prepare`): each layer's numbers are standardised and turned to
their principal axes, at most OF_LAYER of them, divided by their standard deviation to the power of 2 * POWER; then all
layers' to at most WIDE common axes. Plain summaries are dominated by few directions, in which few queries differ.

Everything else is trained. gate, residual and the mlp of g start at zero, R as the identity: the fusion starts as late
fusion of random maps. g has w (d + h + 2) + h (d + 1) + 2 d parameters for w axes, d = WIDTH and h = INNER; the rest
has 1,741,314 for texts of width 384.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from saffe_cache.fusion.base import ROW_BY_ROW, Blocks, Fused, Fusion, Pairing, Texts, gathered
from saffe_cache.fusion.layers import Dropout, Learning, Mask, MatchHead, States, identity_linear, zero_linear
from saffe_cache.fusion.options import FusionShape

OF_LAYER, WIDE, POWER = 512, 768, 0.25
"""Axes kept of a layer, and of all; eigenvalues are divided by their power POWER."""


class ComposeFusion(Fusion):
    """A photo's vector, gated by a text, plus that text, plus a residual of both."""

    learning: ClassVar = {"photo_weight": Learning(decays=False), "text_weight": Learning(decays=False)}
    WIDTH, INNER, TEXT_INNER, SHRINK = 256, 768, 512, 16.0
    mean: torch.Tensor
    axes: torch.Tensor

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        size, width, text, dropout = min(shape.summary_size, WIDE), self.WIDTH, shape.text_size, shape.dropout
        self.register_buffer("mean", torch.zeros(shape.summary_size))
        self.register_buffer("axes", torch.eye(size, shape.summary_size))
        self.norm = nn.LayerNorm(size)
        self.photo_linear = nn.Sequential(Dropout(dropout), nn.Linear(size, width))
        self.photo_mlp = _mlp(size, self.INNER, zero_linear(self.INNER, width), dropout)
        self.text_linear = nn.Linear(text, width)
        self.text_mlp = _mlp(text, self.TEXT_INNER, nn.Linear(self.TEXT_INNER, width), 0.2 * dropout)
        self.caption_linear = nn.Linear(text, width)
        self.kept = identity_linear(width)
        self.photo_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(text)
        self.gate = _mlp(width + text, self.TEXT_INNER, zero_linear(self.TEXT_INNER, width), 0.4 * dropout)
        self.residual = _mlp(width + text, self.INNER, zero_linear(self.INNER, width), 0.6 * dropout)
        self.photo_weight, self.text_weight = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
        if shape.matches:
            self.match_head = MatchHead(shape.read_size, 1, width)

    def prepare(self, photos: np.ndarray) -> None:
        mean, axes = principal_axes(photos, self.shape.num_layers, len(self.axes))
        self.mean.copy_(torch.from_numpy(mean))
        self.axes.copy_(torch.from_numpy(axes))

    def encode_queries(self, vectors: torch.Tensor) -> torch.Tensor:
        return _unit(self.caption_linear(functional.normalize(vectors, dim=-1)))

    def fuse(
        self, states: States, mask: Mask = None, texts: Texts | None = None, pairing: Pairing = ROW_BY_ROW
    ) -> Fused:
        whitened = self.norm((states[0].squeeze(1) - self.mean) @ self.axes.T)
        vectors = gathered(_unit(self.photo_linear(whitened) + self.photo_mlp(whitened)), pairing.gallery)
        if texts is not None:
            paired = texts.rows(pairing.text)
            vectors = torch.where(paired.is_text, self._compose(vectors, paired.vectors), vectors)
        return Fused(vectors, [gathered(states[0], pairing.gallery)], gathered(mask, pairing.gallery))

    def _compose(self, photos: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Unit vectors of the queries, [pairs, WIDTH], of the photos' unit vectors and the texts' own vectors."""
        unit = functional.normalize(texts, dim=-1)
        both = torch.cat([self.photo_norm(photos), self.text_norm(unit)], dim=-1)
        kept = self.kept(photos) * 2 * torch.sigmoid(self.gate(both))
        wanted = _unit(self.text_linear(unit) + self.text_mlp(unit * self.shape.text_size**0.5))
        return _unit(self.photo_weight * kept + self.text_weight * wanted + self.residual(both) / self.SHRINK)


def _mlp(in_size: int, inner_size: int, last: nn.Linear, dropout: float) -> nn.Sequential:
    return nn.Sequential(Dropout(dropout), nn.Linear(in_size, inner_size), nn.GELU(), Dropout(dropout), last)


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return functional.normalize(vectors.float(), dim=-1)


def principal_axes(photos: np.ndarray, num_layers: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean [s] of photos' summaries [n, s], and the map [width, s] of what is left to whitened axes.

    Its outputs have a mean square of 1. Fewer axes than `width` leave zeros.
    """
    mean = photos.mean(axis=0)
    centred = torch.from_numpy(photos - mean)
    deviations = centred.square().mean(dim=0).sqrt() + 1e-4
    parts, maps = [], []
    for layer, scale in zip(centred.chunk(num_layers, dim=1), deviations.chunk(num_layers), strict=True):
        values, vectors = _eigen(layer / scale, OF_LAYER)
        one = vectors / (values + 1e-3) ** POWER / scale[:, None]
        parts.append(layer @ one)
        maps.append(one)
    together = torch.cat(parts, dim=1)
    _, vectors = _eigen(together, width)
    axes = torch.cat([one @ own for one, own in zip(maps, vectors.chunk(num_layers), strict=True)])
    axes /= (together @ vectors).square().mean().sqrt()
    padded = functional.pad(axes.T, (0, 0, 0, width - axes.shape[1]))
    return mean, padded.numpy()


def _eigen(rows: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest eigenvalues of the rows' second moments, at most `most`, and their vectors as columns."""
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    return values[-most:].clamp(min=0), vectors[:, -most:]
