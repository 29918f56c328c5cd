"""The page: notices first, then every result's sections with their drawings and galleries, then costs.

One HTML file that loads nothing and runs nothing. The template escapes all that comes from data; drawings and style are
our own. A policy in the page's head forbids scripts and every address, so that a mistake here could not let one in. The
only importer of jinja2.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from saffe_cache.core.features import CacheError, nouns, printable
from saffe_cache.core.outputs import CONFIG, RESULT, read_json
from saffe_cache.core.results import Measurement, Result, Section
from saffe_cache.core.tables import ABSENT, Cell, Row, Table, duration, percent, size
from saffe_cache.extraction.ledger import extraction_seconds, reencoding
from saffe_cache.report.gallery import Album, Gallery, find_media, open_galleries
from saffe_cache.report.plots import Plot, draw
from saffe_cache.report.report import ReportConfig
from saffe_cache.store.reader import open_cache
from saffe_cache.training.result import TrainResult
from saffe_cache.verbs import VERBS, load_result


@dataclass(frozen=True, kw_only=True)
class Found:
    """A result in its folder."""

    path: Path
    name: str
    """As much of the end of the path as tells it from the others."""
    result: Result


@dataclass(frozen=True)
class Notice:
    """Something to read before the numbers."""

    kind: str
    """failure, warning or note."""
    where: str
    text: str


@dataclass(kw_only=True)
class Part:
    """A section on the page."""

    anchor: str
    section: Section
    name: str = ""
    """Of the result's folder."""
    plots: list[Plot] = field(default_factory=list)
    galleries: dict[str, Gallery] = field(default_factory=dict)
    """By their own anchors."""


@dataclass(kw_only=True)
class Content:
    """Everything on a page, and the files next to it."""

    notices: list[Notice]
    num_controls: int
    parts: list[Part]
    album: Album
    files: dict[str, bytes]
    """Numbers, by their name in data/."""

    @property
    def plots(self) -> list[Plot]:
        return [plot for part in self.parts for plot in part.plots]


def find_results(folders: Iterable[str]) -> list[Found]:
    """The results in some folders and directly below them, and the run that an evaluation is of, each once.

    Raises:
        ValueError: a folder holds no result, or a result is damaged.
    """
    found: dict[Path, Result] = {}
    for folder in map(Path, folders):
        places = [path.parent for path in (folder / RESULT, *sorted(folder.glob(f"*/{RESULT}"))) if path.exists()]
        if not places:
            writers = ", ".join(f"saffe {name}" for name, verb in VERBS.items() if verb.result)
            lack = f"no {RESULT} is in it or in a folder directly below" if folder.exists() else "nothing is there"
            raise ValueError(f"{folder}: {lack}. Give an output folder of {writers}.")
        run = folder.resolve().parent
        for place in (*places, run) if (run / RESULT).exists() else places:
            if place.resolve() not in found:
                found[place.resolve()] = load_result(place)
    ordered = sorted(found.items(), key=lambda item: (item[1].verb == "train", item[1].verb != "evaluate"))
    names = short_names([path for path, _ in ordered])
    return [Found(path=path, name=name, result=of) for (path, of), name in zip(ordered, names, strict=True)]


def make_content(found: Sequence[Found], config: ReportConfig) -> Content:
    """Everything but the page itself."""
    parts: list[Part] = []
    files: dict[str, bytes] = {}
    by_verb: dict[str, list[Found]] = {}
    for one in found:
        same = by_verb.setdefault(one.result.verb, [])
        same.append(one)
        anchor = f"{one.result.verb}-{len(same)}"
        own = _parts(anchor, one.result.page_sections(one.path), one.name)
        parts += own
        files[f"{anchor}.csv"] = as_csv(Measurement._fields, one.result.measurements())
        for number, gallery in enumerate(open_galleries(one.path, one.result, config), start=1):
            place = f"-{number}" if number > 1 else ""
            own[0].galleries[f"{anchor}-gallery{place}"] = gallery
            files[f"{anchor}-queries{place}.csv"] = as_csv(*gallery.queries())
    for verb, same in by_verb.items():
        if len(same) > 1:
            parts += _parts(f"{verb}-all", type(same[0].result).compare({one.name: one.result for one in same}))
    trained = by_verb.get(TrainResult.verb, [])
    parts += _parts("costs", [_costs_section(trained)] if trained else [])
    for part in parts:
        for figure, plot in zip(part.section.figures, part.plots, strict=True):
            files[f"{plot.name}.json"] = json.dumps(asdict(figure), default=list).encode()
    galleries = [(part, gallery) for part in parts for gallery in part.galleries.values()]
    album = find_media([gallery for _, gallery in galleries], config.data)
    notices = [*_notices(found), *(note for of in galleries for note in _notes_on_media(*of, album))]
    num_controls = sum(map(_num_controls, found))
    return Content(notices=notices, num_controls=num_controls, parts=parts, album=album, files=files)


