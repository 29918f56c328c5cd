"""Train the methods of one part of the study and measure each; a cell of the study."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from saffe_cache.core.controls import interval_error
from saffe_cache.core.devices import choose_device
from saffe_cache.core.features import CacheError
from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.bank import draw_bank
from saffe_cache.inputs.feature_loader import FeatureLoader
from saffe_cache.inputs.pairs import Pairs, training_pairs
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.protocols.base import SearchProtocol
from saffe_cache.protocols.registry import load_protocol
from saffe_cache.protocols.setting import Setting, Vectors
from saffe_cache.retrieval.metrics import bootstrap_resamples, map_resamples, metrics_of, middle, unit_totals
from saffe_cache.retrieval.scores import Scores, class_orders
from saffe_cache.store.reader import Cache
from saffe_cache.studies.few_pairs.cells import Measured, Part, Permuted, Trained
from saffe_cache.studies.few_pairs.config import FewPairsConfig
from saffe_cache.studies.few_pairs.planning import Source, reported_pairs, run_config, runs_folder
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.runs import load_permuted, open_run
from saffe_cache.training.train import train_many

logger = logging.getLogger(__name__)

_SEED = 0
"""Of the resamples, the same for all."""
_DIGITS = 7
"""Of resampled values."""


def measure_part(config: FewPairsConfig, source: Source, photos: int, seed: int, group: str) -> Part:
    """Train the group's methods side by side, measure them, and remove their runs."""
    names = source.groups[group]
    lacking = [name for name in names if source.methods[name].uses_rest and photos == source.available]
    failed = dict.fromkeys(lacking, "all photos of the cache have their pairs")
    configs = {
        name: run_config(config, source, name, source.methods[name], photos, seed)
        for name in names
        if name not in failed
    }
    failed |= _train(configs, source)
    runs = {name: _measure(config, source, one) for name, one in configs.items() if name not in failed}
    if not config.keep_runs:
        for one in configs.values():
            shutil.rmtree(one.out, ignore_errors=True)
    return Part(runs=runs, failed=failed)


def remove_empty_folders(config: FewPairsConfig) -> None:
    """Remove the folders of runs that are removed, once all are measured."""
    runs = runs_folder(config)
    for place in (*runs.glob("*"), runs):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def _train(configs: Mapping[str, TrainConfig], source: Source) -> dict[str, str]:
    """Train runs together, or one by one where one of them fails; returns why those that fail do."""
    opened = {source.path: source.cache}
    try:
        train_many(list(configs.values()), opened)
        return {}
    except (CacheError, ValueError) as error:
        logger.warning("Training one by one, since a run failed: %s", error)
    failed = {}
    for name, one in configs.items():
        try:
            train_many([one], opened)
        except (CacheError, ValueError) as error:
            failed[name] = str(error)
    return failed


def _measure(config: FewPairsConfig, source: Source, run: TrainConfig) -> Trained:
    device = choose_device(config.device)
    spec, model, trained = open_run(run.out, source.cache)
    permuted = load_permuted(run.out, spec, source.cache)
    models = model.to(device), None if permuted is None else permuted.to(device)
    training = training_pairs(spec, source.cache).training
    return Trained(
        parameters=trained.trainable_parameters,
        seconds=trained.seconds,
        validation_score=trained.best_validation_score,
        best_epoch=trained.best_epoch,
        train_photos=trained.train_photos,
        validation_photos=trained.validation_photos,
        galleries={name: _measure_on(one, *models) for name, one in _protocols(config, source, spec, training).items()},
    )


def _protocols(config: FewPairsConfig, source: Source, spec: RunSpec, training: Pairs) -> dict[str, SearchProtocol]:
    """The protocol over each gallery, with the bank of its search correction. A cache's photos are encoded once."""
    settings: dict[Cache, Setting] = {}
    found = {}
    for name, gallery in source.galleries.items():
        cache, bank = gallery.cache, None
        if cache not in settings:
            loader = FeatureLoader(cache, spec, choose_device(config.device))
            pairs = reported_pairs(config, cache, spec, source.protocol)
            settings[cache] = Setting(loader, pairs, training.rows, _SEED)
        if gallery.correction:
            bank = draw_bank(gallery.correction, cache, spec, training, settings[cache].pairs.texts.values)
        protocol = load_protocol(source.protocol)(replace(settings[cache], bank=bank))
        assert isinstance(protocol, SearchProtocol)
        found[name] = protocol
    return found


def _measure_on(protocol: SearchProtocol, model: Fusion, permuted: Fusion | None) -> Measured:
    torch.manual_seed(_SEED)
    scores, resampled = _scores_of(protocol, model)
    return Measured(
        values={name: score.value for name, score in scores.items()},
        resampled={name: tuple(np.round(values, _DIGITS).tolist()) for name, values in resampled.items()},
        chance={name: score.chance for name, score in scores.items()},
        permuted=None if permuted is None or protocol.why_no_permuted() else _control(protocol, permuted),
    )


def _control(protocol: SearchProtocol, permuted: Fusion) -> Permuted:
    scores, resampled = _scores_of(protocol, permuted)
    main, dealt = protocol.main_metric, protocol.dealt(permuted)
    own = scores[main].chance, interval_error(*middle(resampled[main]))
    level, error = dealt or own
    return Permuted(value=scores[main].value, level=level, error=error)


def _scores_of(protocol: SearchProtocol, model: Fusion) -> tuple[Scores, dict[str, np.ndarray]]:
    """All metrics, and the resampled values of those that have them."""
    answers = protocol.search(model, protocol.setting.honest())
    assert isinstance(answers, Vectors)
    biases: dict[str, Any] = {"biases": answers.biases} if protocol.corrects_search else {}
    scores = protocol.score_vectors(answers.gallery, answers.queries, intervals=False, **biases)
    photos, resampled = np.arange(len(protocol.setting.pairs)), {}
    means = {name: score for name, score in scores.items() if score.values is not None}
    if protocol.shows_classes:
        order, is_relevant = class_orders(answers.scores(), protocol.setting.pairs.labels, protocol.setting.seed)
        resampled["map"] = map_resamples(order, is_relevant, seed=_SEED)
        means = {name: score for name, score in means.items() if name not in metrics_of("classes")}
    for count in {len(score.of_queries) for score in means.values()}:
        units = photos if count == len(photos) else protocol.queries.units
        of_count = {name: score.of_queries for name, score in means.items() if len(score.of_queries) == count}
        totals, counts = zip(*(unit_totals(values, units) for values in of_count.values()), strict=True)
        resampled |= dict(zip(of_count, bootstrap_resamples(totals, counts[0], seed=_SEED), strict=True))
    return scores, resampled
