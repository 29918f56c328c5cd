"""The FusionAlign Module: gallery tokens, with or without a text beside them, into the space of the queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.features import BlockWeights
from saffe_cache.fusion.decoders import PaperDecoder, ReuseDecoder
from saffe_cache.fusion.heads import AttentionHead, FlattenHead, MatchHead, MeanHead, TextMap, summarize
from saffe_cache.fusion.reference import ReferenceDecoder
from saffe_cache.fusion.shape import FamShape

_KINDS: dict[str, type[ReuseDecoder | PaperDecoder | ReferenceDecoder]] = {
    "reuse": ReuseDecoder,
    "paper": PaperDecoder,
    "reference": ReferenceDecoder,
}

Blocks = Sequence[tuple[BlockWeights, BlockWeights]]


class Texts(NamedTuple):
    """Texts that lie beside gallery inputs; a row whose mask holds no True is the null text."""

    states: Sequence[torch.Tensor]
    """P times [texts, tokens, text width]; empty for a fusion that takes no tokens."""
    mask: torch.Tensor
    """bool [texts, tokens]"""
    vectors: torch.Tensor
    """[texts, text_size], the text encoder's own."""

    def without(self, is_dropped: torch.Tensor) -> Texts:
        """The same, with the null text in some rows, bool [texts]."""
        return self._replace(mask=self.mask & ~is_dropped[:, None])


class Pairing(NamedTuple):
    """Which gallery input is fused with which text: int64 [pairs] each."""

    gallery: torch.Tensor
    text: torch.Tensor


class Fused(NamedTuple):
    """One row each pair."""

    vectors: torch.Tensor
    """Unit vectors [pairs, text_size]."""
    states: Sequence[torch.Tensor]
    """What the head pooled: P times [pairs, tokens, width]."""
    mask: torch.Tensor | None


