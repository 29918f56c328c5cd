"""Every method on few photos of every cache: `saffe few-pairs`.

Cells (saffe_cache/studies/harness.py) are the methods of one group, trained on the same photos with one seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from saffe_cache.core.controls import Control, failed
from saffe_cache.core.devices import choose_device
from saffe_cache.core.processes import choose_workers
from saffe_cache.studies.few_pairs.cells import Part
from saffe_cache.studies.few_pairs.config import FewPairsConfig
from saffe_cache.studies.few_pairs.measuring import measure_part, remove_empty_folders
from saffe_cache.studies.few_pairs.planning import Source, describe, make_source
from saffe_cache.studies.few_pairs.result import FewPairsCache, FewPairsResult
from saffe_cache.studies.few_pairs.summary import Runs, reference_of, runs_of, setting_of, verdicts_of
from saffe_cache.studies.harness import Study, run_study


def few_pairs(config: FewPairsConfig) -> str:
    """Train and measure all methods, and return the output folder.

    Raises:
        CacheError, ValueError: caches, splits and options do not go together, or the folder holds another study.
        OSError: the disk is full or gone, or another process writes to the folder.
    """
    sources = [make_source(config, *of) for of in zip(config.names, config.cache, strict=True)]
    resolved = {"sources": describe(sources), "dtype": config.training_type}
    return run_study("few-pairs", config, resolved, partial(_measure, config, sources), ("keep_runs", "workers"))


def _measure(config: FewPairsConfig, sources: Sequence[Source], study: Study) -> FewPairsResult:
    measures: dict[str, Callable[[], Part]] = {}
    places = {}
    workers = choose_workers(config.workers, choose_device(config.device))
    largest_first = sorted({photos for source in sources for photos in source.sizes}, reverse=True)
    for photos, seed, source in itertools.product(largest_first, config.used_seeds, sources):
        for group in source.groups if photos in source.sizes else ():
            name = f"{source.name}-{photos}-seed{seed}-{group}"
            own = partial(measure_part, config, source) if workers == 1 else partial(_measure_anew, config, source.name)
            measures[name] = partial(own, photos, seed, group)
            places[name] = source.name, photos
    parts: dict[tuple[str, int], list[Part]] = {}
    for name, part in study.cells(Part, measures, workers).items():
        parts.setdefault(places[name], []).append(part)
    remove_empty_folders(config)
    return _summarise(config, sources, parts, study.seconds)


def _measure_anew(config: FewPairsConfig, name: str, photos: int, seed: int, group: str) -> Part:
    """A part in a process of its own, which opens the cache itself."""
    path = dict(zip(config.names, config.cache, strict=True))[name]
    return measure_part(config, make_source(config, name, path), photos, seed, group)


def _summarise(
    config: FewPairsConfig,
    sources: Sequence[Source],
    parts: Mapping[tuple[str, int], Sequence[Part]],
    seconds: Mapping[str, float],
) -> FewPairsResult:
    """Everything that follows from all cells, which are given by cache and number of photos."""
    settings, controls, caches = [], [], {}
    places: dict[tuple[str, int], tuple[str, Runs, str]] = {}
    for source in sources:
        main, closed = source.main_metric, source.closed_forms
        skipped, of_source = dict(source.skipped), []
        for photos in source.sizes:
            runs, failures = runs_of(parts[source.name, photos], len(config.used_seeds))
            skipped |= {f"{method} at {photos:,} photos": why for method, why in failures.items()}
            reference = reference_of(runs, closed)
            of_source.append(runs)
            for gallery in source.galleries:
                settings.append(setting_of(gallery, photos, runs, reference, main))
                places[gallery, photos] = main, runs, reference
        controls += _controls_of(source, of_source, main)
        caches[source.name] = FewPairsCache(
            gallery=source.spec.gallery_key,
            text=source.spec.text_key,
            protocol=source.protocol,
            photos=source.available,
            skipped=skipped,
        )
    return FewPairsResult(
        title=config.title or ", ".join(config.names),
        split=config.split,
        seeds=config.used_seeds,
        dtype=config.training_type,
        closed_forms=tuple(dict.fromkeys(name for source in sources for name in source.closed_forms)),
        caches=caches,
        settings=tuple(settings),
        verdicts=tuple(verdicts_of(places)),
        failures=tuple(failed(controls)),
        seconds=seconds,
    )


def _controls_of(source: Source, runs: Sequence[Runs], metric: str) -> list[Control]:
    """One control for each method and gallery: trained on permuted pairs, it finds what is found by chance.

    Values, levels and errors are means over sizes and seeds: a verdict on each run alone would fail by chance in some
    of some hundred.
    """
    found = []
    for method in source.methods:
        for gallery in source.galleries:
            measured = [one.galleries[gallery].permuted for of in runs for one in of.get(method, ())]
            known = [(one.value, one.level, one.error) for one in measured if one]
            if known:
                value, level, error = (float(np.mean(column)) for column in zip(*known, strict=True))
                name = f"{gallery}, {method} of permuted pairs"
                found.append(Control.at_most(name, metric, value, level, error))
    return found
