"""Text tokens attend to a photo's in a frozen encoder: before its blocks (Flamingo), between their halves (ALBEF).

Flamingo: Alayrac et al. 2022, arXiv 2204.14198. ALBEF: Li et al. 2021, arXiv 2107.07651; BLIP after it.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.fusion.base import Blocks, Fused, Texts
from saffe_cache.fusion.block import EncoderBlock, key_weights, split_heads
from saffe_cache.fusion.known.correction import CorrectingFusion, Correction, masked
from saffe_cache.fusion.layers import Learning, Mask, States, masked_mean, zero_linear
from saffe_cache.fusion.library_block import make_block
from saffe_cache.fusion.options import FusionShape

_HEADS, _HEAD_SIZE, _LATENTS, _DEPTH = 8, 64, 64, 2
"""Of Flamingo."""


class FlamingoFusion(CorrectingFusion):
    """The photo becomes 64 latents; the text's tokens attend to them before each frozen block, from its layer on.

    The output reads the text's tokens after the last block, and the latents. There are two resampler layers, since the
    source's 6 are many for one photo. The source has a causal language model; here any text encoder works.

    It adds 16 d² + 4,175 d parameters of the resampler (12,643,584 for d = 768), 8 e² + 1,028 e + 1,024 d + 2 for each
    block of the text encoder (6,294,530 for d = e = 768), and (d + e + 1) k.
    """

    idle_with_null = ("gated.",)

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape, matched_size=shape.text_hidden_size)
        width, text_width = shape.hidden_size, shape.text_hidden_size
        self.resampler = Resampler(width)
        self.gated = nn.ModuleList(GatedCrossAttention(text_width, width) for _ in blocks.text)
        self.text_blocks = nn.ModuleList(make_block(block) for block in blocks.text)
        self.out = zero_linear(width + text_width, shape.text_size)

    @property
    def attending(self) -> list[nn.Module]:
        return [module for module in self.resampler.modules() if isinstance(module, _Attention)]

    def correct(self, states: States, mask: Mask, texts: Texts | None, summary: torch.Tensor) -> Correction:
        latents = self.resampler(states[-1], mask)
        if texts is None:
            text = latents.new_zeros(latents.shape[0], 0, self.shape.text_hidden_size)
            text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
            text_mean = latents.new_zeros(latents.shape[0], self.shape.text_hidden_size)
        else:
            text, text_mask = texts.states[0], texts.mask
            for gated, block in zip(self.gated, self.text_blocks, strict=True):
                text = block(gated(text, latents), text_mask)
            text_mean = masked(masked_mean(text, text_mask), texts.is_text)
        return Correction(self.out(torch.cat([latents.mean(dim=1), text_mean], dim=-1)), text, text_mask)


class Resampler(nn.Module):
    """Learned latents attend to a photo's tokens and to themselves (sec. 3.1.1 and the pseudocode in the appendix)."""

    def __init__(self, width: int, num_latents: int = _LATENTS, depth: int = _DEPTH) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, width))
        self.photo_position = nn.Parameter(torch.randn(width))
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"attention": _Attention(width, width, norms_context=True), "feed_forward": _FeedForward(width)}
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor, mask: Mask) -> torch.Tensor:
        """[batch, latents, d] of `tokens` [batch, tokens, d]."""
        tokens = tokens + self.photo_position
        latents = self.latents.expand(tokens.shape[0], -1, -1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(latents.shape[:2])], dim=1)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            attention, feed_forward = layer["attention"], layer["feed_forward"]
            latents = latents + attention(latents, tokens, mask)
            latents = latents + feed_forward(latents)
        return self.norm(latents)  # type: ignore[no-any-return]


