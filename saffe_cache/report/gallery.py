"""Retrieval galleries: the first photos that systems find for some queries, with right and wrong marked.

Photos, sounds and videos are searched for where the cache says that its data are. Each is known by the hash of its
content: a file that has changed since, or another one under its name, is never shown in its place. A photo, or the
middle frame of a video, becomes a thumbnail, and the first seconds of a sound a WAV file. What cannot be found or read
has a reason instead.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from saffe_cache.core.features import NOUNS, CacheError, Modality, medium_of_key
from saffe_cache.core.outputs import CONFIG, read_json
from saffe_cache.core.results import Result
from saffe_cache.evaluation.details import NAME, Details, label, read_details
from saffe_cache.evaluation.results import EvaluationResult
from saffe_cache.report.report import ReportConfig
from saffe_cache.sources.decoding import sound_excerpt, thumbnail
from saffe_cache.sources.items import Columns, Media
from saffe_cache.sources.registry import read_named_items
from saffe_cache.store.reader import open_cache
from saffe_cache.studies.bridge.result import BridgeResult

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


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Of one evaluation, or of one medium that searches another."""

    title: str
    details: Details
    cache: str
    encoders: tuple[str, ...]
    """Keys of the gallery's encoders in the cache; several where the media of an item are fused."""
    query_encoder: str
    """Key of the encoder of what searches, where no text does."""
    options: ReportConfig

    @property
    def system(self) -> str:
        """What was evaluated, in words."""
        return label(next(iter(self.details.systems)), "the FAM")

    @property
    def media(self) -> dict[Modality, str]:
        """What is searched and what searches, by their encoders' keys, which begin with the medium."""
        return {medium_of_key(key): key for key in (*self.encoders, self.query_encoder)}

    @property
    def noun(self) -> str:
        """One of what is searched."""
        return NOUNS["media" if len(self.encoders) > 1 else medium_of_key(self.encoders[0])]

    @property
    def query_noun(self) -> str:
        """One of what searches."""
        return self.noun if self.query_encoder in self.encoders else NOUNS[medium_of_key(self.query_encoder)]

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


def open_galleries(folder: Path, result: Result, options: ReportConfig) -> list[Gallery]:
    """Of an evaluation, or of both directions between two media; none where there are no details of single queries.

    Raises:
        ValueError: the details or the config are damaged.
    """
    title, places = "What single queries find", dict[Path, tuple[str, tuple[str, ...], str]]()
    if isinstance(result, EvaluationResult):
        keys = tuple(result.run.media.values()) or (result.run.gallery_key,)
        places[folder] = title, keys, keys[0]
    elif isinstance(result, BridgeResult):
        for one in result.directions:
            keys = (result.encoders[one.gallery],)
            places[folder / one.folder] = f"{title}, {one.name}", keys, result.encoders[one.queries]
    cache = str(read_json(folder / CONFIG).get("config", {}).get("cache")) if places else ""
    return [
        Gallery(
            title=name, details=read_details(place), cache=cache, encoders=keys, query_encoder=other, options=options
        )
        for place, (name, keys, other) in places.items()
        if (place / NAME).exists()
    ]


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
SECONDS, SAMPLING_RATE = 3, 8000
"""Of a sound: at most so long, and at most at so many Hz."""
MOST_BYTES = 3_400_000
"""Of all thumbnails and sounds; 4.5 MB in base64."""


@dataclass(frozen=True)
class Album:
    """Photos and sounds by content hash, each once, however many evaluations and systems show it."""

    thumbnails: dict[bytes, bytes]
    """JPEG files of photos and videos."""
    sounds: dict[bytes, bytes]
    """WAV files."""
    reasons: dict[bytes, str]
    """Why the others have neither."""


def find_media(galleries: Sequence[Gallery], data: Sequence[str]) -> Album:
    """As many thumbnails and sounds as fit into a page: of every gallery's first card, then of every second, and so on.

    `data`: where the data are now; empty: where the extraction found them.
    """
    found: dict[bytes, tuple[Modality, bytes]] = {}
    album = Album({}, {}, {})
    for gallery in galleries:
        names = {gallery.hash_of(place): gallery.details.photo_ids[place] for place in gallery.places}
        wanted = {content: name for content, name in names.items() if content not in found}
        media, problems, failure = _find(gallery, data, wanted)
        for content, name in wanted.items():
            if content not in media:
                album.reasons[content] = failure or problems.get(name, "not found in the data")
                continue
            modality, medium = media[content]
            try:
                whole = medium.read()
                if hashlib.sha256(whole).digest() != content:
                    raise ValueError("its file is changing")
                found[content] = modality, _preview(modality, whole)
            except (OSError, ValueError, ImportError) as error:
                album.reasons[content] = str(error)
    size, queries = 0, _queries(galleries)
    for content in dict.fromkeys(_in_turn(galleries)):
        modality, preview = found.get(content, ("image", b""))
        size += len(preview) * (1 + queries[content] if modality == "audio" else 1)
        if preview and size <= MOST_BYTES:
            (album.sounds if modality == "audio" else album.thumbnails)[content] = preview
        elif preview:
            album.reasons[content] = "left out to keep the page small"
    return album


def _queries(galleries: Sequence[Gallery]) -> Counter[bytes]:
    """How many cards have each photo or sound as their query, where a sound has a player of its own."""
    cards = ((gallery, card.query_photo) for gallery in galleries for card in gallery.cards)
    return Counter(gallery.hash_of(place) for gallery, place in cards if place is not None)


def _preview(modality: Modality, data: bytes) -> bytes:
    if modality == "audio":
        return sound_excerpt(data, SECONDS, SAMPLING_RATE)
    return thumbnail(data, SIDE, modality)


def _in_turn(galleries: Sequence[Gallery]) -> Iterator[bytes]:
    for cards in zip_longest(*(gallery.cards for gallery in galleries)):
        for gallery, card in zip(galleries, cards, strict=True):
            if card is not None:
                yield from (gallery.hash_of(place) for place in sorted(card.places))


def _find(
    gallery: Gallery, data: Sequence[str], wanted: Mapping[bytes, str]
) -> tuple[dict[bytes, tuple[Modality, Media]], dict[str, str], str]:
    """Media by content hash, why each item that was read lacks its own, and why no place could be read."""
    found: dict[bytes, tuple[Modality, Media]] = {}
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
            for modality in gallery.media:
                if modality in item.hashes:
                    found[item.hashes[modality]] = modality, item.media[modality]
                else:
                    problems[item.id] = item.problem or f"it has no {NOUNS[modality]} now"
    return found, problems, "" if problems else " ".join(failures)


def _places(gallery: Gallery, data: Sequence[str]) -> list[tuple[str, Columns, bool]]:
    """Where the data may be and how to read them, each once: folders first, then names that may be on the hub."""
    try:
        cache = open_cache(gallery.cache)
        encoders = [cache.encoders[key] for key in gallery.media.values()]
        configs = [one["config"] for encoder in encoders for one in encoder.manifest.extractions]
        recorded = [(str(one["data"]), Columns(**one["column"]), one.get("streaming", False)) for one in configs]
    except (CacheError, ValueError, TypeError, KeyError, OSError):
        if not data:
            raise
        recorded = []
    if data:
        ways = [way for _, *way in recorded] or [[Columns(), False]]
        recorded = [(place, *way) for place in data for way in ways]
    return sorted(dict.fromkeys(recorded), key=lambda place: not Path(place[0]).expanduser().is_dir())
