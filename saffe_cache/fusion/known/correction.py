"""The frame of published fusions: each of them corrects the same late fusion.

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
from saffe_cache.fusion.heads import MatchHead, summarize
from saffe_cache.fusion.layers import Dropout, Mask, States
from saffe_cache.fusion.options import FusionShape


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
