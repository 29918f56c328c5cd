"""Index the vectors of a run or a baseline, search them, and report every number with controls and chance.

Protocols measure their controls (see `Protocol.measure_controls`) and know their levels. With null text in the gallery
each must be at chance; with paired texts, at what the texts or the photos find alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import torch

from saffe_cache.core import ranks
from saffe_cache.core.atomic_io import hold_folder, remove_partial_files
from saffe_cache.core.controls import Control, failed
from saffe_cache.core.devices import choose_device, peak_memory_mb
from saffe_cache.core.features import NOUNS, Modality, nouns, spoken_of
from saffe_cache.core.items import Inputs
from saffe_cache.core.options import refuse, require
from saffe_cache.core.outputs import CONFIG, RESULT, is_begun, provenance, write_json
from saffe_cache.core.views import indexed_views
from saffe_cache.evaluation.baselines import BASELINES, fit_baseline, fit_baselines, left_out
from saffe_cache.evaluation.config import EvaluateConfig
from saffe_cache.evaluation.details import FAM, write_details
from saffe_cache.evaluation.material import Material
from saffe_cache.evaluation.media import MediaScores, measure_media
from saffe_cache.evaluation.results import Cost, Difference, EvaluationResult, Index, numbers_of
from saffe_cache.evaluation.single_queries import Shown, details_of, shown_of
from saffe_cache.fusion.base import Fusion, counted_flops
from saffe_cache.fusion.registry import OF_MEDIA
from saffe_cache.inputs.bank import draw_bank
from saffe_cache.inputs.feature_loader import FeatureLoader
from saffe_cache.inputs.media import seen_by
from saffe_cache.inputs.pairs import (
    Pairs,
    Unpaired,
    data_fingerprint,
    reported_fingerprint,
    same_training_pairs,
    training_pairs,
    unpaired_inputs,
)
from saffe_cache.inputs.spec import RunSpec, SplitOptions
from saffe_cache.protocols.base import LEAKY_GALLERY, NULL_GALLERY, Level, Protocol, SearchProtocol
from saffe_cache.protocols.registry import load_protocol, own_protocol
from saffe_cache.protocols.setting import FittedScores, Setting, System
from saffe_cache.retrieval.correction import DEFAULT_CORRECTION, Bank
from saffe_cache.retrieval.index import INDEX_FILES, build_index, recall_of_index, require_size, save_index
from saffe_cache.retrieval.metrics import paired_bootstrap
from saffe_cache.retrieval.scores import Scores
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.training.config import DataOptions, TrainConfig
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.result import TrainResult
from saffe_cache.training.runs import kept_encoders, load_permuted, open_run, run_cache, weights_hash

__all__ = ["EvaluateConfig", "evaluate"]

logger = logging.getLogger(__name__)

INDEX_KS = (10, 100)
"""At which an approximate index is compared with a flat one."""
_SENSITIVITY_PHOTOS = 256
_NOT_COMPARED = ("cache", "run", "out", "device", "protocol")
"""Fields of the config that may differ between two evaluations into one folder: what they resolved to is compared."""
_PLAIN_FUSION = "linear"
"""The fusion whose defaults for layers and paired texts a baseline without a run has: it makes no demands on them."""
_FLOPS_BATCH = 8
_CORRECTED = "one in which texts search vectors of items: caption, class or metadata"


@dataclass(frozen=True)
class _Subject:
    """What is evaluated, and the pairs that it was trained on."""

    name: str
    """fam, or the baseline's."""
    spec: RunSpec
    training: Pairs
    validation: Pairs
    run: _Run | None = None
    """None of a baseline."""
    unpaired: Unpaired | None = None
    """What it saw without pairing."""

    @property
    def is_fitted(self) -> bool:
        """Whether it learned from the training pairs."""
        return self.run is not None or BASELINES[self.name].is_fitted


