"""What decides a fusion's parameters, as plain values that a run's folder can hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HeadName = Literal["attention", "mean", "flatten"]
QuerySide = Literal["gallery", "text"]
DECODERS = ("reuse", "paper", "reference")
"""Of the FAM's fusions, those in which one modality's tokens attend to the other's."""
FAM = (*DECODERS, "linear", "concat")
"""Fusions of the FusionAlignModule: SAFFE's, and `reuse` and `concat` in the same frame."""


@dataclass(frozen=True, kw_only=True)
class FamShape:
    """All that decides a fusion's parameters, as plain values."""

    fusion: str
    head: HeadName
    num_layers: int
    """P: layers of the gallery's tokens."""
    hidden_size: int
    """Width of the gallery's tokens."""
    num_tokens: int
    """Tokens of a gallery input."""
    text_hidden_size: int
    """Width of the text's tokens."""
    text_size: int
    """Width of the text encoder's own vector, which is also the width of the output."""
    query_side: QuerySide = "gallery"
    """Whose tokens are the queries of a decoder's cross-attention."""
    shares_decoder: bool = False
    """One decoder for all layers, instead of one each."""
    freezes_decoder: bool = False
    """Train the head alone: the decoder stays as the encoders' blocks made it."""
    adds_text: bool = False
    """Add the text's own vector, mapped, to the output: the residual path of a text in the gallery."""
    maps_queries: bool = True
    """Whether queries pass a learned map; else they are the text encoder's own vectors."""
    matches: bool = False
    """Whether there is a head for image-text matching."""
    num_blocks: int = 0
    """Blocks of an encoder that run on behind its layer, in fusions that do so."""
    text_rms: float = 1.0
    """Root mean square of the text's tokens, for a projection into their space to start from."""
    dropout: float = 0.5
    has_class_token: bool = True
    """Whether the gallery's first token stands for the whole input; feature maps of a CNN have places alone."""

    @property
    def summary_size(self) -> int:
        """Width of what `summarize` makes of a gallery input: 2 P d, or P d without a class token."""
        return (2 if self.has_class_token else 1) * self.num_layers * self.hidden_size

    @property
    def has_decoder(self) -> bool:
        return self.fusion in DECODERS

    @property
    def takes_text(self) -> bool:
        """Whether a text beside a gallery input changes its vector."""
        return self.has_decoder or self.adds_text or self.head_sees_text or self.fusion not in FAM

    @property
    def head_sees_text(self) -> bool:
        """Whether the head's MLP sees the text's own vector."""
        return self.fusion == "concat" or (self.fusion == "reuse" and self.adds_text and self.head == "attention")

    @property
    def pooled_size(self) -> int:
        """Width of the tokens that the head pools: those of the modality that asks."""
        return self.text_hidden_size if self.has_decoder and self.query_side == "text" else self.hidden_size
