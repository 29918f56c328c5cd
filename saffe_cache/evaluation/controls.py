"""Controls: the same measurement where nothing can be found. A number whose controls are not at their level is void.

    pairs_permuted     a model trained on permuted pairs
    photos_shuffled    each place of the gallery has another's photo; texts beside stay
    photos_constant    the same photo at every place; texts beside stay
    queries_constant   every text that searches is the same
    texts_shuffled     (metadata) each place has another's text; photos stay

With null text in the gallery each must be at chance. Beside texts, the first three must find no more than the texts
alone do, and the last no more than the photos alone.

Chance of a model trained on permuted classes is not that of a random order: photos of one class still lie together,
so that a ranking that knows nothing holds them in one run, early or late. There chance is what the same rankings score
when the class names are dealt at random. For the same reason such a model is no control of photos that search photos.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from saffe_cache.evaluation.measuring import Arrangement, Protocol, Setting
from saffe_cache.fusion.fam import FusionAlignModule
from saffe_cache.pairs import Pairs, read_texts, token_tensors
from saffe_cache.retrieval.protocols import Score, Scores

STANDARD_ERRORS = 3.0
LEAST_IMAGE_SENSITIVITY, LEAST_TEXT_SENSITIVITY = 0.2, 0.05
"""Mean distances of unit vectors below which a fusion does not look at its photo, or at its text."""
_SENSITIVITY_PHOTOS = 256


@dataclass(frozen=True)
class Control:
    """One control."""

    scores: Scores
    metric: str
    """By which it is judged."""
    expected: str
    """In words: what its score may be at most."""
    limit: float
    """The largest value that passes: the level, and three standard errors of the control."""
    passed: bool


class Level(NamedTuple):
    """What a control's score may come to by chance."""

    value: float
    spread: float
    """Its standard deviation."""
    expected: str
    """In words."""


def run_controls(
    protocol: Protocol,
    setting: Setting,
    model: FusionAlignModule,
    permuted: FusionAlignModule | None,
    levels: dict[str, Scores],
) -> dict[str, Control]:
    """All controls of a protocol.

    Args:
        protocol: what is measured.
        setting: what it is measured on.
        model: the model that is reported.
        permuted: the model that was trained on permuted pairs; None where there is none.
        levels: beside texts, the baselines that tell what texts alone and photos alone find.
    """
    generator = np.random.default_rng(setting.seed)
    honest = setting.honest()
    shuffled = generator.permutation(len(setting.pairs))
    constant = np.full(len(setting.pairs), generator.integers(len(setting.pairs)))
    arrangements = {
        "photos_shuffled": Arrangement(shuffled, honest.texts),
        "photos_constant": Arrangement(constant, honest.texts),
    }
    measured = {name: protocol.measure(model, arrangement) for name, arrangement in arrangements.items()}
    if permuted is not None and protocol.name != "image":
        measured["pairs_permuted"] = protocol.measure(permuted, honest)
    if protocol.name == "metadata":
        measured["texts_shuffled"] = protocol.measure(model, Arrangement(honest.texts, shuffled))
    if protocol.name in ("caption", "class"):
        assert protocol.search is not None
        same = np.tile(protocol.search.vectors[:1], (len(protocol.search.vectors), 1))
        search = replace(protocol.search, vectors=same)
        gallery = setting.gallery(model, honest)
        measured["queries_constant"] = search.score(gallery, setting.queries(model, search))
    known: dict[str, Level] = {}
    if protocol.num_shuffles:
        spread = _spread_of_shuffles(protocol, setting, model, generator)
        known = {
            name: Level(scores[protocol.main_metric].chance, spread, "chance") for name, scores in measured.items()
        }
    if permuted is not None and protocol.dealt:
        known["pairs_permuted"] = Level(*protocol.dealt(permuted), "class names dealt at random")
    return {name: _judge(name, scores, protocol, levels, known.get(name)) for name, scores in measured.items()}


def _spread_of_shuffles(
    protocol: Protocol, setting: Setting, model: FusionAlignModule, generator: np.random.Generator
) -> float:
    """Standard deviation of the main metric over shuffles of the photos."""
    texts = setting.honest().texts
    arrangements = [Arrangement(generator.permutation(texts), texts) for _ in range(protocol.num_shuffles)]
    values = [protocol.measure(model, arrangement)[protocol.main_metric].value for arrangement in arrangements]
    return float(np.std(values, ddof=1))


