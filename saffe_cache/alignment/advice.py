"""Which fusion the measures speak for: a rule of thumb, in numbers and words.

Photos alone in the gallery:

    no FAM     the encoders' own vectors find more than half of what a linear map finds (A_0 > 0.5 A_lin), or no map
               finds more than permuted pairs do
    decoder    an MLP finds more than the linear map, by a tenth (A_lin < 0.9 A_mlp), or tokens more than their means
    linear     otherwise: what can be found, a linear map finds

A text beside each photo:

    decoder    tokens find more than their means
    concat     otherwise: with one vector of each there is nothing for an attention to choose from

The decoder is made of the photo encoder's blocks. Where it has none (a CNN), the last of each list is advised instead.

"More" is more than noise: the 95 % interval of the paired difference lies above 0; in doubt no decoder is advised.
The numbers 0.5 and 0.9 are guesses. The rule's weakest point: the fusion `linear` is more than a linear map. It pools
tokens and has an MLP, so that what an MLP or tokens find need not take a decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Fusion = Literal["no FAM", "linear", "concat", "decoder"]
Gallery = Literal["photos alone", "a text beside each photo"]

ENOUGH_WITHOUT_MAP, ENOUGH_WITH_LINE = 0.5, 0.9
STANDING = (
    "A hypothesis, not an established rule: pipelines/alignment.py holds it against trained fusions. A small gain of "
    "an MLP or of tokens is not told from noise with so few photos, and more photos to train on may make one. "
    "Intervals are over the judged photos: another seed of the MLP, or other photos to fit on, are not in them."
)


class Gap(NamedTuple):
    """A paired difference of R@1 and its 95 % bootstrap interval over photos."""

    mean: float
    low: float
    high: float

    @property
    def is_gain(self) -> bool:
        """Beyond noise."""
        return self.low > 0


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """R@1 on judged photos, as fractions; None where it cannot be measured."""

    a_0: float | None
    """Of the encoders' own vectors, by cosine."""
    without_map: Gap | None
    """A_0 less half of A_lin."""
    a_lin: float
    a_mlp: float
    mlp_gain: Gap
    """A_mlp less A_lin."""
    null: float
    """The greater of both 95 % quantiles where pairs are permuted."""
    a_tok: float | None
    token_gain: Gap | None
    """A_tok less A_lin of the same hidden states."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One fusion, for one kind of gallery."""

    gallery: Gallery
    fusion: Fusion
    because: str


def advise(evidence: Evidence, *, has_texts_beside: bool, has_blocks: bool = True) -> list[Advice]:
    """By the rule above.

    Args:
        evidence: what was measured.
        has_texts_beside: whether items have texts of their own that may lie beside their photos: captions do; a class
            beside its photo would be the answer itself.
        has_blocks: whether the photo encoder has blocks, of which a decoder is made.
    """
    found = [_advice("photos alone", _of_photos(evidence), "linear", _reasons(evidence), has_blocks)]
    if has_texts_beside:
        fusion: Fusion = "decoder" if evidence.token_gain is not None and evidence.token_gain.is_gain else "concat"
        because = f"{_of_tokens(evidence)}{_of_nothing(evidence)}"
        found.append(_advice("a text beside each photo", fusion, "concat", because, has_blocks))
    return found


def _advice(gallery: Gallery, fusion: Fusion, simpler: Fusion, because: str, has_blocks: bool) -> Advice:
    """`simpler` in the place of a decoder that cannot be made."""
    if fusion == "decoder" and not has_blocks:
        fusion, because = simpler, f"{because}; a decoder, which that speaks for, needs blocks that this encoder lacks"
    return Advice(gallery=gallery, fusion=fusion, because=because)


def _of_photos(evidence: Evidence) -> Fusion:
    if _finds_nothing(evidence):
        return "no FAM"
    if evidence.without_map is not None and evidence.without_map.is_gain:
        return "no FAM"
    if evidence.mlp_gain.is_gain and evidence.a_lin < ENOUGH_WITH_LINE * evidence.a_mlp:
        return "decoder"
    if evidence.token_gain is not None and evidence.token_gain.is_gain:
        return "decoder"
    return "linear"


def _reasons(evidence: Evidence) -> str:
    """The numbers that the rule looked at, in percent."""
    own = "cannot be compared" if evidence.a_0 is None else f"find {_percent(evidence.a_0)}"
    return (
        f"the encoders' own vectors {own}, a linear map {_percent(evidence.a_lin)}, an MLP {_percent(evidence.a_mlp)} "
        f"({_told(evidence.mlp_gain)}); permuted pairs up to {_percent(evidence.null)}"
        f"{_of_nothing(evidence)}; {_of_tokens(evidence)}"
    )


def _finds_nothing(evidence: Evidence) -> bool:
    return max(evidence.a_lin, evidence.a_mlp) <= evidence.null


def _of_nothing(evidence: Evidence) -> str:
    return ": no map finds more than permuted pairs do" if _finds_nothing(evidence) else ""


def _of_tokens(evidence: Evidence) -> str:
    if evidence.a_tok is None or evidence.token_gain is None:
        return "tokens could not be compared"
    return f"tokens find {_percent(evidence.a_tok)} ({_told(evidence.token_gain)} to their means)"


def _told(gap: Gap) -> str:
    return f"{100 * gap.mean:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
