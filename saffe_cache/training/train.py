"""Train fusions from a cache."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from saffe_cache.core import ranks
from saffe_cache.core.atomic_io import LOCK_NAME, hold_folder
from saffe_cache.core.devices import choose_device, peak_memory_mb
from saffe_cache.core.options import refuse, require
from saffe_cache.core.outputs import CONFIG, RESULT, is_begun, provenance, write_json
from saffe_cache.core.tables import drawn
from saffe_cache.inputs.feature_loader import FeatureLoader, choose_residency, window_shards
from saffe_cache.inputs.media import named_layers, seen_by
from saffe_cache.inputs.pairs import Pairs, Parts, Unpaired, run_fingerprint, training_pairs, unpaired_inputs
from saffe_cache.inputs.spec import Residency, RunSpec
from saffe_cache.protocols.registry import load_protocol, own_protocol
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.training.batches import TrainingData
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.loggers import Logger, Loggers, required
from saffe_cache.training.loop import Training, TrainingState, fit
from saffe_cache.training.resolve import resolve_run, with_pairs
from saffe_cache.training.result import PERMUTED, TrainResult
from saffe_cache.training.runs import BLOCKS, RIDGE, STATE, keep_encoders, keep_ridge

logger = logging.getLogger(__name__)

_NOT_COMPARED = ("cache", "out", "device", "residency", "checkpoint_seconds", "log", "validation_photos")
"""Fields of the config that may differ between two commands for the same folder. `data` tells the photos that validate;
runs of earlier releases, which validated on all, do not have their number."""
_FEW_PHOTOS = 10
"""Fewer than these choose an epoch badly."""
_PLACES = {"device": "in its memory", "memory": "in main memory", "mapped": "memory-mapped", "streamed": "streamed"}


def train(config: TrainConfig, callbacks: Sequence[Logger] = ()) -> str:
    """Train, and return the run's folder.

    Args:
        config: the options.
        callbacks: objects with the methods `start`, `log` and `finish` of `saffe_cache.training.loggers.Logger`. One
            that raises is dropped with a warning; a finished run calls none.

    Raises:
        CacheError: the cache lacks what the fusion needs.
        ValueError: the options do not fit the cache, or the folder holds another run.
        ImportError: the package of a logger is not installed.
        OSError: the disk is full or gone, or another process is writing to the folder.
    """
    return train_many([config], callbacks={config.out: callbacks})[0]


def train_many(
    configs: Sequence[TrainConfig],
    opened: Mapping[str, Cache] | None = None,
    callbacks: Mapping[str, Sequence[Logger]] | None = None,
) -> list[str]:
    """Train several runs, and return their folders. Runs that see the same batches are trained side by side.

    These are runs on one cache with equal layers, data, batch size and `data_seed`. Their batches are read and prepared
    once for all of them; each run is the same as if it were trained alone.

    `opened` caches, by path, are used instead of opening the path; for example a cache with renamed classes.
    `callbacks` are those of each run, as of `train`, by its `out`.

    Raises:
        CacheError, ValueError, ImportError, OSError: as `train`; two runs have the same folder.
    """
    folders = [config.out for config in configs]
    twice = sorted({folder for folder in folders if folders.count(folder) > 1})
    require(not twice, "out", twice, "a folder of its own for each run")
    caches = {path: open_cache(path) for path in {config.cache for config in configs} - (opened or {}).keys()}
    caches |= opened or {}
    groups: dict[object, list[_Plan]] = {}
    with ExitStack() as held:
        for config in configs:
            plan = _plan(config, caches[config.cache], (callbacks or {}).get(config.out, ()))
            if not ranks.agreed(partial(_is_finished, plan, held)):
                groups.setdefault((same_batches(config, plan.spec), plan.device, plan.residency), []).append(plan)
        for group in groups.values():
            _train_group(group)
    return folders


def _is_finished(plan: _Plan, held: ExitStack) -> bool:
    """Whether the folder has its result; holds it otherwise, and refuses that of another run."""
    if not plan.is_finished or (plan.out / LOCK_NAME).exists():  # left if it was killed after its result
        held.enter_context(hold_folder(plan.out))
    is_begun(plan.out, plan.content, {"run": RunSpec, "config": TrainConfig}, _NOT_COMPARED)
    if plan.is_finished:
        _remove_states(plan.out)  # of such a run too
        logger.info("%s is finished already, nothing to do.", plan.out)
    return plan.is_finished


@dataclass(frozen=True)
class _Plan:
    """A run to train."""

    config: TrainConfig
    """Resolved."""
    cache: Cache
    spec: RunSpec
    device: str
    """The resolved --device."""
    residency: Residency
    parts: Parts
    unpaired: Unpaired | None
    loggers: Sequence[str]
    """Names of those that --log asks for."""
    callbacks: Sequence[Logger]

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def is_finished(self) -> bool:
        return (self.out / RESULT).exists()

    @property
    def content(self) -> dict[str, Any]:
        """The content of config.json."""
        return {"stage": "train", "run": asdict(self.spec), **provenance(self.config)}


def same_batches(config: TrainConfig, spec: RunSpec) -> tuple[object, ...]:
    """Equal for runs that see the same batches in the same order, and can be trained side by side."""
    data = config.cache, spec.gallery_key, spec.text_key, spec.gallery_layers, spec.token_layers, spec.data, spec.views
    read = (
        spec.gallery_text,
        bool(spec.caption_weight),
        spec.regroup,
        spec.shape.entry.reads,
        spec.shape.entry.query_tokens,
    )
    return (*data, *read, own_protocol(spec), config.recipe.batch_size, config.recipe.gallery_photos, spec.seed)


def _plan(config: TrainConfig, cache: Cache, callbacks: Sequence[Logger]) -> _Plan:
    config = with_pairs(config, cache)
    spec = resolve_run(config, cache)
    cache = seen_by(cache, spec)
    parts = training_pairs(spec, cache)
    device = choose_device(config.device)
    residency = ranks.agreed(lambda: choose_residency(config.residency, cache, spec, device))
    unpaired = unpaired_inputs(spec, cache)
    if unpaired and residency == "streamed":
        refuse("residency", "streamed with --unpaired", "memory or mapped: unpaired items are drawn from all shards")
    if spec.pairs == "composed" and residency == "streamed":
        refuse("residency", "streamed with --pairs composed", "memory or mapped: references and targets are anywhere")
    if spec.media and residency == "streamed":
        refuse("residency", f"streamed with --gallery {config.gallery}", "memory: each medium has shards of its own")
    window = window_shards(cache, spec) if residency == "streamed" else None
    spec = replace(spec, shuffled_shards=window, data=run_fingerprint(cache, spec, parts.training, parts.validation))
    if ranks.agreed(lambda: spec.data) != spec.data:
        raise ValueError(f"{config.cache}: this rank reads other data than the first one. Give all the same cache.")
    config = replace(config.resolved(), mixup=spec.mixup or 0.0)
    return _Plan(config, cache, spec, device, residency, parts, unpaired, required(config.log), callbacks)


def _train_group(plans: Sequence[_Plan]) -> None:
    """Train the runs, then their controls on permuted pairs, each side by side."""
    first, seed = plans[0], plans[0].spec.seed
    training, validation, _ = first.parts
    for plan in plans if ranks.is_first() else ():
        _tell(plan)
        if not (plan.out / CONFIG).exists():  # whatever is there is of another run
            _remove_states(plan.out)
            for name in (RIDGE, BLOCKS):
                (plan.out / name).unlink(missing_ok=True)
        write_json(plan.out / CONFIG, plan.content)
    inputs = FeatureLoader(first.cache, first.spec, first.device, first.residency)
    more = [] if first.unpaired is None else [first.unpaired.rows]
    inputs.keep_summaries(np.concatenate([training.rows, validation.rows, *more]))
    with ExitStack() as opened:
        asked = [(plan.loggers, plan.callbacks) if ranks.is_first() else () for plan in plans]
        loggers = [opened.enter_context(Loggers(plan.out, *of)) for plan, of in zip(plans, asked, strict=True)]
        for plan, one in zip(plans, loggers, strict=True):
            resolved = json.loads(json.dumps(plan.content["run"]))
            one.start({**plan.content["config"], "resolved": resolved}, plan.out.name)
        runs = [(plan, plan.config, plan.out, one) for plan, one in zip(plans, loggers, strict=True)]
        states = _fit(runs, inputs, training, validation)
        controls = [
            (plan, plan.config.of_control, out, Loggers(out))
            for plan in plans
            if plan.config.control_epochs
            for out in [plan.out / PERMUTED]
        ]
        permuted: dict[Path, float] = {}
        if controls:
            fitted = _fit(controls, inputs, training.permuted(seed), validation.permuted(seed))
            permuted = {plan.out: state.seconds for (plan, *_), (state, _) in zip(controls, fitted, strict=True)}
        for plan, one, (state, seen) in zip(plans, loggers, states, strict=True):
            one.finish(_finish(plan, state, seen, permuted.get(plan.out, 0.0)))


def _fit(
    runs: Sequence[tuple[_Plan, TrainConfig, Path, Loggers]], inputs: FeatureLoader, training: Pairs, validation: Pairs
) -> list[tuple[TrainingState, tuple[int, int]]]:
    """Train on some pairs and choose the epoch on others; resumes from the folders' checkpoints.

    Returns each run's state, and the numbers of photos and texts that it saw.
    """
    plan, config, *_ = runs[0]
    recipe, seed = config.recipe, inputs.spec.seed
    data = TrainingData(inputs, training, validation, recipe.batch_size, seed, plan.unpaired, recipe.gallery_photos)
    trainings = [
        Training(replace(config, device=plan.device), plan.spec, data, out, loggers)
        for plan, config, out, loggers in runs
    ]
    for plan, _, out, _ in runs:
        if out == plan.out and not ranks.agreed((out / RIDGE).exists):
            ridge = data.start.ridge()
            if ridge is not None and ranks.is_first():
                keep_ridge(out, ridge)
    fit(trainings, data, str(runs[0][2]) if len(runs) == 1 else f"{len(runs)} runs")
    return [(one.state, data.seen(one.state.step)) for one in trainings]


def _finish(plan: _Plan, state: TrainingState, seen: tuple[int, int], control_seconds: float) -> TrainResult:
    """Save the result, which marks the run as finished."""
    score_name = load_protocol(own_protocol(plan.spec)).main_metric
    if ranks.is_first():
        keep_encoders(plan.out, plan.spec, plan.cache)
    num_trainable = state.model.num_fitted
    result = TrainResult(
        medium=plan.spec.medium,
        best_epoch=state.best_epoch,
        best_validation_score=state.best_score,
        validation_score=score_name,
        trainable_parameters=num_trainable,
        train_photos=len(plan.parts.training),
        validation_photos=len(plan.parts.validation),
        validation_photos_drawn_from=plan.parts.validation.drawn_from,
        unusable_items=plan.parts.training.num_unusable,
        photos_shared_with_other_splits=plan.parts.num_shared,
        steps=state.step,
        photos_seen=seen[0],
        texts_seen=seen[1],
        residency=plan.residency,
        seconds=round(state.seconds, 1),
        control_seconds=round(control_seconds, 2),
        peak_memory_mb=peak_memory_mb(),
    )
    if ranks.is_first():
        result.save(plan.out)
        _remove_states(plan.out)
    logger.info(
        "%s: best validation %s %.2f %% after epoch %d of %d; %.2f M trainable parameters.",
        *(plan.out, score_name, 100 * state.best_score, state.best_epoch, plan.config.recipe.epochs),
        num_trainable / 1e6,
    )
    return result


def _remove_states(out: Path) -> None:
    for path in out.rglob(STATE):
        path.unlink()


def _tell(plan: _Plan) -> None:
    spec = plan.spec
    what = "hidden states" if spec.shape.entry.reads == "tokens" else "their summaries"
    place = f"{plan.device} with {what} {_PLACES[plan.residency]}"
    logger.info(
        "%s fusion, %s head, on %s: %s of %s%s%s, described by %s (%s).",
        *(
            spec.shape.fusion,
            spec.shape.head,
            place,
            f"hidden_states {named_layers(spec)}",
            spec.gallery_key,
        ),
        f" in {1 + len(spec.views)} views" if spec.views else "",
        *(
            f" and hidden_states {', '.join(map(str, spec.text_layers))} of the text" if spec.text_layers else "",
            spec.pairs,
            spec.text_key,
        ),
    )
    training, validation, num_shared = plan.parts
    if training.composed is not None and validation.composed is not None:
        logger.info("%d composed queries to train on, %d to validate on.", training.num_samples, validation.num_samples)
    logger.info(
        "%d items to train on, %s to validate on (%s); skipped %d unusable %s and %d that are in other splits too.",
        *(len(training), drawn(len(validation), validation.drawn_from), spec.validation),
        *(training.num_unusable, "ones" if training.composed is None else "items and queries", num_shared),
    )
    if len(validation) < _FEW_PHOTOS:
        logger.warning(
            "%d items choose the best epoch, among which chance finds much: their score says little. Hold out more "
            "(--validation-fraction), or validate on another split.",
            len(validation),
        )
