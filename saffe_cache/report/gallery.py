"""Retrieval galleries: the first photos that systems find for some queries, with right and wrong marked.

Photos are searched for where the cache says that its data are. A photo is known by the hash of its content: a file that
has changed since, or another one under its name, is never shown in its place. A photo that cannot be found has a reason
instead of a thumbnail.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from saffe_cache.core.features import MODALITIES, CacheError, Modality
from saffe_cache.core.outputs import CONFIG, read_json
from saffe_cache.core.results import Result
from saffe_cache.evaluation.details import NAME, Details, label, read_details
from saffe_cache.evaluation.results import EvaluationResult
from saffe_cache.report.report import ReportConfig
from saffe_cache.sources.decoding import thumbnail
from saffe_cache.sources.items import Columns, Media
from saffe_cache.sources.registry import read_named_items
from saffe_cache.store.reader import open_cache

NUM_RESULTS = 6
NUM_BASELINES = 2
_SEED = 0


@dataclass(frozen=True)
class Row:
    """What one system finds first."""

    system: str
    metric: float
    photos: tuple[tuple[int, bool], ...]
    """Their places among the photos of the details, and whether each is relevant."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One query and what the systems find."""

    why: str
    """best, worst, random, or by its words."""
    number: int
    """Of the query among those that have something relevant, from 1."""
    text: str
    """Empty where the query is a photo alone."""
    query_photo: int | None
    """The place of the photo that is the query, or the reference of a text; None where a text searches alone."""
    answer: int
    """The place of a relevant photo."""
    num_relevant: int
    rows: tuple[Row, ...]

    @property
    def places(self) -> set[int]:
        """All photos that it shows."""
        shown = {place for row in self.rows for place, _ in row.photos} | {self.answer}
        return shown if self.query_photo is None else shown | {self.query_photo}

    @property
    def lacks_answer(self) -> bool:
        """Whether there is only one right photo, which the evaluated system does not show."""
        return self.num_relevant == 1 and not any(is_relevant for _, is_relevant in self.rows[0].photos)


@dataclass(frozen=True)
class Gallery:
    """Of one evaluation."""

    details: Details
    cache: str
    encoder: str
    """Key of the gallery's encoder in the cache."""
    options: ReportConfig

    @property
    def system(self) -> str:
        """What was evaluated, in words."""
        return label(next(iter(self.details.systems)), "the FAM")

    @property
    def modality(self) -> Modality:
        """What is searched, with which the key of its encoder begins."""
        return next(one for one in MODALITIES if self.encoder.startswith(f"{one}-"))

    @property
    def is_sound(self) -> bool:
        return self.modality == "audio"

    @cached_property
    def cards(self) -> list[Card]:
        """The queries with the words asked for, the evaluated system's best and worst, and random ones, none twice."""
        found = self.details.systems
        first, *others = found
        ranked = sorted(others, key=lambda name: -float(found[name].metric.mean()))
        systems = [first, *ranked[:NUM_BASELINES]]
        systems += [name for name in ("zero_shot", "pooled_cosine") if name in ranked[NUM_BASELINES:]]
        chosen = choose_queries(self.details, self.options)
        return [_card(self.details, position, why, systems) for position, why in chosen.items()]

    @property
    def places(self) -> list[int]:
        """Of all photos that its cards show."""
        return sorted({place for card in self.cards for place in card.places})

    def hash_of(self, place: int) -> bytes:
        return bytes(self.details.photo_hashes[place].tobytes())

    def queries(self) -> tuple[tuple[str, ...], Iterator[tuple[Any, ...]]]:
        """Header and rows of a table: the main metric of each query, of each system."""
        details = self.details
        columns = [of.metric for of in details.systems.values()]
        names = details.query_classes or ("",) * len(columns[0])
        rows = ((number + 1, names[number], *(float(of[number]) for of in columns)) for number in range(len(names)))
        return ("query", "class", *(f"{name}: {details.main_metric}" for name in details.systems)), rows


def open_gallery(folder: Path, result: Result, options: ReportConfig) -> Gallery | None:
    """The gallery of an evaluation; None of other results, and where there are no details of single queries.

    Raises:
        ValueError: the details or the config are damaged.
    """
    if not isinstance(result, EvaluationResult) or not (folder / NAME).exists():
        return None
    config = read_json(folder / CONFIG).get("config", {})
    return Gallery(read_details(folder), str(config.get("cache")), result.run.gallery_key, options)


def choose_queries(details: Details, options: ReportConfig) -> dict[int, str]:
    """Positions among the queries that are kept, and why each was chosen; a fixed seed decides between equals."""
    values = next(iter(details.systems.values())).metric[details.shown]
    order = np.random.default_rng(_SEED).permutation(len(values))
    best = order[np.argsort(-values[order], kind="stable")]
    chosen: dict[int, str] = {}
    for words in options.queries:
        for position, text in enumerate(details.texts):
            if words.casefold() in text.casefold():
                chosen[position] = "by its words"
    for why, positions, most in (
        ("best", best, options.extreme_queries),
        ("worst", best[::-1], options.extreme_queries),
        ("random", order, options.random_queries),
    ):
        free = [int(position) for position in positions if int(position) not in chosen]
        chosen |= dict.fromkeys(free[:most], why)
    return chosen