def _parts(anchor: str, sections: Sequence[Section], name: str = "") -> list[Part]:
    found = []
    for number, section in enumerate(sections, start=1):
        place = anchor if number == 1 else f"{anchor}-{number}"
        plots = [draw(figure, place) for figure in section.figures]
        found.append(Part(anchor=place, section=section, name=name, plots=plots))
    return found


def short_names(paths: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = 2
    while depth < 12 and len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return [" / ".join(part[-depth:]) for part in parts]


def _notices(found: Sequence[Found]) -> list[Notice]:
    """Failures first, then warnings, then notes."""
    failures = [(one, f"{text}. Do not use these numbers.") for one in found for text in one.result.failures]
    warnings = [(one, text) for one in found for text in one.result.warnings]
    notes = [(one, text) for one in found for text in one.result.notes()]
    kinds = {"failure": failures, "warning": warnings, "note": notes}
    return [Notice(kind, one.name, text) for kind, texts in kinds.items() for one, text in texts]


def _num_controls(found: Found) -> int:
    measured = found.result.measurements()
    return len({(one.setting, one.system) for one in measured if one.system.startswith("control: ")})


def _notes_on_media(part: Part, gallery: Gallery, album: Album) -> Iterator[Notice]:
    """On the photos, sounds or videos of a gallery that the page lacks."""
    hashes = set(map(gallery.hash_of, gallery.places))
    reasons = [album.reasons[one] for one in hashes if one not in album.thumbnails and one not in album.sounds]
    if reasons:
        common = max(sorted(set(reasons)), key=reasons.count)
        text = f"{len(reasons)} of the {len(hashes)} {nouns(gallery.media)} of its gallery are not shown: {common}."
        yield Notice("note", part.name, text)


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Unrounded numbers; None is empty."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return file.getvalue().encode("utf-8", "backslashreplace")


def render(content: Content, title: str) -> bytes:
    """The page as HTML."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"percent": percent, "printable": printable}
    template = environment.from_string((folder / "page.html.j2").read_text(encoding="utf-8"))
    thumbnails, sounds = content.album.thumbnails, content.album.sounds
    classes = {photo: f"photo-{number}" for number, photo in enumerate(thumbnails)}
    rules = (
        f".{name}{{background-image:url({_data_url('image/jpeg', thumbnails[photo])})}}"
        for photo, name in classes.items()
    )
    page = template.render(
        title=title,
        content=content,
        style=Markup("\n".join([(folder / "page.css").read_text(encoding="utf-8"), *rules])),
        drawings={plot.name: Markup(plot.inline) for plot in content.plots},  # matplotlib escaped the texts in them
        classes=classes,
        players={
            sound: (f"sound-{number}", _data_url("audio/wav", sounds[sound])) for number, sound in enumerate(sounds)
        },
        played=set(),
        kinds={"failure": "Control failed", "warning": "Warning", "note": "Note"},
    )
    return page.encode("utf-8", "backslashreplace")


def _data_url(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


_LEAD = (
    "Re-encoding: the items and texts that went through the FAM, in training and validation, times the seconds of a "
    "forward pass in the fastest extraction into the cache. The cost of autograd and of the control is left out, so "
    "the true figure is higher. One extraction serves all runs of its cache."
)
_HEADER = ("", "trainable parameters", "training", "extraction", "cache", "items seen", "re-encoding at every step")


def _costs_section(trained: Iterable[Found]) -> Section:
    """The costs of all trainings among the results."""
    table = Table("What was paid, and what re-encoding would have cost.", _HEADER, tuple(map(_costs, trained)))
    return Section(title="Cost ledger", lead=_LEAD, tables=[table])


def _costs(found: Found) -> Row:
    """Of one training; what its cache does not say is absent, with the reason."""
    result = found.result
    assert isinstance(result, TrainResult)
    cells = [
        Cell(f"{result.trainable_parameters / 1e6:.2f} M"),
        Cell(duration(result.seconds), f"{result.peak_memory_mb:,} MB"),
    ]
    try:
        content = read_json(found.path / CONFIG)
        cache = open_cache(str(content["config"]["cache"]))
        gallery, text = (cache.encoders[content["run"][f"{side}_key"]] for side in ("gallery", "text"))
        in_loop = reencoding(gallery, text, [vars(result)])
        if in_loop is None:
            raise ValueError("nothing in the cache says how long its encoders take")
    except (CacheError, ValueError, TypeError, KeyError, OSError) as error:
        return Row(Cell(found.name), (*cells, Cell(ABSENT, str(error)), *[Cell(ABSENT)] * 3))
    arrays = [array for encoder in (gallery, text) for array in encoder.manifest.arrays.values()]
    times = in_loop.seconds / result.seconds if result.seconds else 0.0
    cells += [
        Cell(duration(extraction_seconds(cache)), "once, for all runs"),
        Cell(size(sum(array.rows * array.spec.row_bytes for array in arrays))),
        Cell(f"{in_loop.photos_seen:,}", f"and {in_loop.texts_seen:,} texts"),
        Cell(duration(in_loop.seconds), f"{times:.0f} times its training"),
    ]
    return Row(Cell(found.name), tuple(cells))
