"""`linear`: the FAM without attention between modalities, and beside it kernel ridge regressions.

    photo  [ sqrt(1 - w) f(x), sqrt(w) u ]        text   [ sqrt(1 - w) q(t), sqrt(w) v ]

f and q are the FAM's vectors, u and v those of `kernel_ridge`; the inner product averages both cosines with weight w.
The FAM maps photos into the space of texts; with few pairs, what it learns there is little more than a ridge
regression. The kernels fit what is not linear, and one of them maps texts into the space of photos, where other photos
are hubs.

The regressions are fitted once the FAM is trained, and validation, with and without search correction, chooses w; where
it is 0, vectors are those of the FAM alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from saffe_cache.fusion.base import ROW_BY_ROW, Blocks, Fused, Pairing, Texts, gathered
from saffe_cache.fusion.closed_form.kernel import KernelRidgeFusion
from saffe_cache.fusion.fam import FusionAlignModule
from saffe_cache.fusion.layers import Mask, States
from saffe_cache.fusion.options import FusionShape


class Kernels(nn.Module):
    """`kernel_ridge`, and the weight of its cosine. Nothing of it is trained."""

    weight: torch.Tensor

    def __init__(self, shape: FusionShape) -> None:
        super().__init__()
        self.regressions = KernelRidgeFusion(shape, Blocks())
        self.register_buffer("weight", torch.zeros(()))

    def of_photos(self, summaries: torch.Tensor) -> torch.Tensor:
        """What photos have beside their vectors, of their summaries [n, s]."""
        return self.regressions.encode_summaries(summaries.float())

    def of_texts(self, texts: torch.Tensor) -> torch.Tensor:
        """What texts have beside their vectors, of the text encoder's own, [m, k]."""
        return self.regressions.encode_queries(texts.float())

    def beside(self, vectors: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Unit vectors [n, width], and others of the same photos or texts beside them."""
        weight = self.weight.to(vectors.device)
        return torch.cat([(1 - weight).sqrt() * vectors, weight.sqrt() * others], dim=-1)


class WithKernels(FusionAlignModule):
    """The FAM alone until `kernels` are set, and with texts that are paired with photos."""

    kernels: Kernels | None

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape, blocks)
        self.kernels = None

    def fuse(
        self, states: States, mask: Mask = None, texts: Texts | None = None, pairing: Pairing = ROW_BY_ROW
    ) -> Fused:
        fused = super().fuse(states, mask, texts, pairing)
        if self.kernels is None:
            return fused
        others = gathered(self.kernels.of_photos(self.summaries(states, mask)), pairing.gallery)
        return fused._replace(vectors=self.kernels.beside(fused.vectors, others))

    def encode_queries(self, vectors: torch.Tensor) -> torch.Tensor:
        own = super().encode_queries(vectors)
        return own if self.kernels is None else self.kernels.beside(own, self.kernels.of_texts(vectors))

    @property
    def num_fitted(self) -> int:
        others = () if self.kernels is None else self.kernels.buffers()
        return super().num_fitted + sum(one.numel() for one in others)

    def _load_from_state_dict(self, state_dict: Mapping[str, torch.Tensor], prefix: str, *others: Any) -> None:
        """Weights may be those of a FAM alone, or of both."""
        weight = state_dict.get(f"{prefix}kernels.weight")
        self.kernels = None if weight is None else Kernels(self.shape).to(weight.device)
        super()._load_from_state_dict(state_dict, prefix, *others)
