"""Concatenation against cross-attention: does a text belong to a photo? Every cell from one cache.

config.json             the config, the encoders, the layers of tokens, a hash over photos and texts
cells/                  one file for each setting, scale, system and seed: what a killed run goes on from
figures/                SVG and PNG, where matplotlib is installed
match.txt, match.json   the result; the latter written last, so its presence means that all is done
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saffe_cache.core.atomic_io import hold_folder, remove_partial_files, write_whole
from saffe_cache.core.outputs import is_begun, provenance, read_json, write_json
from saffe_cache.inputs.pairs import Pairs, gallery_modality, pair_kind, select_pairs
from saffe_cache.inputs.splits import content_fingerprint, hold_out
from saffe_cache.store.reader import Cache, EncoderCache, open_cache
from saffe_cache.studies.matching.config import MatchConfig
from saffe_cache.studies.matching.table import format_match

__all__ = ["MatchConfig", "exit_status", "match"]

logger = logging.getLogger(__name__)

_EXTRA = ("sklearn", "scipy")
_NOT_COMPARED = ("cache", "out", "device", "title")
"""Fields of the config in which two commands for one folder may differ."""


def match(config: MatchConfig) -> str:
    """Measure, and return the output folder.

    Raises:
        CacheError, ValueError: cache, splits and options do not go together; the folder holds another result.
        ImportError: scikit-learn is not installed.
        OSError: the disk is full or gone, or another process writes to the output folder.
    """
    try:
        from saffe_cache.studies.matching.running import compare, plan
    except ImportError as error:
        if error.name not in _EXTRA:
            raise
        raise ImportError(f"saffe match needs the package {error.name}: pip install 'saffe-cache[match]'.") from None
    cache = open_cache(config.cache)
    modality = gallery_modality(cache)
    photo, text = (cache.encoder(kind, config.encoder.get(kind)) for kind in (modality, "text"))
    parts = _parts(config, cache, photo, text)
    planned = plan(config, photo, text, parts)
    out = Path(config.out)
    with hold_folder(out):
        for folder in (out, out / "cells", out / "figures"):
            remove_partial_files(folder)
        data = content_fingerprint(cache.table, modality, *(parts[name] for name in sorted(parts)))
        layers = planned.layers if planned.token_cells else None
        measured = {"photo": photo.key, "text": text.key, "layers": layers, "data": data}
        told = {"stage": "match", "measured": measured, **provenance(config)}
        if not is_begun(out, told, {"measured": dict, "config": MatchConfig}, _NOT_COMPARED):
            write_json(out / "config.json", told)
        if (out / "match.json").exists():
            logger.info("%s is finished already, nothing to do.", out)
            return str(out)
        started = time.perf_counter()
        result = {
            "title": config.title or Path(config.cache).stem,
            "dataset": Path(config.cache).stem,
            "split": config.split,
            **compare(config, planned, photo, text, parts),
            "last_command_seconds": round(time.perf_counter() - started, 1),
            **provenance(config),
        }
        table = format_match(result)
        write_whole(out / "match.txt", f"{table}\n".encode())
        _draw(result, out / "figures")
        write_json(out / "match.json", result)
    return str(out)


def read_table(out: str) -> str:
    """The result for people."""
    return (Path(out) / "match.txt").read_text()


def exit_status(out: str) -> int:
    """0, or 3 where a control is not where it must be."""
    return 3 if read_json(Path(out) / "match.json")["failures"] else 0


def _parts(config: MatchConfig, cache: Cache, photo: EncoderCache, text: EncoderCache) -> dict[str, Pairs]:
    """Photos to train on, to choose by, to report on, and to align by; none stands in two of them, by content.

    What is trained on stands in no other split of the cache at all.

    Raises:
        ValueError: a split is absent, or has no photo of its own.
    """
    kind = pair_kind(cache.table)
    names = {"train": config.train_split, "test": config.split}
    if config.validation != "heldout":
        names["validation"] = config.validation
    parts = {part: select_pairs(cache.table, photo, text, name, kind) for part, name in names.items()}
    modality = photo.manifest.modality
    elsewhere = cache.table.rows[modality][np.array(cache.table.splits) != config.train_split]
    for part, others in (("validation", parts["test"].rows), ("train", elsewhere)):
        if part in parts:
            parts[part] = parts[part].take(np.flatnonzero(~np.isin(parts[part].rows, others)))
            if not len(parts[part]):
                raise ValueError(
                    f"split {names[part]!r}: all of its photos stand in other splits too. Keep each in one."
                )
    hashes = cache.table.inputs[modality].content_hash
    if config.validation == "heldout":
        parts["train"], parts["validation"] = hold_out(parts["train"], config.validation_fraction, 0, hashes)
    if config.align_fraction:
        parts["train"], parts["aligning"] = hold_out(parts["train"], config.align_fraction, 0, hashes)
    return parts


def _draw(result: Mapping[str, Any], folder: Path) -> None:
    """The figures of the page, as files; without matplotlib none, and that is said."""
    try:
        from saffe_cache.report.match_section import match_plots
        from saffe_cache.report.matches import matches_of
        from saffe_cache.report.plots import draw
    except ImportError as error:
        if error.name != "matplotlib":
            raise
        logger.info("No figures: they need matplotlib, pip install 'saffe-cache[report]'.")
        return
    for figure in match_plots(matches_of(result, "match.json"), "old"):
        plot = draw(figure, "match")
        write_whole(folder / f"{plot.name}.svg", plot.svg)
        write_whole(folder / f"{plot.name}.png", plot.png)
