"""Which fusion the measures speak for, by the rule that trained fusions support (pipelines/alignment.py).

Photos alone in the gallery:

    no FAM     neither a ridge regression nor an MLP finds more than the 95 % quantile of permuted pairs; or the
               encoders' own vectors find more than half of what a linear map finds, beyond noise (A_0 > 0.5 A_lin): a
               guess, for no aligned encoders have been tested
    linear     otherwise

A text beside each photo:

    no FAM     where no map finds anything: the photos tell nothing of the texts
    concat     otherwise

A decoder is never advised. The rule that this one replaces advised one where an MLP found more than a linear map
(A_lin < 0.9 A_mlp), or tokens more than their means, beyond noise. Trained fusions did not bear it out: what an MLP or
tokens find, `linear` finds too, which pools tokens and has an MLP, and starts as the ridge regression. Both measures
are still reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Fusion = Literal["no FAM", "linear", "concat"]
Gallery = Literal["photos alone", "a text beside each photo"]

ENOUGH_WITHOUT_MAP = 0.5
STANDING = (
    "What trained fusions support so far, with one pair of encoders on two data sets (pipelines/LOG.md): decoders are "
    "never advised, since none was worth half a point more than linear or concat. Captions and class names were "
    "tested: of texts that speak of parts of a photo, where sums and concatenations fail, these measures tell nothing. "
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
    a_tok: float
    token_gain: Gap
    """A_tok less A_lin of the same hidden states."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One fusion, for one kind of gallery."""

    gallery: Gallery
    fusion: Fusion
    because: str


def advise(evidence: Evidence, *, has_texts_beside: bool) -> list[Advice]:
    """By the rule above.

    Args:
        evidence: what was measured.
        has_texts_beside: whether items have texts of their own that may lie beside their photos: captions do; a class
            beside its photo would be the answer itself.
    """
    is_nothing_found = max(evidence.a_lin, evidence.a_mlp) <= evidence.null
    is_aligned = evidence.without_map is not None and evidence.without_map.is_gain
    alone: Fusion = "no FAM" if is_nothing_found or is_aligned else "linear"
    nothing = ": neither map finds more than the 95 % quantile of permuted pairs" if is_nothing_found else ""
    own = "cannot be compared" if evidence.a_0 is None else f"find {_percent(evidence.a_0)}"
    because = (
        f"the encoders' own vectors {own}, a linear map {_percent(evidence.a_lin)}, an MLP {_percent(evidence.a_mlp)} "
        f"({_told(evidence.mlp_gain)}); permuted pairs up to {_percent(evidence.null)}{nothing}"
    )
    found = [Advice(gallery="photos alone", fusion=alone, because=because)]
    if has_texts_beside:
        because = (
            f"no fusion that costs more was worth more than concat; tokens find {_percent(evidence.a_tok)} "
            f"({_told(evidence.token_gain)} to their means){nothing}"
        )
        beside: Fusion = "no FAM" if is_nothing_found else "concat"
        found.append(Advice(gallery="a text beside each photo", fusion=beside, because=because))
    return found


def _told(gap: Gap) -> str:
    return f"{100 * gap.mean:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
