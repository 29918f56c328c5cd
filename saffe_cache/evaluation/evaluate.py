"""Index a run's fused vectors, search them, and set baselines, controls and chance beside every number."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from saffe_cache.core.atomic_io import hold_folder, remove_partial_files, write_whole
from saffe_cache.core.devices import choose_device, peak_memory_mb
from saffe_cache.core.options import require, require_seed
from saffe_cache.core.outputs import provenance, read_json, write_json
from saffe_cache.evaluation.baselines import BaselineChoice, Material, baselines
from saffe_cache.evaluation.controls import duplicates, failures, run_controls, sensitivity, why_no_permuted
from saffe_cache.evaluation.cost import fusing_flops
from saffe_cache.evaluation.details import details_of, write_details
from saffe_cache.evaluation.table import control_to_json, format_report, scores_to_json
from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.feature_loader import FamInputs
from saffe_cache.inputs.pairs import Pairs
from saffe_cache.inputs.spec import RunSpec, same_training_pairs
from saffe_cache.protocols.answers import Answered
from saffe_cache.protocols.measuring import (
    DEFINITIONS,
    Protocol,
    ProtocolName,
    Setting,
    candidate_protocol,
    image_protocol,
    reported_data,
    reported_pairs,
    rerank_protocol,
    search_protocol,
    with_true_texts,
)
from saffe_cache.protocols.search import SearchName, own_protocol
from saffe_cache.retrieval.index import IndexKind, build_index, recall_of_index, require_size, save_index
from saffe_cache.retrieval.metrics import paired_bootstrap
from saffe_cache.retrieval.scores import Scores
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.training.runs import load_permuted, load_run

logger = logging.getLogger(__name__)

INDEX_KS = (10, 100)
"""At which an approximate index is held against a flat one."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Index a run's vectors and measure retrieval, with baselines, controls and chance beside it.

    Exits with status 3 where a control is not where it must be.
    """

    cache: str
    """The cache that the run was trained on."""
    run: str
    """The run's folder, as saffe-train-fam wrote it."""
    split: str = "test"
    """Split to report on; its photos are the gallery."""
    out: str | None = None
    """Folder for metrics.json, the table and the index. Default: SPLIT-PROTOCOL in the run's folder, and -leak."""
    protocol: Literal["auto", "caption", "class", "metadata", "candidate", "rerank", "image"] = "auto"
    """caption: captions search photos, and back. class: class names search photos. metadata: captions search photos
    that lie beside their first caption. candidate: every photo is fused with every class. rerank: the first results of
    caption or class, scored again as fused pairs. image: photos search photos of their class. auto: as the run was
    trained."""
    rerank_k: int = 16
    """Results that rerank scores again, for each query."""
    rerank_queries: int = 500
    """Queries that rerank asks at most, drawn at random: each costs rerank_k fusions."""
    index: IndexKind = "flat"
    """What is written to search with later. flat compares with every photo; ivf with those of the nearest clusters;
    ivf_pq does so with codes of a sixteenth of the size; hnsw follows a graph. The metrics are exact with each; the
    report tells how much of flat's results the others find."""
    baselines: BaselineChoice = "all"
    """Which are fitted. linear: those that take seconds, such as ridge and linear probe. none: only those that the
    controls are held against."""
    baseline_layers: Literal["cache", "run"] = "cache"
    """Layers of the photos that baselines see: all of the cache, or those that the run fuses."""
    leak_true_text: bool = False
    """Put into the gallery, beside each photo, a text that it is searched with. THIS LEAKS THE ANSWER: noise in the
    place of photos scores as well. To show what such numbers are worth."""
    seed: int = 0
    """Of the controls, the breaking of ties and the bootstrap."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda."""

    def __post_init__(self) -> None:
        for option in ("rerank_k", "rerank_queries"):
            require(getattr(self, option) > 0, option, getattr(self, option), "a number above 0")
        require_seed("seed", self.seed)
        require(
            not self.leak_true_text or self.protocol in ("auto", "caption", "class"),
            *("leak_true_text", f"--protocol {self.protocol}", "--protocol caption or class"),
        )


