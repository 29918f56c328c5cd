"""Fusions that say whether a photo and a text belong together: two logits a pair.

After "Feature Alignment Determines Fusion Strategy" (arXiv 2606.01207), sections 3 and 4.3, whose text, parameter
counts and FLOPs do not agree with each other: `FUSIONS` names each reading, with its parameters at widths of 512.

`cross` is the simplest that has the paper's 757K. With one vector a modality there is one key, the softmax over it is
1, and attention is the value: the weights of queries and keys within the attention get no gradient, and the output of
`cross` and `cross_equations` does not depend on the modality that asks (the text, in eq. 2). The others see that
modality by their residual alone, where it is added to the other's value: they are a concatenation with more layers.
Only `tokens` attends.

A fusion needs vectors, or hidden states of tokens, of any width; no weights of the encoder, so that an encoder without
queries, keys and values (a CNN) would do: its feature map's places are its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

FUSIONS: Mapping[str, str] = {
    "concat": "Linear(1024, 256), and the head: ReLU, Linear(256, 128), ReLU, Linear(128, 2); at widths of 512 295,554 "
    "parameters, the paper's 296K",
    "concat_linear": "concat without the first ReLU: the paper's eq. 1 as it is written; 295,554",
    "concat_wide": 'concat with Linear(256, 256) in the head: its "hidden dim 256" taken at its word; 328,706',
    "cross": "three Linear(512, 256), MultiheadAttention(256, 4), Linear(256, 256), LayerNorm, the head of concat; "
    "756,610 at widths of 512, the paper's 757K; blind to what asks",
    "cross_residual": "cross, added to what asks before the LayerNorm; 756,610",
    "cross_residual_linear": "cross_residual without the first ReLU of the head; 756,610",
    "cross_two_norms": "a transformer's block, two residuals and two LayerNorms; 757,122",
    "cross_equations": "eq. 2 and 3 alone, 3hd + h = 393,472, and the head; 426,626; blind to what asks",
    "tokens": "cross_residual over cached hidden states: many keys, so that attention can choose; 756,610",
}
"""What each is, and its parameters at widths of 512."""
Asks = Literal["text", "photo"]
HIDDEN, HEAD_HIDDEN, HEADS, DROPOUT = 256, 128, 4, 0.1


def make_fusion(name: str, photo_width: int, text_width: int, asks: Asks = "text") -> nn.Module:
    """With starting weights from torch's generator.

    All take sequences, photos [n, tokens, d] and texts [n, tokens, d], and the texts' mask, bool [n, tokens]; a vector
    is a sequence of one. They give logits [n, 2]: another's, its own.
    """
    assert name in FUSIONS, name
    if name.startswith("concat"):
        return Concat(photo_width, text_width, name)
    if name == "cross_equations":
        return CrossEquations(photo_width, text_width, asks)
    return Cross(photo_width, text_width, asks, name)


class Concat(nn.Module):
    """Eq. 1, and the head."""

    def __init__(self, photo_width: int, text_width: int, name: str = "concat") -> None:
        super().__init__()
        self.project = nn.Linear(photo_width + text_width, HIDDEN)
        self.head = _head(HIDDEN if name == "concat_wide" else HEAD_HIDDEN, is_linear=name == "concat_linear")

    def forward(self, photos: torch.Tensor, texts: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        """Of one vector each; the mask is all True."""
        logits: torch.Tensor = self.head(self.project(torch.cat([photos[:, 0], texts[:, 0]], dim=1)))
        return logits


class Cross(nn.Module):
    """The tokens of one modality ask those of the other; the mean of what they find goes to the head."""

    def __init__(self, photo_width: int, text_width: int, asks: Asks = "text", name: str = "cross_residual") -> None:
        super().__init__()
        asking, asked = (text_width, photo_width) if asks == "text" else (photo_width, text_width)
        self.asks, self.has_residual = asks, name != "cross"
        self.query, self.key, self.value = nn.Linear(asking, HIDDEN), nn.Linear(asked, HIDDEN), nn.Linear(asked, HIDDEN)
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)
        self.inner_norm = nn.LayerNorm(HIDDEN) if name == "cross_two_norms" else None
        self.output = nn.Linear(HIDDEN, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = _head(HEAD_HIDDEN, is_linear=name == "cross_residual_linear")

    def forward(self, photos: torch.Tensor, texts: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        asking, asked = (texts, photos) if self.asks == "text" else (photos, texts)
        queries = self.query(asking)
        ignored = None if self.asks == "text" or texts.shape[1] == 1 else ~text_mask
        found, _ = self.attention(
            queries, self.key(asked), self.value(asked), key_padding_mask=ignored, need_weights=False
        )
        if self.inner_norm is not None:
            queries = found = self.inner_norm(queries + found)
        found = self.output(found)
        found = self.norm(queries + found if self.has_residual else found)
        mean = _masked_mean(found, text_mask) if self.asks == "text" else found.mean(dim=1)
        logits: torch.Tensor = self.head(mean)
        return logits


class CrossEquations(nn.Module):
    """Eq. 2 and 3: queries, keys and values without biases, one head of attention; the h of "3hd + h" is one bias."""

    def __init__(self, photo_width: int, text_width: int, asks: Asks = "text") -> None:
        super().__init__()
        asking, asked = (text_width, photo_width) if asks == "text" else (photo_width, text_width)
        self.asks = asks
        self.query, self.key, self.value = (nn.Linear(width, HIDDEN, bias=False) for width in (asking, asked, asked))
        self.bias = nn.Parameter(torch.zeros(HIDDEN))
        self.head = _head(HEAD_HIDDEN)

    def forward(self, photos: torch.Tensor, texts: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        """Of one vector each; the mask is all True."""
        asking, asked = (texts, photos) if self.asks == "text" else (photos, texts)
        found = functional.scaled_dot_product_attention(self.query(asking), self.key(asked), self.value(asked))
        logits: torch.Tensor = self.head(found[:, 0] + self.bias)
        return logits


def _head(hidden: int, *, is_linear: bool = False) -> nn.Sequential:
    """The "two-layer MLP classifier", of a fused vector."""
    entry = [] if is_linear else [nn.ReLU(), nn.Dropout(DROPOUT)]
    return nn.Sequential(*entry, nn.Linear(HIDDEN, hidden), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(hidden, 2))


def _masked_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.to(tokens.dtype)[..., None]
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1)
