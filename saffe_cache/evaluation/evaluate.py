"""Index a run's fused vectors, search them, and report every number with baselines, controls and chance.

Protocols measure their controls (see `Protocol.measure_controls`) and know their levels. With null text in the gallery
each must be at chance; with paired texts, at what the texts or the photos find alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from saffe_cache.core.atomic_io import hold_folder, remove_partial_files
from saffe_cache.core.controls import Control, failed
from saffe_cache.core.devices import choose_device, peak_memory_mb
from saffe_cache.core.options import require
from saffe_cache.core.outputs import CONFIG, RESULT, provenance, write_json
from saffe_cache.evaluation.baselines import BASELINES, Material, fit_baselines, left_out
from saffe_cache.evaluation.config import EvaluateConfig
from saffe_cache.evaluation.details import write_details
from saffe_cache.evaluation.results import FAM, Cost, Difference, EvaluationResult, Index, numbers_of
from saffe_cache.evaluation.single_queries import details_of
from saffe_cache.fusion.base import Fusion, counted_flops
from saffe_cache.inputs.feature_loader import FeatureLoader
from saffe_cache.inputs.pairs import Pairs, reported_fingerprint, same_training_pairs
from saffe_cache.protocols.base import LEAKY_GALLERY, NULL_GALLERY, Level, Protocol
from saffe_cache.protocols.registry import load_protocol, own_protocol
from saffe_cache.protocols.setting import Setting
from saffe_cache.retrieval.index import build_index, recall_of_index, require_size, save_index
from saffe_cache.retrieval.metrics import paired_bootstrap
from saffe_cache.retrieval.scores import Scores
from saffe_cache.store.reader import open_cache
from saffe_cache.training.result import TrainResult
from saffe_cache.training.runs import load_permuted, open_run

__all__ = ["EvaluateConfig", "evaluate"]

logger = logging.getLogger(__name__)

INDEX_KS = (10, 100)
"""At which an approximate index is compared with a flat one."""
LEAST_SENSITIVITY = {"image": 0.2, "text": 0.05}
"""Mean distances of unit vectors below which a fusion does not look at its photo, or at its text."""
_SENSITIVITY_PHOTOS = 256
_FLOPS_BATCH = 8


class _Run(NamedTuple):
    """A finished run, loaded; `permuted` is the control that was trained on permuted pairs."""

    model: Fusion
    permuted: Fusion | None
    result: TrainResult
    training: Pairs
    validation: Pairs


def evaluate(config: EvaluateConfig) -> str:
    """Evaluate, and return the output folder.

    Raises:
        CacheError, ValueError: cache, run, split and protocol do not fit together.
        OSError: the disk is full or gone, or another process writes to the output folder.
    """
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    cache, device = open_cache(config.cache), choose_device(config.device)
    spec, model, trained = open_run(config.run, cache)
    permuted = load_permuted(config.run, spec, cache)
    permuted = None if permuted is None else permuted.to(device)
    run = _Run(model.to(device), permuted, trained, *same_training_pairs(spec, cache, config.run))
    name = own_protocol(spec) if config.protocol == "auto" else config.protocol
    protocol = _protocol(config, FeatureLoader(cache, spec, device), run, name)
    logger.info("%s protocol: %d photos of split %s.", name, len(protocol.setting.pairs), config.split)
    leak = "-leak" if config.leak_true_text else ""
    out = Path(config.out or Path(config.run) / f"{config.split}-{name}{leak}")
    with hold_folder(out):
        remove_partial_files(out)
        fam = protocol.answer(run.model, protocol.setting.honest())
        is_all = config.baseline_layers == "cache"
        layers = tuple(cache.encoders[spec.gallery_key].layers) if is_all else spec.gallery_layers
        baselines, absent = fit_baselines(Material(protocol, run.training, run.validation, layers), config.baselines)
        (out / RESULT).unlink(missing_ok=True)  # of an evaluation with other options
        write_json(out / CONFIG, {"run": asdict(spec), **provenance(config)})
        systems = {FAM: fam, **baselines}
        write_details(out, details_of(protocol, systems))
        scores = {name: of.scores for name, of in systems.items()}
        _result(config, protocol, run, scores, absent, out, started).save(out)
    return str(out)


def _protocol(config: EvaluateConfig, inputs: FeatureLoader, run: _Run, name: str) -> Protocol:
    """The protocol over the pairs of the split."""
    kind = load_protocol(name)
    pairs = kind.select(inputs.cache, inputs.spec, config.split)
    require_size(config.index, len(pairs))
    setting = Setting(inputs, pairs, run.training.rows, config.seed)
    if config.leak_true_text:
        require(kind.can_leak, "leak_true_text", f"--protocol {name}", "one that searches photos with null text")
        setting = setting.with_true_texts()
    return kind(setting, **{option: getattr(config, option) for option in kind.options})


def _result(
    config: EvaluateConfig,
    protocol: Protocol,
    run: _Run,
    systems: dict[str, Scores],
    absent: dict[str, str],
    out: Path,
    started: float,
) -> EvaluationResult:
    setting, fitted = protocol.setting, {name: of for name, of in systems.items() if name != FAM}
    controls, measured = run_controls(protocol, run.model, run.permuted, fitted)
    moves, shared = sensitivity(setting, run.model), duplicates(setting.pairs, run.training)
    why_no_permuted = protocol.why_no_permuted()
    definition = protocol.definition
    return EvaluationResult(
        failures=tuple(failures(controls, moves, shared, run.permuted is not None)),
        warnings=(*_warnings(config, protocol), *left_out(run.training, fitted)),
        protocol=protocol.name,
        definition=definition.replace(NULL_GALLERY, LEAKY_GALLERY) if config.leak_true_text else definition,
        main_metric=protocol.main_metric,
        split=config.split,
        data=reported_fingerprint(setting.cache, setting.spec, setting.pairs),
        num_photos=len(setting.pairs),
        num_queries=len(protocol.relevant),
        num_unusable_items=setting.pairs.num_unusable,
        systems={name: numbers_of(scores) for name, scores in systems.items()},
        descriptions={name: BASELINES[name].description for name in fitted},
        absent=absent | ({"control pairs_permuted": why_no_permuted} if why_no_permuted else {}),
        differences={} if config.baselines == "none" else differences(systems[FAM], fitted),
        controls=controls,
        control_scores={name: numbers_of(scores) for name, scores in measured.items()},
        sensitivity=moves,
        duplicates=shared,
        index=_write_index(config, protocol, run.model, out),
        cost=Cost(
            trainable_parameters=run.result.trainable_parameters,
            fusing_flops=fusing_flops(run.model, protocol),
            training_seconds=run.result.seconds,
            training_peak_memory_mb=run.result.peak_memory_mb,
            evaluation_seconds=round(time.perf_counter() - started, 1),
            evaluation_peak_memory_mb=peak_memory_mb(),
        ),
        run=setting.spec,
    )


def differences(fam: Scores, baselines: Mapping[str, Scores]) -> dict[str, dict[str, Difference]]:
    """The FAM minus the best baseline on the reported split, metric by metric, by paired bootstrap over photos."""
    found: dict[str, dict[str, Difference]] = {}
    for metric, score in fam.items():
        rivals = {name: of[metric] for name, of in baselines.items() if metric in of and of[metric].values is not None}
        if score.units is None or not rivals:
            continue
        best = max(rivals, key=lambda name: rivals[name].value)
        interval = paired_bootstrap(score.of_queries - rivals[best].of_queries, score.units)
        found.setdefault(best, {})[metric] = Difference(*interval)
    return found


def _warnings(config: EvaluateConfig, protocol: Protocol) -> list[str]:
    """What a reader must know before the numbers."""
    spec, found = protocol.setting.spec, []
    if config.leak_true_text:
        found.append("LEAK, as requested: the gallery contains the texts that search it. These numbers mean nothing.")
    if config.split == spec.validation:
        found.append(
            f"the best epoch was chosen on split {config.split!r} itself: these numbers are optimistic. "
            "Train with --validation heldout, or report on another split."
        )
    if config.split == spec.train_split:
        found.append(f"the run was trained on split {config.split!r}: these numbers do not show how it generalises.")
    found += protocol.warnings()
    if not spec.shape.entry.is_deterministic:
        found.append(f"fusion {spec.shape.fusion} draws random numbers in evaluation too: repeated runs differ.")
    if num_unusable := protocol.setting.pairs.num_unusable:
        found.append(f"{num_unusable} items of the split are left out: see saffe cache inspect.")
    return found


def _write_index(config: EvaluateConfig, protocol: Protocol, model: Fusion, out: Path) -> Index:
    """Write the index, and compare it with a flat one on the split's own queries."""
    setting, recall = protocol.setting, {}
    vectors, ids = setting.gallery(model, setting.honest()), setting.pairs.ids
    index = build_index(vectors, ids, setting.seed, config.index)
    bytes_per_vector = round(save_index(index, out) / len(vectors))
    if config.index != "flat":
        queries = vectors if protocol.queries is None else setting.queries(model, protocol.queries)
        flat = build_index(vectors, ids, setting.seed)
        recall = {str(k): recall_of_index(index, flat, queries, k) for k in INDEX_KS if k <= len(vectors)}
    return Index(kind=config.index, bytes_per_vector=bytes_per_vector, parameters=index.parameters, recall=recall)


