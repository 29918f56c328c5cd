"""Retrieval galleries: for some queries the first photos of the FAM and of baselines, with right and wrong marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from saffe_cache.core.outputs import CONFIG, read_json
from saffe_cache.core.results import Result
from saffe_cache.evaluation.details import NAME, Details, read_details
from saffe_cache.evaluation.results import EvaluationResult

NUM_RESULTS = 6
NUM_BASELINES = 2
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which queries galleries show."""

    words: Sequence[str]
    """Queries that contain one of these are shown."""
    num_random: int
    num_extreme: int
    """Of the FAM's best queries, and as many of its worst."""


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
    """best, worst, random, or by its words."""
    number: int
    """Of the query among those that have something relevant, from 1."""
    text: str
    """Empty where the query is a photo."""
    query_photo: int | None
    """The place of the photo that is the query."""
    answer: int
    """The place of a relevant photo."""
    num_relevant: int
    rows: tuple[Row, ...]

    @property
    def places(self) -> set[int]:
        """All photos that it shows."""
        shown = {photo.place for row in self.rows for photo in row.photos} | {self.answer}
        return shown if self.query_photo is None else shown | {self.query_photo}

    @property
    def lacks_answer(self) -> bool:
        """Whether there is only one right photo, which the FAM does not show."""
        return self.num_relevant == 1 and not any(photo.is_relevant for photo in self.rows[0].photos)


@dataclass(frozen=True)
class Gallery:
    """Of one evaluation."""

    details: Details
    cache: str
    encoder: str
    """Key of the gallery's encoder in the cache."""
    options: Options

    @property
    def is_sound(self) -> bool:
        return self.encoder.startswith("audio-")

    @cached_property
    def cards(self) -> list[Card]:
        """The queries with the words asked for, the FAM's best and worst, and random ones, none twice."""
        values = {name: float(of.metric.mean()) for name, of in self.details.systems.items() if name != "fam"}
        ranked = sorted(values, key=lambda name: -values[name])
        systems = ["fam", *ranked[:NUM_BASELINES]]
        systems += [name for name in ("zero_shot", "pooled_cosine") if name in ranked[NUM_BASELINES:]]
        chosen = choose_queries(self.details, self.options)
        return [_card(self.details, position, why, systems) for position, why in chosen.items()]

    @property
    def places(self) -> list[int]:
        """Of all photos that its cards show."""
        return sorted({place for card in self.cards for place in card.places})

    def hash_of(self, place: int) -> bytes:
        return bytes(self.details.photo_hashes[place].tobytes())

    def hashes(self) -> set[bytes]:
        return set(map(self.hash_of, self.places))

    def queries(self) -> tuple[tuple[str, ...], Iterator[tuple[Any, ...]]]:
        """Header and rows of a table: the main metric of each query, of each system."""
        details = self.details
        columns = [of.metric for of in details.systems.values()]
        names = details.query_classes or ("",) * len(columns[0])
        rows = ((number + 1, names[number], *(float(of[number]) for of in columns)) for number in range(len(names)))
        return ("query", "class", *(f"{name}: {details.main_metric}" for name in details.systems)), rows


def open_gallery(folder: Path, result: Result, options: Options) -> Gallery | None:
    """The gallery of an evaluation; None of other results, and where there are no details of single queries.

    Raises:
        ValueError: the details or the config are damaged.
    """
    if not isinstance(result, EvaluationResult) or not (folder / NAME).exists():
        return None
    config = read_json(folder / CONFIG).get("config", {})
    return Gallery(read_details(folder), str(config.get("cache")), result.run.gallery_key, options)


def choose_queries(details: Details, options: Options) -> dict[int, str]:
    """Positions among the queries that are kept, and why each was chosen; a fixed seed decides between equals."""
    values = details.systems["fam"].metric[details.shown]
    order = np.random.default_rng(_SEED).permutation(len(values))
    best = order[np.argsort(-values[order], kind="stable")]
    chosen: dict[int, str] = {}
    for words in options.words:
        for position, text in enumerate(details.texts):
            if words.casefold() in text.casefold():
                chosen[position] = "by its words"
    for why, positions, most in (
        ("best", best, options.num_extreme),
        ("worst", best[::-1], options.num_extreme),
        ("random", order, options.num_random),
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
        query_photo=None if asking < 0 else asking,
        answer=int(details.answers[position]),
        num_relevant=int(details.num_relevant[position]),
        rows=tuple(rows),
    )