class GatedCrossAttention(nn.Module):
    """y = x + tanh(a) XAttn(x, media);  y + tanh(b) FF(y), both gates closed at the start (eq. in sec. 3.1.2)."""

    def __init__(self, width: int, media_width: int) -> None:
        super().__init__()
        self.attention = _Attention(width, media_width, norms_context=False)
        self.feed_forward = _FeedForward(width)
        self.attention_gate, self.feed_forward_gate = Gate(), Gate()

    def forward(self, tokens: torch.Tensor, media: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, d] for `tokens` [batch, tokens, d] and `media` [batch, latents, width of the media]."""
        tokens = tokens + self.attention_gate(self.attention(tokens, media, None))
        return tokens + self.feed_forward_gate(self.feed_forward(tokens))  # type: ignore[no-any-return]


class Gate(nn.Module):
    """tanh of one learned number, which starts at 0."""

    learning: ClassVar = {"gate": Learning(5.0)}

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.gate) * values


class _Attention(nn.Module):
    """Pre-normed attention of 8 heads of width 64, without biases.

    `norms_context`: as in the resampler, which norms the context and uses the latents as keys and values too.
    """

    def __init__(self, width: int, context_width: int, *, norms_context: bool) -> None:
        super().__init__()
        inner = _HEADS * _HEAD_SIZE
        self.norm = nn.LayerNorm(width)
        self.context_norm = nn.LayerNorm(context_width) if norms_context else None
        self.query = nn.Linear(width, inner, bias=False)
        self.key_value = nn.Linear(context_width, 2 * inner, bias=False)
        self.output = nn.Linear(inner, width, bias=False)

    def forward(self, tokens: torch.Tensor, context: torch.Tensor, mask: Mask) -> torch.Tensor:
        queries, keys, values = self._projected(tokens, context)
        allowed = None if mask is None else mask[:, None, None, :]
        attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
        return self.output(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def attention_weights(self, tokens: torch.Tensor, context: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Weights of the context, in the resampler with the latents after it: [batch, heads * tokens, keys]."""
        queries, keys, _ = self._projected(tokens, context)
        return key_weights(queries, keys, mask)

    def _projected(self, tokens: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, [batch, heads, tokens, 64] each."""
        tokens = self.norm(tokens)
        if self.context_norm is not None:
            context = torch.cat([self.context_norm(context), tokens], dim=1)
        keys, values = (split_heads(part, _HEADS) for part in self.key_value(context).chunk(2, dim=-1))
        return split_heads(self.query(tokens), _HEADS), keys, values


class _FeedForward(nn.Sequential):
    def __init__(self, width: int) -> None:
        inner = nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        super().__init__(nn.LayerNorm(width), *inner)


class AlbefFusion(CorrectingFusion):
    """Upper blocks of the text encoder, each with a cross-attention to the photo's tokens between its halves, or before
    it where the halves of its family are unknown.

    With null text in the gallery the contrast (`info_nce`) is between photo and text alone, as in the source, and `out`
    does not train; with paired texts it trains the fused vector too. `matching` reads the first fused token (the last
    one of a causal text encoder) through Linear(e, 2), 1,538 parameters for e = 768. The source trains both encoders,
    with momentum copies, a queue and masked language modelling; here the blocks are frozen, and each cross-attention
    trains and starts closed.

    It adds 2 e² + 2 d e + 6 e + 2 d parameters for each block, (e + 1) k, and 2 (e + 1) if it matches.
    """

    idle_with_null = ("cross_attentions.", "out.")

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        width = shape.text_hidden_size
        self.text_blocks = nn.ModuleList(make_block(block) for block in blocks.text)
        self.cross_attentions = nn.ModuleList(
            _CrossAttention(width, shape.hidden_size, math.gcd(width, block.spec.num_attention_heads))
            for block in blocks.text
        )
        self.out = zero_linear(width, shape.text_size)
        self.is_causal = any(block.spec.is_causal for block in blocks.text)
        if shape.matches:
            self.match_head = nn.Linear(width, 2)

    @property
    def attending(self) -> list[nn.Module]:
        return list(self.cross_attentions)

    def correct(self, states: States, mask: Mask, texts: Texts | None, summary: torch.Tensor) -> Correction:
        if texts is None:
            return Correction(None, states[-1].new_zeros(states[-1].shape[0], 1, self.shape.text_hidden_size), None)
        tokens = texts.states[0]
        for block, cross_attention in zip(self.text_blocks, self.cross_attentions, strict=True):
            if isinstance(block, EncoderBlock):
                tokens = block.attend(tokens, texts.mask)
                tokens = block.feed_forward(tokens + cross_attention(tokens, states[-1], mask))
            else:
                tokens = block(tokens + cross_attention(tokens, states[-1], mask), texts.mask)
        vectors = masked(self.out(masked_mean(tokens, texts.mask)), texts.is_text)
        return Correction(vectors, tokens, texts.mask)

    def match(self, fused: Fused, queries: torch.Tensor) -> torch.Tensor:
        tokens = fused.states[0]
        place = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        if self.is_causal and fused.mask is not None:
            place = (fused.mask.sum(dim=1) - 1).clamp(min=0)
        chances = self.match_head(tokens[torch.arange(len(tokens), device=tokens.device), place])
        return chances[:, 1] - chances[:, 0]  # type: ignore[no-any-return]


class _CrossAttention(nn.Module):
    """torch's attention, with a norm on both sides, whose output starts at zero."""

    def __init__(self, width: int, context_width: int, num_heads: int) -> None:
        super().__init__()
        self.norm, self.context_norm = nn.LayerNorm(width), nn.LayerNorm(context_width)
        self.attention = nn.MultiheadAttention(
            width, num_heads, kdim=context_width, vdim=context_width, batch_first=True
        )
        nn.init.zeros_(self.attention.out_proj.weight)

    def forward(self, tokens: torch.Tensor, context: torch.Tensor, mask: Mask) -> torch.Tensor:
        """[batch, tokens, d] for `tokens` [batch, tokens, d] and `context` [batch, keys, d of the context]."""
        context = self.context_norm(context)
        padding = None if mask is None else ~mask
        attended, _ = self.attention(self.norm(tokens), context, context, padding, need_weights=False)
        return attended  # type: ignore[no-any-return]

    def attention_weights(self, tokens: torch.Tensor, context: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Weights of the context, [batch, heads * tokens, keys]."""
        context = self.context_norm(context)
        padding = None if mask is None else ~mask
        weights = self.attention(self.norm(tokens), context, context, padding, average_attn_weights=False)[1]
        return weights.flatten(1, 2)  # type: ignore[no-any-return]
