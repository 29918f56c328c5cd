"""Index a run's fused vectors, search them, and set baselines, controls and chance beside every number."""

from __future__ import annotations

import logging
import resource
import textwrap
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from saffe_cache.features import Ragged
from saffe_cache.pairs import (
    PairKind,
    Pairs,
    class_vectors,
    mean_text_vectors,
    select_pairs,
    summaries,
    unit_rows,
)
from saffe_cache.retrieval.baselines import LinearMap, fit_linear_probe, fit_ridge
from saffe_cache.retrieval.index import build_index, save_index
from saffe_cache.retrieval.protocols import Scores, caption_scores, class_scores
from saffe_cache.runs import (
    RunSpec,
    choose_device,
    encode_gallery,
    encode_queries,
    load_run,
    provenance,
    same_training_pairs,
    write_json,
)
from saffe_cache.store.reader import Cache, EncoderCache, open_cache

logger = logging.getLogger(__name__)

DEFINITIONS = {
    "caption": "each caption searches the photos, one of which is relevant; each photo searches the captions; "
    "the gallery is f(photo, null text)",
    "class": "each class's text searches the photos; map is the mean over classes of non-interpolated average "
    "precision over the whole ranking, map_at_100 the same over its first 100, divided by min(relevant, 100); "
    "top1 is the share of photos whose nearest class text is theirs; "
    "the gallery is f(photo, null text)",
}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Index a run's vectors and measure retrieval, with baselines, controls and chance beside it."""

    cache: str
    """The cache that the run was trained on."""
    run: str
    """The run's folder, as saffe-train-fam wrote it."""
    split: str = "test"
    """Split to report on; its photos are the gallery."""
    out: str | None = None
    """Folder for metrics.json, the table and the index. Default: a folder in the run's, named like the split."""
    protocol: Literal["auto", "caption", "class"] = "auto"
    """caption: captions search photos, and back. class: class names search photos. auto: as the run was trained."""
    seed: int = 0
    """Of the shuffled control, the breaking of ties and the bootstrap."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda."""


@dataclass(frozen=True)
class _Queries:
    """How the photos of some pairs are searched, given what makes a query vector from a text vector."""

    kind: PairKind
    vectors: np.ndarray
    """The text encoder's own vectors: of each caption, or of each class."""
    owners: np.ndarray
    """Captions: the photo that each describes. Classes: empty."""
    labels: Ragged
    seed: int

    def score(self, photos: np.ndarray, queries: np.ndarray, *, intervals: bool = True) -> Scores:
        if self.kind == "captions":
            return caption_scores(photos, queries, self.owners, intervals=intervals, seed=self.seed)
        return class_scores(photos, queries, self.labels, intervals=intervals, seed=self.seed)

    @property
    def main_metric(self) -> str:
        return "mrr" if self.kind == "captions" else "map"


