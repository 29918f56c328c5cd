"""Tokens are inserted into frozen encoders: a photo's before a text's, or bottleneck tokens into both (MBT)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.fusion.base import Blocks, Texts
from saffe_cache.fusion.block import EncoderBlock
from saffe_cache.fusion.known.correction import CorrectingFusion, Correction, masked
from saffe_cache.fusion.layers import Mask, States, masked_mean, summarize, zero_linear
from saffe_cache.fusion.library_block import LibraryBlock, make_block
from saffe_cache.fusion.options import FusionShape

GRID = 4
"""A photo's patches are averaged over a grid with this number of rows and columns; its class token is kept."""


class LimberFusion(CorrectingFusion):
    """LiMBeR (Merullo et al. 2022, arXiv 2209.15162): only a linear map of a photo's tokens enters the text encoder.

    The source has a causal language model and its loss. Here any text encoder continues from its layer, its input for
    `--layers text=0`, and the output reads the means over photo and text tokens. A photo's tokens are averaged to 17.
    Layer 0 is the output of the text encoder's embeddings: photo tokens are put before it, after the norm that ends
    BERT's embeddings, without position and type. A prefix of `inputs_embeds` would get norm, position and type, and
    would shift the text's positions; here the text keeps the positions of its cached states. Without photo tokens this
    is the plain encoder.

    It adds the (d + 1) e parameters of that map (590,592 between widths of 768), and (2 e + 1) k to read both means.
    """

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        width = shape.text_hidden_size
        super().__init__(shape, matched_size=width)
        self.project = nn.Linear(shape.hidden_size, width)
        self.text_blocks = nn.ModuleList(make_block(block) for block in blocks.text)
        self.out = zero_linear(2 * width, shape.text_size)

    def insert(self, tokens: torch.Tensor) -> torch.Tensor:
        """Photo tokens as the text encoder sees them."""
        return self.project(tokens)  # type: ignore[no-any-return]

    def prefix(self, states: States, mask: Mask, summary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What precedes the text, [pairs, tokens, e], and its mask."""
        photo, seen = inserted_tokens(states[-1], mask, has_class_token=self.shape.has_class_token)
        return self.insert(photo), seen

    def run(self, number: int, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Run one of the text encoder's blocks."""
        return self.text_blocks[number](tokens, mask)  # type: ignore[no-any-return]

    def correct(self, states: States, mask: Mask, texts: Texts | None, summary: torch.Tensor) -> Correction:
        tokens, seen = self.prefix(states, mask, summary)
        photo_seen, length = seen, tokens.shape[1]
        if texts is not None:
            tokens, seen = torch.cat([tokens, texts.states[0]], dim=1), torch.cat([seen, texts.mask], dim=1)
        for number in range(len(self.text_blocks)):
            tokens = self.run(number, tokens, seen)
        of_photo = masked_mean(tokens[:, :length], photo_seen)
        of_text = torch.zeros_like(of_photo)
        if texts is not None:
            of_text = masked(masked_mean(tokens[:, length:], texts.mask), texts.is_text)
        return Correction(self.out(torch.cat([of_photo, of_text], dim=-1)), tokens, seen)


class MagmaFusion(LimberFusion):
    """MAGMA (Eichenberg et al. 2021, arXiv 2112.05253): an adapter, a quarter as wide, after each frozen block.

    The source applies it to the outputs of a block's halves, before the residual sum; here it follows the block. The
    source also trains its image encoder, which a cache cannot. Each adapter adds e² / 2 + 5 e / 4
    parameters to LiMBeR's.
    """

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape, blocks)
        width = shape.text_hidden_size
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width // 4), nn.ReLU(), zero_linear(width // 4, width)) for _ in blocks.text
        )

    def run(self, number: int, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens = super().run(number, tokens, mask)
        return tokens + self.adapters[number](tokens)  # type: ignore[no-any-return]


class DeepInsertFusion(LimberFusion):
    """DeepInsert (arXiv 2504.19327): photo tokens enter at a layer above the input; earlier layers never see them.

    The source retrains its language model and counts the photo's tokens in the text's positions; here everything is
    frozen, and only the text has positions. The norm of the projection, which starts at the root mean square of that
    layer's tokens, is our addition. The norm adds 2 e parameters to LiMBeR's.
    """

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape, blocks)
        self.norm = nn.LayerNorm(shape.text_hidden_size)
        nn.init.constant_(self.norm.weight, shape.text_rms)

    def insert(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(super().insert(tokens))  # type: ignore[no-any-return]


class FrozenFusion(LimberFusion):
    """Frozen (Tsimpoukelli et al. 2021, arXiv 2106.13884): a photo is a prefix of 2 tokens, a linear map of one vector.

    LiMBeR maps each of a photo's tokens; Frozen its summary, to both tokens at once. The source trains its image
    encoder (NF-ResNet-50) through a language model of 7 billion parameters, on the text's likelihood alone; here the
    encoder is a frozen one, the summary the class token and the mean of the others, and the vector that searches reads
    the means over prefix and text, as LiMBeR's does. `saffe caption --layer 0` trains the prefix on the likelihood.

    It adds 2 (s + 1) e parameters, for a summary of width s, and (2 e + 1) k to read both means.
    """

    NUM_TOKENS = 2

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape, blocks)
        self.project = nn.Linear(shape.summary_size, self.NUM_TOKENS * shape.text_hidden_size)

    def prefix(self, states: States, mask: Mask, summary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.project(summary).unflatten(-1, (self.NUM_TOKENS, -1))
        return tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool)