def evaluate(config: EvaluateConfig) -> str:
    """Evaluate, and return the output folder.

    Raises:
        CacheError, ValueError: cache, run, split or protocol do not go together.
        OSError: the disk is full or gone, or another process writes to the output folder.
    """
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    cache = open_cache(config.cache)
    spec, model, result = load_run(config.run, cache)
    training = same_training_pairs(spec, cache, config.run)
    device = choose_device(config.device)
    permuted = load_permuted(config.run, spec, cache)
    for one in (model, permuted):
        if one is not None:
            one.to(device)
    name = own_protocol(spec) if config.protocol == "auto" else config.protocol
    setting = _setting(config, cache, spec, name, training[0], device)
    protocol = _protocol(config, setting, name)
    logger.info("%s protocol: %d photos of split %s.", name, len(setting.pairs), config.split)
    leak = "-leak" if config.leak_true_text else ""
    out = Path(config.out or Path(config.run) / f"{config.split}-{name}{leak}")
    with hold_folder(out):
        remove_partial_files(out)
        measured, systems = _measure(config, protocol, setting, (model, permuted), training)
        report = {
            "protocol": name,
            "definition": _definition(config, name),
            "split": config.split,
            "warnings": _warnings(spec, config, setting.pairs, name),
            "data": reported_data(cache, spec, setting.pairs),
            "num_photos": len(setting.pairs),
            "num_queries": protocol.num_queries,
            "num_unusable_items": setting.pairs.num_unusable,
            **measured,
            "index": _write_index(config, protocol, setting, model, out),
            "cost": {
                "trainable_parameters": result.trainable_parameters,
                "fusing_flops": fusing_flops(model, setting, protocol),
                "training_seconds": result.seconds,
                "training_peak_memory_mb": result.peak_memory_mb,
                "evaluation_seconds": round(time.perf_counter() - started, 1),
                "evaluation_peak_memory_mb": peak_memory_mb(),
            },
            "run": asdict(spec),
            **provenance(config),
        }
        write_details(out, details_of(protocol, setting, systems))
        _write(out, report)
    return str(out)


def _measure(
    config: EvaluateConfig,
    protocol: Protocol,
    setting: Setting,
    models: tuple[Fusion, Fusion | None],
    training: tuple[Pairs, Pairs],
) -> tuple[dict[str, Any], dict[str, Answered]]:
    """The FAM, the baselines and the controls; `models` are the run's own and that of permuted pairs.

    What the report says of them, and the systems themselves.
    """
    model, permuted = models
    fam = protocol.answer(model, setting.honest())
    gallery = setting.inputs.gallery
    layers = tuple(gallery.layers) if config.baseline_layers == "cache" else setting.spec.gallery_layers
    material = Material(setting, *training, protocol, layers)
    others, absent = baselines(material, config.baselines)
    fitted = {system: of.scores for system, of in others.items()}
    controls = run_controls(protocol, setting, model, permuted, fitted)
    reason = why_no_permuted(protocol, setting)
    if reason:
        absent = absent | {"pairs_permuted": reason}
    moves, shared = sensitivity(setting, model), duplicates(setting, training[0])
    report = {
        "failures": failures(controls, moves, shared, permuted is not None),
        "systems": {system: scores_to_json(scores) for system, scores in ({"fam": fam.scores} | fitted).items()},
        "absent": absent,
        "differences": {} if config.baselines == "none" else _differences(fam.scores, fitted, setting, protocol),
        "controls": {name: control_to_json(control) for name, control in controls.items()},
        "sensitivity": moves,
        "duplicates": shared,
    }
    return report, {"fam": fam} | others


def _definition(config: EvaluateConfig, name: ProtocolName) -> str:
    if config.leak_true_text:
        return DEFINITIONS[name].replace("f(photo, null text)", "f(photo, a text that it is searched with)")
    return DEFINITIONS[name]


def read_table(out: str) -> str:
    """The report for people."""
    return (Path(out) / "report.txt").read_text()


def exit_status(out: str) -> int:
    """0, or 3 where a control of the report is not where it must be."""
    return 3 if read_json(Path(out) / "metrics.json")["failures"] else 0


def _setting(
    config: EvaluateConfig, cache: Cache, spec: RunSpec, name: ProtocolName, training: Pairs, device: str
) -> Setting:
    """The pairs of the split, as the protocol needs them."""
    pairs = reported_pairs(cache, spec, config.split, name)
    require_size(config.index, len(pairs))
    setting = Setting(FamInputs(cache, spec, device), pairs, training.rows, config.seed)
    return with_true_texts(setting) if config.leak_true_text else setting


