"""Fast concept binding: how few photos does a FAM need to learn a new word? Many episodes, all from one cache.

names.npz               the pool of made-up names and their vectors; with it, no encoder is needed again
config.json             the config, the resolved FAM, a hash over photos and classes
settings/               one file for each setting that is done: what a killed run goes on from
names-replaced/         a run's folder for each training on true names and on made-up ones
binding.json, .txt      the result; written last, so its presence means that all is done
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from saffe_cache.core.atomic_io import hold_folder, remove_partial_files, write_whole
from saffe_cache.core.devices import choose_device
from saffe_cache.core.features import MODALITIES, CacheError
from saffe_cache.core.options import require, require_keys, require_seed
from saffe_cache.core.outputs import is_begun, provenance, read_json, write_json
from saffe_cache.extraction.history import past_extractions
from saffe_cache.extraction.reload_encoder import reopen_encoder
from saffe_cache.inputs.feature_loader import summaries
from saffe_cache.inputs.pairs import select_pairs
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.studies.binding.episodes import Task
from saffe_cache.studies.binding.fitting import BATCH_PHOTOS
from saffe_cache.studies.binding.measuring import MeasureOptions, Photos, measure
from saffe_cache.studies.binding.names import NamePool, encode_names, make_names
from saffe_cache.studies.binding.published import published_results
from saffe_cache.studies.binding.renamed_classes import METRICS, probe_scores, renamed_cache, run_scores
from saffe_cache.studies.binding.table import format_binding
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.train import TrainConfig, train_many

logger = logging.getLogger(__name__)

_NOT_COMPARED = ("cache", "out", "device", "text_encoder", "title")
"""Fields of the config in which two commands for one folder may differ."""
_LEAST_NAMES = 2


@dataclass(frozen=True, kw_only=True)
class BindConfig:
    """Bind made-up names to photos by a few examples each, in many episodes, with baselines and controls.

    The same command goes on with a killed run, and does nothing for a finished one. Exits with status 3 where a control
    is not where it must be.
    """

    cache: str
    """A cache of photos with classes, as saffe-extract wrote it."""
    out: str
    """Folder of the result."""
    ways: tuple[int, ...] = (2, 5)
    """Classes of an episode, one setting for each number."""
    shots: tuple[int, ...] = (1, 3, 5)
    """Photos of each class to learn from, one setting for each number."""
    queries: int = 15
    """Photos of each class to be asked about."""
    episodes: int = 600
    """Episodes of a setting."""
    split: str = "test"
    """Split that the episodes are drawn from."""
    train_split: str = "train"
    """Split in whose episodes learning rates and the ridge's strength are chosen; photos of --split are left out."""
    tuning_episodes: int = 20
    """Episodes to choose them by, for each setting."""
    head: Literal["attention", "mean"] = "attention"
    """How the FAM pools tokens: by learned queries, with an MLP, or by their mean."""
    max_epochs: int = 20
    """Epochs after which a fit counts as converged even if its loss still falls."""
    num_names: int = 1000
    """Made-up names to draw from."""
    replaced_seeds: int = 0
    """So many trainings on the whole train split with a made-up name for every class, each with other names and
    another start, beside as many with the true names."""
    replaced_epochs: int = 20
    """Epochs of these at most; the best is chosen on a tenth of train."""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layers, as image=11,12. Default: all."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Which encoder, as image=PART-OF-KEY, where the cache has several of a modality."""
    text_encoder: str | None = None
    """Where the text encoder is now. Default: where the extraction found it. Needed once, to encode the names."""
    title: str | None = None
    """What the result is called. Default: the cache's name."""
    seed: int = 0
    """Of names, episodes and starting weights."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda."""

    def __post_init__(self) -> None:
        for option in ("ways", "shots"):
            values = getattr(self, option)
            least = 2 if option == "ways" else 1
            require(bool(values) and min(values) >= least, option, values, f"numbers of {least} or more")
            require(len(set(values)) == len(values), option, values, "each number once")
        require(max(self.ways) <= BATCH_PHOTOS, "ways", max(self.ways), f"at most {BATCH_PHOTOS}: a step's photos")
        for option in ("queries", "max_epochs", "replaced_epochs"):
            require(getattr(self, option) > 0, option, getattr(self, option), "a number above 0")
        for option in ("episodes", "tuning_episodes"):
            require(getattr(self, option) > 1, option, getattr(self, option), "2 or more")
        require(self.max_epochs >= 2, "max_epochs", self.max_epochs, "2 or more: both are reported")
        require(self.num_names >= _LEAST_NAMES, "num_names", self.num_names, f"{_LEAST_NAMES} or more")
        require(self.replaced_seeds >= 0, "replaced_seeds", self.replaced_seeds, "0 or more")
        require(self.split != self.train_split, "split", self.split, "another than --train-split")
        require_keys("layers", self.layers, MODALITIES)
        require_keys("encoder", self.encoder, MODALITIES)
        require_seed("seed", self.seed)


