"""What single queries find: details.npz beside result.json, for galleries and curves.

For the FAM and each baseline the main metric of every query, and the first photos of some queries, drawn by the seed;
where classes search, also precision at 101 recalls, and which class's text is nearest to the photos of each class. The
mean of `metric` is the number in result.json, and the right ones among the first photos are marked here, so that a page
made of it has nothing to decide.

Numpy arrays, in a file that is read without unpickling. All texts are one JSON object, stored as bytes.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from saffe_cache.core.atomic_io import write_whole
from saffe_cache.core.features import Ragged
from saffe_cache.core.json_schema import made_of
from saffe_cache.protocols.base import Protocol
from saffe_cache.protocols.setting import Answered, Answers, Setting
from saffe_cache.retrieval.ranking import members, relevant_ranks_of_scores
from saffe_cache.retrieval.scores import nearest_classes

NAME = "details.npz"
FIRST_K = 10
MOST_QUERIES = 2000
RECALLS = np.linspace(0, 1, 101)
"""At which precision is stored."""
_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class ClassDetails:
    """Where classes search."""

    precision: np.ndarray
    """float32 [queries, 101]: at each of `RECALLS` the highest precision at this recall or above it, of each class."""
    confusion: np.ndarray
    """int64 [classes, classes]: photos of each class (row), by the class whose text is nearest. Of photos with one
    class."""


@dataclass(frozen=True, kw_only=True)
class SystemDetails:
    """One system's results."""

    metric: np.ndarray
    """float64 [queries]: the main metric of every query."""
    first: np.ndarray
    """int64 [shown, up to 10]: places in `photos` of the first photos of the queries that are shown, best first."""
    is_relevant: np.ndarray
    """bool, of the same shape."""
    classes: ClassDetails | None = None


@dataclass(frozen=True, kw_only=True)
class Details:
    """What details.npz holds."""

    main_metric: str
    shown: np.ndarray
    """int64 [shown]: which of the queries have their first photos kept, ascending."""
    texts: tuple[str, ...]
    """Of the queries that are shown; empty where a photo searches."""
    answers: np.ndarray
    """int64 [shown]: the place in `photos` of a relevant one, the first in the gallery."""
    asking: np.ndarray
    """int64 [shown]: where photos search, the place in `photos` of the one that does, else -1."""
    num_relevant: np.ndarray
    """int64 [shown]: relevant photos in the gallery."""
    photo_ids: tuple[str, ...]
    """Of the photos that are named here."""
    photo_hashes: np.ndarray
    """uint8 [photos, 32]: SHA-256 of their files."""
    photo_texts: tuple[str, ...]
    """What describes them: the text that lies beside them, their classes, or their first caption."""
    query_classes: tuple[str, ...]
    """Where classes search: the class of each query."""
    class_names: tuple[str, ...]
    """Where classes search: all of them."""
    systems: Mapping[str, SystemDetails]


def details_of(protocol: Protocol, systems: Mapping[str, Answered]) -> Details:
    """The details of some systems under one protocol."""
    setting, relevant, by_photo = protocol.setting, protocol.relevant, protocol.queries is None
    queries = np.flatnonzero(np.diff(relevant.offsets))
    shown = np.arange(len(queries))
    if len(shown) > MOST_QUERIES:
        shown = np.sort(np.random.default_rng(setting.seed).choice(shown, MOST_QUERIES, replace=False))
    chosen = queries[shown]
    first = {name: _first(of.answers, chosen, setting.seed, by_photo) for name, of in systems.items()}
    answers = np.array([relevant[int(query)][0] for query in chosen], np.int64)
    asking = chosen if by_photo else answers
    named = np.unique(np.concatenate([answers, asking, *(of.ravel() for of in first.values())]))
    hashes = setting.cache.table.inputs[setting.inputs.gallery.manifest.modality].content_hash
    return Details(
        main_metric=protocol.main_metric,
        shown=shown,
        texts=_query_texts(protocol, chosen),
        answers=np.searchsorted(named, answers),
        asking=np.searchsorted(named, chosen) if by_photo else np.full(len(chosen), -1),
        num_relevant=np.diff(relevant.offsets)[chosen],
        photo_ids=tuple(setting.pairs.ids[place] for place in named),
        photo_hashes=hashes[setting.pairs.rows[named]],
        photo_texts=tuple(_photo_text(setting, int(place)) for place in named),
        query_classes=tuple(protocol.class_names[query] for query in queries) if protocol.shows_classes else (),
        class_names=protocol.class_names,
        systems={
            name: SystemDetails(
                metric=of.scores[protocol.main_metric].of_queries,
                first=np.searchsorted(named, first[name]),
                is_relevant=_is_relevant(relevant, chosen, first[name]),
                classes=_class_details(of.answers, protocol) if protocol.shows_classes else None,
            )
            for name, of in systems.items()
        },
    )