def _protocol(config: EvaluateConfig, setting: Setting, name: ProtocolName) -> Protocol:
    if name == "candidate":
        return candidate_protocol(setting)
    if name == "image":
        return image_protocol(setting)
    if name == "rerank":
        first: SearchName = "class" if setting.pairs.kind == "classes" else "caption"
        return rerank_protocol(setting, first, config.rerank_k, config.rerank_queries)
    return search_protocol(setting, name)


def _differences(fam: Scores, fitted: dict[str, Scores], setting: Setting, protocol: Protocol) -> dict[str, Any]:
    """The FAM less the baseline that the reported split likes best, metric by metric, by paired bootstrap over photos.

    For means over photos, or over queries that belong to photos; a mean over a few classes has too few units.
    """
    by_class = protocol.search is not None and protocol.search.protocol == "class"
    found: dict[str, Any] = {}
    for metric, score in fam.items():
        rivals = {name: of[metric] for name, of in fitted.items() if metric in of and of[metric].values is not None}
        if score.values is None or not rivals or metric.startswith("image_to_text"):
            continue
        if by_class and not metric.startswith("top"):
            continue
        units = np.arange(len(setting.pairs)) if by_class else protocol.units
        best = max(rivals, key=lambda name: rivals[name].value)
        other = rivals[best].values
        assert other is not None
        mean, low, high = paired_bootstrap(score.values - other, units[: len(other)])
        found.setdefault(best, {})[metric] = {"mean": mean, "low": low, "high": high}
    return found


def _warnings(spec: RunSpec, config: EvaluateConfig, pairs: Pairs, name: ProtocolName) -> list[str]:
    """What a reader must know before the numbers."""
    warnings = []
    if config.leak_true_text:
        warnings.append(
            "LEAK, as asked for: the gallery holds the texts that it is searched with. These numbers say nothing."
        )
    if config.split == spec.validation:
        warnings.append(
            f"the best epoch was chosen on split {config.split!r} itself: these numbers are optimistic. "
            "Train with --validation heldout, or report on another split."
        )
    if config.split == spec.train_split:
        warnings.append(f"the run was trained on split {config.split!r}: these numbers do not tell how it generalises.")
    if name in ("candidate", "rerank") and not spec.shape.takes_text:
        warnings.append(f"no text enters fusion {spec.shape.fusion}: a pair's score is that of the photo alone.")
    elif name in ("candidate", "rerank") and spec.gallery_text == "null" and not spec.trains_pairs:
        warnings.append("the run was trained with null text alone: what it makes of a pair is untrained.")
    always_text = spec.pairs_alone or (spec.gallery_text == "first_caption" and not spec.sees_null)
    if name not in ("metadata", "candidate") and always_text:
        warnings.append("the run was trained without null text: what it makes of a photo alone is untrained.")
    if spec.shape.fusion == "reference":
        warnings.append("fusion reference draws its attention anew in every forward: other runs give other numbers.")
    if pairs.num_unusable:
        warnings.append(f"{pairs.num_unusable} items of the split are left out: see saffe-cache inspect.")
    return warnings


def _write_index(
    config: EvaluateConfig, protocol: Protocol, setting: Setting, model: Fusion, out: Path
) -> dict[str, Any]:
    """The index, and what the report says of it: against a flat one, what it finds of the split's own searches."""
    vectors, ids = setting.gallery(model, setting.honest()), setting.pairs.ids
    index = build_index(vectors, ids, setting.seed, config.index)
    size = save_index(index, out)
    found = {"kind": config.index, "bytes_per_vector": round(size / len(vectors)), **index.parameters}
    if config.index == "flat":
        return found
    queries = setting.queries(model, protocol.search) if protocol.search else vectors
    flat = build_index(vectors, ids, setting.seed)
    ks = [k for k in INDEX_KS if k <= len(vectors)]
    return found | {f"recall_at_{k}": recall_of_index(index, flat, queries, k) for k in ks}


def _write(out: Path, report: dict[str, Any]) -> None:
    """metrics.json and report.txt."""
    write_whole(out / "report.txt", f"{format_report(report)}\n".encode())
    write_json(out / "metrics.json", report)
