"""A frozen block of a text encoder as one more layer of the photo encoder (Pang et al.)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.core.features import BlockSpec, BlockWeights
from saffe_cache.fusion.base import Blocks, Texts
from saffe_cache.fusion.block import EncoderBlock
from saffe_cache.fusion.known.correction import CorrectingFusion, Correction
from saffe_cache.fusion.layers import Mask, States, summarize, zero_linear
from saffe_cache.fusion.library_block import LibraryBlock, make_block
from saffe_cache.fusion.options import FusionShape


class PangFusion(CorrectingFusion):
    """Pang et al. 2023 (arXiv 2310.12973, sec. 3): a photo's tokens pass a frozen block of a language model.

        y = W_2 rms( block( W_1 norm(x) ) )        correction = W_3 summary(y)

    As in the source and its released code, the maps W_1 and W_2 have no bias, nothing bypasses the block (its own
    residuals stay), an RMS norm without a learned gain follows it, and photo tokens have no order: no causal mask, and
    neither rotary nor relative positions. The block is the last of the text encoder, or that of `--layers text=L`; any
    text encoder's will do, not only a causal language model's.

    The source trains the photo encoder along with the maps, and its own head on the class token. Here the photo encoder
    is frozen, so its tokens are normed (without gain) before W_1; the head is the frame's, which also keeps the linear
    map of the photo's plain summary. With zero maps it is that plain head. No text tokens are read.

    It adds 2 d e parameters and those of W_3, (2 d + 1) k, or (d + 1) k without a class token.
    """

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        width, text_width = shape.hidden_size, shape.text_hidden_size
        self.text_blocks = nn.ModuleList([without_order(blocks.text[0])])
        self.enter = nn.Linear(width, text_width, bias=False)
        self.leave = nn.Linear(text_width, width, bias=False)
        self.out = zero_linear(shape.summary_size // shape.num_layers, shape.text_size)

    def correct(self, states: States, mask: Mask, texts: Texts | None, summary: torch.Tensor) -> Correction:
        normed = functional.layer_norm(states[-1], states[-1].shape[-1:])
        tokens = self.text_blocks[0](self.enter(normed), mask)
        tokens = self.leave(functional.rms_norm(tokens, tokens.shape[-1:], eps=1e-6))
        seen = summarize([tokens], mask, has_class_token=self.shape.has_class_token)
        return Correction(self.out(seen), tokens, mask)


def without_order(weights: BlockWeights) -> EncoderBlock | LibraryBlock:
    """A frozen block to which its tokens are a set: each sees all, wherever they are.

    Raises:
        ValueError: the block of this family cannot do without order.
    """
    if isinstance(weights.spec, BlockSpec):
        spec = replace(weights.spec, is_causal=False, relative_attention_num_buckets=0)
        return EncoderBlock(BlockWeights(spec, weights.tensors))
    block = make_block(weights)
    assert isinstance(block, LibraryBlock)
    block.forget_order()
    block.require_no_positions("pang")
    return block
