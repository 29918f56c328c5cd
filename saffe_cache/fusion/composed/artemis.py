"""ARTEMIS: a text says what to see of the target, and of its likeness to the reference (Delmas et al. 2022,
arXiv 2203.08101; code naver/artemis).

    score(r, m; t) = <T(m), unit(A_E * t)> + <unit(A_I * r), unit(A_I * t)>
    T(m) = unit(Linear m)      A_E, A_I = softmax(Linear relu Linear m)   over channels, two maps each

It adds 5 (k² + k) parameters to the frame's: 1.31 M at the paper's width of 512. Its loss is the cross-entropy over the
batch with a learned scale of exp(2.659): `info_nce` from its temperature of 0.07. Ours also contrasts targets with
queries.

The score is no inner product of two vectors, but both terms are (w t) / sqrt(a² t²) with w and a of the query alone,
and neither changes with the length of a:

    explicit   w = A_E T          a = A_E
    implicit   w = A_I² r / ||A_I r||    a = A_I

So a query is the vector [w, a; w, a], four times as wide as those of the gallery, and a search is exact by matrix
products with t and t². `similarities` computes it; a FAISS index cannot. a is k times the softmax, ones where attention
is uniform, and the score then <T(m), t> + <r, t>. A photo alone and a text alone, T(m), are vectors of the usual width
and search by inner product.

Differs from the source: the photo is mapped as the frame does, T starts as the identity, so that photos can start as
the ridge regression, and the rest is Linear's usual start.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.fusion.base import Blocks, Texts, inner_products
from saffe_cache.fusion.composed.frame import ComposedFusion
from saffe_cache.fusion.layers import identity_linear
from saffe_cache.fusion.options import FusionShape


class ArtemisFusion(ComposedFusion):
    """Explicit matching of the text with the target, and implicit similarity of reference and target."""

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        size = shape.text_size
        self.text_linear = identity_linear(size)
        self.explicit = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
        self.implicit = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))

    def encode_queries(self, vectors: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.text_linear(functional.normalize(vectors, dim=-1)).float(), dim=-1)

    def attentions(self, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Explicit and implicit weights of channels, [texts, text_size] each, whose mean is 1."""
        explicit, implicit = (part(texts).float().softmax(dim=-1) for part in (self.explicit, self.implicit))
        return explicit * self.shape.text_size, implicit * self.shape.text_size

    def _queries(self, photos: torch.Tensor, texts: Texts) -> torch.Tensor:
        """[pairs, 4 text_size]; with the null text, the photo itself, seen evenly."""
        explicit, implicit = (
            torch.where(texts.is_text, one, 1.0) for one in self.attentions(functional.normalize(texts.vectors, dim=-1))
        )
        wanted = torch.where(texts.is_text, explicit * self.encode_queries(texts.vectors), 0.0)
        kept = implicit * functional.normalize(implicit * photos, dim=-1)
        return torch.cat([wanted, explicit, kept, implicit], dim=-1)

    def similarities(self, queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
        if queries.shape[-1] == gallery.shape[-1]:
            return inner_products(queries, gallery)
        wanted, explicit, kept, implicit = queries.chunk(4, dim=-1)
        squares = gallery.square()

        def term(weights: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
            lengths = inner_products(attention.square(), squares).clamp(min=1e-12).sqrt()
            return inner_products(weights, gallery) / lengths

        return term(wanted, explicit) + term(kept, implicit)
