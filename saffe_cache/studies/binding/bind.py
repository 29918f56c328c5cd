"""How few photos does a FAM need to learn a new word? Many few-shot episodes with made-up names, from one cache.

Besides what every study writes (saffe_cache/studies/harness.py), the folder holds names.npz, the pool of made-up names
and their vectors, with which no encoder is needed again, and names-replaced/, the runs trained on true and on made-up
names. Cells are the kinds of episodes, and the seeds of these trainings.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache as cached
from functools import partial
from pathlib import Path

import numpy as np
import torch

from saffe_cache.core.devices import choose_device
from saffe_cache.core.features import CacheError
from saffe_cache.core.options import require
from saffe_cache.extraction.reencode import past_extractions, reload_encoder
from saffe_cache.inputs.feature_loader import summaries
from saffe_cache.inputs.pairs import Pairs, own_pairs, select_pairs
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.studies.binding import names
from saffe_cache.studies.binding.config import BindConfig
from saffe_cache.studies.binding.episodes import Episodic, Photos
from saffe_cache.studies.binding.names import METRICS, NamePool
from saffe_cache.studies.binding.result import BindingResult, FewShot, NamesReplaced, Replaced, Task
from saffe_cache.studies.harness import Study, run_study
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.train import train_many

logger = logging.getLogger(__name__)


def bind(config: BindConfig) -> str:
    """Measure, and return the output folder.

    Raises:
        CacheError, ValueError: cache, split and options do not go together; the folder holds another result.
        OSError: the disk is full or gone, or another process writes to the output folder.
    """
    cache = open_cache(config.cache)
    spec = resolve_run(_train_config(config, config.out, config.seed), cache)
    spec = replace(spec, shape=replace(spec.shape, dropout=0.0, maps_queries=False))
    pairs = {name: _pairs_of(config, cache, spec, name) for name in (config.split, config.train_split)}
    spec = replace(spec, data=_fingerprint(cache, spec, pairs))
    binding = _Binding(config, cache, spec, pairs)
    return run_study("bind", config, spec, binding.measure, ignored=("text_encoder",))


@dataclass(frozen=True)
class _Binding:
    """All that one command measures."""

    config: BindConfig
    cache: Cache
    spec: RunSpec
    pairs: Mapping[str, Pairs]
    """Photos of one class each, by split."""

    def measure(self, study: Study) -> BindingResult:
        config, pool = self.config, self._names(study.out / "names.npz")
        episodic = Episodic(config, self.spec.shape, unit_rows(pool.vectors), choose_device(config.device))
        photos = cached(self._read_photos)

        def measure(task: Task) -> FewShot:
            return episodic.measure(task, photos(config.split), photos(config.train_split))

        tasks = [Task(ways=ways, shots=shots, queries=config.queries) for ways in config.ways for shots in config.shots]
        cells = {task.name.replace(" ", "-"): partial(measure, task) for task in tasks}
        settings = tuple(study.cells(FewShot, cells).values())
        return BindingResult(
            dataset=Path(config.cache).stem,
            settings=settings,
            names_replaced=tuple(self._names_replaced(pool, study)) if config.replaced_seeds else (),
            num_names=len(pool.names),
            example_names=pool.names[:5],
            **study.common_fields(config, (verdict for one in settings for verdict in one.verdicts)),
        )

    def _names(self, path: Path) -> NamePool:
        """The pool that the folder holds, or a new one.

        CacheError or ValueError if the text encoder is unavailable, or the folder's pool is damaged or another's.
        """
        config, key, width = self.config, self.spec.text_key, self.spec.shape.text_size
        if path.exists():
            pool = NamePool.load(path)
            if pool.encoder != key or pool.vectors.shape != (config.num_names, width):
                raise ValueError(
                    f"{path}: {pool.vectors.shape} vectors of {pool.encoder}, expected {config.num_names} of width "
                    f"{width} of {key}. Delete it; it is then rebuilt."
                )
            return pool
        manifest = self.cache.encoders[key].manifest
        past = past_extractions(manifest, choose_device(config.device))
        if not past:
            raise CacheError(
                f"{config.cache}: {key} does not say where its encoder is. Add something with saffe extract, "
                f"which records it, or copy a {path.name} that was made with the same encoder."
            )
        made_up = names.make_names(config.num_names, self.cache.table.class_names, config.seed)
        logger.info("Encoding %d made-up names, such as %s.", len(made_up), ", ".join(made_up[:3]))
        encoder = reload_encoder(manifest, past[-1].config, config.text_encoder, "--text-encoder")
        vectors = names.encode_names(encoder, manifest.vector, made_up, past[-1].config.class_prompt)
        pool = NamePool(tuple(made_up), vectors, key)
        pool.save(path)
        return pool

    def _read_photos(self, split: str) -> Photos:
        """Read a split's photos into memory."""
        gallery, pairs, layers = self.cache.encoders[self.spec.gallery_key], self.pairs[split], self.spec.gallery_layers
        gallery.require_equal_lengths(pairs.rows, "saffe bind")
        states = tuple(torch.from_numpy(state) for state in gallery.tokens(pairs.rows, layers).states)
        pooled = means = summaries(gallery, pairs.rows, layers)
        if self.spec.shape.head == "mean":
            means = torch.cat([state.mean(dim=1, dtype=torch.float32) for state in states], dim=1).numpy()
        return Photos(states, means, pooled, pairs.labels.values)

    def _names_replaced(self, pool: NamePool, study: Study) -> list[NamesReplaced]:
        """The usual training on the whole train split: with true names, and with a made-up name for every class.

        ValueError if there are fewer names than classes.
        """
        config, cache = self.config, self.cache
        num_classes, folder = len(cache.table.class_names), study.out / "names-replaced"
        require(num_classes <= len(pool.names), "num_names", len(pool.names), f"one for each of {num_classes} classes")

        def trained(seed: int) -> Replaced:
            chosen = np.random.default_rng(seed).choice(len(pool.names), num_classes, replace=False)
            renamed = names.renamed_cache(cache, pool.encoder, [pool.names[i] for i in chosen], pool.vectors[chosen])
            found = {}
            for name, known in (("true names", cache), ("made-up names", renamed)):
                run = _train_config(config, str(folder / f"{name.replace(' ', '-')}-seed{seed}"), seed)
                train_many([run], {config.cache: known})
                found[f"fam, {name}"] = names.run_scores(run.out, known, config.split, choose_device(config.device))
            return Replaced(systems=found)

        def nameless() -> Replaced:
            probe, chance = names.probe_scores(str(folder / f"true-names-seed{config.seed}"), cache, config.split)
            return Replaced(systems={"linear probe": probe, "chance": chance})

        seeds = range(config.seed, config.seed + config.replaced_seeds)
        cells = study.cells(Replaced, {f"names-replaced-seed{seed}": partial(trained, seed) for seed in seeds})
        cells |= study.cells(Replaced, {"names-replaced-probe": nameless})
        found: dict[str, list[Mapping[str, float]]] = {}
        for cell in cells.values():
            for system, scores in cell.systems.items():
                found.setdefault(system, []).append(scores)
        title = f"all {num_classes} names of {Path(config.cache).stem} replaced"
        by_metric = {
            metric: {system: tuple(one[metric] for one in scores) for system, scores in found.items()}
            for metric in METRICS
        }
        return [
            NamesReplaced(name=title, classes=num_classes, metric=metric, systems=systems)
            for metric, systems in by_metric.items()
        ]


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
        log=("none",),
    )


def _pairs_of(config: BindConfig, cache: Cache, spec: RunSpec, split: str) -> Pairs:
    """The photos of a split that have exactly one class, each once; to train on, only those of no other split.

    ValueError if there are none.
    """
    gallery, text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
    pairs = select_pairs(cache.table, gallery, text, split, "classes")
    if split == config.train_split:
        pairs = own_pairs(cache.table, gallery.manifest.modality, split, pairs)
    has_one = np.diff(pairs.labels.offsets) == 1
    if not has_one.any():
        raise ValueError(
            f"split {split!r}: none of its {len(pairs)} photos has exactly one class. Use a cache of photos by class."
        )
    return pairs.take(np.flatnonzero(has_one))


def _fingerprint(cache: Cache, spec: RunSpec, pairs: Mapping[str, Pairs]) -> str:
    """Hash over the content of the photos, their classes and the classes' names."""
    hashes = cache.table.inputs[cache.encoders[spec.gallery_key].manifest.modality].content_hash
    parts = ["\n".join(cache.table.class_names).encode("utf-8", "surrogatepass")]
    for of in pairs.values():
        parts += hashes[of.rows].tobytes(), of.labels.values.astype("<i8").tobytes()
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