def run_controls(
    protocol: Protocol, model: Fusion, permuted: Fusion | None, baselines: Mapping[str, Scores]
) -> tuple[dict[str, Control], dict[str, Scores]]:
    """The verdict on every control of a protocol, and all its scores; `baselines` are what some are compared with."""
    measured = protocol.measure_controls(model, permuted)
    levels = protocol.control_levels(model, permuted, measured, baselines)
    verdicts = {}
    for name, scores in measured.items():
        metric = protocol.control_metrics.get(name, protocol.main_metric)
        level = levels.get(name) or Level(scores[metric].chance, scores[metric].error)
        verdicts[name] = Control.at_most(name, metric, scores[metric].value, *level)
    return verdicts, measured


@torch.inference_mode()
def sensitivity(setting: Setting, model: Fusion) -> dict[str, float]:
    """How far the fused vector moves when another photo, or another text, takes the place: mean distances, 0 to 2.

    `to_image` = E |f(x, t) - f(x', t)|, and with paired texts `to_text` = E |f(x, t) - f(x, t')|.
    """
    pairs, inputs = setting.pairs, setting.inputs
    chosen = np.random.default_rng(setting.seed).permutation(len(pairs))[:_SENSITIVITY_PHOTOS]
    rolled = np.roll(chosen, 1)

    def vectors(photos: np.ndarray, texts: np.ndarray) -> torch.Tensor:
        states, mask = inputs.photos(pairs.rows[photos])
        paired = None if pairs.paired_texts is None else inputs.texts(pairs.paired_texts[texts])
        return model(states, mask, paired)  # type: ignore[no-any-return]

    others = {"to_image": (rolled, chosen)} | ({} if pairs.paired_texts is None else {"to_text": (chosen, rolled)})
    own = vectors(chosen, chosen)
    return {part: float((own - vectors(*other)).norm(dim=1).mean()) for part, other in others.items()}


