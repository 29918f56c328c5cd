"""Our fusion for composed queries: the photo's own gallery vector, gated by the text, plus the text, plus a residual.

    g(x) = L y + mlp([pooled tokens; y])     gallery vector: r = unit(g(x))
    c = [LN(r); LN(t)]
    f(x, t) = unit( a R r * 2 sigmoid(gate(c)) + b unit(u(t)) + residual(c) / 16 )

g is the FAM's head (`AttentionHead`): learned queries pool the tokens of each layer. y is the photo's summary with
spreads, standardised by the training photos (`prepare`): first token, mean and standard deviation of the others, of
each layer. Lower layers hold colour and texture, upper ones the kind of thing, and spreads tell a print from a plain
cloth, so that it should read several layers. The same g makes references and gallery.

t is the text encoder's own vector, of unit length, and u(t) = U t + mlp(t). A text alone searches as unit(K t), by a
map of its own: a caption describes a photo, a composed query's text only what is to change.

gate, residual and the mlp of g start at zero, R as the identity: the fusion starts as late fusion of random maps. It
adds 1,741,314 parameters to the head's for texts of width 384.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from saffe_cache.fusion.base import ROW_BY_ROW, Blocks, Fused, Fusion, Pairing, Texts, gathered
from saffe_cache.fusion.layers import (
    AttentionHead,
    Dropout,
    Learning,
    Mask,
    MatchHead,
    States,
    identity_linear,
    zero_linear,
)
from saffe_cache.fusion.options import FusionShape


class ComposeFusion(Fusion):
    """A photo's vector, gated by a text, plus that text, plus a residual of both."""

    composes_vectors: ClassVar = True
    learning: ClassVar = {"photo_weight": Learning(decays=False), "text_weight": Learning(decays=False)}
    WIDTH, INNER, TEXT_INNER, SHRINK = 256, 768, 512, 16.0
    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        width, text, dropout = self.WIDTH, shape.text_size, shape.dropout
        self.register_buffer("mean", torch.zeros(shape.summary_size))
        self.register_buffer("deviation", torch.ones(shape.summary_size))
        self.head = AttentionHead(
            shape.hidden_size,
            shape.num_layers,
            width,
            summary_size=shape.summary_size,
            dropout=dropout,
            has_class_token=shape.has_class_token,
        )
        self.text_linear = nn.Linear(text, width)
        self.text_mlp = _mlp(text, self.TEXT_INNER, nn.Linear(self.TEXT_INNER, width), 0.2 * dropout)
        self.caption_linear = nn.Linear(text, width)
        self.kept = identity_linear(width)
        self.photo_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(text)
        self.gate = _mlp(width + text, self.TEXT_INNER, zero_linear(self.TEXT_INNER, width), 0.4 * dropout)
        self.residual = _mlp(width + text, self.INNER, zero_linear(self.INNER, width), 0.6 * dropout)
        self.photo_weight, self.text_weight = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
        if shape.matches:
            self.match_head = MatchHead(shape.hidden_size, shape.num_layers, width)

    def prepare(self, photos: np.ndarray) -> None:
        self.mean.copy_(torch.from_numpy(photos.mean(axis=0)))
        self.deviation.copy_(torch.from_numpy(photos.std(axis=0) + 1e-3))

    @property
    def attending(self) -> list[nn.Module]:
        return [self.head]

    def encode_queries(self, vectors: torch.Tensor) -> torch.Tensor:
        return _unit(self.caption_linear(functional.normalize(vectors, dim=-1)))

    def fuse(
        self, states: States, mask: Mask = None, texts: Texts | None = None, pairing: Pairing = ROW_BY_ROW
    ) -> Fused:
        summary = (self.summaries(states, mask) - self.mean) / self.deviation
        vectors = gathered(_unit(self.head(states, mask, summary)), pairing.gallery)
        if texts is not None:
            paired = texts.rows(pairing.text)
            vectors = torch.where(paired.is_text, self.compose_queries(vectors, paired), vectors)
        pooled = [gathered(state, pairing.gallery) for state in states]
        return Fused(vectors, pooled, gathered(mask, pairing.gallery))

    def compose_queries(self, photos: torch.Tensor, texts: Texts) -> torch.Tensor:
        unit = functional.normalize(texts.vectors, dim=-1)
        both = torch.cat([self.photo_norm(photos), self.text_norm(unit)], dim=-1)
        kept = self.kept(photos) * 2 * torch.sigmoid(self.gate(both))
        wanted = _unit(self.text_linear(unit) + self.text_mlp(unit * self.shape.text_size**0.5))
        return _unit(self.photo_weight * kept + self.text_weight * wanted + self.residual(both) / self.SHRINK)


def _mlp(in_size: int, inner_size: int, last: nn.Linear, dropout: float) -> nn.Sequential:
    return nn.Sequential(Dropout(dropout), nn.Linear(in_size, inner_size), nn.GELU(), Dropout(dropout), last)


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return functional.normalize(vectors.float(), dim=-1)
