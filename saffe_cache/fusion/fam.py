"""The FusionAlign Module: gallery tokens, with or without a text beside them, into the space of the queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.features import BlockWeights
from saffe_cache.fusion.block import DecoderBlock
from saffe_cache.fusion.heads import AttentionHead, FlattenHead, MeanHead

FusionName = Literal["linear", "decoder"]
HeadName = Literal["attention", "mean", "flatten"]


@dataclass(frozen=True, kw_only=True)
class FamShape:
    """All that decides a FAM's parameters, as plain values."""

    fusion: FusionName
    head: HeadName
    num_layers: int
    """P: layers of each modality."""
    hidden_size: int
    """Width of the gallery's tokens."""
    num_tokens: int
    """Tokens of a gallery input."""
    text_size: int
    """Width of the text encoder's own vector, which is also the width of the output."""
    dropout: float = 0.5


class QueryMap(nn.Module):
    """The text encoder's vector into the shared space: starts as the identity, learns a small correction."""

    def __init__(self, size: int, dropout: float, inner_size: int = 512) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        inner, last = nn.Linear(size, inner_size), nn.Linear(inner_size, size)
        self.mlp = nn.Sequential(inner, nn.GELU(), nn.Dropout(dropout), last)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(size))
            for zeroed in (self.linear.bias, last.weight, last.bias):
                zeroed.zero_()

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """`vectors` [batch, size] of any length; their direction alone counts."""
        unit = functional.normalize(vectors, dim=-1)
        return self.linear(unit) + self.mlp(unit * unit.shape[-1] ** 0.5)  # type: ignore[no-any-return]


class FusionAlignModule(nn.Module):
    """Gallery side f(x, text or null) and query side g(text), both as unit vectors.

    `linear` pools the cached states themselves, so that text does not enter. `decoder` sends each layer
    through the encoder's next block with a gated cross-attention to the text, then pools. What is indexed
    is always f(x, null): a gallery that was fused with its own label would find itself.
    """

    def __init__(self, shape: FamShape, blocks: Sequence[tuple[BlockWeights, BlockWeights]] = ()) -> None:
        """`blocks`: for each layer of a decoder, the gallery's block and the text's that consume it."""
        super().__init__()
        assert len(blocks) == (shape.num_layers if shape.fusion == "decoder" else 0)
        self.shape = shape
        self.decoders = nn.ModuleList([DecoderBlock(gallery, text) for gallery, text in blocks])
        self.head = _make_head(shape)
        self.query_map = QueryMap(shape.text_size, shape.dropout)

    def forward(
        self,
        states: Sequence[torch.Tensor],
        mask: torch.Tensor | None = None,
        texts: Sequence[torch.Tensor] | None = None,
        text_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Unit vectors [batch, text_size].

        Args:
            states: P times [batch, tokens, hidden_size].
            mask: bool [batch, tokens]; None where no token is padded.
            texts: P times [batch, text tokens, text width]; None is the null text.
            text_mask: bool [batch, text tokens].
        """
        return functional.normalize(self.head(self.decode(states, mask, texts, text_mask), mask), dim=-1)

    def decode(
        self,
        states: Sequence[torch.Tensor],
        mask: torch.Tensor | None = None,
        texts: Sequence[torch.Tensor] | None = None,
        text_mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """What the head pools: the states themselves, or the decoders' outputs."""
        if not self.decoders:
            return list(states)
        contexts = texts if texts is not None else [None] * len(self.decoders)
        return [
            decoder(state, mask, context, text_mask)
            for decoder, state, context in zip(self.decoders, states, contexts, strict=True)
        ]

    def encode_queries(self, vectors: torch.Tensor) -> torch.Tensor:
        """Unit vectors [batch, text_size] of the text encoder's own vectors."""
        return functional.normalize(self.query_map(vectors), dim=-1)

    def freeze_text_path(self) -> None:
        """For training with null text alone: softmax over one key is 1, so queries and keys would get no gradient."""
        for decoder in self.decoders:
            attention = decoder.get_submodule("cross_attention")
            for part in ("query_norm", "query", "key"):
                attention.get_submodule(part).requires_grad_(False)

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, object]]:
        """Groups for AdamW: matrices decay, all else does not; pooling queries learn faster, the text side slower."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                speed = 0.15 if name.startswith("query_map") else 2.5 if name == "head.pool_queries" else 1.0
                decay = weight_decay if parameter.ndim > 1 and speed == 1.0 else 0.0
                groups.setdefault((speed, decay), []).append(parameter)
        return [
            {"params": parameters, "lr": learning_rate * speed, "weight_decay": decay}
            for (speed, decay), parameters in groups.items()
        ]


def _make_head(shape: FamShape) -> nn.Module:
    if shape.head == "attention":
        return AttentionHead(shape.hidden_size, shape.num_layers, shape.text_size, dropout=shape.dropout)
    if shape.head == "mean":
        return MeanHead(shape.hidden_size, shape.num_layers, shape.text_size)
    return FlattenHead(shape.hidden_size, shape.num_layers, shape.num_tokens, shape.text_size)