def duplicates(pairs: Pairs, training: Pairs) -> dict[str, int]:
    """Photos and texts, by content, that the reported pairs share with those that the run was trained on."""
    return {
        "photos": int(np.isin(pairs.rows, training.rows).sum()),
        "texts": int(np.isin(np.unique(pairs.texts.values), training.texts.values).sum()),
    }


@torch.enable_grad()
def fusing_flops(model: Fusion, protocol: Protocol) -> int:
    """FLOPs of fusing one photo, two for each multiplication and addition: mean over the gallery's first photos.

    The encoders are not counted, but blocks of theirs that the fusion runs are. A photo's text is its own, or with
    candidates a class's, padded to the longest of the batch; re-ranking counts the first stage, the photo alone.
    With gradients, without which torch's counter fails on parameters that a module is called with.
    """
    pairs, inputs, texts = protocol.setting.pairs, protocol.setting.inputs, protocol.fused_texts()
    states, mask = inputs.photos(pairs.rows[:_FLOPS_BATCH])
    with_texts = None if texts is None else inputs.texts(texts[:_FLOPS_BATCH])
    with counted_flops() as counter:
        model(states, mask, with_texts)
    return round(int(counter.get_total_flops()) / len(states[0]))


def failures(
    controls: Mapping[str, Control], moves: Mapping[str, float], shared: Mapping[str, int], has_permuted: bool
) -> list[str]:
    """Why the numbers must not be used, one line each; nothing where they may be."""
    found = failed(controls.values())
    if not has_permuted:
        found.append("no control was trained on permuted pairs (train with --control-epochs above 0)")
    for part, least in LEAST_SENSITIVITY.items():
        moved = moves.get(f"to_{part}")
        if moved is not None and moved < least:
            found.append(f"another {part} moves the fused vector by {moved:.3f}, expected at least {least}")
    if shared["photos"]:
        found.append(f"{shared['photos']} photos were trained on")
    return found