def _card(details: Details, position: int, why: str, systems: Sequence[str]) -> Card:
    asking, number = int(details.asking[position]), int(details.shown[position])
    rows = []
    for name in systems:
        of = details.systems[name]
        found = zip(of.first[position, :NUM_RESULTS], of.is_relevant[position, :NUM_RESULTS], strict=True)
        rows.append(Row(name, float(of.metric[number]), tuple((int(place), bool(right)) for place, right in found)))
    return Card(
        why=why,
        number=number + 1,
        text=details.texts[position] if details.texts else "",
        query_photo=None if asking < 0 else asking,
        answer=int(details.answers[position]),
        num_relevant=int(details.num_relevant[position]),
        rows=tuple(rows),
    )


SIDE = 160
"""Pixels of a thumbnail's longer side."""
MOST_BYTES = 3_400_000
"""Of all thumbnails; 4.5 MB in base64."""


@dataclass(frozen=True)
class Album:
    """Photos by content hash, each once, however many evaluations show it."""

    thumbnails: dict[bytes, bytes]
    reasons: dict[bytes, str]
    """Why the others have no thumbnail."""


def find_photos(galleries: Sequence[Gallery], data: Sequence[str]) -> Album:
    """As many thumbnails as fit into a page: of every gallery's first card, then of every second, and so on.

    `data`: where the data are now; empty: where the extraction found them.
    """
    found: dict[bytes, bytes] = {}
    album = Album({}, {})
    for gallery in galleries:
        names = {gallery.hash_of(place): gallery.details.photo_ids[place] for place in gallery.places}
        wanted = {content: name for content, name in names.items() if content not in found}
        if gallery.is_sound:
            album.reasons.update(dict.fromkeys(wanted, "a sound"))
            continue
        media, problems, failure = _find(gallery, data, wanted)
        for content, name in wanted.items():
            if content not in media:
                album.reasons[content] = failure or problems.get(name, "not found in the data")
                continue
            try:
                whole = media[content].read()
                if hashlib.sha256(whole).digest() != content:
                    raise ValueError("its file is changing")
                found[content] = thumbnail(whole, SIDE, gallery.modality)
            except (OSError, ValueError) as error:
                album.reasons[content] = str(error)
    size = 0
    for content in dict.fromkeys(_in_turn(galleries)):
        size += len(found.get(content, b""))
        if content in found and size <= MOST_BYTES:
            album.thumbnails[content] = found[content]
        elif content in found:
            album.reasons[content] = "left out to keep the page small"
    return album


def _in_turn(galleries: Sequence[Gallery]) -> Iterator[bytes]:
    for cards in zip_longest(*(gallery.cards for gallery in galleries)):
        for gallery, card in zip(galleries, cards, strict=True):
            if card is not None:
                yield from (gallery.hash_of(place) for place in sorted(card.places))


def _find(
    gallery: Gallery, data: Sequence[str], wanted: Mapping[bytes, str]
) -> tuple[dict[bytes, Media], dict[str, str], str]:
    """Photos by content hash, why each item that was read lacks the photo, and why no place could be read."""
    found: dict[bytes, Media] = {}
    problems: dict[str, str] = {}
    failures = []
    try:
        places = _places(gallery, data)
    except (CacheError, ValueError, TypeError, KeyError, OSError) as error:
        return found, problems, f"the cache does not say where its data are ({error})"
    for place, columns, streaming in places:
        left = {name for content, name in wanted.items() if content not in found}
        try:
            items = read_named_items(place, columns, left, streaming=streaming) if left else ()
        except (ValueError, OSError) as error:
            failures.append(str(error))
            continue
        for item in items:
            problems[item.id] = "its file has changed since it was extracted"
            if gallery.modality in item.hashes:
                found[item.hashes[gallery.modality]] = item.media[gallery.modality]
            else:
                problems[item.id] = item.problem or "it has no photo now"
    return found, problems, "" if problems else " ".join(failures)


def _places(gallery: Gallery, data: Sequence[str]) -> list[tuple[str, Columns, bool]]:
    """Where the data may be and how to read them, each once: folders first, then names that may be on the hub."""
    try:
        cache = open_cache(gallery.cache)
        configs = [one["config"] for one in cache.encoders[gallery.encoder].manifest.extractions]
        recorded = [(str(one["data"]), Columns(**one["column"]), one.get("streaming", False)) for one in configs]
    except (CacheError, ValueError, TypeError, KeyError, OSError):
        if not data:
            raise
        recorded = []
    if data:
        ways = [way for _, *way in recorded] or [[Columns(), False]]
        recorded = [(place, *way) for place in data for way in ways]
    return sorted(dict.fromkeys(recorded), key=lambda place: not Path(place[0]).expanduser().is_dir())
