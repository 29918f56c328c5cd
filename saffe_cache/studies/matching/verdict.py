"""The paper's rule against what was measured: concatenation where features are aligned, cross-attention where not.

arXiv 2606.01207, Table 4: "Pre-aligned, any size: Concat"; "Unaligned, any size: Cross". And section 5.3: the worse
aligned, the larger concatenation's lead. Its "weakly aligned" features (concatenation below 4,000 pairs,
cross-attention above 8,000) have neither a definition nor a number there, and no rule here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saffe_cache.retrieval.metrics import seed_interval

Accuracies = Mapping[str, Mapping[int, Sequence[float]]]
"""By system and training size: accuracy of each seed, in the same order everywhere."""
CONCAT = "concat"
BLIND = dict.fromkeys(("cross", "cross_equations"), " (which sees one modality alone)")


@dataclass(frozen=True)
class Features:
    """Which half of the rule speaks of them."""

    are_aligned: bool
    num_aligning: int = 0
    """Photos of the ridge regression that made them so; 0 where they are as the encoders give them."""

    @property
    def kind(self) -> str:
        return "pre-aligned" if self.are_aligned else "non-aligned"

    def __str__(self) -> str:
        if self.num_aligning:
            return f"features made pre-aligned by a ridge regression of {self.num_aligning} other photos"
        return f"{self.kind} features"


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """The mean, and both ends of its 95 % t-interval, which are None with one seed."""
    mean, low, high = seed_interval(values)
    return {"mean": mean} | ({"low": low, "high": high} if len(values) > 1 else {"low": None, "high": None})


def paired(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Of first less second, by seed, what `over_seeds` gives."""
    return over_seeds([a - b for a, b in zip(first, second, strict=True)])


def points(difference: Mapping[str, Any]) -> str:
    """What `over_seeds` gave, in words."""
    mean = f"{100 * difference['mean']:+.1f}"
    if difference["low"] is None:
        return f"{mean} (one seed)"
    return f"{mean} [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"


def judge_rule(features: Features, accuracies: Accuracies, contenders: Sequence[str]) -> list[dict[str, Any]]:
    """The rule at each size, of concatenation against each contender that was measured there.

    `holds` is True or False where the 95 % interval of the difference excludes 0, else None: undecided. With one seed
    there is no interval, and nothing is decided.
    """
    found = []
    expected = 1 if features.are_aligned else -1
    for contender in contenders:
        for size, own in accuracies.get(contender, {}).items():
            if size not in accuracies.get(CONCAT, {}):
                continue
            difference = paired(accuracies[CONCAT][size], own)
            sign = _sign(difference)
            holds = sign == expected if sign else None
            found.append({"contender": contender, "size": size, "lead": difference, "holds": holds})
    return found


def rule_in_words(features: Features, judged: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each contender."""
    winner = "concatenation" if features.are_aligned else "cross-attention"
    sentences = []
    for contender in dict.fromkeys(one["contender"] for one in judged):
        of_it = [one for one in judged if one["contender"] == contender]
        leads = "; ".join(f"{one['size']}: {points(one['lead'])}" for one in of_it)
        by_verdict = {
            verdict: [f"{one['size']}" for one in of_it if one["holds"] is held]
            for verdict, held in (("holds", True), ("fails", False), ("is undecided", None))
        }
        verdicts = ", ".join(f"{verdict} at {', '.join(sizes)}" for verdict, sizes in by_verdict.items() if sizes)
        sentences.append(
            f"the rule for {features}, {winner} wins at any size, {verdicts} pairs against {contender}"
            f"{BLIND.get(contender, '')}: concat's lead in points by training pairs: {leads}"
        )
    return sentences


def judge_degradation(leads: Mapping[str, Sequence[float]], kind: str, contender: str) -> dict[str, Any]:
    """Does concatenation's lead grow as alignment falls? At each level the lead less that on clean features.

    Args:
        leads: by level, clean first: concat's accuracy less the contender's, of each seed.
        kind: noise or rotation.
        contender: a cross-attention.
    """
    (_, clean), *others = leads.items()
    changes = {level: paired(values, clean) for level, values in others}
    grown, fallen = ([level for level, change in changes.items() if _sign(change) == sign] for sign in (1, -1))
    trend = f"grows at {len(grown)} and falls at {len(fallen)} of {len(changes)} levels; it"
    told = "; ".join(f"{level}: {points(change)}" for level, change in changes.items())
    words = (
        f"with {kind} concat's lead over {contender} {trend if len(clean) > 1 else 'is not judged by one seed; it'} is "
        f"{100 * sum(clean) / len(clean):+.1f} points on clean features and changes by {told}"
    )
    return {
        "kind": kind, "contender": contender, "changes": changes, "grown": grown, "fallen": fallen, "words": words
    }  # fmt: skip


def _sign(difference: Mapping[str, Any]) -> int:
    """1 or -1 where the interval excludes 0; 0 where it does not, or there is none."""
    if difference["low"] is None:
        return 0
    return int(difference["low"] > 0) - int(difference["high"] < 0)
