"""`linear`: the FAM without attention between modalities, and beside it a ridge regression the other way.

    photo  [ sqrt(1 - w) f(x), sqrt(w) s ],    s = unit(s(x) - m)
    text   [ sqrt(1 - w) q(t), sqrt(w) p ],    p = unit(U t + b)

The FAM maps photos into the space of texts. The ridge regression maps texts into that of the photos' summaries s(x),
where other photos are hubs; the inner product averages both cosines with weight w. Texts reach a subspace only of the
summaries' space: s is written in a basis of that subspace, with what is left of its length as one more number, so that
vectors have unit length and at most text_size + 2 more numbers.

The regression is fitted once the FAM is trained. Validation, with and without search correction, chooses its penalty,
whether the mean m of the photos is taken off both sides, and w. Of 1,350 photos (Flickr8k, CLIP ViT-B/16 with
all-mpnet-base-v2) it takes a third of the weight; of 5,400 (DINOv2-small with all-MiniLM-L6-v2) none, and vectors then
are those of the FAM alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from saffe_cache.fusion.base import ROW_BY_ROW, Blocks, Fused, Pairing, Texts, gathered
from saffe_cache.fusion.fam import FusionAlignModule
from saffe_cache.fusion.layers import Mask, States
from saffe_cache.fusion.options import FusionShape


class OtherWay(nn.Module):
    """A map of texts into the space of photos' summaries, and the weight of its cosine. Nothing of it is trained."""

    weight: torch.Tensor
    centre: torch.Tensor
    basis: torch.Tensor
    text_map: torch.Tensor
    text_offset: torch.Tensor

    def __init__(self, summary_size: int, text_size: int) -> None:
        super().__init__()
        size = min(summary_size, text_size + 1)
        self.register_buffer("weight", torch.zeros(()))
        self.register_buffer("centre", torch.zeros(summary_size))
        self.register_buffer("basis", torch.zeros(summary_size, size))
        self.register_buffer("text_map", torch.zeros(size, text_size))
        self.register_buffer("text_offset", torch.zeros(size))

    @classmethod
    def of(cls, matrix: np.ndarray, offset: np.ndarray, centre: np.ndarray) -> OtherWay:
        """Of a map to summaries, `matrix` [s, k] and `offset` [s], and what is taken off photos, [s]."""
        made = cls(*matrix.shape)
        basis = np.linalg.qr(np.column_stack([matrix, offset]))[0]
        for name, values in {
            "centre": centre,
            "basis": basis,
            "text_map": basis.T @ matrix,
            "text_offset": basis.T @ offset,
        }.items():
            getattr(made, name).copy_(torch.from_numpy(values))
        return made

    def of_photos(self, summaries: torch.Tensor) -> torch.Tensor:
        """What photos have beside their vectors, of their summaries [n, s]."""
        photos = functional.normalize(functional.normalize(summaries.float(), dim=-1) - self.centre, dim=-1)
        inside = photos @ self.basis
        rest = (1 - inside.square().sum(dim=-1, keepdim=True)).clamp(min=0).sqrt()
        return torch.cat([inside, rest], dim=-1)

    def of_texts(self, texts: torch.Tensor) -> torch.Tensor:
        """What texts have beside their vectors, of the text encoder's own, [m, k]."""
        unit = functional.normalize(texts.float(), dim=-1)
        mapped = functional.normalize(unit @ self.text_map.T + self.text_offset, dim=-1)
        return functional.pad(mapped, (0, 1))

    def beside(self, vectors: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Unit vectors [n, width], and others of the same photos or texts beside them."""
        weight = self.weight.to(vectors.device)
        return torch.cat([(1 - weight).sqrt() * vectors, weight.sqrt() * others], dim=-1)


class TwoWayFusion(FusionAlignModule):
    """The FAM alone until `other_way` is set, and with texts that are paired with photos."""

    other_way: OtherWay | None

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape, blocks)
        self.other_way = None

    def fuse(
        self, states: States, mask: Mask = None, texts: Texts | None = None, pairing: Pairing = ROW_BY_ROW
    ) -> Fused:
        fused = super().fuse(states, mask, texts, pairing)
        if self.other_way is None:
            return fused
        summaries = gathered(self.summaries(states, mask), pairing.gallery)
        return fused._replace(vectors=self.other_way.beside(fused.vectors, self.other_way.of_photos(summaries)))

    def encode_queries(self, vectors: torch.Tensor) -> torch.Tensor:
        own = super().encode_queries(vectors)
        return own if self.other_way is None else self.other_way.beside(own, self.other_way.of_texts(vectors))

    @property
    def num_fitted(self) -> int:
        others = () if self.other_way is None else self.other_way.buffers()
        return super().num_fitted + sum(one.numel() for one in others)

    def _load_from_state_dict(self, state_dict: Mapping[str, torch.Tensor], prefix: str, *others: Any) -> None:
        """Weights may be those of a FAM alone, or of both."""
        found = state_dict.get(f"{prefix}other_way.text_map")
        self.other_way = None if found is None else OtherWay(self.shape.summary_size, found.shape[1]).to(found.device)
        super()._load_from_state_dict(state_dict, prefix, *others)
