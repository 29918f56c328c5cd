"""What the study trains: the photos of each cache, the methods that it supports, and why others are skipped."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from saffe_cache.core.features import CacheError, Modality
from saffe_cache.core.options import refuse
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.inputs.bank import draw_bank
from saffe_cache.inputs.pairs import Pairs, content_fingerprint, own_pairs, select_pairs, training_pairs
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.protocols.registry import load_protocol, own_protocol
from saffe_cache.retrieval.correction import SearchCorrection
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.studies.few_pairs.claims import CLAIMS, VARIANTS, Method
from saffe_cache.studies.few_pairs.config import DEFAULT, EVERY, QUICK_EPOCHS, QUICK_SIZES, SIZES, FewPairsConfig
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.resolve import resolve_run

_PLAIN = "linear"
"""The fusion that makes no demands on a cache: its encoders and protocol are those of all methods."""
_ALMOST_ALL = 0.95
"""A number of photos that a cache misses by less than this leaves is taken to mean all of its photos."""
_RUNS = "runs"


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """What is reported on."""

    cache: Cache
    correction: SearchCorrection | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """A cache that is trained on, and the galleries that are reported on."""

    name: str
    path: str
    cache: Cache
    galleries: Mapping[str, Gallery]
    """By the name of the setting: its own, the same with search correction, and those of `--report-cache`."""
    spec: RunSpec
    protocol: str
    available: int
    """Photos of the train split that belong to no other one."""
    sizes: tuple[int, ...]
    methods: Mapping[str, Method]
    skipped: Mapping[str, str]
    """Methods and numbers of photos that are left out, and why."""
    data: str
    """Hash of all photos and texts that may be seen."""

    @property
    def main_metric(self) -> str:
        return load_protocol(self.protocol).main_metric

    @property
    def closed_forms(self) -> list[str]:
        return [name for name, method in self.methods.items() if method.entry.is_closed_form]

    @property
    def groups(self) -> dict[str, list[str]]:
        """Names of methods by group."""
        found: dict[str, list[str]] = {}
        for name, method in self.methods.items():
            found.setdefault(method.group, []).append(name)
        return found


def make_source(config: FewPairsConfig, name: str, path: str) -> Source:
    """
    Raises:
        CacheError, ValueError: cache, splits and options do not fit together.
    """
    cache = open_cache(path)
    spec = resolve_run(TrainConfig(cache=path, out="", fusion=_PLAIN, **_common(config)), cache)
    protocol = own_protocol(spec)
    galleries = {name: Gallery(cache=cache)}
    for one in config.report_cache.get(name, ()):
        galleries[f"{name} on {Path(one).stem}"] = Gallery(cache=open_cache(one))
    encoders = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
    modality = encoders[0].manifest.modality
    drawn = own_pairs(
        cache.table, modality, config.train_split, select_pairs(cache.table, *encoders, config.train_split, spec.pairs)
    )
    parts = [content_fingerprint(cache.table, modality, drawn)]
    for of, gallery in galleries.items():
        pairs = reported_pairs(config, gallery.cache, spec, protocol)
        _require_unseen(of, cache.table.inputs[modality].content_hash[drawn.rows], gallery.cache, modality, pairs)
        parts.append(content_fingerprint(gallery.cache.table, modality, pairs))
    sizes, left_out = choose_sizes(config, len(drawn))
    source = Source(
        name=name,
        path=path,
        cache=cache,
        galleries=galleries,
        spec=spec,
        protocol=protocol,
        available=len(drawn),
        sizes=sizes,
        methods={},
        skipped=left_out,
        data=hashlib.sha256("".join(parts).encode()).hexdigest()[:16],
    )
    return _with_methods(config, _with_correction(config, source))


def _with_correction(config: FewPairsConfig, source: Source) -> Source:
    """The source with a gallery for the search correction; without it where some number of photos has no bank."""
    if config.correction is None:
        return source
    name = f"{source.name} with {config.correction.kind}"
    if not load_protocol(source.protocol).corrects_search:
        return replace(source, skipped={**source.skipped, name: f"not for protocol {source.protocol}"})
    reported = reported_pairs(config, source.cache, source.spec, source.protocol).texts.values
    try:
        for photos in source.sizes:
            for seed in config.used_seeds:
                run = run_config(config, source, _PLAIN, Method(fusion=_PLAIN), photos, seed)
                spec = resolve_run(run, source.cache)
                training = training_pairs(spec, source.cache).training
                bank = draw_bank(config.correction, source.cache, spec, training, reported)
                if len(bank.photos) < config.correction.least_bank():
                    found = f"{config.correction.k} with {len(bank.photos)} photos to train on"
                    refuse("correction_k", found, f"at most {len(bank.photos)}")
    except ValueError as error:
        return replace(source, skipped={**source.skipped, name: str(error)})
    galleries = {**source.galleries, name: Gallery(cache=source.cache, correction=config.correction)}
    return replace(source, galleries=galleries)


def _common(config: FewPairsConfig) -> dict[str, Any]:
    """Training options that all runs share."""
    names = ("train_split", "validation", "layers", "encoder", "device")
    return {name: getattr(config, name) for name in names} | {"log": ("none",), "dtype": config.training_type}


def reported_pairs(config: FewPairsConfig, cache: Cache, spec: RunSpec, protocol: str) -> Pairs:
    """The pairs of the split that is reported on."""
    missing = [key for key in (spec.gallery_key, spec.text_key) if key not in cache.encoders]
    if missing:
        raise CacheError(
            f"{cache.storage.root}: found encoders {', '.join(cache.encoders)}, expected {missing[0]}, which "
            "is trained on. Extract it with the same encoders and options."
        )
    return load_protocol(protocol).select(cache, spec, config.split)


def _require_unseen(name: str, seen: np.ndarray, cache: Cache, modality: Modality, reported: Pairs) -> None:
    """Raise ValueError if a reported photo is among those that may be trained on, uint8 [photos, 32] hashes."""
    known = {one.tobytes() for one in seen}
    hashes = cache.table.inputs[modality].content_hash[reported.rows]
    if shared := sum(content.tobytes() in known for content in hashes):
        raise ValueError(
            f"{name}: {shared} of its {len(hashes)} reported photos are among those to train on, expected none. Report "
            "on another --split."
        )


def choose_sizes(config: FewPairsConfig, available: int) -> tuple[tuple[int, ...], dict[str, str]]:
    """The numbers of photos to draw of those available, ascending, and why some requested ones are left out."""
    wanted = sorted(config.photos or SIZES)
    nearly = [min(size, available) for size in wanted if size * _ALMOST_ALL <= available]
    left_out = {f"{size:,} photos": f"the cache has {available:,}" for size in wanted[len(nearly) :]}
    sizes = tuple(dict.fromkeys(nearly))
    if len(sizes) < 2 and not config.photos:
        sizes = tuple(dict.fromkeys((max(2, available // 4), *sizes, available)))
    if not sizes:
        refuse("photos", ", ".join(map(str, wanted)), f"at most the {available} that the cache has")
    return sizes[:QUICK_SIZES] if config.quick else sizes, left_out


def _with_methods(config: FewPairsConfig, source: Source) -> Source:
    """The source with the methods that it supports."""
    chosen, skipped = choose_methods(config.fusions)
    methods: dict[str, Method] = {}
    for name, method in chosen.items():
        try:
            spec = resolve_run(run_config(config, source, name, method, source.sizes[0], config.seeds[0]), source.cache)
        except (CacheError, ValueError) as error:
            skipped[name] = str(error)
            continue
        if own_protocol(spec) != source.protocol:
            skipped[name] = f"it is trained for protocol {own_protocol(spec)}, the others for {source.protocol}"
        else:
            methods[name] = method
    if not any(method.entry.is_closed_form for method in methods.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"{source.path}: no closed form can be fitted, and there is nothing to compare with. {reasons}"
        )
    return replace(source, methods=methods, skipped={**source.skipped, **skipped})


def choose_methods(fusions: Collection[str]) -> tuple[dict[str, Method], dict[str, str]]:
    """The methods that `--fusions` asks for, and why other fusions are skipped.

    A fusion comes with its variants, and with the forms that claims compare it with.
    """
    skipped, found = {}, {}
    for name, entry in FUSIONS.items():
        if entry.is_special:
            continue
        if EVERY not in fusions and not entry.is_closed_form and name not in fusions:
            if fusions and DEFAULT not in fusions:
                skipped[name] = "--fusions does not name it"
                continue
            if entry.blocks != "none":
                skipped[name] = f"encoder blocks run in training, which takes long; --fusions {EVERY} includes it"
                continue
        found[name] = Method(fusion=name)
        found |= {variant: method for variant, method in VARIANTS.items() if method.fusion == name}
        claim = CLAIMS.get(name)
        if claim and claim.plain:
            found[claim.against] = Method(fusion=name, options=claim.plain)
    return found, skipped


def run_config(
    config: FewPairsConfig, source: Source, name: str, method: Method, photos: int, seed: int
) -> TrainConfig:
    """One run, in a folder of its own inside the study's."""
    folder = runs_folder(config) / f"{source.name}-{photos}-seed{seed}" / name.replace(" ", "-")
    quick = {"epochs": QUICK_EPOCHS} if config.quick and not method.entry.is_closed_form else {}
    options = {**_common(config), **split_options(config, source, photos), **quick, **method.options}
    return TrainConfig(cache=source.path, out=str(folder), fusion=method.fusion, seed=seed, **options)


def runs_folder(config: FewPairsConfig) -> Path:
    """Of all runs: in it a folder for those on the same photos."""
    return Path(config.out) / _RUNS


def split_options(config: FewPairsConfig, source: Source, photos: int) -> dict[str, Any]:
    """The options by which a training draws exactly this number of photos, those that are held out included."""
    if config.validation != "heldout":
        return {"train_fraction": photos / source.available}
    held = max(1, round(config.validation_fraction * photos))
    rest = source.available - held
    return {
        "validation_fraction": max(config.validation_fraction, held / source.available),
        "validation_photos": held,
        "train_fraction": (photos - held) / rest,
    }


def describe(sources: Sequence[Source]) -> dict[str, Any]:
    """What config.json holds of the sources, to tell another study from this one."""
    return {
        source.name: {
            "gallery": source.spec.gallery_key,
            "text": source.spec.text_key,
            "protocol": source.protocol,
            "data": source.data,
            "photos": list(source.sizes),
            "methods": list(source.methods),
            "galleries": {name: str(gallery.correction) for name, gallery in source.galleries.items()},
        }
        for source in sources
    }
