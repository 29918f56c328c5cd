"""Recipes: TOML files that say what a sweep varies. Every option of a training may have several values.

`x` and `y` are an option's name, `layers.MODALITY`, or `num_layers`; with `y` the figure is a heat map. Options of
[shared] hold for every [[series]], a line of the plot, whose lists of values span a grid. Options that are on no axis
split a series into one line for each combination of their values. `storage` is an option too: the sweep converts the
cache. docs/studies.md has an example.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from saffe_cache.core.json_schema import made_of
from saffe_cache.core.options import one_of, positional, require, require_seed
from saffe_cache.evaluation.config import BaselineChoice
from saffe_cache.protocols.registry import protocol_choices
from saffe_cache.studies.sweep.result import Published
from saffe_cache.training.config import TrainConfig

_OWN = {"cache", "out", "seed", "device"}
"""Options that the sweep itself decides."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One place of the grid, with one run for each seed."""

    series: str
    x: str
    y: str | None
    settings: Mapping[str, Any]
    """Options of TrainConfig, and `storage`."""

    def config(self, cache: str, out: str, seed: int, device: str) -> TrainConfig:
        """
        Raises:
            ValueError: two options exclude each other.
        """
        options = {name: value for name, value in self.settings.items() if name != "storage"}
        return made_of(TrainConfig, options | {"cache": cache, "out": out, "seed": seed, "device": device})


@dataclass(frozen=True, kw_only=True)
class _Heading:
    """What a recipe says besides its cells."""

    title: str
    question: str
    x_label: str
    y_label: str | None = None
    """None where there is one axis."""
    metric: str | None = None
    """The metric to plot; None for the protocol's main metric."""
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Recipe(_Heading):
    """What a sweep varies and measures."""

    path: str
    """Where it comes from, for messages."""
    cells: tuple[Cell, ...]
    published: tuple[Published, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Content(_Heading):
    """A recipe's file."""

    x: str
    y: str | None = None
    series: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any] = field(default_factory=dict)
    published: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name, values in (("series", self.series), ("seeds", self.seeds)):
            if not values:
                raise ValueError(f"{name}: [], expected at least one")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: {list(self.seeds)}, expected whole numbers from 0, each once")


def read_recipe(path: str | Path) -> Recipe:
    """
    Raises:
        ValueError: it is not a recipe; the message says where.
        OSError: the file cannot be read.
    """
    try:
        content = _made(_Content, tomllib.loads(Path(path).read_text()), "a recipe")
        cells = [cell for series in content.series for cell in _cells(series, content)]
        published = tuple(_made(Published, one, "published") for one in content.published)
        places = [(cell.series, cell.x, cell.y) for cell in cells]
    except (TypeError, ValueError) as error:
        what = f"not TOML ({error})" if isinstance(error, tomllib.TOMLDecodeError) else error
        raise ValueError(f"{path}: {what}. See the recipes in pipelines/.") from None
    twice = [place for place in places if places.count(place) > 1]
    if twice:
        raise ValueError(f"{path}: {twice[0]} is given twice. Give each series and value once, or another x.")
    heading = {one.name: getattr(content, one.name) for one in fields(_Heading)}
    heading |= {"y_label": (content.y_label or "") if content.y else None}
    return Recipe(path=str(path), cells=tuple(cells), published=published, **heading)


def _made(kind: type[Any], content: Mapping[str, Any], where: str) -> Any:
    """
    Raises:
        ValueError: a field is unknown, or one without a default is missing.
        TypeError: a field is of another kind.
    """
    known = {one.name: one.default is MISSING and one.default_factory is MISSING for one in fields(kind)}
    wrong = [f"{name!r} is no field" for name in content if name not in known]
    wrong += [f"{name!r} is missing" for name, is_needed in known.items() if is_needed and name not in content]
    if wrong:
        raise ValueError(f"{where}: {wrong[0]}; there are {', '.join(known)}")
    return made_of(kind, content)