def _first(answers: Answers, queries: np.ndarray, seed: int, by_photo: bool) -> np.ndarray:
    """The first photos of some queries; a photo that searches is not among its own."""
    num_gallery = answers.scores().shape[1]
    first = answers.first(queries, min(FIRST_K + by_photo, num_gallery), seed)
    if not by_photo:
        return first
    is_own = first == queries[:, None]
    is_own[~is_own.any(axis=1), -1] = True
    return np.asarray(first[~is_own].reshape(len(first), -1))


def _is_relevant(relevant: Ragged, queries: np.ndarray, first: np.ndarray) -> np.ndarray:
    return np.array([np.isin(of, relevant[int(query)]) for query, of in zip(queries, first, strict=True)])


def _query_texts(protocol: Protocol, queries: np.ndarray) -> tuple[str, ...]:
    if protocol.queries is None:
        return ()
    return tuple(_text(protocol.setting, int(row)) for row in protocol.queries.text_rows[queries])


def _text(setting: Setting, row: int) -> str:
    texts = setting.cache.table.inputs["text"].texts
    assert texts is not None
    return texts[row]


def _photo_text(setting: Setting, place: int) -> str:
    pairs = setting.pairs
    if pairs.beside is not None:
        return _text(setting, int(pairs.beside[place]))
    if pairs.kind == "classes":
        return ", ".join(setting.cache.table.class_names[label] for label in pairs.labels[place])
    return _text(setting, int(pairs.texts[place][0]))


def _class_details(answers: Answers, protocol: Protocol) -> ClassDetails:
    pairs, seed, num_classes = protocol.setting.pairs, protocol.setting.seed, len(protocol.class_names)
    alone = np.flatnonzero(np.diff(pairs.labels.offsets) == 1)
    labels = pairs.labels.values[pairs.labels.offsets[alone]]
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (labels, nearest_classes(answers.scores(), seed)[alone]), 1)
    ranks = relevant_ranks_of_scores(answers.scores(), members(pairs.labels, num_classes), seed=seed)
    curves = [interpolated_precision(of_class) for of_class in ranks if len(of_class)]
    return ClassDetails(precision=np.array(curves, np.float32), confusion=confusion)


def interpolated_precision(ranks: np.ndarray) -> np.ndarray:
    """The highest precision at each of `RECALLS` or above it, float64 [101], from the ranks of all relevant photos.

    For drawing alone: average precision is not interpolated.
    Source: Manning et al., Introduction to Information Retrieval, sec. 8.4.
    """
    found = np.arange(1, len(ranks) + 1)
    highest = np.maximum.accumulate((found / ranks)[::-1])[::-1]
    needed = np.ceil(RECALLS * len(ranks) - 1e-9).astype(int)  # how many of them make this recall
    return np.asarray(highest[np.maximum(needed, 1) - 1])


_ARRAYS = ("shown", "answers", "asking", "num_relevant", "photo_hashes")
_TEXTS = "json"


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """The file's JSON object: fields of `Details`, and the names of its systems."""

    main_metric: str
    systems: tuple[str, ...]
    texts: tuple[str, ...]
    photo_ids: tuple[str, ...]
    photo_texts: tuple[str, ...]
    query_classes: tuple[str, ...]
    class_names: tuple[str, ...]


