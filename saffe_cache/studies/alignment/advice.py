"""Which fusion the measures recommend, by the rule that trained fusions support (pipelines/alignment.py).

Gallery of photos alone:

    no FAM     neither a ridge regression nor an MLP finds more than the 95 % quantile of permuted pairs; or the
               encoders' own vectors find more than half of what a linear map finds, beyond noise (A_0 > 0.5 A_lin): a
               guess, since no aligned encoders have been tested
    linear     otherwise

Photos with paired text:

    no FAM     if no map finds anything: the photos carry no information about the texts
    concat     otherwise

A decoder is never recommended. An earlier rule recommended one where an MLP found more than a linear map
(A_lin < 0.9 A_mlp), or tokens more than their means, beyond noise. Trained fusions did not confirm it: what an MLP or
tokens find, `linear` finds too, which pools tokens and has an MLP, and starts as the ridge regression. Both measures
are still reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saffe_cache.core.results import Estimate
from saffe_cache.core.tables import percent

Fusion = Literal["no FAM", "linear", "concat"]
Gallery = Literal["photos alone", "photos with paired text"]

ENOUGH_WITHOUT_MAP = 0.5
STANDING = (
    "The advice rests on trained fusions with one pair of encoders on two data sets (pipelines/LOG.md). Decoders are "
    "never recommended, since none gained half a point over linear or concat. Captions and class names were tested; "
    "for texts about parts of a photo, where sums and concatenations fail, these measures say nothing. Intervals cover "
    "the choice of measured photos, but not the MLP's seed or the photos that maps are fitted on."
)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """R@1 on the measured photos, as fractions; None where it is undefined."""

    a_0: float | None
    """By cosine of the encoders' own vectors."""
    without_map: Estimate | None
    """A_0 less half of A_lin."""
    a_lin: float
    a_mlp: float
    mlp_gain: Estimate
    """A_mlp less A_lin."""
    null: float
    """The greater of both 95 % quantiles with permuted pairs."""
    a_tok: float
    token_gain: Estimate
    """A_tok less A_lin of the same hidden states."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One fusion for one kind of gallery."""

    gallery: Gallery
    fusion: Fusion
    because: str


def advise(evidence: Evidence, *, has_paired_texts: bool) -> list[Advice]:
    """By the rule above.

    Args:
        evidence: what was measured.
        has_paired_texts: whether photos may be paired with texts of their own. Captions may; a class paired with its
            photo would be the answer itself.
    """
    is_nothing_found = max(evidence.a_lin, evidence.a_mlp) <= evidence.null
    is_aligned = evidence.without_map is not None and evidence.without_map.sign > 0
    alone: Fusion = "no FAM" if is_nothing_found or is_aligned else "linear"
    nothing = ": neither map finds more than the 95 % quantile of permuted pairs" if is_nothing_found else ""
    own = "cannot be compared" if evidence.a_0 is None else f"find {percent(evidence.a_0)}"
    because = (
        f"the encoders' own vectors {own}, a linear map {percent(evidence.a_lin)}, an MLP {percent(evidence.a_mlp)} "
        f"({evidence.mlp_gain.points()}); permuted pairs up to {percent(evidence.null)}{nothing}"
    )
    found = [Advice(gallery="photos alone", fusion=alone, because=because)]
    if has_paired_texts:
        because = (
            f"no costlier fusion gained more than concat; tokens find {percent(evidence.a_tok)} "
            f"({evidence.token_gain.points()} over their means){nothing}"
        )
        paired: Fusion = "no FAM" if is_nothing_found else "concat"
        found.append(Advice(gallery="photos with paired text", fusion=paired, because=because))
    return found
