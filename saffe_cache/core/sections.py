"""What a result shows, in a terminal and on a page: facts, tables, paragraphs, figures. Plain data only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from saffe_cache.core.figures import Figure
from saffe_cache.core.tables import Table, wrapped


@dataclass(kw_only=True)
class Section:
    """A part of a report."""

    title: str
    lead: str = ""
    """A sentence below the title."""
    facts: list[tuple[str, str]] = field(default_factory=list)
    """Names and values: what was run, and on what."""
    definitions: list[tuple[str, str]] = field(default_factory=list)
    """What each metric and system is."""
    tables: list[Table] = field(default_factory=list)
    """The main table first."""
    texts: list[str] = field(default_factory=list)
    """Paragraphs below the first table."""
    figures: list[Figure] = field(default_factory=list)
    """For saffe_cache.report.plots; a terminal shows none."""

    def to_text(self) -> str:
        """For a terminal. Tables that a page folds are left out, except for the first table."""
        tables = [table.to_text() for place, table in enumerate(self.tables) if place == 0 or not table.folded]
        named = [line for name, text in [*self.facts, *self.definitions] for line in wrapped(f"{name}: {text}", "  ")]
        parts = [
            "\n".join([*wrapped(self.title), *wrapped(self.lead)]),
            *tables[:1],
            "\n".join(line for text in self.texts for line in wrapped(text, "- ")),
            *tables[1:],
            "\n".join(named),
        ]
        return "\n\n".join(filter(None, parts))


def to_text(failures: Iterable[str], warnings: Iterable[str], sections: Iterable[Section]) -> str:
    """A report for a terminal. What is wrong comes first."""
    wrong = [line for text in failures for line in wrapped(f"CONTROL FAILED: {text}. Do not use these numbers.")]
    wrong += [line for text in warnings for line in wrapped(f"WARNING: {text}")]
    return "\n\n".join(filter(None, ["\n".join(wrong), *(section.to_text() for section in sections)])) + "\n"