def write_details(out: Path, details: Details) -> None:
    """details.npz, whole or not at all."""
    texts = {one.name: getattr(details, one.name) for one in fields(_Texts)} | {"systems": list(details.systems)}
    arrays = {name: getattr(details, name) for name in _ARRAYS}
    arrays |= {"version": np.array(_VERSION), _TEXTS: np.frombuffer(json.dumps(texts).encode(), np.uint8)}
    for number, system in enumerate(details.systems.values()):
        classes = {} if system.classes is None else vars(system.classes)
        for name, array in {**vars(system), **classes}.items():
            if name != "classes":
                arrays[f"{number}.{name}"] = array
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_whole(out / NAME, file.getvalue())


def read_details(out: Path) -> Details:
    """
    Raises:
        ValueError: it is damaged, or of another version.
        FileNotFoundError: there is none.
    """
    path = out / NAME
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if int(arrays["version"]) != _VERSION:
                raise ValueError(f"version {arrays['version']}, this release reads {_VERSION}")
            details = _read(arrays)
            _check(details)
            return details
    except (KeyError, ValueError, TypeError, IndexError, EOFError, RecursionError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged or of another version ({error}). Evaluate again.") from None


def _read(arrays: Mapping[str, np.ndarray]) -> Details:
    texts = vars(made_of(_Texts, json.loads(arrays[_TEXTS].tobytes())))
    systems = {}
    for number, name in enumerate(texts.pop("systems")):
        own: dict[str, Any] = {part: arrays[f"{number}.{part}"] for part in ("metric", "first", "is_relevant")}
        if f"{number}.confusion" in arrays:
            own["classes"] = ClassDetails(
                precision=arrays[f"{number}.precision"], confusion=arrays[f"{number}.confusion"]
            )
        systems[name] = SystemDetails(**own)
    plain: dict[str, Any] = {name: arrays[name] for name in _ARRAYS}
    return Details(systems=systems, **plain, **texts)


def _check(details: Details) -> None:
    """
    Raises:
        ValueError: arrays do not fit each other, or name a photo that is none.
    """
    count, num_photos = len(details.shown), len(details.photo_ids)
    fits = [
        all(len(of) == count for of in (details.answers, details.asking, details.num_relevant)),
        len(details.texts) in (0, count),
        details.photo_hashes.shape == (num_photos, 32),
        len(details.photo_texts) == num_photos,
        _inside(details.answers, 0, num_photos),
        _inside(details.asking, -1, num_photos),
    ]
    for system in details.systems.values():
        fits += [
            system.first.ndim == 2 and len(system.first) == count,
            system.first.shape == system.is_relevant.shape,
            system.is_relevant.dtype == bool,
            _inside(system.first, 0, num_photos),
            _inside(details.shown, 0, len(system.metric)),
        ]
        if system.classes is not None:
            wanted = (len(details.query_classes), len(RECALLS)), (len(details.class_names),) * 2
            fits.append((system.classes.precision.shape, system.classes.confusion.shape) == wanted)
    if not all(fits):
        raise ValueError("its arrays do not fit each other")


def check_means(folder: Path, details: Details, means: Mapping[str, float]) -> None:
    """
    Raises:
        ValueError: the details belong to another evaluation than the main metric of each system.
    """
    for name, system in details.systems.items():
        found, expected = float(system.metric.mean()), means.get(name)
        if expected is None or abs(found - expected) > 1e-9:
            told = "nothing" if expected is None else f"{expected:.6f}"
            raise ValueError(
                f"{folder / NAME}: {details.main_metric} of {name} is {found:.6f}, result.json says {told}: they "
                "belong to two evaluations. Evaluate again."
            )


def _inside(numbers: np.ndarray, low: int, high: int) -> bool:
    return numbers.dtype.kind == "i" and (not numbers.size or (low <= numbers.min() and numbers.max() < high))
