"""Index a run's fused vectors, search them, and report every number with baselines, controls and chance."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from saffe_cache.core.atomic_io import hold_folder, remove_partial_files
from saffe_cache.core.devices import choose_device, peak_memory_mb
from saffe_cache.core.options import require
from saffe_cache.core.outputs import CONFIG, RESULT, provenance, write_json
from saffe_cache.evaluation.baselines import BASELINES, Material, fit_baselines, left_out
from saffe_cache.evaluation.config import EvaluateConfig
from saffe_cache.evaluation.controls import duplicates, failures, fusing_flops, run_controls, sensitivity
from saffe_cache.evaluation.details import write_details
from saffe_cache.evaluation.results import FAM, Cost, Difference, EvaluationResult, Index, numbers_of
from saffe_cache.evaluation.single_queries import details_of
from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.feature_loader import FamInputs
from saffe_cache.inputs.pairs import Pairs, reported_fingerprint, same_training_pairs
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.protocols.base import LEAKY_GALLERY, NULL_GALLERY, Protocol
from saffe_cache.protocols.registry import load_protocol, own_protocol
from saffe_cache.protocols.setting import Answered, Setting
from saffe_cache.retrieval.index import build_index, recall_of_index, require_size, save_index
from saffe_cache.retrieval.metrics import paired_bootstrap
from saffe_cache.retrieval.scores import Scores
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.training.result import TrainResult
from saffe_cache.training.runs import load_permuted, load_run

__all__ = ["EvaluateConfig", "evaluate"]

logger = logging.getLogger(__name__)

INDEX_KS = (10, 100)
"""At which an approximate index is compared with a flat one."""


@dataclass(frozen=True)
class _Run:
    """A finished run, loaded."""

    spec: RunSpec
    model: Fusion
    permuted: Fusion | None
    """The control that was trained on permuted pairs."""
    result: TrainResult
    training: Pairs
    validation: Pairs

    @staticmethod
    def load(folder: str, cache: Cache, device: str) -> _Run:
        spec, model, result = load_run(folder, cache)
        training, validation = same_training_pairs(spec, cache, folder)
        permuted = load_permuted(folder, spec, cache)
        for one in (model, permuted):
            if one is not None:
                one.to(device)
        return _Run(spec, model, permuted, result, training, validation)


def evaluate(config: EvaluateConfig) -> str:
    """Evaluate, and return the output folder.

    Raises:
        CacheError, ValueError: cache, run, split and protocol do not fit together.
        OSError: the disk is full or gone, or another process writes to the output folder.
    """
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    cache, device = open_cache(config.cache), choose_device(config.device)
    run = _Run.load(config.run, cache, device)
    name = own_protocol(run.spec) if config.protocol == "auto" else config.protocol
    protocol = _protocol(config, cache, run, name, device)
    logger.info("%s protocol: %d photos of split %s.", name, len(protocol.setting.pairs), config.split)
    leak = "-leak" if config.leak_true_text else ""
    out = Path(config.out or Path(config.run) / f"{config.split}-{name}{leak}")
    with hold_folder(out):
        remove_partial_files(out)
        fam = protocol.answer(run.model, protocol.setting.honest())
        layers = tuple(cache.encoders[run.spec.gallery_key].layers)
        layers = layers if config.baseline_layers == "cache" else run.spec.gallery_layers
        baselines, absent = fit_baselines(Material(protocol, run.training, run.validation, layers), config.baselines)
        (out / RESULT).unlink(missing_ok=True)  # of an evaluation with other options
        write_json(out / CONFIG, {"run": asdict(run.spec), **provenance(config)})
        write_details(out, details_of(protocol, {FAM: fam, **baselines}))
        _result(config, protocol, run, fam, baselines, absent, out, started).save(out)
    return str(out)


def _protocol(config: EvaluateConfig, cache: Cache, run: _Run, name: str, device: str) -> Protocol:
    """The protocol over the pairs of the split."""
    kind = load_protocol(name)
    pairs = kind.select(cache, run.spec, config.split)
    require_size(config.index, len(pairs))
    setting = Setting(FamInputs(cache, run.spec, device), pairs, run.training.rows, config.seed)
    if config.leak_true_text:
        require(kind.can_leak, "leak_true_text", f"--protocol {name}", "one that searches photos with null text")
        setting = setting.with_true_texts()
    return kind.from_options(setting, asdict(config))


def _result(
    config: EvaluateConfig,
    protocol: Protocol,
    run: _Run,
    fam: Answered,
    baselines: dict[str, Answered],
    absent: dict[str, str],
    out: Path,
    started: float,
) -> EvaluationResult:
    setting = protocol.setting
    fitted = {name: of.scores for name, of in baselines.items()}
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
        num_queries=len(protocol.units),
        num_unusable_items=setting.pairs.num_unusable,
        systems={name: numbers_of(scores) for name, scores in {FAM: fam.scores, **fitted}.items()},
        descriptions={name: BASELINES[name].description for name in fitted},
        absent=absent | ({"control pairs_permuted": why_no_permuted} if why_no_permuted else {}),
        differences={} if config.baselines == "none" else differences(fam.scores, fitted, protocol),
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
        run=run.spec,
    )


def differences(fam: Scores, baselines: dict[str, Scores], protocol: Protocol) -> dict[str, dict[str, Difference]]:
    """The FAM minus the best baseline on the reported split, metric by metric, by paired bootstrap over photos."""
    found: dict[str, dict[str, Difference]] = {}
    for metric, score in fam.items():
        rivals = {name: of[metric] for name, of in baselines.items() if metric in of and of[metric].values is not None}
        units = protocol.difference_units(metric)
        if score.values is None or not rivals or units is None:
            continue
        best = max(rivals, key=lambda name: rivals[name].value)
        other = rivals[best].values
        assert other is not None
        interval = paired_bootstrap(score.values - other, units[: len(other)])
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
    if protocol.setting.pairs.num_unusable:
        num_unusable = protocol.setting.pairs.num_unusable
        found.append(f"{num_unusable} items of the split are left out: see saffe cache inspect.")
    return found


def _write_index(config: EvaluateConfig, protocol: Protocol, model: Fusion, out: Path) -> Index:
    """Write the index, and compare it with a flat one on the split's own queries."""
    setting = protocol.setting
    vectors, ids = setting.gallery(model, setting.honest()), setting.pairs.ids
    index = build_index(vectors, ids, setting.seed, config.index)
    bytes_per_vector, recall = round(save_index(index, out) / len(vectors)), {}
    if config.index != "flat":
        queries = vectors if protocol.queries is None else setting.queries(model, protocol.queries)
        flat = build_index(vectors, ids, setting.seed)
        recall = {str(k): recall_of_index(index, flat, queries, k) for k in INDEX_KS if k <= len(vectors)}
    return Index(kind=config.index, bytes_per_vector=bytes_per_vector, parameters=index.parameters, recall=recall)