def bind(config: BindConfig) -> str:
    """Measure, and return the output folder.

    Raises:
        CacheError, ValueError: cache, split and options do not go together; the folder holds another result.
        OSError: the disk is full or gone, or another process writes to the output folder.
    """
    cache = open_cache(config.cache)
    spec = resolve_run(_train_config(config, config.out, config.seed), cache)
    spec = replace(spec, shape=replace(spec.shape, dropout=0.0, maps_queries=False))
    out = Path(config.out)
    with hold_folder(out):
        remove_partial_files(out)
        rows = {name: _photo_rows(cache, spec, name) for name in (config.split, config.train_split)}
        seen = np.isin(rows[config.train_split][0], rows[config.split][0])
        known, labels = rows[config.train_split]
        rows[config.train_split] = known[~seen], labels[~seen]
        spec = replace(spec, data=_fingerprint(cache, spec, rows))
        told = {"stage": "bind", "run": asdict(spec), **provenance(config)}
        if not is_begun(out, told, {"run": RunSpec, "config": BindConfig}, _NOT_COMPARED):
            write_json(out / "config.json", told)
        if (out / "binding.json").exists():
            logger.info("%s is finished already, nothing to do.", out)
            return str(out)
        pool = _names(config, cache, spec, out)
        started = time.perf_counter()
        settings = _settings(config, cache, spec, rows, unit_rows(pool.vectors))
        replaced = _names_replaced(config, cache, pool) if config.replaced_seeds else []
        result = {
            "title": config.title or Path(config.cache).stem,
            "dataset": Path(config.cache).stem,
            "split": config.split,
            "failures": [failure for setting in settings for failure in setting["failures"]],
            "settings": settings,
            "names_replaced": replaced,
            "published": published_results(),
            "names": {"count": len(pool.names), "examples": list(pool.names[:5])},
            "seconds": round(sum(setting["seconds"] for setting in settings), 1),
            "last_command_seconds": round(time.perf_counter() - started, 1),
            "fam": asdict(spec.shape),
            **provenance(config),
        }
        table = format_binding(result)
        write_whole(out / "binding.txt", f"{table}\n".encode())
        write_json(out / "binding.json", result)
    return str(out)


def read_table(out: str) -> str:
    """The result for people."""
    return (Path(out) / "binding.txt").read_text()


def exit_status(out: str) -> int:
    """0, or 3 where a control is not where it must be."""
    return 3 if read_json(Path(out) / "binding.json")["failures"] else 0


def _train_config(config: BindConfig, out: str, seed: int) -> TrainConfig:
    """The usual training of the same FAM."""
    return TrainConfig(
        cache=config.cache,
        out=out,
        fusion="linear",
        head=config.head,
        layers=config.layers,
        encoder=config.encoder,
        pairs="classes",
        train_split=config.train_split,
        validation="heldout",
        epochs=config.replaced_epochs,
        control_epochs=0,
        seed=seed,
        data_seed=config.seed,
        device=config.device,
        tensorboard=False,
    )


_Rows = tuple[np.ndarray, np.ndarray]
"""Rows of photos in their encoder's arrays, and their classes."""


def _photo_rows(cache: Cache, spec: RunSpec, split: str) -> _Rows:
    """Of the photos of a split that have one class, each photo once.

    Raises:
        ValueError: there are none.
    """
    pairs = select_pairs(cache.table, cache.encoders[spec.gallery_key], cache.encoders[spec.text_key], split, "classes")
    has_one = np.diff(pairs.labels.offsets) == 1
    if not has_one.any():
        raise ValueError(f"split {split!r}: none of its {len(pairs)} photos has one class alone. Give photos by class.")
    return pairs.rows[has_one], pairs.labels.values[pairs.labels.offsets[:-1][has_one]]


