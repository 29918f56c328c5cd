"""ALBEF (Li et al. 2021, arXiv 2107.07651), and BLIP after it: contrast the modalities alone, match what is fused."""

from __future__ import annotations

import math

import torch
from torch import nn

from saffe_cache.fusion.base import Blocks, Fused, Texts
from saffe_cache.fusion.block import EncoderBlock
from saffe_cache.fusion.known.correction import CorrectingFusion, Correction, masked
from saffe_cache.fusion.layers import Mask, States, masked_mean, zero_linear
from saffe_cache.fusion.library_block import make_block
from saffe_cache.fusion.options import FusionShape


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

    def correct(self, states: States, mask: Mask, texts: Texts | None, summary: torch.Tensor) -> Correction:
        if texts is None:
            return Correction(None, states[-1].new_zeros(len(states[-1]), 1, self.shape.text_hidden_size), None)
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
