"""The frame of published fusions, each of which corrects the same late fusion; and the fusions of one vector a side.

    v = unit( linear(summary(x)) + correction(x, t) )          z = unit( v + w map(t) )

`linear` may start as the ridge regression and `w` at its best value on validation, and every correction starts at zero.
So all of them start at the same point, and a table shows what each fusion adds. The original systems have no such
frame; each file says what else differs from its source, and which parameters it adds. Throughout, d is the width of the
photo's tokens, e of the text's, k of the text's own vector.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.fusion.base import ROW_BY_ROW, Blocks, Fused, Fusion, Pairing, Texts, gathered
from saffe_cache.fusion.layers import (
    Dropout,
    Mask,
    MatchHead,
    NormedTokens,
    States,
    summarize,
    summary_weights,
    zero_linear,
)
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.two_sided import TwoSided


class Correction(NamedTuple):
    """What a fusion adds for gallery inputs and their paired texts, one row for each pair."""

    vectors: torch.Tensor | None
    """[pairs, text_size]; None for no correction."""
    tokens: torch.Tensor
    """[pairs, tokens, matched_size]: what a matching head pools."""
    mask: Mask


class CorrectingFusion(Fusion):
    """A late fusion that `correct` corrects. `matched_size`: width of the tokens that a matching head pools.

    (2 P d + 1) k parameters for P photo layers, and those of the maps of queries and paired texts (`TextMap`) and of
    the texts' weight.
    """

    def __init__(self, shape: FusionShape, matched_size: int | None = None) -> None:
        super().__init__(shape)
        self.dropout = Dropout(shape.dropout)
        self.linear = nn.Linear(shape.summary_size, shape.text_size)
        self._make_text_maps()
        if shape.matches:
            self.match_head = MatchHead(matched_size or shape.hidden_size, 1, shape.text_size)

    @property
    def linear_start(self) -> nn.Linear | None:
        return self.linear

    def correct(self, states: States, mask: Mask, texts: Texts | None, summary: torch.Tensor) -> Correction:
        """The correction, one row for each pair.

        `states`, `mask` and `summary` are those of the pairs' gallery inputs. `texts` are the pairs' own, the null text
        where a row's mask has no True; None where all are null.
        """
        raise NotImplementedError

    def fuse(
        self, states: States, mask: Mask = None, texts: Texts | None = None, pairing: Pairing = ROW_BY_ROW
    ) -> Fused:
        summary = gathered(summarize(states, mask, has_class_token=self.shape.has_class_token), pairing.gallery)
        states, mask = [gathered(state, pairing.gallery) for state in states], gathered(mask, pairing.gallery)
        texts = None if texts is None else texts.rows(pairing.text)
        found = self.correct(states, mask, texts, summary)
        vectors = self.linear(self.dropout(summary))
        vectors = functional.normalize(vectors if found.vectors is None else vectors + found.vectors, dim=-1)
        return Fused(self._add_text(vectors, texts), [found.tokens], found.mask)


def masked(tokens: torch.Tensor, is_text: torch.Tensor) -> torch.Tensor:
    """[pairs, d] with zeros for null texts, by bool [pairs, 1]."""
    return torch.where(is_text, tokens, 0.0)


class LateFusion(CorrectingFusion):
    """No correction: a linear map of the photo's summary, plus the mapped vector of the text.

    Only the frame's parameters: 1,379,201 for d = e = k = 384, one layer and paired texts.
    """

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)

    def correct(self, states: States, mask: Mask, texts: Texts | None, summary: torch.Tensor) -> Correction:
        return Correction(None, states[-1], mask)


class HadamardFusion(CorrectingFusion):
    """P^T (tanh(U^T s) * tanh(V^T t)) + b for the photo's summary s and the text's own vector t; 0 for the null text.

    Low-rank bilinear pooling (MLB, Kim et al. 2017, arXiv 1610.04325, eq. 6).

    It adds (2 P d + 1) r + (k + 1) r + (r + 1) k parameters, for P layers and r = 1,200 as in the paper.
    """

    idle_with_null = ("of_photo.", "of_text.", "out.")
    RANK = 1200

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        self.of_photo = nn.Linear(shape.summary_size, self.RANK)
        self.of_text = nn.Linear(shape.text_size, self.RANK)
        self.out = zero_linear(self.RANK, shape.text_size)

    def correct(self, states: States, mask: Mask, texts: Texts | None, summary: torch.Tensor) -> Correction:
        if texts is None:
            return Correction(None, states[-1], mask)
        text = functional.normalize(texts.vectors, dim=-1) * self.shape.text_size**0.5
        joint = torch.tanh(self.of_photo(self.dropout(summary))) * torch.tanh(self.of_text(text))
        return Correction(masked(self.out(joint), texts.is_text), states[-1], mask)


class TwoTowerFusion(TwoSided):
    """The photo's first token and the text's own vector, each through Linear(d, 256): 393,728 parameters for d = 768,
    one photo layer and a text vector of the same width.

    ALBEF's and SigLIP's heads for retrieval (Li et al. 2021, sec. 3.1; Zhai et al. 2023, on towers locked as in LiT).
    Nothing is fused: a paired text is averaged with the photo in the shared space. The weights start at random. The
    first token must stand for the whole input, as a class token does. Feature maps have none, and their mean is used;
    for sounds (Whisper) it is only the first frame, and `late` sees more of them.
    """

    WIDTH = 256

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        self.photo_tower = nn.Linear(shape.num_layers * shape.hidden_size, self.WIDTH)
        self.text_tower = nn.Linear(shape.text_size, self.WIDTH)
        self._make_match_head(self.WIDTH)

    def photo_side(self, summary: torch.Tensor) -> torch.Tensor:
        return self.photo_tower(summary)  # type: ignore[no-any-return]

    def text_side(self, unit: torch.Tensor) -> torch.Tensor:
        return self.text_tower(unit * self.shape.text_size**0.5)  # type: ignore[no-any-return]

    def photo_summary(self, states: States, mask: Mask) -> torch.Tensor:
        return torch.cat([self._whole(state, mask) for state in states], dim=-1)

    def _whole(self, state: torch.Tensor, mask: Mask) -> torch.Tensor:
        """The normed token, or mean, that stands for each whole photo, [inputs, d]."""
        weights = summary_weights(state, mask, has_class_token=self.shape.has_class_token)[:, :1]
        return NormedTokens(state).sums(weights).squeeze(1)