class _Run(NamedTuple):
    """A finished run, loaded; `permuted` is the control that was trained on permuted pairs."""

    model: Fusion
    permuted: Fusion | None
    result: TrainResult
    weights: str
    """Hash of the model's file."""


class _Systems(NamedTuple):
    """The systems of a protocol, ready to be measured."""

    main: System
    permuted: System | None
    """The same, trained or fitted on permuted pairs."""
    answered: Mapping[str, Shown]
    """By name, the main one first."""
    absent: Mapping[str, str]
    """Why some baselines or controls are absent."""
    fitting_seconds: float
    """Of a baseline."""
    uncorrected: Scores
    """Of the main one without the search correction; empty where there is none."""


def evaluate(config: EvaluateConfig) -> str:
    """Evaluate, and return the output folder.

    Raises:
        CacheError, ValueError: cache, run, split and protocol do not fit together, the baseline does not apply, or the
            output folder holds a result of other options.
        OSError: the disk is full or gone, or another process writes to the output folder.
    """
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    cache, device = open_cache(config.cache), choose_device(config.device)
    if config.run is not None:
        cache = run_cache(config.run, cache)
    subject = _resolve_baseline(config, cache) if config.run is None else _load_run(config.run, cache, device)
    cache = seen_by(cache, subject.spec)
    name = own_protocol(subject.spec) if config.protocol == "auto" else config.protocol
    views = _index_views(config, cache, subject.spec)
    inputs = FeatureLoader(cache, subject.spec, device, index_views=views)
    protocol = _protocol(config, inputs, subject, name)
    num_items, of = len(protocol.setting.pairs), nouns([subject.spec.medium])
    logger.info("%s protocol: %d %s of split %s.", name, num_items, of, config.split)
    out = Path(config.out or _default_out(config, subject, name))
    resolved = {"protocol_name": name, "weights": subject.run.weights if subject.run else None}
    content = {"run": asdict(subject.spec), "resolved": resolved, **provenance(config)}
    with ExitStack() as held:
        if ranks.is_first():
            held.enter_context(hold_folder(out))
            remove_partial_files(out)
            if (out / RESULT).exists():  # of the same options it is measured again
                is_begun(out, content, {"run": RunSpec, "resolved": dict, "config": EvaluateConfig}, _NOT_COMPARED)
        systems = _answers(config, protocol, subject)
        details = details_of(protocol, systems.answered)
        if ranks.is_first():
            for file in (RESULT, *INDEX_FILES):
                (out / file).unlink(missing_ok=True)
            write_json(out / CONFIG, content)
            write_details(out, details)
        result = _in_its_words(_result(config, protocol, subject, systems, out, started))
        if ranks.is_first():
            result.save(out)
    return str(out)


def _index_views(config: EvaluateConfig, cache: Cache, spec: RunSpec) -> tuple[str, ...]:
    """The views that --index-views averages: of a run those that its cache had at its training, as in an index."""
    encoder, where = cache.encoders[spec.gallery_key], config.cache
    others = encoder.views(spec.gallery_layers)
    if config.index_views == "mean" and config.run is not None:
        kept, where = kept_encoders(config.run)[0], f"the cache when run {config.run} was trained"
        others = kept.encoders[spec.gallery_key].manifest.views_of(spec.gallery_layers)
    return indexed_views(config.index_views, others, where)


def _load_run(folder: str, cache: Cache, device: str) -> _Subject:
    spec, model, trained = open_run(folder, cache)
    permuted = load_permuted(folder, spec, cache)
    run = _Run(model.to(device), None if permuted is None else permuted.to(device), trained, weights_hash(folder))
    return _Subject(FAM, spec, *same_training_pairs(spec, cache, folder), run, unpaired_inputs(spec, cache))