def inserted_tokens(
    state: torch.Tensor, mask: Mask, *, has_class_token: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a photo that are inserted, and their mask: the first, and means over a 4 by 4 grid of the others.

    If the others form no square, means over 16 equal stretches of them; of padded ones, over stretches of the real
    tokens of each. If an input has fewer than 17, all of them. Without a class token, the grid covers all tokens.
    """
    in_front = 1 if has_class_token else 0
    first, others = state[:, :in_front], state[:, in_front:].transpose(1, 2)
    count = others.shape[2]
    if count <= GRID * GRID:
        return state, state.new_ones(state.shape[:2], dtype=torch.bool) if mask is None else mask
    if mask is not None:
        weights, seen = _stretches(mask[:, in_front:].sum(dim=1), count)
        tokens = torch.cat([first, (others @ weights.to(others.dtype)).transpose(1, 2)], dim=1)
        return tokens, torch.cat([mask[:, :in_front], seen], dim=1)
    side = round(count**0.5)
    if side * side == count:
        pooled = functional.adaptive_avg_pool2d(others.reshape(*others.shape[:2], side, side), GRID).flatten(2)
    else:
        pooled = functional.adaptive_avg_pool1d(others, GRID * GRID)
    tokens = torch.cat([first, pooled.transpose(1, 2)], dim=1)
    return tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool)


def _stretches(lengths: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [batch, count, 16] of the means over equal stretches of the first `lengths` [batch] tokens, and bool
    [batch, 16]: which of these means there are. Fewer than 16 tokens are stretches of one."""
    number, place = torch.arange(GRID * GRID, device=lengths.device), torch.arange(count, device=lengths.device)
    seen, stretched = number < lengths[:, None], lengths[:, None].clamp(min=GRID * GRID)
    first, after = number * stretched // (GRID * GRID), -((number + 1) * -stretched // (GRID * GRID))
    inside = (place[:, None] >= first[:, None]) & (place[:, None] < after[:, None]) & seen[:, None]
    return inside / inside.sum(dim=1, keepdim=True).clamp(min=1), seen


class BottleneckFusion(CorrectingFusion):
    """MBT (Nagrani et al. 2021, arXiv 2107.00135, sec. 3.2): both encoders exchange information only through 4 tokens.

        [x; z_x] = block_x([x; z]),   [t; z_t] = block_t([t; z]),   z = (z_x + z_t) / 2

    Both continue from their first given layer; here the blocks stay frozen. The 4 tokens train, two maps between the
    widths if these differ, and a linear map of both outputs' summaries, which replaces the averaged logits. Without a
    text, z is z_x. Bottlenecks precede the tokens, so that padding does not move them (MPNet counts positions); in a
    causal text encoder they follow the tokens, which then do not see them.

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
        self.out = zero_linear((2 if shape.has_class_token else 1) * width + 2 * text_width, shape.text_size)

    def correct(self, states: States, mask: Mask, texts: Texts | None, summary: torch.Tensor) -> Correction:
        photo, bottlenecks = states[0], self.bottlenecks.expand(states[0].shape[0], -1, -1)
        text = None if texts is None else texts.states[0]
        for photo_block, text_block in zip(self.photo_blocks, self.text_blocks, strict=True):
            photo, of_photo = _step(photo_block, photo, mask, bottlenecks)
            if texts is None or text is None:
                bottlenecks = of_photo
                continue
            text, of_text = _step(text_block, text, texts.mask, self.to_text(bottlenecks))
            both = (of_photo + self.to_photo(of_text)) / 2
            bottlenecks = torch.where(texts.is_text[..., None], both, of_photo)
        seen = summarize([photo], mask, has_class_token=self.shape.has_class_token)
        if texts is None or text is None:
            text_summary = seen.new_zeros(seen.shape[0], 2 * self.shape.text_hidden_size)
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