class FusionAlignModule(nn.Module):
    """Gallery side f(x, text or null) and query side g(text), both as unit vectors.

    `linear` pools the cached states themselves: a text beside them enters as its own vector alone (`adds_text`), which
    is late fusion. `concat` shows that vector to the head's MLP too, as `reuse` does. The decoders (`reuse`, `paper`,
    `reference`) let one modality's tokens attend to the other's in each layer, then pool. A text that is missing is
    the null text: one learned token a layer.
    """

    def __init__(self, shape: FamShape, blocks: Blocks = ()) -> None:
        """`blocks`: for each layer of a decoder, the gallery's block and the text's that consume it."""
        super().__init__()
        assert len(blocks) == (shape.num_layers if shape.has_decoder else 0)
        self.shape = shape
        self.layers, self.decoders = _make_decoders(shape, blocks)
        if shape.has_decoder:
            self.null_text = nn.Parameter(torch.randn(shape.num_layers, shape.text_hidden_size) * 0.02)
        self.head = _make_head(shape)
        self.query_map = TextMap(shape.text_size, shape.dropout) if shape.maps_queries else nn.Identity()
        if shape.adds_text:
            self.text_map = TextMap(shape.text_size, shape.dropout)
            self.text_weight = nn.Parameter(torch.ones(()))
        if shape.matches:
            self.match_head = MatchHead(shape.pooled_size, shape.num_layers, shape.text_size)

    def forward(
        self,
        states: Sequence[torch.Tensor],
        mask: torch.Tensor | None = None,
        texts: Texts | None = None,
        pairing: Pairing | None = None,
    ) -> torch.Tensor:
        """Unit vectors [pairs, text_size].

        Args:
            states: P times [inputs, tokens, hidden_size].
            mask: bool [inputs, tokens]; None where no token is padded.
            texts: one for each input, or as `pairing` says; None is the null text for all.
            pairing: None fuses row i with row i.
        """
        return self.fuse(states, mask, texts, pairing).vectors

    def fuse(
        self,
        states: Sequence[torch.Tensor],
        mask: torch.Tensor | None = None,
        texts: Texts | None = None,
        pairing: Pairing | None = None,
    ) -> Fused:
        """The vectors, and what they were pooled from; arguments as in `forward`."""
        fused, fused_mask = self.decode(states, mask, texts, pairing)
        chosen, is_text = None, None
        if texts is not None:
            index = pairing.text if pairing else None
            chosen, is_text = _rows(texts.vectors, index), _rows(texts.mask.any(dim=1, keepdim=True), index)
        vectors = self._pool(fused, fused_mask, self._summary(states, mask, pairing), chosen, is_text)
        vectors = functional.normalize(vectors, dim=-1)
        if self.shape.adds_text and chosen is not None:
            vectors = functional.normalize(vectors + self.text_weight * self.text_map(chosen) * is_text, dim=-1)
        return Fused(vectors, fused, fused_mask)

    def decode(
        self,
        states: Sequence[torch.Tensor],
        mask: torch.Tensor | None = None,
        texts: Texts | None = None,
        pairing: Pairing | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """What the head pools, and its mask: the states themselves, or the decoders' outputs, one row each pair."""
        if not self.shape.has_decoder:
            index = pairing.gallery if pairing else None
            return [_rows(state, index) for state in states], _mask_rows(mask, index)
        text_states, text_mask = self._with_null(texts)
        indices = self._indices(len(states[0]), texts, pairing)
        sides = ((states, mask, indices.gallery), (text_states, text_mask, indices.text))
        (asking, asking_mask, asking_index), (asked, asked_mask, asked_index) = (
            sides if self.shape.query_side == "gallery" else sides[::-1]
        )
        fused = []
        for number, layer in enumerate(self.layers):
            decoder: Any = self.decoders[number % len(self.decoders)]
            entered = decoder.enter(layer, asking[number], asking_mask)
            keys, values = decoder.keys_values(layer, asked[number])
            fused.append(
                decoder(
                    layer,
                    _rows(asking[number], asking_index),
                    _rows(entered, asking_index),
                    (_rows(keys, asked_index), _rows(values, asked_index)),
                    _mask_rows(asked_mask, asked_index),
                )
            )
        return fused, _mask_rows(asking_mask, asking_index)

    def encode_queries(self, vectors: torch.Tensor) -> torch.Tensor:
        """Unit vectors [batch, text_size] of the text encoder's own vectors."""
        return functional.normalize(self.query_map(vectors), dim=-1)

    def match(self, fused: Fused, queries: torch.Tensor) -> torch.Tensor:
        """Logits [pairs] that photo and text belong together; `queries` are the texts' unit vectors."""
        return self.match_head(fused.states, fused.mask, fused.vectors, queries)  # type: ignore[no-any-return]

    def freeze_unused(self, *, null_only: bool) -> None:
        """Take out of training what is not to train, and what no gradient reaches (but `reference` stays as released).

        With null text alone a softmax is over one token: in the cross-attention where the gallery asks, in the
        self-attention and the pooling where the text does.
        """
        if self.shape.freezes_decoder and self.shape.has_decoder:
            self.decoders.requires_grad_(False)
            self.null_text.requires_grad_(False)
        if not null_only or self.shape.fusion not in ("reuse", "paper"):
            return
        idle = _IDLE_WHERE_GALLERY_ASKS if self.shape.query_side == "gallery" else _IDLE_WHERE_TEXT_ASKS
        for name, parameter in self.named_parameters():
            if any(part in name for part in idle):
                parameter.requires_grad_(False)

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, object]]:
        """Groups for AdamW: matrices decay, all else does not; gates and pooling queries learn faster, texts slower."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                speed = next((speed for part, speed in _SPEEDS.items() if part in name), 1.0)
                decay = weight_decay if parameter.ndim > 1 and speed == 1.0 and name != "null_text" else 0.0
                groups.setdefault((speed, decay), []).append(parameter)
        return [
            {"params": parameters, "lr": learning_rate * speed, "weight_decay": decay}
            for (speed, decay), parameters in groups.items()
        ]

    def _with_null(self, texts: Texts | None) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """The texts' states, with the learned token in the place of a null text."""
        if texts is None:
            return [token[None, None] for token in self.null_text], None
        is_null = ~texts.mask.any(dim=1)
        states = [
            torch.where(is_null[:, None, None], token, state)
            for token, state in zip(self.null_text, texts.states, strict=True)
        ]
        mask = texts.mask.clone()
        mask[:, 0] |= is_null
        return states, mask

    def _indices(self, num_inputs: int, texts: Texts | None, pairing: Pairing | None) -> _Indices:
        """Rows of each side; the one row of a null text serves all inputs."""
        gallery = pairing.gallery if pairing else None
        if texts is not None:
            return _Indices(gallery, pairing.text if pairing else None)
        if self.shape.query_side == "gallery":
            return _Indices(gallery, None)
        num_pairs = num_inputs if gallery is None else len(gallery)
        return _Indices(gallery, torch.zeros(num_pairs, dtype=torch.int64, device=self.null_text.device))

    def _summary(
        self, states: Sequence[torch.Tensor], mask: torch.Tensor | None, pairing: Pairing | None
    ) -> torch.Tensor | None:
        """Of the gallery's own tokens, where texts ask and the fused tokens are theirs; else of what is pooled."""
        if not self.shape.has_decoder or self.shape.query_side == "gallery" or self.shape.head != "attention":
            return None
        return _rows(summarize(states, mask), pairing.gallery if pairing else None)

    def _pool(
        self,
        fused: Sequence[torch.Tensor],
        mask: torch.Tensor | None,
        summary: torch.Tensor | None,
        beside: torch.Tensor | None,
        is_text: torch.Tensor | None,
    ) -> torch.Tensor:
        if self.shape.head != "attention":
            return self.head(fused, mask)  # type: ignore[no-any-return]
        if not self.shape.head_sees_text:
            return self.head(fused, mask, summary)  # type: ignore[no-any-return]
        if beside is None or is_text is None:
            beside = fused[0].new_zeros(len(fused[0]), self.shape.text_size)
        else:
            beside = functional.normalize(beside, dim=-1) * self.shape.text_size**0.5 * is_text
        return self.head(fused, mask, summary, beside)  # type: ignore[no-any-return]


