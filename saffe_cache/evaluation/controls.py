"""Whether numbers may be used: verdicts on controls, and whether the fusion looks at its inputs at all.

Protocols measure their controls (see `Protocol.measure_controls`) and know their levels. With null text in the gallery
each must be at chance; with paired texts, at what the texts or the photos find alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from saffe_cache.core.controls import Control, failed
from saffe_cache.fusion.base import Fusion, counted_flops
from saffe_cache.inputs.pairs import Pairs
from saffe_cache.protocols.base import Level, Protocol
from saffe_cache.protocols.setting import Setting
from saffe_cache.retrieval.scores import Scores

LEAST_SENSITIVITY = {"image": 0.2, "text": 0.05}
"""Mean distances of unit vectors below which a fusion does not look at its photo, or at its text."""
_SENSITIVITY_PHOTOS = 256
_FLOPS_BATCH = 8


def run_controls(
    protocol: Protocol, model: Fusion, permuted: Fusion | None, baselines: Mapping[str, Scores]
) -> tuple[dict[str, Control], dict[str, Scores]]:
    """The verdict on every control of a protocol, and all its scores.

    Args:
        protocol: over the reported pairs.
        model: the model that is reported.
        permuted: the model that was trained on permuted pairs; None where there is none.
        baselines: those that controls are compared with, and others.
    """
    measured = protocol.measure_controls(model, permuted)
    levels = protocol.control_levels(model, permuted, measured, baselines)
    verdicts = {}
    for name, scores in measured.items():
        metric = protocol.control_metric(name)
        score = scores[metric]
        level = levels.get(name) or Level(score.chance, score.error)
        verdicts[name] = Control.at_most(name, metric, score.value, *level)
    return verdicts, measured


@torch.inference_mode()
def sensitivity(setting: Setting, model: Fusion) -> dict[str, float]:
    """How far the fused vector moves when another photo, or another text, takes the place: mean distances, 0 to 2.

    `to_image` = E |f(x, t) - f(x', t)|, and with paired texts `to_text` = E |f(x, t) - f(x, t')|.
    """
    pairs, inputs = setting.pairs, setting.inputs
    chosen = np.random.default_rng(setting.seed).permutation(len(pairs))[:_SENSITIVITY_PHOTOS]
    rolled = np.roll(chosen, 1)

    def vectors(photos: np.ndarray, texts: np.ndarray) -> torch.Tensor:
        states, mask = inputs.photos(pairs.rows[photos])
        beside = None if pairs.beside is None else inputs.texts(pairs.beside[texts])
        return model(states, mask, beside)  # type: ignore[no-any-return]

    own = vectors(chosen, chosen)

    def moved(photos: np.ndarray, texts: np.ndarray) -> float:
        return float((own - vectors(photos, texts)).norm(dim=1).mean())

    found = {"to_image": moved(rolled, chosen)}
    if pairs.beside is not None:
        found["to_text"] = moved(chosen, rolled)
    return found


def duplicates(pairs: Pairs, training: Pairs) -> dict[str, int]:
    """Photos and texts, by content, that the reported pairs share with those that the run was trained on."""
    return {
        "photos": int(np.isin(pairs.rows, training.rows).sum()),
        "texts": int(np.isin(np.unique(pairs.texts.values), training.texts.values).sum()),
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
    controls: Mapping[str, Control], moves: Mapping[str, float], shared: Mapping[str, int], has_permuted: bool
) -> list[str]:
    """Why the numbers must not be used, one line each; nothing where they may be."""
    found = failed(controls.values())
    if not has_permuted:
        found.append("no control was trained on permuted pairs (train with --control-epochs above 0)")
    for part, least in LEAST_SENSITIVITY.items():
        moved = moves.get(f"to_{part}")
        if moved is not None and moved < least:
            found.append(f"another {part} moves the fused vector by {moved:.3f}, expected at least {least}")
    if shared["photos"]:
        found.append(f"{shared['photos']} photos were trained on")
    return found