def _judge(name: str, scores: Scores, protocol: Protocol, levels: dict[str, Scores], level: Level | None) -> Control:
    """`level` where it is not chance, or no more than a baseline."""
    # one query for all classes ranks the photos of some class first, and AP sees that; which class is nearest is open
    metric = "top1" if name == "queries_constant" and "top1" in scores else protocol.main_metric
    score = scores[metric]
    if level is None and protocol.name == "metadata":
        kind = "image_only" if name == "texts_shuffled" else "text_only"
        values = {of: found[metric].value for of, found in levels.items() if of.startswith(kind)}
        best = max(values, key=lambda of: values[of])
        level = Level(values[best], standard_error(score), f"no more than {best}")
    elif level is None:
        level = Level(score.chance, standard_error(score), "chance")
    limit = level.value + STANDARD_ERRORS * level.spread
    return Control(scores, metric, level.expected, limit, score.value <= limit)


def standard_error(score: Score) -> float:
    """From the 95 % interval; 0 where there is none."""
    return (score.interval[1] - score.interval[0]) / (2 * 1.96) if score.interval else 0.0


@torch.inference_mode()
def sensitivity(setting: Setting, model: FusionAlignModule) -> dict[str, float]:
    """How far the fused vector moves when another photo, or another text, takes the place: mean distances, 0 to 2.

    `to_image` = E |f(x, t) - f(x', t)|, and beside texts `to_text` = E |f(x, t) - f(x, t')|.
    """
    spec, cache, pairs = setting.spec, setting.cache, setting.pairs
    chosen = np.random.default_rng(setting.seed).permutation(len(pairs))[:_SENSITIVITY_PHOTOS]
    rolled = np.roll(chosen, 1)

    def vectors(photos: np.ndarray, texts: np.ndarray) -> torch.Tensor:
        gallery = cache.encoders[spec.gallery_key]
        states, mask = token_tensors(gallery, pairs.rows[photos], spec.gallery_layers, setting.device)
        if pairs.beside is None:
            return model(states, mask)  # type: ignore[no-any-return]
        text = cache.encoders[spec.text_key]
        return model(states, mask, read_texts(text, pairs.beside[texts], spec.text_layers, setting.device))  # type: ignore[no-any-return]

    own = vectors(chosen, chosen)

    def moved(photos: np.ndarray, texts: np.ndarray) -> float:
        return float((own - vectors(photos, texts)).norm(dim=1).mean())

    found = {"to_image": moved(rolled, chosen)}
    if pairs.beside is not None:
        found["to_text"] = moved(chosen, rolled)
    return found


def duplicates(setting: Setting, training: Pairs) -> dict[str, int]:
    """Photos and texts, by content, that the reported pairs share with those that the run was trained on."""
    pairs = setting.pairs
    return {
        "photos": int(np.isin(pairs.rows, training.rows).sum()),
        "texts": int(np.isin(np.unique(pairs.texts.values), training.texts.values).sum()),
    }


def failures(
    controls: dict[str, Control], moves: dict[str, float], shared: dict[str, int], has_permuted: bool
) -> list[str]:
    """What is not as it must be, one line each; nothing where the numbers may be used."""
    found = [
        f"{name} is at {control.metric} {100 * control.scores[control.metric].value:.2f}, "
        f"at most {100 * control.limit:.2f} may come of it ({control.expected})"
        for name, control in controls.items()
        if not control.passed
    ]
    if not has_permuted:
        found.append("no control was trained on permuted pairs (train with --control-epochs above 0)")
    for part, least in (("image", LEAST_IMAGE_SENSITIVITY), ("text", LEAST_TEXT_SENSITIVITY)):
        moved = moves.get(f"to_{part}")
        if moved is not None and moved < least:
            found.append(f"another {part} moves the fused vector by {moved:.3f}, below {least}: it is not looked at")
    if shared["photos"]:
        found.append(f"{shared['photos']} photos were trained on")
    return found