class _Indices(NamedTuple):
    gallery: torch.Tensor | None
    text: torch.Tensor | None


_SPEEDS = {"query_map": 0.15, "text_map": 0.15, "text_weight": 20.0, "head.pool_queries": 2.5, ".gate": 5.0}
"""Learning rates as multiples; parts of parameters' names."""
_IDLE_WHERE_GALLERY_ASKS = ("cross_attention.query", "cross_attention.key.")
_IDLE_WHERE_TEXT_ASKS = ("self_attention.weights.query", "self_attention.weights.key", "head.pool_queries")
"""Parts of parameters' names: what no gradient reaches with null text alone."""


def _rows(values: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return values if index is None else values[index]


def _mask_rows(mask: torch.Tensor | None, index: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else _rows(mask, index)


def _make_decoders(shape: FamShape, blocks: Blocks) -> tuple[nn.ModuleList, nn.ModuleList]:
    """What belongs to each layer, and what trains; a shared decoder starts as the last layer's."""
    if not shape.has_decoder:
        return nn.ModuleList(), nn.ModuleList()
    kind = _KINDS[shape.fusion]
    ordered = [pair if shape.query_side == "gallery" else pair[::-1] for pair in blocks]
    decoders = [kind(*pair) for pair in (ordered[-1:] if shape.shares_decoder else ordered)]
    return nn.ModuleList([kind.layer_of(*pair) for pair in ordered]), nn.ModuleList(decoders)


def _make_head(shape: FamShape) -> nn.Module:
    if shape.head == "attention":
        return AttentionHead(
            shape.pooled_size,
            shape.num_layers,
            shape.text_size,
            summary_size=2 * shape.num_layers * shape.hidden_size,
            beside_size=shape.text_size if shape.head_sees_text else 0,
            dropout=shape.dropout,
        )
    if shape.head == "mean":
        return MeanHead(shape.pooled_size, shape.num_layers, shape.text_size)
    return FlattenHead(
        shape.pooled_size, shape.num_layers, shape.num_tokens, shape.text_size, has_relu=shape.fusion == "reference"
    )
