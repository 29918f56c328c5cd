"""Retrieval galleries: for some queries the first photos of the FAM and of baselines, with right and wrong marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saffe_cache.evaluation.details import Details
from saffe_cache.report.reading import Evaluation

NUM_RESULTS = 6
NUM_BASELINES = 2
_SEED = 0


@dataclass(frozen=True)
class Shown:
    """One photo of a gallery."""

    place: int
    """In the photos of the details."""
    rank: int
    is_relevant: bool


@dataclass(frozen=True)
class Row:
    """What one system finds first."""

    system: str
    metric: float
    photos: tuple[Shown, ...]


@dataclass(frozen=True, kw_only=True)
class Card:
    """One query and what the systems find."""

    why: str
    """best, worst, random, or asked for."""
    number: int
    """Of the query among those that have something relevant, from 1."""
    text: str
    """Empty where a photo searches."""
    asking: int | None
    """The place of the photo that searches."""
    answer: int
    """The place of a relevant photo."""
    num_relevant: int
    rows: tuple[Row, ...]

    @property
    def places(self) -> set[int]:
        """All photos that it shows."""
        shown = {photo.place for row in self.rows for photo in row.photos} | {self.answer}
        return shown if self.asking is None else shown | {self.asking}

    @property
    def lacks_answer(self) -> bool:
        """Is there one right photo alone, which the FAM does not show?"""
        return self.num_relevant == 1 and not any(photo.is_relevant for photo in self.rows[0].photos)


def make_cards(evaluation: Evaluation, asked: Sequence[str], num_random: int, num_extreme: int) -> list[Card]:
    """Cards of an evaluation: the queries asked for, the FAM's best and worst, and random ones, none twice."""
    details = evaluation.details
    assert details is not None
    baselines = [name for name in evaluation.metrics.ranked_baselines() if name in details.systems]
    systems = ["fam", *baselines[:NUM_BASELINES]]
    own = [name for name in ("zero_shot", "pooled_cosine") if name in baselines[NUM_BASELINES:]]
    chosen = choose_queries(details, asked, num_random, num_extreme)
    return [_card(details, position, why, [*systems, *own]) for position, why in chosen.items()]


def choose_queries(details: Details, asked: Sequence[str], num_random: int, num_extreme: int) -> dict[int, str]:
    """Positions among the queries that are shown, and why each was chosen; equals are drawn by a fixed seed."""
    values = details.systems["fam"].metric[details.shown]
    order = np.random.default_rng(_SEED).permutation(len(values))
    best = order[np.argsort(-values[order], kind="stable")]
    chosen: dict[int, str] = {}
    for words in asked:
        for position, text in enumerate(details.texts):
            if words.casefold() in text.casefold():
                chosen[position] = "asked for"
    for why, positions, most in (
        ("best", best, num_extreme),
        ("worst", best[::-1], num_extreme),
        ("random", order, num_random),
    ):
        free = [int(position) for position in positions if int(position) not in chosen]
        chosen |= dict.fromkeys(free[:most], why)
    return chosen


def _card(details: Details, position: int, why: str, systems: Sequence[str]) -> Card:
    asking = int(details.asking[position])
    number = int(details.shown[position])
    rows = []
    for name in systems:
        of = details.systems[name]
        found = zip(of.first[position, :NUM_RESULTS], of.is_relevant[position, :NUM_RESULTS], strict=True)
        photos = tuple(Shown(int(place), rank, bool(right)) for rank, (place, right) in enumerate(found, start=1))
        rows.append(Row(name, float(of.metric[number]), photos))
    return Card(
        why=why,
        number=number + 1,
        text=details.texts[position] if details.texts else "",
        asking=None if asking < 0 else asking,
        answer=int(details.answers[position]),
        num_relevant=int(details.num_relevant[position]),
        rows=tuple(rows),
    )