def _resolve_baseline(config: EvaluateConfig, cache: Cache) -> _Subject:
    """A baseline with the encoders, layers and pairs of a run that was trained with the same options."""
    assert config.system is not None
    require(config.system in BASELINES, "system", config.system, " or ".join(BASELINES))
    groups = (*fields(SplitOptions), *fields(DataOptions))
    options = {one.name: getattr(config, one.name) for one in groups} | {"data_seed": config.data_seed}
    fusion = OF_MEDIA if config.media else _PLAIN_FUSION
    spec = resolve_run(TrainConfig(cache=config.cache, out="", fusion=fusion, **options), cache)
    cache = seen_by(cache, spec)
    training, validation, _ = training_pairs(spec, cache)
    spec = replace(spec, data=data_fingerprint(cache, spec, training, validation))
    return _Subject(config.system, spec, training, validation)


def _default_out(config: EvaluateConfig, subject: _Subject, protocol: str) -> Path:
    is_usual = config.search_correction in (None, DEFAULT_CORRECTION)
    of_correction = "" if is_usual else f"-{config.search_correction}"
    if config.run is None:
        folder = f"{PurePath(config.cache).stem}-baselines"
        return Path(folder) / f"{config.split}-{protocol}-{subject.name}{of_correction}"
    leak, views = "-leak" * config.leak_true_text, "-views" * (config.index_views == "mean")
    return Path(config.run) / f"{config.split}-{protocol}{leak}{of_correction}{views}"


def _protocol(config: EvaluateConfig, inputs: FeatureLoader, subject: _Subject, name: str) -> Protocol:
    """The protocol over the pairs of the split."""
    kind = load_protocol(name)
    pairs = kind.select(inputs.cache, inputs.spec, config.split)
    require_size(config.index, len(pairs))
    setting = Setting(inputs, pairs, subject.training.rows, config.seed)
    if config.leak_true_text:
        require(kind.can_leak, "leak_true_text", f"--protocol {name}", "one that searches items with null text")
        setting = setting.with_true_texts()
    protocol = kind(setting, **{option: getattr(config, option) for option in kind.options})
    protocol.setting = replace(setting, bank=_bank(config, protocol, subject))
    return protocol


def _bank(config: EvaluateConfig, protocol: Protocol, subject: _Subject) -> Bank | None:
    """The training queries of the search correction; None if there is none, or the default one does not apply.

    Raises:
        ValueError: the correction that was requested does not apply.
    """
    correction, setting = config.correction, protocol.setting
    if correction is None:
        return None
    pairs = setting.pairs
    reported = [pairs.texts.values, *([] if pairs.paired_texts is None else [pairs.paired_texts])]
    try:
        if not protocol.corrects_search:
            refuse("search_correction", f"{correction.kind} with protocol {protocol.name}", _CORRECTED)
        return draw_bank(correction, setting.cache, setting.spec, subject.training, np.concatenate(reported))
    except ValueError as error:
        if config.search_correction is not None:
            raise
        logger.info("Searches are not corrected: %s", error)
        return None


def _fitted_on(protocol: Protocol, subject: _Subject, config: EvaluateConfig) -> tuple[Pairs, Pairs]:
    """The training and validation pairs of baselines: where texts alone search, those that have a text."""
    if protocol.pair_kind == "composed":
        return subject.training, subject.validation
    found = subject.training.described(), subject.validation.described()
    if not all(map(len, found)) and config.baselines != "none":
        refuse("baselines", config.baselines, "none: no item that was trained or validated on has a text of its own")
    return found


