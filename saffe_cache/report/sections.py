"""Parts of a page: trainings, costs, sweeps and episodes."""

from __future__ import annotations

from dataclasses import dataclass, field

from saffe_cache.evaluation.details import Details
from saffe_cache.report.old_plots import Plot
from saffe_cache.report.tables import Table


@dataclass(kw_only=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    lead: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Paragraphs below the first table."""
    table: Table | None = None
    words: list[tuple[str, str]] = field(default_factory=list)
    """Metrics and what they are."""
    plots: list[Plot] = field(default_factory=list)
    more: list[Table] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)
    details: Details | None = None
    is_sound: bool = False
