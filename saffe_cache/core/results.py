"""What a verb writes: result.json, which the same class reads back, and report.txt for people.

result.json holds "verb", "version" and the fields of the verb's class; fractions are fractions, seconds are seconds.
The folder's config.json holds the config, what it resolved to, and versions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from saffe_cache.core.atomic_io import write_whole
from saffe_cache.core.features import Modality, spoken_of
from saffe_cache.core.figures import Figure, Series
from saffe_cache.core.json_schema import made_of
from saffe_cache.core.outputs import RESULT, read_json, write_json
from saffe_cache.core.tables import Cell, Table, interval_cell, percent, wrapped

if TYPE_CHECKING:
    import pandas


REPORT = "report.txt"


class Measurement(NamedTuple):
    """One row of a result's tidy frame."""

    setting: str
    """What distinguishes it within the result, such as "5-way 1-shot"; empty where there is one setting."""
    system: str
    """ "fam", a baseline, or "control: NAME"."""
    metric: str
    value: float
    """A fraction, or a rank or a loss where the metric is one."""
    low: float | None = None
    """Of the 95 % interval; None where there is none."""
    high: float | None = None
    chance: float | None = None
    """What the metric would be by chance; None where that is undefined."""

    @classmethod
    def of(cls, setting: str, system: str, metric: str, estimate: Estimate, chance: float | None = None) -> Measurement:
        """A row from an estimate."""
        return cls(setting, system, metric, estimate.value, estimate.low, estimate.high, chance)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval, if there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def half(self) -> float | None:
        """Half of the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes 0; 0 if it does not, or there is none."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    def cell(self) -> Cell:
        """In percent, with the interval's ends."""
        return interval_cell(self.value, self.low, self.high)

    def half_cell(self) -> Cell:
        """In percent, ± half of the interval."""
        return Cell(percent(self.value), "" if self.half is None else f"± {percent(self.half)}")

    def points(self) -> str:
        """In signed percentage points, in a sentence."""
        value = f"{100 * self.value:+.1f}"
        if self.low is None or self.high is None:
            return value
        return f"{value} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def series_of(name: str, estimates: Sequence[Estimate | None]) -> Series:
    """One series of a panel, in percent; None at a place without an estimate."""
    known = [(place, one) for place, one in enumerate(estimates) if one is not None]
    means, halves = [100 * one.value for _, one in known], [100 * (one.half or 0.0) for _, one in known]
    return Series(name, [place for place, _ in known], means, halves)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Base of every verb's result. A subclass is a frozen dataclass of JSON's kinds that says what it shows."""

    verb: ClassVar[str]
    version: ClassVar[int] = 1
    """Rises when fields change their meaning."""

    failures: tuple[str, ...] = ()
    """Controls that did not hold, one sentence each; the numbers are void where there is one."""
    warnings: tuple[str, ...] = ()
    """What a reader must know before the numbers."""

    def measurements(self) -> Iterator[Measurement]:
        """Every number with its interval and chance."""
        raise NotImplementedError

    def sections(self) -> list[Section]:
        """What a report shows of it."""
        raise NotImplementedError

    def page_sections(self, folder: Path) -> list[Section]:
        """The same for a page, which may also show what other files in the result's folder hold."""
        return self.sections()

    def notes(self) -> list[str]:
        """Remarks that a page puts below the warnings."""
        return []

    @classmethod
    def compare(cls, results: Mapping[str, Self]) -> list[Section]:
        """What a page shows of several results of this verb side by side, by short name; nothing by default."""
        return []

    def to_frame(self) -> pandas.DataFrame:
        """The measurements, one a row, with the fields of `Measurement` as columns."""
        import pandas

        return pandas.DataFrame(list(self.measurements()), columns=list(Measurement._fields))

    def to_text(self) -> str:
        """For a terminal."""
        return to_text(self.failures, self.warnings, self.sections())

    def save(self, folder: Path) -> None:
        """Write report.txt, then result.json: its presence means that the result is complete.

        Raises:
            OSError: the disk is full or gone.
        """
        write_whole(folder / REPORT, self.to_text().encode("utf-8", "backslashreplace"))
        write_json(folder / RESULT, {"verb": self.verb, "version": self.version, **asdict(self)})

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: there is no result, or it is damaged, another verb's, or of another version.
        """
        return cls.from_json(read_json(Path(folder) / RESULT), Path(folder) / RESULT)

    @classmethod
    def from_json(cls, content: dict[str, Any], path: Path) -> Self:
        """As `load`, from JSON that was read from `path`; fields that the class does not declare are left out."""
        found = {key: content.get(key) for key in ("verb", "version")}
        if found != {"verb": cls.verb, "version": cls.version}:
            raise ValueError(
                f"{path}: found {found['verb']!r:.60} version {found['version']!r:.60}, expected {cls.verb!r} version "
                f"{cls.version}. Run the command that writes it again."
            )
        try:
            return made_of(cls, content, ignores_unknown=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: it is damaged ({error}). Run the command that writes it again.") from None


def exit_status(out: str | Path) -> int:
    """0, or 3 where a control of a finished result did not hold."""
    return 3 if read_json(Path(out) / RESULT).get("failures") else 0


def read_report(out: str | Path) -> str:
    """A finished result for people."""
    return (Path(out) / REPORT).read_text(encoding="utf-8")


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

    def spoken_of(self, medium: Modality) -> Section:
        """The same, written about photos, for inputs of a medium; cells and the values of facts stay as they are."""

        def spoken(text: str) -> str:
            return spoken_of(text, medium)

        def drawn(figure: Figure) -> Figure:
            texts = {name: spoken(of) for name, of in vars(figure).items() if isinstance(of, str) and name != "name"}
            return replace(figure, **texts)

        tables = [replace(of, caption=spoken(of.caption), header=(*map(spoken, of.header),)) for of in self.tables]
        return Section(
            title=spoken(self.title),
            lead=spoken(self.lead),
            facts=[(spoken(name), value) for name, value in self.facts],
            definitions=[(name, spoken(text)) for name, text in self.definitions],
            tables=tables,
            texts=[*map(spoken, self.texts)],
            figures=[*map(drawn, self.figures)],
        )

    def to_text(self) -> str:
        """For a terminal. Tables that a page folds are left out, except for the first table."""
        tables = [table.to_text() for place, table in enumerate(self.tables) if place == 0 or not table.folded]
        named = [f"{name}: {text}" for name, text in [*self.facts, *self.definitions]]
        parts = [
            "\n".join([*wrapped(self.title), *wrapped(self.lead)]),
            *tables[:1],
            "\n".join(line for text in self.texts for line in wrapped(text, "- ")),
            *tables[1:],
            "\n".join(line for text in named for line in wrapped(text, "  ", hang=2)),
        ]
        return "\n\n".join(filter(None, parts))


def to_text(failures: Iterable[str], warnings: Iterable[str], sections: Iterable[Section]) -> str:
    """A report for a terminal. What is wrong comes first."""
    wrong = [line for text in failures for line in wrapped(f"CONTROL FAILED: {text}. Do not use these numbers.")]
    wrong += [line for text in warnings for line in wrapped(f"WARNING: {text}")]
    return "\n\n".join(filter(None, ["\n".join(wrong), *(section.to_text() for section in sections)])) + "\n"
