"""The baselines that a FAM is compared with: fitted on the same cache, tuned on validation pairs alone.

All see the same: of the photos the first token and the mean of the others (of a CNN the mean of all places), of every
cached layer or of those that the run fuses, or the encoder's own vector; of the texts the encoder's own vector. They
know the run's training pairs and its validation pairs.

A new baseline is one function and one entry of `BASELINES`; protocols name those that apply. Fitted, it is a system
that answers as a model does, so that the same controls apply.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch

from saffe_cache.core.options import refuse
from saffe_cache.evaluation import composed_baselines as composed
from saffe_cache.evaluation.config import BaselineChoice
from saffe_cache.evaluation.material import AbsentError, Material
from saffe_cache.evaluation.single_queries import Shown, shown_of
from saffe_cache.inputs.pairs import Pairs, in_one_space
from saffe_cache.protocols.setting import Arrangement, FittedScores, FittedVectors, System
from saffe_cache.retrieval.baselines import (
    fit_class_means,
    fit_linear_probe,
    fit_zlap,
    fuse_late,
    tune_late_fusion,
    unit_rows,
)

_Map = Callable[[np.ndarray], np.ndarray]
_LEAST_GRAPH_PHOTOS = 100
"""Training photos above which label propagation is fitted."""


def photo_vectors(
    vectors: np.ndarray, map_queries: _Map | None = None, bank_photos: np.ndarray | None = None
) -> FittedVectors:
    """A system that knows one unit vector of each photo, [photos, d], whatever its paired text."""
    return FittedVectors(lambda at: vectors[at.photos], map_queries, bank_photos)


def _of_features(of: Material, map_photos: _Map, map_queries: _Map | None = None) -> FittedVectors:
    """A system that maps the features of photos."""
    bank = of.bank_photos
    of_bank = None if bank is None else map_photos(of.training_features(bank))
    return photo_vectors(of.rows[2].mapped(map_photos), map_queries, of_bank)


def _ridge(of: Material) -> System:
    return _of_features(of, lambda features: unit_rows(of.ridge(features)))


def _mlp(of: Material) -> System:
    return _of_features(of, of.mlp.gallery, of.mlp.queries)


def _own_vectors(of: Material, is_zero_shot: bool) -> System:
    """Those of an image-text model are zero_shot where texts search, all others pooled_cosine."""
    is_one_space = in_one_space(of.gallery, of.text)
    if not is_one_space if is_zero_shot else (is_one_space and of.protocol.queries is not None):
        raise AbsentError
    own = of.own_vectors(of.setting.pairs)
    if own is None:
        raise AbsentError("no vector of the photo encoder is cached")
    searching = own if of.protocol.queries is None else of.protocol.queries.vectors
    if own.shape[1] != searching.shape[1]:
        widths = f"{own.shape[1]} and {searching.shape[1]}"
        raise AbsentError(f"the encoders' own vectors cannot be compared: widths {widths}")
    bank = of.bank_photos
    return photo_vectors(own, None, None if bank is None else unit_rows(of.gallery.vectors(of.training.rows[bank])))


def _summary_cosine(of: Material) -> System:
    center = of.rows[0].whole.mean(axis=0)
    return photo_vectors(of.rows[2].mapped(lambda features: unit_rows(features - center)))


def _linear_probe(of: Material) -> System:
    judged = of.rows[1].whole
    probe = fit_linear_probe(*of.training_labels(), lambda fit: of.validate_classes(log_odds(fit(judged))))
    return FittedScores(of.rows[2].mapped(lambda features: log_odds(probe(features))))


def _zlap(of: Material) -> System:
    """Label propagation over the training photos, from texts that the ridge regression maps photos to."""
    of.training_labels()
    if len(of.training) <= _LEAST_GRAPH_PHOTOS:
        raise AbsentError("fewer than 100 photos to propagate over")
    assert of.protocol.queries is not None
    classes = unit_rows(of.protocol.queries.vectors).T
    own = map(of.own_vectors, of.all_pairs)
    features = of.rows
    images = [one.mapped(unit_rows) if vectors is None else vectors for one, vectors in zip(features, own, strict=True)]
    similar = [one.mapped(lambda some: unit_rows(of.ridge(some)) @ classes) for one in features]

    fit = fit_zlap(images[0], similar[0], lambda fit: of.validate_classes(fit.scores(images[1], similar[1])))
    return FittedScores(fit.scores(images[2], similar[2]))


def text_vectors(vectors: np.ndarray) -> FittedVectors:
    """A system that knows one unit vector of each paired text, [photos, d], whatever the photo."""
    return FittedVectors(lambda at: vectors[at.texts])


def _text_only_linear(of: Material) -> System:
    training, validation, reported = map(of.paired_texts, of.all_pairs)
    ridge = of.fit_ridge(training, validation)
    return text_vectors(reported.mapped(lambda texts: unit_rows(ridge(texts))))


def _concat_mlp(of: Material) -> System:
    training, validation, reported = (of.paired_texts(pairs).whole for pairs in of.all_pairs)
    mlp, photos = of.fit_mlp(training, validation), of.rows[2].whole
    return FittedVectors(lambda at: mlp.gallery(photos[at.photos], reported[at.texts]), mlp.queries)


def _late_fusion(of: Material, map_photos: _Map, map_texts: _Map | None) -> System:
    """A weighted sum of the photo's vector and the text's; validation picks the weight."""
    texts = [of.paired_texts(pairs).whole for pairs in (of.validation, of.setting.pairs)]
    queries = of.validation_queries
    if map_texts is not None:
        texts, queries = [map_texts(vectors) for vectors in texts], map_texts(queries)
    photos = [features.mapped(map_photos) for features in of.rows[1:]]
    weight = tune_late_fusion(photos[0], texts[0], lambda gallery: of.validate(gallery, queries))

    def gallery(at: Arrangement) -> np.ndarray:
        return fuse_late(photos[1][at.photos], texts[1][at.texts], weight)

    return FittedVectors(gallery, map_texts)


@dataclass(frozen=True)
class Baseline:
    """A system that a FAM is compared with."""

    description: str
    fit: Callable[[Material], System]
    """Raises AbsentError where it does not apply."""
    is_slow: bool = False
    """Whether fitting takes minutes rather than seconds."""
    is_fitted: bool = True
    """Whether it is fitted on training pairs; if not, permuted pairs change nothing."""
    needs_one_class: bool = False
    """Whether it is fitted on the training photos that have exactly one class."""


_OF_COMPOSED = {
    "composed_image": Baseline(
        "centred features of the reference photo, untrained", composed.image_alone, is_fitted=False
    ),
    "composed_text": Baseline(
        "the text's vector of an image-text model, untrained, without the photo",
        lambda of: composed.of_one_space(of, with_photo=False),
        is_fitted=False,
    ),
    "composed_zero_shot": Baseline(
        "the sum of an image-text model's vectors of photo and text, untrained",
        lambda of: composed.of_one_space(of, with_photo=True),
        is_fitted=False,
    ),
    "composed_image_ridge": Baseline(
        "ridge regression from the reference photo to the targets, without the text",
        lambda of: composed.ridge_of(of, "image"),
    ),
    "composed_text_ridge": Baseline(
        "ridge regression from the text to the targets, without the photo", lambda of: composed.ridge_of(of, "text")
    ),
    "composed_ridge": Baseline(
        "ridge regression from the reference photo and the text to the targets",
        lambda of: composed.ridge_of(of, "both"),
    ),
    "composed_sum": Baseline(
        "the sum of composed_image_ridge and composed_text_ridge", lambda of: composed.late(of, 0.5)
    ),
    "composed_late": Baseline("their weighted sum, late fusion: validation picks the weight", composed.late),
    "composed_mlp": Baseline(
        "an MLP on the reference photo's features and the text's vector, trained with InfoNCE",
        composed.concat_mlp,
        is_slow=True,
    ),
}
"""Where photos and texts search."""

BASELINES: dict[str, Baseline] = {
    "ridge": Baseline("ridge regression from photo features to the mean vector of the photo's texts", _ridge),
    "mlp": Baseline("an MLP from photo features to the texts' space, trained with InfoNCE", _mlp, is_slow=True),
    "zero_shot": Baseline(
        "the vectors of an image-text model, untrained", lambda of: _own_vectors(of, True), is_fitted=False
    ),
    "pooled_cosine": Baseline(
        "the encoders' own vectors, untrained", lambda of: _own_vectors(of, False), is_fitted=False
    ),
    "summary_cosine": Baseline("centred photo features, untrained", _summary_cosine, is_fitted=False),
    "linear_probe": Baseline(
        "logistic regression of the class from photo features", _linear_probe, needs_one_class=True
    ),
    "class_means": Baseline(
        "the nearest mean of a class's photo features",
        lambda of: FittedScores(of.rows[2].mapped(fit_class_means(*of.training_labels()))),
        needs_one_class=True,
    ),
    "zlap": Baseline("label propagation from class texts over the training photos", _zlap, is_slow=True),
    "text_only": Baseline(
        "the vector of the paired text, without the photo",
        lambda of: text_vectors(of.paired_texts(of.setting.pairs).whole),
        is_fitted=False,
    ),
    "text_only_linear": Baseline("ridge regression from the paired text, without the photo", _text_only_linear),
    "image_only_ridge": Baseline("ridge regression from photo features, without the paired text", _ridge),
    "image_only_mlp": Baseline("an MLP on photo features, without the paired text", _mlp, is_slow=True),
    "concat_mlp": Baseline("an MLP on photo features and the paired text's vector", _concat_mlp, is_slow=True),
    "late_fusion_ridge": Baseline(
        "a weighted sum of image_only_ridge and text_only",
        lambda of: _late_fusion(of, lambda features: unit_rows(of.ridge(features)), None),
    ),
    "late_fusion_mlp": Baseline(
        "a weighted sum of image_only_mlp and its text vector",
        lambda of: _late_fusion(of, of.mlp.gallery, of.mlp.queries),
        is_slow=True,
    ),
    **_OF_COMPOSED,
}


def fit_baselines(of: Material, choice: BaselineChoice = "all") -> tuple[dict[str, Shown], dict[str, str]]:
    """The baselines of a protocol, and why some are absent.

    With "linear" those that take minutes are left out, with "none" all but those that controls are compared with.
    """
    found, absent = {}, {}
    for name in of.protocol.baselines:
        is_chosen = choice == "all" or (choice == "linear" and not BASELINES[name].is_slow)
        if is_chosen or name in of.protocol.required_baselines:
            try:
                answered = of.protocol.answer(BASELINES[name].fit(of), of.setting.honest())
                found[name] = shown_of(of.protocol, answered)
                del answered  # whose vectors may be as large as all others
            except AbsentError as reason:
                absent[name] = str(reason)
    return found, {name: reason for name, reason in absent.items() if reason}


def fit_baseline(name: str, of: Material) -> System:
    """One baseline, by name.

    Raises:
        ValueError: the protocol has no such baseline, or it does not apply to the encoders or the data.
    """
    if name not in of.protocol.baselines:
        refuse("system", name, f"a baseline of protocol {of.protocol.name}: {', '.join(of.protocol.baselines)}")
    try:
        return BASELINES[name].fit(of)
    except AbsentError as error:
        swapped = "zero_shot is for both halves of an image-text model, pooled_cosine for all other encoders"
        raise ValueError(f"--system {name}: it does not apply: {str(error) or swapped}. Use another one.") from None


def left_out(training: Pairs, fitted: Collection[str]) -> list[str]:
    """Which fitted baselines leave training photos out, and how many."""
    count = int((training.labels.lengths != 1).sum())
    names = ", ".join(name for name in fitted if BASELINES[name].needs_one_class)
    text = f"{names}: {count} of {len(training)} training photos are left out, which have several classes."
    return [text] if count and names else []


def log_odds(logits: np.ndarray) -> np.ndarray:
    """Of each class against all others, [n, c]: ranks the photos of a class where its probability is all but 1."""
    values = torch.from_numpy(np.asarray(logits, np.float64))
    top = values.argmax(dim=1, keepdim=True)
    highest, others = values.gather(1, top), values.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True)
    chances = values - torch.logaddexp(highest, others)
    odds = chances - torch.log1p(-chances.exp().clamp(max=0.5))  # but the highest, none has more than a half
    return np.asarray(odds.scatter(1, top, highest - others).numpy())
