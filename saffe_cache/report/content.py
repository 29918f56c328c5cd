"""What a page says: notices, then evaluations with plots and galleries, sweeps, episodes, pairs, alignments,
captions, trainings and costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from saffe_cache.report.alignment_section import alignment_section
from saffe_cache.report.caption_section import caption_section
from saffe_cache.report.evaluations import evaluation_section
from saffe_cache.report.galleries import make_cards
from saffe_cache.report.ledger import Costs, costs_of
from saffe_cache.report.match_section import match_section
from saffe_cache.report.photos import Album
from saffe_cache.report.plots import Plot
from saffe_cache.report.reading import Material, Run
from saffe_cache.report.sections import Section, ablation_section, costs_section, episodes_section, run_section
from saffe_cache.report.tables import Sheet


@dataclass(frozen=True)
class Notice:
    """Something that a reader must know before the numbers."""

    kind: str
    """failure, warning or note."""
    where: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Of queries for the galleries."""

    asked: Sequence[str]
    num_random: int
    num_extreme: int


@dataclass(kw_only=True)
class Content:
    """All of a page."""

    notices: list[Notice]
    num_controls: int
    sections: list[Section]
    album: Album
    sheets: list[Sheet]

    @property
    def plots(self) -> list[Plot]:
        return [plot for section in self.sections for plot in section.plots]


def make_content(material: Material, album: Album, choice: Choice) -> Content:
    """Everything but the page itself."""
    names = short_names([one.path for one in material.evaluations])
    runs = short_names([run.path for run in material.runs])
    content = Content(
        notices=_notices(material, names),
        num_controls=sum(len(one.metrics.controls) for one in material.evaluations)
        + sum(len(one.controls) for one in material.matches),
        sections=[],
        album=album,
        sheets=[],
    )
    for number, (evaluation, name) in enumerate(zip(material.evaluations, names, strict=True), start=1):
        content.sections.append(evaluation_section(evaluation, name, f"evaluation-{number}", content.sheets))
    for section, evaluation in zip(content.sections, material.evaluations, strict=True):
        if evaluation.details is not None:
            section.cards = make_cards(evaluation, choice.asked, choice.num_random, choice.num_extreme)
            album.add(evaluation, {place for card in section.cards for place in card.places})
    album.keep_first(_in_turn(content.sections))
    content.notices += _missing_photos(content)
    for number, ablation in enumerate(material.ablations, start=1):
        content.sections.append(ablation_section(ablation, f"ablation-{number}", content.sheets))
    for number, episodes in enumerate(material.episodes, start=1):
        content.sections.append(episodes_section(episodes, f"episodes-{number}", content.sheets))
    for number, matches in enumerate(material.matches, start=1):
        content.sections.append(match_section(matches, f"match-{number}", content.sheets))
    for number, alignment in enumerate(material.alignments, start=1):
        content.sections.append(alignment_section(alignment, f"alignment-{number}", content.sheets))
    if material.captions:
        told = short_names(list(material.captions))
        content.sections.append(caption_section(list(material.captions.values()), told, "captions", content.sheets))
    for number, (run, name) in enumerate(zip(material.runs, runs, strict=True), start=1):
        content.sections.append(run_section(run, name, f"run-{number}", content.sheets))
    if material.runs:
        costs = [(name, _costs(run, material)) for run, name in zip(material.runs, runs, strict=True)]
        content.sections.append(costs_section(costs, content.sheets))
    return content


def short_names(paths: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = 2
    while depth < 12 and len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return [" / ".join(part[-depth:]) for part in parts]


def _notices(material: Material, names: Sequence[str]) -> list[Notice]:
    """Failures first, then warnings, then notes."""
    found = []
    for evaluation, name in zip(material.evaluations, names, strict=True):
        metrics = evaluation.metrics
        found += [Notice("failure", name, f"{text}. Do not use these numbers.") for text in metrics.failures]
        found += [Notice("warning", name, text) for text in metrics.warnings]
        found += [Notice("note", name, text) for text in metrics.notes()]
        if evaluation.details is None:
            text = "it was written by an earlier release, without details of single queries: no galleries and curves. "
            found.append(Notice("note", name, text + "Run saffe-index-eval again."))
    for ablation in material.ablations:
        for series in ablation.series:
            for point in series.points:
                where = f"{ablation.title}: {series.name}, {' / '.join(filter(None, (point.x, point.y)))}"
                found += [Notice("failure", where, f"{text}. Do not use these numbers.") for text in point.failures]
    for episodes in material.episodes:
        found += [Notice("failure", episodes.title, f"{text}. Do not use these numbers.") for text in episodes.failures]
    for matches in material.matches:
        found += [Notice("failure", matches.title, f"{text}. Do not use these numbers.") for text in matches.failures]
    for path, captions in material.captions.items():
        found += [Notice("failure", path.name, f"{text}. Do not use these numbers.") for text in captions.failures]
    order = ("failure", "warning", "note")
    return sorted(found, key=lambda notice: order.index(notice.kind))


def _in_turn(sections: Sequence[Section]) -> Iterator[bytes]:
    """The photos of every section's first card, then of every second, so that none takes another's room."""
    for cards in zip_longest(*(section.cards for section in sections)):
        for section, card in zip(sections, cards, strict=True):
            if card is not None and section.details is not None:
                yield from (section.details.photo_hashes[place].tobytes() for place in sorted(card.places))


def _missing_photos(content: Content) -> list[Notice]:
    found = []
    for section in content.sections:
        if section.details is None or section.is_sound:
            continue
        hashes = section.details.photo_hashes
        shown = {hashes[place].tobytes() for card in section.cards for place in card.places}
        reasons = [content.album.reasons[one] for one in shown if one not in content.album.thumbnails]
        if reasons:
            common = max(sorted(set(reasons)), key=reasons.count)
            text = f"{len(reasons)} of the {len(shown)} photos of its gallery are not shown: {common}."
            found.append(Notice("note", section.title, text))
    return found


def _costs(run: Run, material: Material) -> Costs:
    place = run.path.resolve()
    return costs_of(run, [one for one in material.evaluations if one.path.resolve().parent == place])
