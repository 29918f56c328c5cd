"""Train the FAM alone, straight from the cache."""

from __future__ import annotations

import json
import logging
import resource
from dataclasses import asdict, replace
from pathlib import Path

from saffe_cache.fusion.fam import FusionAlignModule
from saffe_cache.judging.search import own_protocol
from saffe_cache.pairs import Pairs
from saffe_cache.runs import RunSpec, data_fingerprint, provenance, read_json, training_pairs, write_json
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.training.batches import TrainingData
from saffe_cache.training.checkpoints import TrainingState, resume
from saffe_cache.training.fitting import FitOptions, fit, start
from saffe_cache.training.resolving import TrainConfig, fit_options, resolve_run, term_options
from saffe_cache.training.terms import TermOptions

__all__ = ["TrainConfig", "train"]

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> str:
    """Train, and return the run's folder.

    Raises:
        CacheError: the cache lacks what the fusion needs.
        ValueError: the options do not fit the cache, or the folder holds another run.
    """
    out = Path(config.out)
    cache = open_cache(config.cache)
    spec = resolve_run(config, cache)
    train_pairs, validation_pairs, num_shared = training_pairs(spec, cache)
    spec = replace(spec, data=data_fingerprint(cache, spec, train_pairs, validation_pairs))
    _check_folder(out, config, spec)
    if (out / "result.json").exists():
        logger.info("%s is finished already, nothing to do.", out)
        return config.out
    options, terms = fit_options(config), term_options(config)
    _tell(spec, options, train_pairs, validation_pairs, num_shared)
    write_json(out / "config.json", {"stage": "train", "run": asdict(spec), **provenance(config)})
    state = _fit(options, terms, spec, cache, (train_pairs, validation_pairs), out)
    if config.control_epochs:
        permuted = train_pairs.permuted(config.seed), validation_pairs.permuted(config.seed)
        shorter = replace(options, epochs=config.control_epochs, tensorboard=False)
        _fit(shorter, terms, spec, cache, permuted, out / "permuted")
    result = {
        "best_epoch": state.best_epoch,
        "best_validation_score": state.best_score,
        "validation_score": _score_name(spec),
        "trainable_parameters": _num_trainable(state.model),
        "train_photos": len(train_pairs),
        "validation_photos": len(validation_pairs),
        "unusable_items": train_pairs.num_unusable,
        "photos_shared_with_other_splits": num_shared,
        "steps": state.step,
        "seconds": round(state.seconds, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    write_json(out / "result.json", result)
    for path in out.rglob("state.safetensors"):
        path.unlink()
    logger.info(
        "best validation %s %.2f %% after epoch %d of %d; %.2f M trainable parameters.",
        *(_score_name(spec), 100 * state.best_score, state.best_epoch, config.epochs),
        _num_trainable(state.model) / 1e6,
    )
    return config.out


def _tell(spec: RunSpec, options: FitOptions, training: Pairs, validation: Pairs, num_shared: int) -> None:
    logger.info(
        "%s fusion, %s head, on %s: %s of %s%s, described by %s (%s).",
        *(spec.shape.fusion, spec.shape.head, options.device, _names(spec.gallery_layers), spec.gallery_key),
        *(f" and {_names(spec.text_layers)} of the text" if spec.text_layers else "", spec.pairs, spec.text_key),
    )
    logger.info(
        "%d items to train on, %d to validate on (%s); left out %d unusable ones and %d that are in other splits too.",
        *(len(training), len(validation), spec.validation, training.num_unusable, num_shared),
    )


def _fit(
    options: FitOptions, terms: TermOptions, spec: RunSpec, cache: Cache, pairs: tuple[Pairs, Pairs], out: Path
) -> TrainingState:
    """Train on some pairs and choose the epoch on others; resumes what the folder holds."""
    out.mkdir(parents=True, exist_ok=True)
    data = TrainingData(spec, cache, *pairs, options.batch_size, options.seed, options.device)
    state = start(options, terms, spec, cache, data, resumes=(out / "state.safetensors").exists())
    resume(out, state)
    fit(options, state, data, out)
    return state


def _score_name(spec: RunSpec) -> str:
    return "mrr" if own_protocol(spec) == "caption" else "map"


def _check_folder(out: Path, config: TrainConfig, spec: RunSpec) -> None:
    """Refuse to mix two runs in one folder."""
    if not (out / "config.json").exists():
        return
    old = read_json(out / "config.json")
    new = json.loads(json.dumps({"run": asdict(spec), "config": asdict(config)}))
    ignored = {"device", "checkpoint_seconds", "tensorboard", "cache", "out"}
    different = [
        f"{name}: {old.get(part, {}).get(name)!r} there, {value!r} now"
        for part in ("run", "config")
        for name, value in new[part].items()
        if name not in ignored and old.get(part, {}).get(name) != value
    ]
    if different:
        raise ValueError(f"--out {out} holds another run ({'; '.join(different)}). Choose another --out, or delete it.")


def _names(layers: tuple[int, ...]) -> str:
    return "hidden_states " + ", ".join(map(str, layers))


def _num_trainable(model: FusionAlignModule) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