def evaluate(config: EvaluateConfig) -> str:
    """Evaluate, and return the output folder.

    Raises:
        CacheError, ValueError: cache, run, split or protocol do not go together.
    """
    started = time.perf_counter()
    cache = open_cache(config.cache)
    spec, model, result = load_run(config.run, cache)
    training = same_training_pairs(spec, cache, config.run)
    device = choose_device(config.device)
    model.to(device)
    gallery, text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
    kinds: dict[str, PairKind] = {"auto": spec.pairs, "caption": "captions", "class": "classes"}
    kind = kinds[config.protocol]
    pairs = select_pairs(cache.table, gallery, text, config.split, kind)
    queries = _queries(cache, text, pairs, config.seed)
    logger.info("%s: %d photos, %d queries of split %s", kind, len(pairs), len(queries.vectors), config.split)
    encoding = time.perf_counter()
    photos = encode_gallery(model, gallery, pairs.rows, spec.gallery_layers, device)
    encoding = time.perf_counter() - encoding
    searching = encode_queries(model, queries.vectors, device)
    systems: dict[str, Scores] = {"fam": queries.score(photos, searching)}
    shuffled = photos[np.random.default_rng(config.seed).permutation(len(photos))]
    control = queries.score(shuffled, searching)
    baselines, absent = _baselines(cache, spec, pairs, queries, training)
    systems |= baselines
    report = {
        "protocol": "caption" if kind == "captions" else "class",
        "definition": DEFINITIONS["caption" if kind == "captions" else "class"],
        "split": config.split,
        "warnings": _warnings(spec, config, control[queries.main_metric], pairs),
        "num_photos": len(pairs),
        "num_queries": len(queries.vectors),
        "num_unusable_items": pairs.num_unusable,
        "systems": {name: _to_json(scores) for name, scores in systems.items()},
        "absent": absent,
        "controls": {"photos_shuffled": _to_json(control)},
        "cost": {
            "trainable_parameters": result["trainable_parameters"],
            "training_seconds": result["seconds"],
            "training_peak_memory_mb": result["peak_memory_mb"],
            "gallery_seconds": round(encoding, 2),
            "evaluation_seconds": round(time.perf_counter() - started, 1),
            "evaluation_peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        },
        "run": asdict(spec),
        **provenance(config),
    }
    out = Path(config.out or Path(config.run) / config.split)
    out.mkdir(parents=True, exist_ok=True)
    save_index(build_index(photos, pairs.ids, config.seed), out)
    table = format_report(report)
    (out / "report.txt").write_text(table + "\n")
    write_json(out / "metrics.json", report)
    print(table)
    return str(out)


def _queries(cache: Cache, text: EncoderCache, pairs: Pairs, seed: int) -> _Queries:
    if pairs.kind == "classes":
        return _Queries("classes", class_vectors(cache.table, text), np.zeros(0, np.int64), pairs.labels, seed)
    owners = np.repeat(np.arange(len(pairs)), np.diff(pairs.texts.offsets))
    return _Queries("captions", text.vectors(pairs.texts.values), owners, pairs.labels, seed)


def _baselines(
    cache: Cache, spec: RunSpec, pairs: Pairs, queries: _Queries, training: tuple[Pairs, Pairs]
) -> tuple[dict[str, Scores], dict[str, str]]:
    """Scores of the baselines, and why one is absent. They see all cached layers of the same encoder."""
    gallery, text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
    layers = gallery.manifest.layers
    train_pairs, validation = training
    features = {
        part: summaries(gallery, p.rows, layers)
        for part, p in (("train", train_pairs), ("validation", validation), ("test", pairs))
    }
    on_validation = _queries(cache, text, validation, queries.seed)

    def judge_ridge(fit: LinearMap) -> float:
        photos = unit_rows(fit(features["validation"]))
        scores = on_validation.score(photos, unit_rows(on_validation.vectors), intervals=False)
        return scores[on_validation.main_metric].value

    systems: dict[str, Scores] = {}
    absent: dict[str, str] = {}
    query_vectors = unit_rows(queries.vectors)
    ridge = fit_ridge(features["train"], mean_text_vectors(train_pairs, text), judge_ridge)
    systems["ridge"] = queries.score(unit_rows(ridge(features["test"])), query_vectors)
    if queries.kind == "classes":
        systems |= _linear_probe(train_pairs, validation, queries, features, len(cache.table.class_names), absent)
    own = gallery.vectors(pairs.rows) if gallery.manifest.vector in gallery.manifest.arrays else None
    if own is not None and own.shape[1] == queries.vectors.shape[1]:
        systems["pooled_cosine"] = queries.score(unit_rows(own), query_vectors)
    else:
        widths = "no vector is cached" if own is None else f"widths {own.shape[1]} and {queries.vectors.shape[1]}"
        absent["pooled_cosine"] = f"the encoders' own vectors cannot be compared: {widths}"
    return systems, absent


def _linear_probe(
    train_pairs: Pairs,
    validation: Pairs,
    queries: _Queries,
    features: Mapping[str, np.ndarray],
    num_classes: int,
    absent: dict[str, str],
) -> dict[str, Scores]:
    """Logistic regression; its logits rank the photos of each class."""
    if any(len(of_one) != 1 for pairs in (train_pairs, validation) for of_one in pairs.labels):
        absent["linear_probe"] = "some photos have several classes"
        return {}

    def score(fit: LinearMap, photos: np.ndarray, labels: Ragged, intervals: bool) -> Scores:
        probabilities = _softmax(fit(photos))
        return class_scores(
            unit_rows(probabilities), np.eye(num_classes, dtype=np.float32), labels, intervals=intervals
        )

    fit = fit_linear_probe(
        features["train"],
        train_pairs.labels.values,
        num_classes,
        lambda fit: score(fit, features["validation"], validation.labels, False)["top1"].value,
    )
    return {"linear_probe": score(fit, features["test"], queries.labels, True)}


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)


