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
from saffe_cache.fusion.registry import FUSIONS, FusionEntry

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


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is trained under one name."""

    fusion: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of TrainConfig, where they differ from the fusion's own."""

    @property
    def entry(self) -> FusionEntry:
        return FUSIONS[self.fusion]

    @property
    def uses_rest(self) -> bool:
        """Whether it uses the photos that are left out of the pairs."""
        return self.options.get("unpaired") == "rest"

    @property
    def group(self) -> str:
        """Methods of a group read alike, so that one pass over the cache serves many of them."""
        if self.entry.is_closed_form:
            return "closed-form"
        if self.entry.blocks != "none":
            return "blocks"
        return "vectors" if self.entry.reads == "summary" else "tokens"


VARIANTS: Mapping[str, Method] = {
    "sotalign with unpaired data": Method(fusion="sotalign", options={"unpaired": "rest"}),
}
"""Methods that are a fusion with other options. Unpaired data are the photos and texts that a number of photos leaves
out: there are none at the largest."""

_WEB = "arXiv 2602.23353"
CLAIMS: Mapping[str, Claim] = {
    "linear": Claim(
        text="attention pooling over tokens finds more than any closed form over their means", source="this project"
    ),
    "contrastive": Claim(
        text="a trained linear map finds more than closed forms (24.2 against 21.5 with 10,000 web pairs)", source=_WEB
    ),
    "kernel_ridge": Claim(
        text="kernels find more than linear regressions on the same pairs", source="this project", against="ridge"
    ),
    "cca": Claim(text="whitening helps (21.5 against 21.1)", source=_WEB, against="procrustes"),
    "csa": Claim(
        text="canonical directions weighted by their correlations find more than a trained linear map",
        source="arXiv 2410.07610",
        against="contrastive",
    ),
    "asif": Claim(
        text="similarities to paired anchors find, without training, more than a trained map",
        source="arXiv 2210.01738",
        against="contrastive",
    ),
    "fusemix": Claim(
        text="mixing the vectors of pairs makes few of them do",
        source="arXiv 2312.10144",
        against="fusemix without mixing",
        plain={"mixup": 0.0},
    ),
    "sail": Claim(
        text="a gated head with a sigmoid loss finds more than a linear map",
        source="arXiv 2412.04616",
        against="contrastive",
    ),
    "structure": Claim(
        text="keeping each encoder's neighbourhoods helps where pairs are few",
        source="arXiv 2506.16895",
        against="structure without its term",
        plain={"objective": {"info_nce": 1.0}},
    ),
    "sharelock": Claim(text="a map of texts into the frozen space of photos is enough", source="arXiv 2410.07173"),
    "freeze_align": Claim(
        text="projectors of tokens find more than a linear map of their means",
        source="arXiv 2409.19425",
        against="contrastive",
    ),
    "gpo": Claim(
        text="learned pooling of sorted tokens finds more than their mean",
        source="arXiv 2011.04305",
        against="contrastive",
    ),
    "sotalign": Claim(
        text="a transport loss that follows a closed-form teacher helps where pairs are few",
        source=_WEB,
        against="sotalign without transport",
        plain={"objective": {"siglip": 1.0}},
    ),
    "sotalign with unpaired data": Claim(text="photos and texts without pairs help", source=_WEB, against="sotalign"),
    "fromage": Claim(text="a learned token behind the text and linear maps are enough", source="arXiv 2301.13823"),
    "pang": Claim(
        text="a frozen block of a language model improves a photo encoder", source="arXiv 2310.12973", against="late"
    ),
}
"""By method. Closed forms without a claim are what others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A claim at one number of photos."""

    setting: str
    """The cache, and what is reported on where it is another, or with search correction."""
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