def _answers(config: EvaluateConfig, protocol: Protocol, subject: _Subject) -> _Systems:
    """Fit what is not trained yet, and have all systems answer."""
    honest, gallery = protocol.setting.honest(), protocol.setting.inputs.gallery
    sees_all = config.baseline_layers == "cache" and gallery.manifest.modality not in config.layers
    layers = tuple(gallery.layers) if sees_all else subject.spec.gallery_layers
    material = Material(protocol, *_fitted_on(protocol, subject, config), layers)
    why_no_permuted, started = protocol.why_no_permuted(), time.perf_counter()
    main: System = subject.run.model if subject.run else fit_baseline(subject.name, material)
    permuted: System | None = subject.run.permuted if subject.run else None
    seconds = time.perf_counter() - started
    if not subject.is_fitted:
        why_no_permuted = "nothing is fitted on training pairs"
    if subject.run is None and why_no_permuted is None:
        permuted = fit_baseline(subject.name, material.permuted(subject.spec.seed))
    others, absent = fit_baselines(material, config.baselines if subject.run else "none")
    if why_no_permuted:
        absent["control pairs_permuted"] = why_no_permuted
    answered = {subject.name: shown_of(protocol, protocol.answer(main, honest))}
    uncorrected = {}
    if protocol.setting.bank is not None:
        without = copy(protocol)
        without.setting = replace(protocol.setting, bank=None)
        uncorrected = without.measure(main, honest)
    return _Systems(main, permuted, answered | others, absent, seconds, uncorrected)


def _result(
    config: EvaluateConfig, protocol: Protocol, subject: _Subject, systems: _Systems, out: Path, started: float
) -> EvaluationResult:
    setting, run, bank = protocol.setting, subject.run, protocol.setting.bank
    scores = {name: of.scores for name, of in systems.answered.items()}
    fitted = {name: of for name, of in scores.items() if name != FAM}
    of_media = _measure_media(protocol, systems.main, scores[subject.name])
    controls, measured = _all_controls(protocol, systems, fitted, of_media)
    moves, shared = sensitivity(protocol, systems.main), _shared(setting, subject)
    definition, is_compared = protocol.described, run is not None and config.baselines != "none"
    return EvaluationResult(
        failures=tuple(
            failures(controls, moves, shared, systems.permuted is not None, protocol.least_moves)
            if run
            else _baseline_failures(controls, shared, subject)
        ),
        warnings=(
            *_warnings(config, protocol, subject),
            *left_out(subject.training, fitted),
            *protocol.findings(scores[subject.name], fitted),
        ),
        system=subject.name,
        protocol=protocol.name,
        definition=definition.replace(NULL_GALLERY, LEAKY_GALLERY) if config.leak_true_text else definition,
        main_metric=protocol.main_metric,
        split=config.split,
        data=reported_fingerprint(setting.cache, setting.spec, setting.pairs),
        num_photos=len(setting.pairs),
        num_queries=len(protocol.relevant),
        num_unusable_items=setting.pairs.num_unusable,
        validation_photos=len(subject.validation),
        validation_photos_drawn_from=subject.validation.drawn_from,
        systems={name: numbers_of(of) for name, of in scores.items()},
        search_correction=bank.correction if bank else None,
        bank_texts=len(bank.texts) if bank else 0,
        bank_photos=len(bank.photos) if bank and protocol.photos_search else 0,
        uncorrected=numbers_of(systems.uncorrected),
        descriptions={name: BASELINES[name].description for name in fitted},
        absent=systems.absent,
        differences=differences(scores[FAM], fitted) if is_compared else {},
        controls=controls,
        control_scores={name: numbers_of(of) for name, of in measured.items()},
        media={name: numbers_of(of) for name, of in of_media.rows.items()},
        media_items=of_media.num_items,
        sensitivity=moves,
        duplicates=shared,
        index=_write_index(config, protocol, systems.main, out),
        cost=_cost(protocol, subject, systems, started),
        run=setting.spec,
    )


def _in_its_words(result: EvaluationResult) -> EvaluationResult:
    """The result with the noun of its medium where texts are written about photos."""
    say = partial(spoken_of, medium=result.run.medium)
    return replace(
        result,
        failures=tuple(map(say, result.failures)),
        warnings=tuple(map(say, result.warnings)),
        definition=say(result.definition),
        descriptions={name: say(text) for name, text in result.descriptions.items()},
        absent={name: say(why) for name, why in result.absent.items()},
    )