def _fingerprint(cache: Cache, spec: RunSpec, rows: Mapping[str, _Rows]) -> str:
    """Hash over the content of the photos, their classes and the classes' names."""
    hashes = cache.table.inputs[cache.encoders[spec.gallery_key].manifest.modality].content_hash
    digest = hashlib.sha256("\n".join(cache.table.class_names).encode("utf-8", "surrogatepass"))
    for of_split, labels in rows.values():
        digest.update(hashes[of_split].tobytes())
        digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _names(config: BindConfig, cache: Cache, spec: RunSpec, out: Path) -> NamePool:
    """The pool that the folder holds, or one made now.

    Raises:
        CacheError, ValueError: the text encoder cannot be had; the folder's pool is damaged or another's.
    """
    path, manifest = out / "names.npz", cache.encoders[spec.text_key].manifest
    if path.exists():
        pool = NamePool.load(path)
        if pool.encoder != spec.text_key or pool.vectors.shape != (config.num_names, spec.shape.text_size):
            raise ValueError(
                f"{path}: {pool.vectors.shape} vectors of {pool.encoder}, expected {config.num_names} of width "
                f"{spec.shape.text_size} of {spec.text_key}. Delete it, it is then made again."
            )
        return pool
    past = past_extractions(manifest, choose_device(config.device))
    if not past:
        raise CacheError(
            f"{config.cache}: {spec.text_key} does not say where its encoder is. Add something with saffe-extract, "
            f"which notes it, or bring a {path.name} that was made from the same encoder."
        )
    names = make_names(config.num_names, cache.table.class_names, config.seed)
    logger.info("Encoding %d made-up names, such as %s.", len(names), ", ".join(names[:3]))
    encoder = reopen_encoder(manifest, past, config.text_encoder, "--text-encoder")
    vectors = encode_names(encoder, manifest.vector, names, past[-1].config.class_prompt)
    pool = NamePool(tuple(names), vectors, spec.text_key)
    pool.save(path)
    return pool


def _settings(
    config: BindConfig, cache: Cache, spec: RunSpec, rows: Mapping[str, _Rows], names: np.ndarray
) -> list[dict[str, Any]]:
    """Every setting, from the folder where it is done already."""
    tasks = [Task(ways=ways, shots=shots, queries=config.queries) for ways in config.ways for shots in config.shots]
    paths = {task: Path(config.out) / "settings" / f"{task.ways}-way-{task.shots}-shot.json" for task in tasks}
    missing = [task for task in tasks if not paths[task].exists()]
    options = MeasureOptions(
        shape=spec.shape,
        num_episodes=config.episodes,
        tuning_episodes=config.tuning_episodes,
        max_epochs=config.max_epochs,
        seed=config.seed,
        device=choose_device(config.device),
    )
    if missing:
        reported, tuning = (_read_photos(cache, spec, rows[name]) for name in (config.split, config.train_split))
    for task in missing:
        started = time.perf_counter()
        setting = measure(task, reported, tuning, names, options)
        seconds = time.perf_counter() - started
        write_json(paths[task], setting | {"seconds": round(seconds, 1)})
        logger.info("%s: %d episodes in %.0f s.", task, config.episodes, seconds)
    return [read_json(paths[task]) for task in tasks]


def _read_photos(cache: Cache, spec: RunSpec, rows: _Rows) -> Photos:
    """Into memory, once."""
    gallery, layers = cache.encoders[spec.gallery_key], spec.gallery_layers
    states = tuple(torch.from_numpy(state) for state in gallery.tokens(rows[0], layers).states)
    pooled = summaries(gallery, rows[0], layers)
    means = pooled
    if spec.shape.head == "mean":
        means = torch.cat([state.mean(dim=1, dtype=torch.float32) for state in states], dim=1).numpy()
    return Photos(states, means, pooled, rows[1])


def _names_replaced(config: BindConfig, cache: Cache, pool: NamePool) -> list[dict[str, Any]]:
    """The usual training on the whole train split: with true names, and with a made-up name for every class.

    Raises:
        ValueError: there are fewer names than classes.
    """
    num_classes, folder = len(cache.table.class_names), Path(config.out) / "names-replaced"
    if num_classes > len(pool.names):
        raise ValueError(f"--num-names: found {len(pool.names)}, expected one for each of {num_classes} classes.")
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(config.seed, config.seed + config.replaced_seeds):
        chosen = np.random.default_rng(seed).choice(len(pool.names), num_classes, replace=False)
        text_key = pool.encoder
        renamed = renamed_cache(cache, text_key, [pool.names[i] for i in chosen], pool.vectors[chosen])
        for name, known in (("true names", cache), ("made-up names", renamed)):
            run = _train_config(config, str(folder / f"{name.replace(' ', '-')}-seed{seed}"), seed)
            train_many([run], {config.cache: known})
            found.setdefault(f"fam, {name}", []).append(
                run_scores(run.out, known, config.split, choose_device(config.device))
            )
    probe, chance = probe_scores(str(folder / f"true-names-seed{config.seed}"), cache, config.split)
    found |= {"linear probe": [probe], "chance": [chance]}
    return [
        {
            "name": f"all {num_classes} names of {Path(config.cache).stem} replaced",
            "classes": num_classes,
            "metric": metric,
            "systems": {name: {"values": [scores[metric] for scores in of_one]} for name, of_one in found.items()},
        }
        for metric in METRICS
    ]
