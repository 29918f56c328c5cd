"""The FusionAlign Module: maps gallery tokens, with or without a paired text, into the space of the queries."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.core.features import LibraryBlockSpec
from saffe_cache.fusion.base import ROW_BY_ROW, Blocks, Fused, Fusion, Pairing, Texts, gathered
from saffe_cache.fusion.decoders import OpaqueDecoder, PaperDecoder, ReuseDecoder
from saffe_cache.fusion.layers import AttentionHead, FlattenHead, Learning, Mask, MatchHead, MeanHead, States, summarize
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.reference import ReferenceDecoder

_NO_BLOCKS = Blocks()


class FusionAlignModule(Fusion):
    """The fusions `linear` and `concat`, and the frame of those with a decoder.

    `linear` pools the cached states themselves: a paired text enters only as its own vector (`pooled_text`), which is
    late fusion. `concat` also shows that vector to the head's MLP, as `reuse` does. A decoder (see the subclasses) lets
    one modality's tokens attend to the other's in each layer before they are pooled. A missing text is the null text:
    one learned token for each layer.

    Its parameters are those of the head, the decoders, that token, and the maps of queries and of added texts:
    3,106,305 (`linear`) and 3,500,289 (`concat`) with one layer, where all widths are 384.
    """

    learning: ClassVar = {**Fusion.learning, "null_text": Learning(decays=False)}
    decoder_class: ClassVar[type[ReuseDecoder | PaperDecoder | ReferenceDecoder] | None] = None
    freezes_idle: ClassVar[bool] = True
    """Whether parameters that get no gradient from null text are frozen if only null text is fused."""
    flatten_relu: ClassVar[bool] = False
    """Whether a flatten head ends with a ReLU."""

    def __init__(self, shape: FusionShape, blocks: Blocks = _NO_BLOCKS) -> None:
        """`blocks`: for each layer of a decoder, the gallery's block and the text's that consume it."""
        super().__init__(shape)
        assert len(blocks.gallery) == len(blocks.text) == (shape.num_layers if self.decoder_class else 0)
        self.layers, self.decoders = self._make_decoders(blocks)
        if self.decoder_class:
            self.null_text = nn.Parameter(torch.randn(shape.num_layers, shape.text_hidden_size) * 0.02)
        self.head = self._make_head()
        self._make_text_maps()
        if shape.matches:
            self.match_head = MatchHead(shape.pooled_size, shape.num_layers, shape.text_size)

    def fuse(
        self, states: States, mask: Mask = None, texts: Texts | None = None, pairing: Pairing = ROW_BY_ROW
    ) -> Fused:
        fused, fused_mask = self.decode(states, mask, texts, pairing)
        paired = None if texts is None else texts._replace(states=()).rows(pairing.text)
        vectors = self._pool(fused, fused_mask, self._summary(states, mask, pairing), paired)
        return Fused(self._add_text(functional.normalize(vectors, dim=-1), paired), fused, fused_mask)

    def decode(
        self, states: States, mask: Mask = None, texts: Texts | None = None, pairing: Pairing = ROW_BY_ROW
    ) -> tuple[list[torch.Tensor], Mask]:
        """What the head pools, one row for each pair, and its mask: the states themselves or the decoders' outputs."""
        if not self.decoder_class:
            return [gathered(state, pairing.gallery) for state in states], gathered(mask, pairing.gallery)
        sides = (states, mask, pairing.gallery), self._text_side(states[0].shape[0], texts, pairing)
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
                    gathered(asking[number], asking_index),
                    gathered(entered, asking_index),
                    (gathered(keys, asked_index), gathered(values, asked_index)),
                    gathered(asked_mask, asked_index),
                    gathered(asking_mask, asking_index),
                )
            )
        return fused, gathered(asking_mask, asking_index)

    @property
    def attending(self) -> list[nn.Module]:
        if self.decoder_class and self.shape.query_side == "text":
            crossing = [getattr(decoder, "cross_attention", None) for decoder in self.decoders]
            return [one for one in crossing if one is not None]
        return [self.head] if isinstance(self.head, AttentionHead) else []

    @property
    def fuses_first(self) -> bool:
        return self.decoder_class is not None and self.shape.query_side == "gallery"

    def linear_features(self, states: States, mask: Mask, texts: Texts | None) -> torch.Tensor:
        if self.fuses_first:
            states, mask = self.decode(states, mask, texts)
        return summarize(states, mask, has_class_token=self.shape.has_class_token)

    @property
    def linear_start(self) -> nn.Linear | None:
        return self.head.linear if isinstance(self.head, AttentionHead) else None

    def freeze_unused(self, *, null_only: bool) -> None:
        """Freeze what must not train and, if only null text is fused, what gets no gradient.

        A softmax is then over one token: in the cross-attention if the gallery has the queries, in the self-attention
        and the pooling if the text has them.
        """
        if self.shape.freeze_decoder and self.decoder_class:
            self.decoders.requires_grad_(False)
            self.null_text.requires_grad_(False)
        if not null_only or not self.freezes_idle:
            return
        idle = _IDLE[self.shape.query_side]
        for name, parameter in self.named_parameters():
            if any(part in name for part in idle):
                parameter.requires_grad_(False)

    def _text_side(
        self, num_inputs: int, texts: Texts | None, pairing: Pairing
    ) -> tuple[States, Mask, torch.Tensor | None]:
        """The texts' states and mask, and which row of them each pair takes. A null text is one learned token."""
        if texts is None:
            num_pairs = num_inputs if pairing.gallery is None else len(pairing.gallery)
            same = torch.zeros(num_pairs, dtype=torch.int64, device=self.null_text.device)
            # where the gallery asks, the one row of keys serves all inputs
            return list(self.null_text[:, None, None]), None, None if self.shape.query_side == "gallery" else same
        is_null = ~texts.mask.any(dim=1)
        states = [
            torch.where(is_null[:, None, None], token, state)
            for token, state in zip(self.null_text, texts.states, strict=True)
        ]
        mask = texts.mask.clone()
        mask[:, 0] |= is_null
        return states, mask, pairing.text

    def _summary(self, states: States, mask: Mask, pairing: Pairing) -> torch.Tensor | None:
        """Summary of the gallery's own tokens if the text has the queries, so that fused tokens are the text's.

        None otherwise: the head then summarises what it pools.
        """
        if not self.decoder_class or self.shape.query_side == "gallery" or self.shape.head != "attention":
            return None
        summary = summarize(states, mask, has_class_token=self.shape.has_class_token)
        return gathered(summary, pairing.gallery)

    def _pool(self, fused: States, mask: Mask, summary: torch.Tensor | None, paired: Texts | None) -> torch.Tensor:
        if self.shape.head != "attention":
            return self.head(fused, mask)  # type: ignore[no-any-return]
        extra = None
        if self.shape.head_sees_text and paired is None:
            extra = fused[0].new_zeros(fused[0].shape[0], self.shape.text_size)
        elif self.shape.head_sees_text and paired is not None:
            extra = functional.normalize(paired.vectors, dim=-1) * self.shape.text_size**0.5 * paired.is_text
        return self.head(fused, mask, summary, extra)  # type: ignore[no-any-return]

    def _make_decoders(self, blocks: Blocks) -> tuple[nn.ModuleList, nn.ModuleList]:
        """What belongs to each layer, and what trains; a shared decoder starts as the last layer's."""
        if self.decoder_class is None:
            return nn.ModuleList(), nn.ModuleList()
        sides = blocks if self.shape.query_side == "gallery" else blocks[::-1]
        ordered = list(zip(*sides, strict=True))
        kind: Any = self.decoder_class
        if kind is not ReferenceDecoder and any(isinstance(one.spec, LibraryBlockSpec) for one, _ in ordered):
            kind = OpaqueDecoder
        decoders = [kind(*pair) for pair in (ordered[-1:] if self.shape.share_decoder else ordered)]
        return nn.ModuleList([kind.layer_of(*pair) for pair in ordered]), nn.ModuleList(decoders)

    def _make_head(self) -> nn.Module:
        shape = self.shape
        pooled = shape.pooled_size, shape.num_layers
        if shape.head == "mean":
            return MeanHead(*pooled, shape.text_size)
        if shape.head == "flatten":
            return FlattenHead(*pooled, shape.num_tokens, shape.text_size, has_relu=self.flatten_relu)
        return AttentionHead(
            *(*pooled, shape.text_size),
            summary_size=shape.summary_size,
            extra_size=shape.text_size if shape.head_sees_text else 0,
            dropout=shape.dropout,
            has_class_token=shape.has_class_token,
        )


class ReuseFusion(FusionAlignModule):
    """`reuse`: the encoder's own next block, with a gated cross-attention."""

    decoder_class = ReuseDecoder


class PaperFusion(FusionAlignModule):
    """`paper`: eq. 1-4 of the SAFFE paper."""

    decoder_class = PaperDecoder


class ReferenceFusion(FusionAlignModule):
    """`reference`: the released SAFFE code, as it is."""

    decoder_class = ReferenceDecoder
    freezes_idle = False
    flatten_relu = True


_IDLE = {
    "gallery": ("cross_attention.query", "cross_attention.key."),
    "text": ("self_attention.weights.query", "self_attention.weights.key", "head.pool_queries"),
}
"""For each side that asks, parts of the names of parameters that get no gradient if only null text is fused."""