def _cells(series: Mapping[str, Any], recipe: _Content) -> list[Cell]:
    """All combinations of a series' values."""
    options, axes = {**recipe.shared, **series}, (recipe.x, recipe.y)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ValueError("a series lacks its name")
    known = {one.name for one in fields(TrainConfig)} - _OWN | {"storage"}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(f"series {name!r}: there is no option {unknown[0]!r} to vary; there are {sorted(known)}")
    empty = [key for option, value in options.items() for key in _empty(option, value)]
    if empty:  # it would make no cell, or one of nothing
        raise ValueError(f"series {name!r}: {empty[0]} is empty, expected at least one value; or leave it out")
    lists = {option: _values(value) for option, value in options.items()}
    on_axes = {axis.split(".")[0] if axis != "num_layers" else "layers" for axis in axes if axis}
    others = [option for option, values in lists.items() if len(values) > 1 and option not in on_axes]
    cells = []
    for values in itertools.product(*lists.values()):
        settings = dict(zip(lists, values, strict=True))
        varied = [f"{option} {_label(settings[option])}" for option in others]
        x, y = (None if axis is None else _place(settings, axis, name) for axis in axes)
        assert x is not None
        cell = Cell(series=", ".join([name, *varied]), x=x, y=y, settings=settings)
        try:
            cell.config("cache", "out", 0, "auto")
        except (TypeError, ValueError) as error:
            raise ValueError(f"series {cell.series!r} at {x}: {error}") from None
        cells.append(cell)
    return cells


def _empty(key: str, value: Any) -> Iterator[str]:
    """The keys, this one or below it, of empty lists and tables."""
    if not isinstance(value, (list, Mapping)):
        return
    if not value:
        yield key
    parts = value.items() if isinstance(value, Mapping) else [("", one) for one in value]
    for name, one in parts:
        yield from _empty(f"{key}.{name}" if name else key, one)


def _values(value: Any) -> list[Any]:
    """What an option is to be: a list's items; of a table with lists of lists, all combinations of these."""
    if isinstance(value, list):
        return value
    if not isinstance(value, Mapping):
        return [value]
    parts = [one if isinstance(one, list) and one and isinstance(one[0], list) else [one] for one in value.values()]
    return [dict(zip(value, chosen, strict=True)) for chosen in itertools.product(*parts)]


def _place(settings: Mapping[str, Any], axis: str, series: str) -> str:
    """A cell's label on an axis."""
    option, _, part = axis.partition(".")
    try:
        if axis == "num_layers":
            return str(len(next(iter(settings["layers"].values()))))
        return _label(settings[option][part] if part else settings[option])
    except KeyError as error:
        raise ValueError(f"series {series!r} says no {error}, which axis {axis!r} needs") from None


def _label(value: Any) -> str:
    """For a label."""
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_label(one)}" for key, one in value.items())
    return "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """Train and evaluate every cell of a recipe, for every seed, from one cache.

    Runs that exist are not repeated, whether this recipe made them or another with the same --out; the same command
    resumes a killed sweep. Exits with status 3 if a control of a cell failed.
    """

    recipe: tuple[str, ...] = positional()
    """Recipes, such as pipelines/layers.toml: what is varied."""
    cache: str
    """The cache, with all layers and encoders that the recipes name."""
    out: str
    """Folder for all runs, and for each recipe a folder with its result."""
    split: str = "test"
    """Split to report on; the recipe's validation chooses the best epoch."""
    protocol: str | None = one_of(protocol_choices, None)
    """As for saffe evaluate. Default: as the runs are trained; a recipe needs the same one for all of its runs."""
    seeds: tuple[int, ...] = ()
    """Seeds that replace the recipe's."""
    baselines: BaselineChoice = "linear"
    """Which baselines are fitted for each run, on the layers that it fuses."""
    together: int = 8
    """Largest number of runs trained side by side from one pass over the shards, if they see the same batches."""
    workers: int | None = None
    """Training processes. Default: one per processor core, at most 4; 1 on a GPU."""
    device: str = "auto"
    """auto uses a GPU if there is one; or cpu, cuda."""

    def __post_init__(self) -> None:
        require(self.together > 0, "together", self.together, "a number above 0")
        require(self.workers is None or self.workers > 0, "workers", self.workers, "a number above 0")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "each once")
        for seed in self.seeds:
            require_seed("seeds", seed)
        stems = [Path(path).stem for path in self.recipe]
        require(len(set(stems)) == len(stems), "recipe", stems, "files of different names")
        require("runs" not in stems and "caches" not in stems, "recipe", stems, "another name than runs or caches")
