"""Fuse the media of each item, and measure every subset of them.

A cell of the study is one fusion with one seed: trained on all media, on each smaller subset alone, and, with the first
seed, on permuted texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np

from saffe_cache.core.controls import Control
from saffe_cache.core.devices import choose_device
from saffe_cache.core.features import Modality
from saffe_cache.core.options import refuse, require
from saffe_cache.core.results import Estimate
from saffe_cache.evaluation.media import subsets_of
from saffe_cache.inputs.pairs import VALIDATION_SPLITS
from saffe_cache.retrieval.metrics import paired_bootstrap
from saffe_cache.retrieval.scores import Score
from saffe_cache.store.reader import Cache, EncoderCache, open_cache
from saffe_cache.studies.harness import Study, run_study
from saffe_cache.studies.subsets.config import SubsetsConfig
from saffe_cache.studies.subsets.examples import Examples, fingerprint, read_examples
from saffe_cache.studies.subsets.fitting import Fit, fit, late, late_weights
from saffe_cache.studies.subsets.result import FusionOfMedia, Gain, SubsetsCell, SubsetsResult

_HELD_OUT = 0.1


def subsets(config: SubsetsConfig) -> str:
    """Measure, and return the output folder.

    Raises:
        CacheError, ValueError: cache, split and options do not go together; the folder holds another result.
        OSError: the disk is full or gone, or another process writes to the output folder.
    """
    cache = open_cache(config.cache)
    kinds = {encoder.manifest.modality for encoder in cache.encoders.values()}
    order: tuple[Modality, ...] = ("image", "audio", "video")
    chosen = config.modalities or kinds
    modalities = tuple(one for one in order if one in chosen)
    if len(modalities) < 2:
        refuse("modalities", f"{', '.join(modalities) or 'none'} in this cache", "two: add one with saffe extract")
    encoders = [cache.encoder(one, config.encoder.get(one)) for one in modalities]
    text = cache.encoder("text", config.encoder.get("text"))
    layers: dict[str, tuple[int, ...]] = {
        one.manifest.modality: tuple(config.layers.get(one.manifest.modality, one.layers)) for one in encoders
    }
    parts = _parts(config, cache, encoders, text, layers)
    keys = [one.key for one in (*encoders, text)]
    resolved = {
        "encoders": keys,
        "layers": layers,
        "data": fingerprint(cache, list(parts.values())),
    }
    measuring = _Measuring(config, modalities, parts)
    return run_study("subsets", config, resolved, partial(measuring.measure, keys=keys))


def _parts(
    config: SubsetsConfig,
    cache: Cache,
    encoders: list[EncoderCache],
    text: EncoderCache,
    layers: Mapping[str, tuple[int, ...]],
) -> dict[str, Examples]:
    """Items to train on, to choose by and to report on; no input of the last is in the others.

    Raises:
        ValueError: a split has no usable item.
    """
    read = partial(read_examples, cache, encoders, text, layers)
    reported = read(config.split)
    reported = reported.take(np.flatnonzero(reported.has_all))
    if not len(reported):
        raise ValueError(f"split {config.split!r}: no item has all of {', '.join(reported.rows)}. Choose others.")
    training = _without(read(config.train_split), reported)
    validation = config.validation
    if validation == "auto":
        present = set(cache.table.splits) - {config.split}
        validation = next((one for one in VALIDATION_SPLITS if one in present), "heldout")
    require(validation != config.split, "validation", validation, "heldout, or a split that is not reported")
    if validation == "heldout":
        order = np.random.default_rng(0).permutation(len(training))
        held, rest = np.split(order, [max(2, round(_HELD_OUT * len(order)))])
        return {"train": training.take(np.sort(rest)), "validation": training.take(np.sort(held)), "test": reported}
    chosen = _without(read(validation), reported)
    return {"train": _without(training, chosen), "validation": chosen, "test": reported}


def _without(examples: Examples, others: Examples) -> Examples:
    """The items that share no input with others; ValueError if there are none."""
    shared = [np.isin(rows, others.rows[name]) & (rows >= 0) for name, rows in examples.rows.items()]
    kept = np.flatnonzero(~np.logical_or.reduce(shared))
    if not len(kept):
        raise ValueError(f"all of {len(examples)} items share an input with another split. Keep each in one split.")
    return examples.take(kept)


def subset_names(modalities: tuple[Modality, ...]) -> dict[str, tuple[Modality, ...]]:
    """Every subset of some media, by its name; all of them first."""
    return {" + ".join(one): one for one in subsets_of(modalities)}


@dataclass(frozen=True)
class _Measuring:
    """All that one command measures."""

    config: SubsetsConfig
    modalities: tuple[Modality, ...]
    parts: Mapping[str, Examples]

    def measure(self, study: Study, keys: list[str]) -> SubsetsResult:
        config, test = self.config, self.parts["test"]
        names = {f"{name}-seed{seed}": (name, seed) for name in config.fusions for seed in config.seeds}
        cells = study.cells(SubsetsCell, {key: partial(self._cell, *one) for key, one in names.items()})
        by_fusion: dict[str, list[SubsetsCell]] = {
            name: [cells[f"{name}-seed{seed}"] for seed in config.seeds] for name in config.fusions
        }
        fusions = {name: self._summary(of) for name, of in by_fusion.items()}
        chance = cells[next(iter(cells))].chance
        controls = tuple(self._controls(by_fusion, chance))
        return SubsetsResult(
            modalities=self.modalities,
            encoders=tuple(keys),
            seeds=config.seeds,
            metric=test.main_metric,
            chance=chance,
            items={name: len(one) for name, one in self.parts.items()},
            fusions=fusions,
            differences={
                f"{one} less {other}": self._estimate(np.subtract(fusions[one].values, fusions[other].values))
                for one, other in combinations(fusions, 2)
            },
            controls=controls,
            **study.common_fields(config, controls),
        )

    def _cell(self, name: str, seed: int) -> SubsetsCell:
        """Train a fusion with all media and with each smaller subset, and measure."""
        config, test, validation = self.config, self.parts["test"], self.parts["validation"]
        device = choose_device(config.device)
        train = partial(
            fit, config, name, training=self.parts["train"], validation=validation, seed=seed, device=device
        )
        every = subset_names(self.modalities)
        whole = train(modalities=self.modalities)
        rest = {key: train(modalities=one) for key, one in every.items() if len(one) < len(self.modalities)}
        singles = [rest[name] for name in self.modalities]
        complete = validation.take(np.flatnonzero(validation.has_all))
        sides = [[(one.items(part, one.modalities), one.texts(part)) for one in singles] for part in (complete, test)]
        weights = late_weights(complete, sides[0])
        shuffled: dict[str, tuple[float, ...]] = {
            key: self._values(whole, self.modalities, key) for key in self.modalities
        }
        permuted = None
        if seed == config.seeds[0]:
            permuted = self._values(train(modalities=self.modalities, permuted=True), self.modalities)
        return SubsetsCell(
            shown={key: self._values(whole, one) for key, one in every.items()},
            alone={key: self._values(of, of.modalities) for key, of in rest.items()},
            late=_listed(test.scores(*late(sides[1], weights))[test.main_metric]),
            late_weights=weights,
            validation=self._validation(whole, rest),
            shuffled=shuffled,
            permuted=permuted,
            chance=test.scores(*late(sides[1], weights))[test.main_metric].chance,
        )

    def _values(self, of: Fit, subset: tuple[Modality, ...], shuffled: Modality | None = None) -> tuple[float, ...]:
        """The metric of each query on the reported items."""
        test = self.parts["test"]
        return _listed(test.scores(of.items(test, subset, shuffled), of.texts(test))[test.main_metric])

    def _validation(self, whole: Fit, rest: Mapping[str, Fit]) -> dict[str, float]:
        """The metric on validation items, of each model with its own media."""
        part = self.parts["validation"]
        part = part.take(np.flatnonzero(part.has_all))
        every = {" + ".join(self.modalities): whole, **rest}
        return {
            key: part.scores(of.items(part, of.modalities), of.texts(part))[part.main_metric].value
            for key, of in every.items()
        }

    def _summary(self, cells: list[SubsetsCell]) -> FusionOfMedia:
        """Means over the seeds with their intervals over the items, and paired differences."""
        whole = " + ".join(self.modalities)
        best = max(self.modalities, key=lambda one: float(np.mean([cell.validation[one] for cell in cells])))
        full = self._mean([cell.shown[whole] for cell in cells])
        alone = {key: self._mean([cell.alone[key] for cell in cells]) for key in cells[0].alone}
        shown = {key: self._mean([cell.shown[key] for cell in cells]) for key in cells[0].shown}
        late_values = self._mean([cell.late for cell in cells])
        gains = {
            f"all media less {best} alone, the best single one": full - alone[best],
            "all media less late fusion": full - late_values,
            **{
                f"{one} adds to the others": full
                - shown[" + ".join(other for other in self.modalities if other != one)]
                for one in self.modalities
            },
            **{f"with {key} only, less the model of {key} alone": shown[key] - alone[key] for key in alone},
        }
        return FusionOfMedia(
            shown={key: self._estimate(values) for key, values in shown.items()},
            alone={key: self._estimate(values) for key, values in alone.items()},
            late=self._estimate(late_values),
            late_weights=tuple(np.mean([cell.late_weights for cell in cells], axis=0).round(3).tolist()),
            shuffled={
                key: self._estimate(self._mean([cell.shuffled[key] for cell in cells])) for key in cells[0].shuffled
            },
            values=tuple(full.tolist()),
            gains=tuple(
                Gain(name=name, difference=self._estimate(values), by_seed=self._by_seed(cells, name, best))
                for name, values in gains.items()
            ),
        )

    def _by_seed(self, cells: list[SubsetsCell], name: str, best: str) -> tuple[float, ...]:
        """The two differences that matter most, for each seed; none of the others."""
        whole = " + ".join(self.modalities)
        if name.startswith("all media less late"):
            return tuple(float(np.mean(one.shown[whole]) - np.mean(one.late)) for one in cells)
        if name.startswith("all media less"):
            return tuple(float(np.mean(one.shown[whole]) - np.mean(one.alone[best])) for one in cells)
        return ()

    def _mean(self, values: list[tuple[float, ...]]) -> np.ndarray:
        return np.asarray(np.mean(values, axis=0))

    def _estimate(self, values: np.ndarray) -> Estimate:
        test = self.parts["test"]
        units = np.arange(len(test)) if len(test.labels.values) else test.texts.owners
        value, low, high = paired_bootstrap(values, units)
        return Estimate(value=value, low=low, high=high)

    def _controls(self, by_fusion: Mapping[str, list[SubsetsCell]], chance: float) -> list[Control]:
        """A shuffled medium must not find more than the others alone do; permuted texts must be at chance."""
        metric, found = self.parts["test"].main_metric, []
        for name, cells in by_fusion.items():
            for one in self.modalities:
                others = " + ".join(other for other in self.modalities if other != one)
                level = self._estimate(self._mean([cell.alone[others] for cell in cells]))
                value = float(np.mean([cell.shuffled[one] for cell in cells]))
                error = (level.half or 0.0) / 1.96
                what = f"no more than the model of {others} alone"
                found.append(Control.at_most(f"{name}, {one} shuffled", metric, value, level.value, error, what))
            permuted = self._estimate(np.asarray(cells[0].permuted))
            error = (permuted.half or 0.0) / 1.96
            found.append(Control.at_most(f"{name}, texts permuted", metric, permuted.value, chance, error))
        return found


def _listed(score: Score) -> tuple[float, ...]:
    return tuple(score.of_queries.tolist())
