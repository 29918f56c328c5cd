"""All cells of a comparison, those that are done already from their files, and what follows from them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saffe_cache.core.devices import choose_device
from saffe_cache.core.features import CacheError
from saffe_cache.core.outputs import read_json, write_json
from saffe_cache.inputs.pairs import Pairs
from saffe_cache.store.reader import EncoderCache
from saffe_cache.studies.matching.baselines import BASELINES
from saffe_cache.studies.matching.config import MatchConfig
from saffe_cache.studies.matching.cost import measure_cost
from saffe_cache.studies.matching.examples import num_kinds
from saffe_cache.studies.matching.fitting import FitOptions
from saffe_cache.studies.matching.fusions import FUSIONS
from saffe_cache.studies.matching.measuring import Bench, Cell, measure_cell
from saffe_cache.studies.matching.planning import plan_cells
from saffe_cache.studies.matching.published import NOTES, published_results
from saffe_cache.studies.matching.summary import summarise
from saffe_cache.studies.matching.verdict import Features

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    features: Features
    cells: Sequence[Cell]
    left_out: Sequence[str]
    """What of the config is in no cell, and why."""
    layers: tuple[int, int]
    """Of photos and texts, whose tokens are taken."""

    @property
    def token_cells(self) -> list[Cell]:
        """Those that need hidden states."""
        return [cell for cell in self.cells if cell.system == "tokens"]


def plan(config: MatchConfig, photo: EncoderCache, text: EncoderCache, parts: Mapping[str, Pairs]) -> Plan:
    """Whatever the data or the cache do not allow is found here, before anything is measured.

    Args:
        config: what is asked for.
        photo: the encoder of photos (or sounds).
        text: that of texts.
        parts: "train", "validation" and "test", which share no photo; "aligning" where features are made pre-aligned.

    Raises:
        CacheError, ValueError: the cache lacks a layer; the data allow no pairs; features are aligned already.
    """
    features = _features(config, photo, text, parts)
    return Plan(features, *plan_cells(config, parts), _layers(config, photo, text))


def compare(
    config: MatchConfig, planned: Plan, photo: EncoderCache, text: EncoderCache, parts: Mapping[str, Pairs]
) -> dict[str, Any]:
    """Measure what `plan` gave, from the same arguments, and sum up.

    Raises:
        OSError: the disk is full or gone.
    """
    features, cells = planned.features, planned.cells
    bench = Bench(photo, text, parts, planned.token_cells, planned.layers)
    found = _measured(config, bench, cells)
    made = bench.made_alignment()
    shown = max((cell for cell in cells if cell.setting == cells[0].setting), key=lambda cell: cell.scale)
    return {
        "features": features.kind,
        "features_in_words": str(features),
        "made_alignment": made,
        "seeds": list(config.seeds),
        **summarise(found, features, num_kinds(parts["test"]), made),
        "cost": _costs(config, bench),
        "planes": bench.plane(shown, config.tsne_pairs) if config.tsne_pairs else {},
        "meanings": {**BASELINES, **{name: FUSIONS[name] for name in config.fusions_of_features}},
        "left_out": list(planned.left_out),
        "published": published_results(),
        "published_notes": list(NOTES),
        "photos": {name: len(of) for name, of in parts.items()},
        "encoders": {"photo": photo.key, "text": text.key},
        "layers_of_tokens": list(planned.layers),
        "seconds": round(sum(cell["seconds"] for cell in found), 1),
    }


def _features(config: MatchConfig, photo: EncoderCache, text: EncoderCache, parts: Mapping[str, Pairs]) -> Features:
    """
    Raises:
        ValueError: they are aligned, and asked to be made so.
    """
    if not config.align_fraction:
        return Features(is_aligned(photo, text))
    if is_aligned(photo, text):
        raise ValueError(
            f"--align-fraction: found {config.align_fraction:g}, expected 0: {photo.key} and {text.key} are halves of "
            "one model, whose features are aligned as they are."
        )
    return Features(True, len(parts["aligning"]))


def _layers(config: MatchConfig, photo: EncoderCache, text: EncoderCache) -> tuple[int, int]:
    """Of photos and texts, whose tokens are taken.

    Raises:
        CacheError: it is not cached.
    """
    found = []
    for encoder in (photo, text):
        asked = config.layers.get(encoder.manifest.modality, tuple(encoder.layers[-1:]))
        if not set(asked) <= set(encoder.layers) or not asked:
            raise CacheError(
                f"{config.cache}: {encoder.key} has hidden states of layers {encoder.layers}, asked for "
                f"{list(asked) or 'one'}. Choose another with --layers, or add it with saffe extract."
            )
        found.append(asked[0])
    return found[0], found[1]


def _measured(config: MatchConfig, bench: Bench, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Every cell, from the folder where it is done already."""

    options = FitOptions(
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        asks=config.asks,
        device=choose_device(config.device),
    )
    found = []
    for number, cell in enumerate(cells, start=1):
        path = Path(config.out) / "cells" / f"{cell.name}.json"
        if not path.exists():
            write_json(path, measure_cell(bench, cell, options))
            told = read_json(path)
            scores = ", ".join(f"{name} {100 * of['test']['accuracy']:.1f}" for name, of in told["systems"].items())
            logger.info("%d of %d, %s: %s, %.1f s.", number, len(cells), cell.name, scores, told["seconds"])
        found.append(read_json(path))
    return found


def is_aligned(photo: EncoderCache, text: EncoderCache) -> bool:
    """Whether both are halves of one model that projects into one space."""
    manifests = (photo.manifest, text.manifest)
    models = {(of.fingerprint.fields["model_id"], of.fingerprint.fields.get("revision")) for of in manifests}
    return len(models) == 1 and all(of.vector == "projected" for of in manifests)


def _costs(config: MatchConfig, bench: Bench) -> dict[str, Any]:
    """Of each fusion at these widths."""
    found = {}
    for name in config.fusions_of_features:
        if name != "tokens":
            found[name] = dict(measure_cost(name, bench.clean.widths, (1, 1), config.asks))
        elif bench.num_tokens:
            found[name] = dict(measure_cost(name, bench.tokens.widths, bench.num_tokens, config.asks))
    return found
