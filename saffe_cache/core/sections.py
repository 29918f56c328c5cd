"""What a result shows, in a terminal and on a page: facts, tables, paragraphs, figures. Plain data only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from saffe_cache.core.tables import Table, wrapped


@dataclass(kw_only=True)
class Section:
    """A part of a report."""

    title: str
    lead: str = ""
    """A sentence below the title."""
    facts: list[tuple[str, str]] = field(default_factory=list)
    """Names and what they are."""
    definitions: list[tuple[str, str]] = field(default_factory=list)
    """Metrics and systems, and what each is."""
    tables: list[Table] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Paragraphs below the first table."""
    figures: list[Any] = field(default_factory=list)
    """Descriptions that saffe_cache.report.plots draws; a terminal shows none."""

    def to_text(self) -> str:
        """For a terminal."""
        lines = [*wrapped(self.title), *wrapped(self.lead)]
        for table in self.tables:
            if not table.folded:
                lines += ["", table.to_text()]
        lines += ["", *(line for text in self.texts for line in wrapped(text, "- "))]
        lines += [line for name, text in [*self.definitions, *self.facts] for line in wrapped(f"{name}: {text}")]
        return "\n".join(lines)


def to_text(failures: Iterable[str], warnings: Iterable[str], sections: Iterable[Section]) -> str:
    """A report for a terminal. What is wrong comes first."""
    lines = [line for text in failures for line in wrapped(f"CONTROL FAILED: {text}. Do not use these numbers.")]
    lines += [line for text in warnings for line in wrapped(f"WARNING: {text}")]
    return "\n".join([*lines, "\n\n".join(section.to_text() for section in sections)]) + "\n"
