"""GPO: the weights with which sorted channels are averaged are learned (Chen et al. 2021, arXiv 2011.04305).

For a photo's L tokens, mapped into the shared space, each channel c is sorted by itself:

    v_(1)c >= ... >= v_(L)c,   pooled_c = sum_k w_k v_(k)c,   w = softmax_k( u . h_k / 0.1 )

    h_1 ... h_L = a bidirectional GRU (32 -> 32) over codes of the ranks 1 ... L, both directions averaged

The codes are sines and cosines, so w depends on L alone: 1/L is mean pooling, (1, 0, ...) max pooling. Each layer has
its own map and operator; what they pool is added up.

(P d + 1) 256 + 12,704 P + (k + 1) 256 parameters for P layers of width d and text vectors of width k.

In training, four photos in five lose tokens (the paper's size augmentation for grids): with u uniform in [0, 1], each
token is dropped with probability 0.2 u if u > 0.2. The first token always stays.

What differs from the paper: its photo side has an MLP with a batch norm beside the linear map, which mixes photos; its
text side pools the words of a trained BERT by the same operator, here a linear map takes the text's own vector. Its
loss is a hinge with the hardest negative, preceded by an epoch on all negatives, since it collapses without; the
default here is InfoNCE. Class tokens are pooled with the others.
Its learning rate of 5e-4, for 5,700 steps, is 5e-3 here, for hundreds of them.

Where inputs differ in length, as sounds do, it cannot be exported to ONNX: its weights follow the lengths in a batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from saffe_cache.core import ranks
from saffe_cache.fusion.base import Blocks
from saffe_cache.fusion.layers import Dropout, Mask, NormedTokens, States
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.two_sided import TwoSided


def rank_codes(count: int, size: int) -> torch.Tensor:
    """Sines (even columns) and cosines of the ranks, from 0: float32 [count, size]."""
    frequencies = torch.exp(torch.arange(0, size, 2) * (-math.log(10_000) / size))
    angles = torch.arange(count)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def descending(channels: torch.Tensor) -> torch.Tensor:
    """Each row of the last axis, the largest first. On a CPU numpy sorts short rows several times as fast as torch."""
    if channels.device.type != "cpu" or torch.compiler.is_compiling():
        return channels.sort(dim=-1, descending=True).values
    order = np.argsort(-channels.detach().float().numpy(), axis=-1)
    return channels.gather(-1, torch.from_numpy(order))


class PoolingOperator(nn.Module):
    """The weights of ranks: 12,704 parameters."""

    SIZE, TEMPERATURE = 32, 0.1

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(self.SIZE, self.SIZE, batch_first=True, bidirectional=True)
        self.score = nn.Linear(self.SIZE, 1, bias=False)

    def weights(self, lengths: torch.Tensor | None, most: int) -> torch.Tensor:
        """Weights of the ranks, [inputs, most], 0 beyond the length of an input; [1, most] where all have `most`."""
        codes = rank_codes(most, self.SIZE).to(self.score.weight.device)
        if lengths is None:
            return self._softmax(self.gru(codes[None])[0])
        distinct, inverse = torch.unique(lengths, return_inverse=True)
        packed = pack_padded_sequence(
            codes.expand(len(distinct), -1, -1), distinct.cpu(), batch_first=True, enforce_sorted=False
        )
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=most)
        is_rank = torch.arange(most, device=lengths.device) < distinct[:, None]
        return self._softmax(states, ~is_rank)[inverse]

    def _softmax(self, states: torch.Tensor, is_beyond: torch.Tensor | None = None) -> torch.Tensor:
        averaged = (states[..., : self.SIZE] + states[..., self.SIZE :]) / 2
        scores = self.score(averaged).squeeze(-1) / self.TEMPERATURE
        if is_beyond is not None:
            scores = scores.masked_fill(is_beyond, -torch.inf)
        return scores.softmax(dim=-1)  # type: ignore[no-any-return]

    def forward(self, channels: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Pool `channels` [batch, size, tokens]: [batch, size]."""
        if mask is not None:
            channels = channels.masked_fill(~mask[:, None], torch.finfo(channels.dtype).min)
        ordered = descending(channels)
        if mask is not None:
            ordered = ordered.masked_fill(~mask.sort(dim=1, descending=True).values[:, None], 0.0)
        weights = self.weights(None if mask is None else mask.sum(dim=1), channels.shape[-1])
        return (ordered * weights[:, None]).sum(dim=-1)


def drop_tokens(states: torch.Tensor, mask: Mask) -> torch.Tensor:
    """The mask [batch, tokens] without the tokens that size augmentation drops; ranks draw as one process does."""
    rows = ranks.drawn_rows()
    count = len(states) if rows is None else rows.total
    draws = torch.rand(count, states.shape[1] + 1, device=states.device)
    draws = draws if rows is None else draws[rows.own]
    extent = draws[:, :1]
    is_dropped = (extent > 0.2) & (draws[:, 1:] < 0.2 * extent)
    is_dropped[:, 0] = False
    return ~is_dropped if mask is None else mask & ~is_dropped


class GpoFusion(TwoSided):
    """A linear map and a `PoolingOperator` for each layer, and a linear map of the text's vector."""

    WIDTH = 256

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        self.photo_linear = nn.Linear(shape.num_layers * shape.hidden_size, self.WIDTH)
        self.operators = nn.ModuleList(PoolingOperator() for _ in range(shape.num_layers))
        self.text_linear = nn.Linear(shape.text_size, self.WIDTH)
        self.dropout = Dropout(shape.dropout)
        nn.init.xavier_uniform_(self.photo_linear.weight)
        nn.init.zeros_(self.photo_linear.bias)
        self._make_match_head(self.WIDTH)

    def photo_summary(self, states: States, mask: Mask) -> torch.Tensor:
        if self.training:
            mask = drop_tokens(states[0], mask)
        parts = self.photo_linear.weight.T.chunk(len(states))
        pooled = [
            operator(NormedTokens(state).products(part), mask)
            for operator, state, part in zip(self.operators, states, parts, strict=True)
        ]
        return torch.stack(pooled).sum(dim=0)

    def photo_side(self, summary: torch.Tensor) -> torch.Tensor:
        return self.dropout(summary + self.photo_linear.bias)  # type: ignore[no-any-return]

    def text_side(self, unit: torch.Tensor) -> torch.Tensor:
        return self.text_linear(self.dropout(unit * self.shape.text_size**0.5))  # type: ignore[no-any-return]