def _warnings(spec: RunSpec, config: EvaluateConfig, control: Any, pairs: Pairs) -> list[str]:
    """What a reader must know before the numbers."""
    warnings = []
    if config.split == spec.validation:
        warnings.append(
            f"the best epoch was chosen on split {config.split!r} itself: these numbers are optimistic. "
            "Train with --validation heldout, or report on another split."
        )
    if config.split == spec.train_split:
        warnings.append(f"the run was trained on split {config.split!r}: these numbers do not tell how it generalises.")
    low, high = control.interval
    slack = high - low
    if not low - slack <= control.chance <= high + slack:
        warnings.append(
            f"the shuffled control is at {100 * control.value:.2f}, chance is {100 * control.chance:.2f}: "
            "something other than the photos is being retrieved. Do not use these numbers."
        )
    if pairs.num_unusable:
        warnings.append(f"{pairs.num_unusable} items of the split are left out: see saffe-cache inspect.")
    return warnings


def _to_json(scores: Scores) -> dict[str, Any]:
    return {
        name: {"value": score.value, "chance": score.chance}
        | ({"low": score.interval[0], "high": score.interval[1]} if score.interval else {})
        for name, score in scores.items()
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The report as a table for a terminal: percent, 95 % intervals in brackets."""
    lines = [f"WARNING: {warning}" for warning in report["warnings"]]
    lines += [
        f"{report['protocol']} protocol, split {report['split']}: {report['num_photos']} photos, "
        f"{report['num_queries']} queries",
        *textwrap.wrap(f"{report['definition']}; percent, 95 % intervals over photos in brackets", 100),
        "",
    ]
    rows = {name: report["systems"][name] for name in report["systems"]}
    rows["photos shuffled"] = report["controls"]["photos_shuffled"]
    metrics = list(report["systems"]["fam"])
    blocks = [metrics[start : start + 3] for start in range(0, len(metrics), 3)]
    for block in blocks:
        lines.append(f"{'':16}" + "".join(f"{name:>27}" for name in block))
        for name, scores in rows.items():
            lines.append(f"{name:16}" + "".join(f"{_cell(metric, scores[metric]):>27}" for metric in block))
        chances = {metric: {"value": report["systems"]["fam"][metric]["chance"]} for metric in block}
        lines.append(f"{'chance':16}" + "".join(f"{_cell(metric, chances[metric]):>27}" for metric in block))
        lines.append("")
    lines += [f"{name}: not applicable, {reason}" for name, reason in report["absent"].items()]
    cost = report["cost"]
    lines.append(
        f"{cost['trainable_parameters'] / 1e6:.2f} M trainable parameters, {cost['training_seconds']:.0f} s of "
        f"training at {cost['training_peak_memory_mb']} MB, gallery encoded in {cost['gallery_seconds']:.1f} s, "
        f"evaluation {cost['evaluation_seconds']:.0f} s"
    )
    return "\n".join(lines)


def _cell(metric: str, score: Mapping[str, float]) -> str:
    if metric.endswith("median_rank"):
        return f"{score['value']:.0f}"
    interval = f" [{100 * score['low']:.1f}, {100 * score['high']:.1f}]" if "low" in score else ""
    return f"{100 * score['value']:.2f}{interval}"
