"""Bottleneck tokens (MBT, Nagrani et al. 2021, arXiv 2107.00135, sec. 3.2)."""

from __future__ import annotations

import torch
from torch import nn

from saffe_cache.fusion.base import Blocks, Texts
from saffe_cache.fusion.block import EncoderBlock
from saffe_cache.fusion.known.correction import CorrectingFusion, Correction, masked
from saffe_cache.fusion.layers import Mask, States, summarize, zero_linear
from saffe_cache.fusion.library_block import LibraryBlock, make_block
from saffe_cache.fusion.options import FusionShape


class BottleneckFusion(CorrectingFusion):
    """Both encoders continue from their first given layer and exchange information only through 4 tokens.

        [x; z_x] = block_x([x; z]),   [t; z_t] = block_t([t; z]),   z = (z_x + z_t) / 2

    Here the blocks stay frozen. The 4 tokens train, two maps between the widths if these differ, and a linear map of
    both outputs' summaries, which replaces the averaged logits. Without a text, z is z_x. Bottlenecks precede the
    tokens, so that padding does not move them (MPNet counts positions); in a causal text encoder they follow the
    tokens, which then do not see them.

    It adds 4 d + (2 d + 2 e + 1) k parameters, and 2 d e + d + e more if the widths differ.
    """

    idle_with_null = ("to_text.", "to_photo.")
    NUM_BOTTLENECKS = 4

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        self.photo_blocks = nn.ModuleList(make_block(block) for block in blocks.gallery)
        self.text_blocks = nn.ModuleList(make_block(block) for block in blocks.text)
        for block in self.photo_blocks:
            if isinstance(block, LibraryBlock):
                block.require_no_positions("mbt")
        width, text_width = shape.hidden_size, shape.text_hidden_size
        self.bottlenecks = nn.Parameter(torch.randn(self.NUM_BOTTLENECKS, width) * 0.02)
        same = width == text_width
        self.to_text = nn.Identity() if same else nn.Linear(width, text_width)
        self.to_photo = nn.Identity() if same else nn.Linear(text_width, width)
        self.out = zero_linear(2 * (width + text_width), shape.text_size)

    def correct(self, states: States, mask: Mask, texts: Texts | None, summary: torch.Tensor) -> Correction:
        photo, bottlenecks = states[0], self.bottlenecks.expand(len(states[0]), -1, -1)
        text = None if texts is None else texts.states[0]
        for photo_block, text_block in zip(self.photo_blocks, self.text_blocks, strict=True):
            photo, of_photo = _step(photo_block, photo, mask, bottlenecks)
            if texts is None or text is None:
                bottlenecks = of_photo
                continue
            text, of_text = _step(text_block, text, texts.mask, self.to_text(bottlenecks))
            both = (of_photo + self.to_photo(of_text)) / 2
            bottlenecks = torch.where(texts.is_text[..., None], both, of_photo)
        seen = summarize([photo], mask)
        if texts is None or text is None:
            text_summary = seen.new_zeros(len(seen), 2 * self.shape.text_hidden_size)
        else:
            text_summary = masked(summarize([text], texts.mask), texts.is_text)
        return Correction(self.out(torch.cat([seen, text_summary], dim=-1)), photo, mask)


def _step(
    block: nn.Module, tokens: torch.Tensor, mask: Mask, bottlenecks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one block over tokens and bottlenecks, and return both."""
    assert isinstance(block, (EncoderBlock, LibraryBlock))
    parts = [bottlenecks, tokens]
    masks = None if mask is None else [mask.new_ones(bottlenecks.shape[:2]), mask]
    if block.spec.is_causal:
        parts, masks = parts[::-1], masks and masks[::-1]
    updated = block(torch.cat(parts, dim=1), None if masks is None else torch.cat(masks, dim=1))
    first, second = updated.split([part.shape[1] for part in parts], dim=1)
    return (first, second) if block.spec.is_causal else (second, first)