def _all_controls(
    protocol: Protocol, systems: _Systems, fitted: Mapping[str, Scores], of_media: MediaScores
) -> tuple[dict[str, Control], dict[str, Scores]]:
    """As `run_controls`, with those of several media where training dropped some of them."""
    controls, measured = run_controls(protocol, systems.main, systems.permuted, fitted)
    if protocol.setting.spec.modality_dropout:  # otherwise the null is untrained
        controls |= of_media.controls(protocol.main_metric)
        measured |= {f"{medium}_shuffled": of for medium, of in of_media.shuffled.items()}
    return controls, measured


def _measure_media(protocol: Protocol, system: System, scores: Scores) -> MediaScores:
    """What a run of several media finds with some of them; nothing of other systems."""
    if isinstance(system, Fusion) and system.shape.media and isinstance(protocol, SearchProtocol):
        return measure_media(protocol, system, scores)
    return MediaScores()


def _cost(protocol: Protocol, subject: _Subject, systems: _Systems, started: float) -> Cost:
    run = subject.run
    return Cost(
        trainable_parameters=run.result.trainable_parameters if run else None,
        fusing_flops=fusing_flops(run.model, protocol) if run else None,
        training_seconds=run.result.seconds if run else round(systems.fitting_seconds, 1),
        training_peak_memory_mb=run.result.peak_memory_mb if run else peak_memory_mb(),
        evaluation_seconds=round(time.perf_counter() - started, 1),
        evaluation_peak_memory_mb=peak_memory_mb(),
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


def _warnings(config: EvaluateConfig, protocol: Protocol, subject: _Subject) -> list[str]:
    """What a reader must know before the numbers."""
    spec, found = subject.spec, []
    if config.leak_true_text:
        found.append("LEAK, as requested: the gallery contains the texts that search it. These numbers mean nothing.")
    what, choice = ("run", "the best epoch was chosen") if subject.run else ("baseline", "the baseline was tuned")
    if config.split == spec.validation and subject.is_fitted:
        found.append(
            f"{choice} on split {config.split!r} itself: these numbers are optimistic. "
            f"{'Train with' if subject.run else 'Use'} --validation heldout, or report on another split."
        )
    if config.split == spec.train_split and subject.is_fitted:
        found.append(f"the {what} was trained on split {config.split!r}: these numbers do not show how it generalises.")
    if subject.run:
        found += protocol.warnings()
        if not spec.shape.entry.is_deterministic:
            found.append(f"fusion {spec.shape.fusion} draws random numbers in evaluation too: repeated runs differ.")
    elif protocol.fuses_pairs:
        found.append("a baseline fuses no pairs: its numbers are those of a search without fusing.")
    if num_unusable := protocol.setting.pairs.num_unusable:
        found.append(f"{num_unusable} items of the split are left out: see saffe cache inspect.")
    return found


def _write_index(config: EvaluateConfig, protocol: Protocol, system: System, out: Path) -> Index | None:
    """Write the index, and compare it with a flat one on the split's own queries; None where there are no vectors."""
    if isinstance(system, FittedScores) or (isinstance(system, Fusion) and system.shape.entry.scores == "own"):
        return None
    setting, recall, ids = protocol.setting, {}, tuple(protocol.setting.pairs.ids)
    if protocol.queries is None:
        vectors = queries = setting.gallery(system, setting.honest())
        biases = None
    else:
        vectors, queries, (biases, _) = setting.vectors(system, setting.honest(), protocol.queries)
    index = build_index(vectors, ids, setting.seed, config.index, biases)
    bytes_per_vector = round(save_index(index, out) / len(vectors)) if ranks.is_first() else 0
    if config.index != "flat":
        flat = build_index(vectors, ids, setting.seed, biases=biases)
        recall = {str(k): recall_of_index(index, flat, queries, k) for k in INDEX_KS if k <= len(vectors)}
    return Index(kind=config.index, bytes_per_vector=bytes_per_vector, parameters=index.parameters, recall=recall)


def run_controls(
    protocol: Protocol, system: System, permuted: System | None, baselines: Mapping[str, Scores]
) -> tuple[dict[str, Control], dict[str, Scores]]:
    """The verdict on every control of a protocol, and all its scores; `baselines` are what some are compared with."""
    measured = protocol.measure_controls(system, permuted)
    levels = protocol.control_levels(system, permuted, measured, baselines)
    verdicts = {}
    for name, scores in measured.items():
        metric = protocol.control_metrics.get(name, protocol.main_metric)
        level = levels.get(name) or Level(scores[metric].chance, scores[metric].error)
        verdicts[name] = Control.at_most(name, metric, scores[metric].value, *level)
    return verdicts, measured


def sensitivity(protocol: Protocol, system: System) -> dict[str, float]:
    """How far the fused vector moves when another photo, or another text, takes the place: mean distances, 0 to 2.

    `to_image` = E |f(x, t) - f(x', t)|, and where photos are fused with texts `to_text` = E |f(x, t) - f(x, t')|. Empty
    of a system that makes no vectors.
    """
    if isinstance(system, FittedScores):
        return {}
    chosen = np.random.default_rng(protocol.setting.seed).permutation(protocol.num_fused)[:_SENSITIVITY_PHOTOS]
    rolled = np.roll(chosen, 1)
    others = {"to_image": (rolled, chosen)} | ({"to_text": (chosen, rolled)} if protocol.fuses_texts else {})
    own = protocol.fused_vectors(system, chosen, chosen)
    return {
        part: float(np.linalg.norm(own - protocol.fused_vectors(system, *other), axis=1).mean())
        for part, other in others.items()
    }


def _shared(setting: Setting, subject: _Subject) -> dict[str, int]:
    """`duplicates` of what is reported and what the subject was trained on."""
    inputs = setting.cache.table.inputs[setting.inputs.gallery.manifest.modality]
    return duplicates(inputs, setting.pairs, subject.training, subject.unpaired)


def duplicates(inputs: Inputs, pairs: Pairs, training: Pairs, unpaired: Unpaired | None = None) -> dict[str, int]:
    """Photos and texts, by content, that the reported pairs share with those that the run was trained on.

    Of several media, items with one in common.
    """
    photos, texts = unpaired or Unpaired(training.rows[:0], training.texts.values[:0])
    photos, texts = np.concatenate([training.rows, photos]), np.concatenate([training.searching.values, texts])
    return {
        "photos": int(inputs.shared(pairs.rows, photos).sum()),
        "texts": int(np.isin(np.unique(pairs.searching.values), texts).sum()),
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
    controls: Mapping[str, Control],
    moves: Mapping[str, float],
    shared: Mapping[str, int],
    has_permuted: bool,
    least_moves: Mapping[Modality, float] = Protocol.least_moves,
) -> list[str]:
    """Why a run's numbers must not be used, one line each; nothing where they may be."""
    found = failed(controls.values())
    if not has_permuted:
        found.append("no control was trained on permuted pairs (train with --control-epochs above 0)")
    for part, least in least_moves.items():
        moved = moves.get(f"to_{part}")
        if moved is not None and moved < least:
            found.append(f"another {NOUNS[part]} moves the fused vector by {moved:.3f}, expected at least {least}")
    return found + _seen(shared)


def _baseline_failures(controls: Mapping[str, Control], shared: Mapping[str, int], subject: _Subject) -> list[str]:
    """The same of a baseline, which may look at one of photo and text alone by design."""
    return failed(controls.values()) + (_seen(shared) if subject.is_fitted else [])


def _seen(shared: Mapping[str, int]) -> list[str]:
    return [f"{shared['photos']} photos were trained on"] if shared["photos"] else []
