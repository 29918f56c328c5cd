"""What single queries find: details.npz beside result.json, for galleries and curves.

For each system, the evaluated one first, the main metric of every query, and the first photos of some queries, drawn by
the seed; where classes search, also precision at 101 recalls, and which class's text is nearest to the photos of each
class. The mean of `metric` is the number in result.json, and the right ones among the first photos are marked here, so
that a page made of it has nothing to decide.

Numpy arrays, in a file that is read without unpickling. All texts are one JSON object, stored as bytes.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saffe_cache.core.atomic_io import write_whole
from saffe_cache.core.figures import ClassPlot, Curve, CurvePlot, HeatMap
from saffe_cache.core.json_schema import typed
from saffe_cache.core.results import Section
from saffe_cache.core.tables import Table, percent, plain_row

FAM = "fam"
"""The name of the trained system."""
NAME = "details.npz"
RECALLS = np.linspace(0, 1, 101)
"""At which precision is stored."""
_VERSION = 2
_MOST_CLASSES = 24
"""Drawn one by one; of more, the worst."""
_MOST_CONFUSED = 12
_MOST_CURVES, _MOST_BARS = 6, 3
"""Systems that are drawn."""


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
    """What details.npz holds. Texts are stored as JSON."""

    main_metric: str
    texts: tuple[str, ...]
    """Of the queries that are shown; empty where photos search alone."""
    photo_ids: tuple[str, ...]
    """Of the photos that are named here."""
    photo_texts: tuple[str, ...]
    """What describes them: their paired text, their classes, or their first caption."""
    query_classes: tuple[str, ...]
    """Where classes search: the class of each query."""
    class_names: tuple[str, ...]
    """Where classes search: all of them."""
    shown: np.ndarray
    """int64 [shown]: which of the queries have their first photos kept, ascending."""
    answers: np.ndarray
    """int64 [shown]: the place in `photos` of a relevant one, the first in the gallery."""
    asking: np.ndarray
    """int64 [shown]: where photos search, alone or with a text, the place in `photos` of the one that does, else -1."""
    num_relevant: np.ndarray
    """int64 [shown]: relevant photos in the gallery."""
    photo_hashes: np.ndarray
    """uint8 [photos, 32]: SHA-256 of the files of the photos that are named here."""
    systems: Mapping[str, SystemDetails]


_ARRAYS = ("shown", "answers", "asking", "num_relevant", "photo_hashes")
_TEXTS = {"main_metric": str, **dict.fromkeys(("texts", "photo_ids", "photo_texts"), tuple[str, ...])}
_TEXTS |= dict.fromkeys(("query_classes", "class_names", "systems"), tuple[str, ...])
"""The texts and the names of the systems, and their types."""


def write_details(out: Path, details: Details) -> None:
    """details.npz, whole or not at all."""
    texts = {name: getattr(details, name) for name in _TEXTS} | {"systems": list(details.systems)}
    arrays = {name: getattr(details, name) for name in _ARRAYS}
    arrays |= {"version": np.array(_VERSION), "json": np.frombuffer(json.dumps(texts).encode(), np.uint8)}
    for number, system in enumerate(details.systems.values()):
        own = vars(system) | (vars(system.classes) if system.classes else {})
        arrays |= {f"{number}.{name}": array for name, array in own.items() if name != "classes"}
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_whole(out / NAME, file.getvalue())


def read_details(out: Path) -> Details:
    """What `write_details` wrote; ValueError where it is damaged or of another version."""
    path = out / NAME
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if int(arrays["version"]) != _VERSION:
                raise ValueError(f"version {arrays['version']}, this release reads {_VERSION}")
            return _read(arrays)
    except (KeyError, ValueError, TypeError, IndexError, EOFError, RecursionError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged or of another version ({error}). Evaluate again.") from None


def _read(arrays: Mapping[str, np.ndarray]) -> Details:
    content = json.loads(arrays["json"].tobytes())
    texts = {name: typed(kind, name, content[name]) for name, kind in _TEXTS.items()}

    def parts(number: int, *names: str) -> dict[str, Any]:
        return {name: arrays[f"{number}.{name}"] for name in names}

    systems = {}
    for number, name in enumerate(texts["systems"]):
        has_classes = f"{number}.confusion" in arrays
        classes = ClassDetails(**parts(number, "precision", "confusion")) if has_classes else None
        systems[name] = SystemDetails(**parts(number, "metric", "first", "is_relevant"), classes=classes)
    details = Details(**texts | {name: arrays[name] for name in _ARRAYS} | {"systems": systems})
    _check(details)
    return details


def _check(details: Details) -> None:
    """Raise ValueError where arrays do not fit each other, or name a photo that is none."""
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
    """Raise ValueError where details belong to another evaluation than `means`, the main metric of each system."""
    for name, system in details.systems.items():
        found, expected = float(system.metric.mean()), means.get(name)
        if expected is None or abs(found - expected) > 1e-9:
            other = "nothing" if expected is None else f"{expected:.6f}"
            both = f"{details.main_metric} of {name} is {found:.6f}, result.json says {other}"
            raise ValueError(f"{folder / NAME}: {both}: they belong to two evaluations. Evaluate again.")


def _inside(numbers: np.ndarray, low: int, high: int) -> bool:
    return numbers.dtype.kind == "i" and (not numbers.size or (low <= numbers.min() and numbers.max() < high))


def show_classes(section: Section, details: Details, ranked: list[str]) -> None:
    """Add precision over recall, average precision of each class, and confusion to a page's section.

    `ranked`: the systems to draw, the evaluated one first and the best baselines next.
    """
    shown = [name for name in ranked if name in details.systems]
    classes = details.systems[shown[0]].classes
    if classes is None:
        return
    section.figures += [_precision_recall(details, shown[:_MOST_CURVES]), _per_class(details, shown[:_MOST_BARS])]
    named = label(shown[0], "the FAM")
    counts, names = classes.confusion, details.class_names
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    if len(names) <= _MOST_CLASSES:
        section.figures.append(
            HeatMap(
                name="confusion",
                caption=f"Confusion of {named}: percent of each class's photos, by the class whose text is nearest.",
                row_label="true class",
                column_label="nearest class text",
                rows=names,
                columns=names,
                cells=(100 * shares).tolist(),
                texts=[[f"{100 * share:.0f}" if share >= 0.005 else "" for share in row] for row in shares],
            )
        )
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSED]
    rows = tuple(
        plain_row(names[true], names[nearest], str(wrong[true, nearest]), percent(shares[true, nearest]))
        for true, nearest in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[true, nearest]
    )
    if rows:
        header = ("true class", "nearest class text", "photos", "percent of the class")
        section.tables.append(Table(f"What {named} confuses most.", header, rows, folded=True))


def _precision_recall(details: Details, shown: list[str]) -> CurvePlot:
    found = {name: of for name in shown if (of := details.systems[name].classes)}
    means = {name: (100 * of.precision.mean(axis=0)).tolist() for name, of in found.items()}
    return CurvePlot(
        name="precision-recall",
        caption="Precision over recall, mean over classes; interpolated for this drawing only (map is not).",
        x_label="recall, percent",
        y_label="precision, percent",
        curves=[Curve(label(name), (100 * RECALLS).tolist(), mean) for name, mean in means.items()],
        y_limits=(0, 103),
    )


def _per_class(details: Details, shown: list[str]) -> ClassPlot:
    values = details.systems[shown[0]].metric
    worst = np.argsort(values, kind="stable")[:_MOST_CLASSES]
    left_out = f"; the {_MOST_CLASSES} worst of {len(values)} classes" if len(values) > _MOST_CLASSES else ""
    return ClassPlot(
        name="per-class",
        caption=f"Average precision of each class, not interpolated, worst first{left_out}.",
        label="average precision, percent",
        classes=[details.query_classes[query] for query in worst],
        systems=[(label(name), (100 * details.systems[name].metric[worst]).tolist()) for name in shown],
    )


def label(name: str, fam: str = "FAM") -> str:
    """A system's name for people."""
    return fam if name == FAM else name
