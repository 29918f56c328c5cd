"""Freeze-Align's projectors of tokens (Maniparambil et al. 2024, arXiv 2409.19425).

    T(v) = W1 v' + W3 GELU(W2 v'),   v' = LN(v)
    f(x) = unit( mean over patches of T_patch(v) + T_class(v_class) )
    g(t) = unit( H(T_text(t)) ),   H(z) = LN( drop(V2 GELU(p)) + p ),  p = V1 z

All W and V have biases. Tokens of several layers are put side by side, each layer normed by itself. The gain and bias
of the norm before W1 and W2 are left to these. W1 and W3 are applied to means, since they commute with the mean; only
GELU(W2 v') is computed of each token.

Parameters, with width e = 512 of everything inside and P d of a token's P layers: 2 e (P d + 1) + e (e + 1) for each of
the two photo projectors, 2 e (k + 1) + e (e + 1) for the text's, 2 e (e + 1) + 2 e for H.

The paper applies T_text to the text's tokens and then averages; here it maps the text's own vector, which is the same
for its linear part only. The paper's dropout acts on each token, whose noise the mean averages away; here it acts on
the means. Without a class token there is T_patch alone, on all positions. The released run has e = 1,024.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.fusion.base import Blocks
from saffe_cache.fusion.layers import Dropout, Mask, NormedTokens, States, mean_weights
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.two_sided import TwoSided


class Projector(nn.Module):
    """T, averaged over tokens. `size`: width of a token of all layers together."""

    def __init__(self, size: int, width: int, dropout: float) -> None:
        super().__init__()
        self.linear, self.inner, self.outer = nn.Linear(size, width), nn.Linear(size, width), nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, states: States, mask: Mask) -> torch.Tensor:
        """The mean over the tokens that the mask keeps, [batch, width]."""
        tokens, weights = [NormedTokens(state) for state in states], mean_weights(states[0], mask)
        mean = torch.cat([layer.sums(weights).squeeze(1) for layer in tokens], dim=-1)
        parts = self.inner.weight.T.chunk(len(tokens))
        inner = sum((layer.products(part) for layer, part in zip(tokens, parts, strict=True)), self.inner.bias[:, None])
        active = (functional.gelu(inner) @ weights.transpose(1, 2)).squeeze(2)
        return self.linear(self.dropout(mean)) + self.outer(self.dropout(active))  # type: ignore[no-any-return]


class TextHead(nn.Module):
    """H."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.GELU(), nn.Linear(width, width), Dropout(dropout))
        self.norm = nn.LayerNorm(width)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        projected = self.linear(vectors)
        return self.norm(self.mlp(projected) + projected)  # type: ignore[no-any-return]


class FreezeAlignFusion(TwoSided):
    """Projectors of patches and class token, and of the text's vector."""

    WIDTH = 512

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        size, width = shape.num_layers * shape.hidden_size, self.WIDTH
        self.of_patches = Projector(size, width, shape.dropout)
        self.of_class = Projector(size, width, shape.dropout) if shape.has_class_token else None
        self.of_text = Projector(shape.text_size, width, shape.dropout)
        self.text_head = TextHead(width, shape.dropout)
        self._make_match_head(self.WIDTH)

    def photo_summary(self, states: States, mask: Mask) -> torch.Tensor:
        if self.of_class is None:
            return self.of_patches(states, mask)  # type: ignore[no-any-return]
        patches = self.of_patches([state[:, 1:] for state in states], None if mask is None else mask[:, 1:])
        return patches + self.of_class([state[:, :1] for state in states], None)  # type: ignore[no-any-return]

    def photo_side(self, summary: torch.Tensor) -> torch.Tensor:
        return summary

    def text_side(self, unit: torch.Tensor) -> torch.Tensor:
        one_token = unit[:, None] * self.shape.text_size**0.5
        return self.text_head(self.of_text([one_token], None))  # type: ignore[no-any-return]
