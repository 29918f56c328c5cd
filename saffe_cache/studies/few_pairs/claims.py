"""What the methods' papers claim, each as a comparison that the study can decide.

A claim is about a lead: the method's main metric less that of what it is compared with. The 95 % interval of the lead,
paired over photos, decides: above 0 the claim holds, below 0 it does not, and otherwise it is not decided. Papers claim
more than that, on other data and with more pairs; a verdict is about the few pairs of this study.

A new claim is one entry of `CLAIMS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from saffe_cache.core.results import Estimate

BEST = "the best closed form"
"""The closed form with the highest validation score, mean over seeds."""
Answer = Literal["holds", "does not hold", "is not decided"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A method finds more than another."""

    text: str
    """The claim in one clause."""
    source: str
    against: str = BEST
    """What the method is compared with: `BEST`, another method, or its own form as `plain` makes it."""
    plain: Mapping[str, Any] = field(default_factory=dict)
    """Training options that leave the claimed part out of the method; such a form is trained too, under the name that
    `against` gives it."""


CLAIMS: Mapping[str, Claim] = {
    "linear": Claim(
        text="attention pooling over tokens finds more than any closed form over their means", source="this project"
    ),
    "contrastive": Claim(
        text="a trained linear map finds more than closed forms (24.2 against 21.5 with 10,000 web pairs)",
        source="arXiv 2602.23353",
    ),
    "cca": Claim(text="whitening helps (21.5 against 21.1)", source="arXiv 2602.23353", against="procrustes"),
    "csa": Claim(
        text="canonical directions weighted by their correlations find more than a trained linear map",
        source="arXiv 2410.07610",
        against="contrastive",
    ),
    "asif": Claim(
        text="similarities to paired anchors do without training what a trained map does",
        source="arXiv 2210.01738",
        against="contrastive",
    ),
    "sail": Claim(
        text="a gated head with a sigmoid loss finds more than a linear map",
        source="arXiv 2412.04616",
        against="contrastive",
    ),
    "structure": Claim(
        text="keeping each encoder's neighbourhoods helps where pairs are few",
        source="arXiv 2506.16895",
        against="contrastive",
    ),
    "sharelock": Claim(text="a map of the text alone into a frozen photo space is enough", source="arXiv 2410.07173"),
    "freeze_align": Claim(
        text="projectors of tokens find more than a linear map of their means",
        source="arXiv 2409.19425",
        against="contrastive",
    ),
    "sotalign": Claim(
        text="a transport loss on unpaired photos and texts helps where pairs are few",
        source="arXiv 2602.23353",
        against="contrastive",
    ),
}
"""By method. Closed forms without a claim are what others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A claim at one number of photos."""

    setting: str
    """The cache, and the one reported on where it is another."""
    photos: int
    lead: Estimate
    answer: Answer


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A method's claim at every place where both were measured."""

    method: str
    places: tuple[Place, ...]
    sentence: str


def answer(lead: Estimate) -> Answer:
    """By the interval alone; a lead without one decides nothing."""
    return {1: "holds", -1: "does not hold", 0: "is not decided"}[lead.sign]  # type: ignore[return-value]


def judge(method: str, metric: str, leads: Mapping[tuple[str, int], Estimate]) -> Verdict:
    """
    Args:
        method: one with a claim.
        metric: of the leads.
        leads: by setting and number of photos, the method less what its claim names.
    """
    claim = CLAIMS[method]
    places = [
        Place(setting=setting, photos=photos, lead=lead, answer=answer(lead))
        for (setting, photos), lead in leads.items()
    ]
    settings = dict.fromkeys(place.setting for place in places)
    parts = []
    for setting in settings:
        own = [place for place in places if place.setting == setting]
        shown = "; ".join(f"{place.photos:,}: {place.lead.points()}" for place in own)
        parts.append(f"on {setting} it {_answers(own)} ({shown})")
    claimed = f"{method}, {claim.source}: {claim.text}. As {metric} above {claim.against}, in points by photos,"
    return Verdict(method=method, places=tuple(places), sentence=f"{claimed} {'; '.join(parts)}.")


def _answers(places: Sequence[Place]) -> str:
    """Each answer with the numbers of photos at which it is given."""
    by_answer: dict[str, list[str]] = {}
    for place in places:
        by_answer.setdefault(place.answer, []).append(f"{place.photos:,}")
    return ", ".join(f"{one} with {' and '.join(at)} photos" for one, at in by_answer.items())
