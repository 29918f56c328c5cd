"""How every study runs: one output folder, cells that are measured once, a result that is written last.

    def bind(config: BindConfig) -> str:
        cache = open_cache(config.cache)
        ...                                            # resolve and check everything before anything is measured
        def measure(study: Study) -> BindingResult:
            settings = study.cells(SettingResult, {"2-way-1-shot": lambda: ..., ...})
            return BindingResult(settings=settings, ..., **study.common_fields(config, controls))
        return run_study("bind", config, resolved, measure)

OUT/config.json      the config, what it resolved to, versions
OUT/cells/NAME.json  one file per finished cell, so that a killed study resumes
OUT/report.txt       for people
OUT/result.json      the result; written last, so its presence means that the study is finished

A cell is whatever is measured and stored together, such as one setting with one seed. The same command resumes a killed
study and does nothing for a finished one; a command with other options is refused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from saffe_cache.core.atomic_io import remove_partial_files
from saffe_cache.core.controls import Control, failed
from saffe_cache.core.json_schema import made_of
from saffe_cache.core.outputs import output_folder, read_json, write_json
from saffe_cache.core.processes import side_by_side
from saffe_cache.core.results import Result

logger = logging.getLogger(__name__)

Cell = TypeVar("Cell")

IGNORED = ("cache", "out", "device", "title")
"""Options in which two commands for one folder may differ; the data's hash is part of what the config resolves to."""


@dataclass(frozen=True, kw_only=True)
class StudyResult(Result):
    """What the results of all studies hold."""

    title: str
    split: str
    """The split that is reported on."""
    seconds: Mapping[str, float]
    """How long each cell took, whichever command measured it."""

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


class Study:
    """A study's output folder while it is held."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.seconds: dict[str, float] = {}
        """How long each cell took, in the order in which they were asked for."""

    def common_fields(self, config: Any, controls: Iterable[Control] = ()) -> dict[str, Any]:
        """What all results hold, once all cells are measured."""
        return {
            "title": config.title or Path(config.cache).stem,
            "split": config.split,
            "failures": tuple(failed(controls)),
            "seconds": self.seconds,
        }

    def cell(self, kind: type[Cell], name: str, measure: Callable[[], Cell]) -> Cell:
        """`cells` with one."""
        return self.cells(kind, {name: measure})[name]

    def cells(self, kind: type[Cell], measures: Mapping[str, Callable[[], Cell]], workers: int = 1) -> dict[str, Cell]:
        """Cells by name, each measured now unless an earlier command has stored it.

        Args:
            kind: the cells' dataclass, of JSON's kinds.
            measures: what measures each; names are file names without suffix, unique within the study. They are begun
                in their order.
            workers: processes that measure side by side; with several, `measures` must be picklable.

        Raises:
            ValueError: a cell's file is damaged.
        """
        folder = self.out / "cells"
        remove_partial_files(folder)
        paths = {name: folder / f"{name}.json" for name in measures}
        missing = {name: partial(_timed, measures[name]) for name, path in paths.items() if not path.exists()}
        done = len(measures) - len(missing)
        for number, (name, (seconds, cell)) in enumerate(side_by_side(missing, workers), start=done + 1):
            write_json(paths[name], {"seconds": seconds, "cell": asdict(cell)})
            logger.info("%d of %d, %s: %.1f s.", number, len(measures), name, seconds)
        found = {}
        for name, path in paths.items():
            assert name not in self.seconds, name
            content = read_json(path)
            try:
                found[name] = made_of(kind, content["cell"], ignores_unknown=True)
                self.seconds[name] = float(content["seconds"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}: it is damaged ({error}). Delete it and run the same command again."
                ) from None
        return found


def _timed(measure: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds that it took, and what it gave."""
    started = time.perf_counter()
    cell = measure()
    return round(time.perf_counter() - started, 2), cell


def run_study(
    verb: str, config: Any, resolved: Any, measure: Callable[[Study], Result], ignored: Collection[str] = ()
) -> str:
    """Measure a study, save its result, and return the output folder, `config.out`.

    Args:
        resolved: what the config resolved to, such as encoders and a hash of the data: a dataclass, or a mapping.
        measure: gives the result; called only where there is none yet.
        ignored: options, besides `IGNORED`, in which two commands for one folder may differ.

    Raises:
        ValueError: the folder holds another result.
        OSError: the disk is full or gone, or another process writes to the folder.
    """
    out = Path(config.out)
    with output_folder(out, verb, config, resolved, (*IGNORED, *ignored)) as is_finished:
        if not is_finished:
            measure(Study(out)).save(out)
    return str(out)
