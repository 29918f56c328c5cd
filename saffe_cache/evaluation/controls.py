"""Controls: the same measurement where nothing can be found. A number whose controls are not at their level is void.

    photos_shuffled    each place of the gallery has another's photo; texts beside stay
    pairs_permuted     a model trained, for a few epochs, on permuted pairs
    photos_constant    the same photo at every place; texts beside stay
    queries_constant   every text that searches is the same
    texts_shuffled     (metadata) each place has another's text; photos stay

With null text in the gallery each must be at chance. Beside texts, the first two must find no more than the texts alone
do: baselines on the texts, and the run itself with one photo everywhere, which is then no test but a level. The last
must find no more than the photos alone.

Chance of a model trained on permuted classes is not that of a random order: photos of one class still lie together,
so that a ranking that knows nothing holds them in one run, early or late. There chance is what the same rankings score
when the class names are dealt at random. For the same reason such a model is no control of photos that search photos.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.pairs import Pairs
from saffe_cache.protocols.measuring import Arrangement, Protocol, Setting
from saffe_cache.retrieval.scores import Score, Scores

STANDARD_ERRORS = 3.0
LEAST_CLASSES = 6
"""With fewer, a run trained on permuted classes cannot be told from one that was not."""
FEWEST_SHUFFLES = 5
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
    model: Fusion,
    permuted: Fusion | None,
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
    measured = _measure(protocol, setting, model, permuted)
    known = _levels(protocol, setting, model, permuted, measured, levels)
    return {name: _judge(name, scores, protocol, known.get(name)) for name, scores in measured.items()}


def _measure(protocol: Protocol, setting: Setting, model: Fusion, permuted: Fusion | None) -> dict[str, Scores]:
    generator = np.random.default_rng(setting.seed)
    honest = setting.honest()
    shuffled = generator.permutation(len(setting.pairs))
    constant = np.full(len(setting.pairs), generator.integers(len(setting.pairs)))
    measured = {
        "photos_shuffled": protocol.measure(model, Arrangement(shuffled, honest.texts)),
        "photos_constant": protocol.measure(model, Arrangement(constant, honest.texts)),
    }
    if permuted is not None and not why_no_permuted(protocol, setting):
        measured["pairs_permuted"] = protocol.measure(permuted, honest)
    if protocol.name == "metadata":
        measured["texts_shuffled"] = protocol.measure(model, Arrangement(honest.texts, shuffled))
    if protocol.name in ("caption", "class"):
        assert protocol.search is not None
        same = np.tile(protocol.search.vectors[:1], (len(protocol.search.vectors), 1))
        search = replace(protocol.search, vectors=same)
        measured["queries_constant"] = search.score(setting.gallery(model, honest), setting.queries(model, search))
    return measured


def why_no_permuted(protocol: Protocol, setting: Setting) -> str | None:
    """Why a run trained on permuted pairs tells nothing here; None where it does."""
    if protocol.name == "image":
        return "photos of one class lie together whatever the run was trained on"
    if protocol.dealt and len(np.unique(setting.pairs.labels.values)) < LEAST_CLASSES:
        return f"with fewer than {LEAST_CLASSES} classes, names dealt at random are often right"
    return None


def _levels(
    protocol: Protocol,
    setting: Setting,
    model: Fusion,
    permuted: Fusion | None,
    measured: dict[str, Scores],
    baselines: dict[str, Scores],
) -> dict[str, Level]:
    """Where it is not chance with the spread of its bootstrap: what each control may come to."""
    metric = protocol.main_metric
    known: dict[str, Level] = {}
    if protocol.name == "metadata":
        # what the run's own text path finds is seen where all photos are the same: a level as well as a control
        known = {name: _best(baselines, "text_only", metric, measured) for name in measured}
        known["texts_shuffled"] = _best(baselines, "image_only", metric, {})
        known["photos_constant"] = _best({}, "photos_constant", metric, measured)
    elif protocol.num_shuffles or measured["photos_shuffled"][metric].interval is None:
        spread = _spread_of_shuffles(protocol, setting, model)
        known = {name: Level(scores[metric].chance, spread, "chance") for name, scores in measured.items()}
    if permuted is not None and protocol.dealt:
        known["pairs_permuted"] = Level(*protocol.dealt(permuted), "class names dealt at random")
    return known


def _best(baselines: dict[str, Scores], kind: str, metric: str, measured: dict[str, Scores]) -> Level:
    """The best of the baselines of a kind, and of the run with one photo everywhere."""
    values = {name: scores[metric] for name, scores in baselines.items() if name.startswith(kind)}
    if "photos_constant" in measured:
        values["photos_constant"] = measured["photos_constant"][metric]
    best = max(values, key=lambda name: values[name].value)
    return Level(values[best].value, standard_error(values[best]), f"no more than {best}")


def _spread_of_shuffles(protocol: Protocol, setting: Setting, model: Fusion) -> float:
    """Standard deviation of the main metric over shuffles of the photos."""
    generator = np.random.default_rng((setting.seed, 1))
    texts = setting.honest().texts
    values = [
        protocol.measure(model, Arrangement(generator.permutation(texts), texts))[protocol.main_metric].value
        for _ in range(protocol.num_shuffles or FEWEST_SHUFFLES)
    ]
    return float(np.std(values, ddof=1))


def _judge(name: str, scores: Scores, protocol: Protocol, level: Level | None) -> Control:
    # one query for all classes ranks the photos of some class first, and AP sees that; which class is nearest is open
    metric = "top1" if name == "queries_constant" and "top1" in scores else protocol.main_metric
    score = scores[metric]
    level = level or Level(score.chance, standard_error(score), "chance")
    limit = level.value + STANDARD_ERRORS * level.spread
    return Control(scores, metric, level.expected, limit, score.value <= limit)


def standard_error(score: Score) -> float:
    """From the 95 % interval."""
    assert score.interval is not None, "a control needs an interval"
    return (score.interval[1] - score.interval[0]) / (2 * 1.96)


@torch.inference_mode()
def sensitivity(setting: Setting, model: Fusion) -> dict[str, float]:
    """How far the fused vector moves when another photo, or another text, takes the place: mean distances, 0 to 2.

    `to_image` = E |f(x, t) - f(x', t)|, and beside texts `to_text` = E |f(x, t) - f(x, t')|.
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
