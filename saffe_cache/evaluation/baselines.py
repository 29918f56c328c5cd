"""The systems that stand beside a FAM in its report: baselines over the same cache, tuned on validation alone.

All see the same: of the photos the first token and the mean of the others (of a CNN the mean of all places), of every
cached layer or of those that the run fuses, or the encoder's own vector; of the texts the encoder's own vector. They
know the run's training pairs and its validation pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from saffe_cache.core.features import Ragged
from saffe_cache.inputs.feature_loader import summaries
from saffe_cache.inputs.pairs import Pairs, mean_text_vectors
from saffe_cache.protocols.answers import Answered, Answers, ClassScores, Vectors
from saffe_cache.protocols.measuring import Protocol, Setting
from saffe_cache.protocols.search import Search, make_search, own_search
from saffe_cache.retrieval.baselines import (
    LinearMap,
    fit_class_means,
    fit_linear_probe,
    fit_ridge,
    fuse_late,
    tune_late_fusion,
    unit_rows,
)
from saffe_cache.retrieval.candidates import candidate_scores
from saffe_cache.retrieval.mlp import MlpFit, fit_mlp
from saffe_cache.retrieval.propagation import LabelPropagation, fit_zlap
from saffe_cache.retrieval.scores import Scores, image_scores
from saffe_cache.store.reader import EncoderCache


@dataclass(frozen=True)
class Material:
    """What baselines are made of and judged by."""

    setting: Setting
    training: Pairs
    validation: Pairs
    protocol: Protocol
    layers: tuple[int, ...]
    """Of the photos' hidden states, those that baselines see."""

    @property
    def gallery(self) -> EncoderCache:
        return self.setting.inputs.gallery

    @property
    def text(self) -> EncoderCache:
        return self.setting.inputs.text

    @cached_property
    def features(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Summaries of the training, validation and reported photos, [photos, 2 P d] each."""
        training, validation, reported = (
            summaries(self.gallery, pairs.rows, self.layers)
            for pairs in (self.training, self.validation, self.setting.pairs)
        )
        return training, validation, reported

    @cached_property
    def judging(self) -> Search:
        """The search over the validation pairs."""
        spec = self.setting.spec
        name = self.protocol.search.protocol if self.protocol.search else own_search(spec)
        return make_search(self.setting.cache, spec, self.validation, name)

    def judge(self, gallery: np.ndarray, queries: np.ndarray) -> float:
        """The validation score of unit vectors."""
        return self.judging.score(gallery, queries, intervals=False)[self.judging.main_metric].value

    def texts_of(self, pairs: Pairs) -> np.ndarray:
        """Unit vectors of the texts beside the photos."""
        assert pairs.beside is not None
        return unit_rows(self.text.vectors(pairs.beside))

    def answered(self, answers: Answers) -> Answered:
        """With the protocol's scores; for rerank with those of the first stage."""
        if self.protocol.name == "candidate" and isinstance(answers, Vectors):
            answers = ClassScores(answers.gallery @ answers.queries.T)
        return Answered(self._scores(answers), answers)

    def _scores(self, answers: Answers) -> Scores:
        labels, seed, search = self.setting.pairs.labels, self.setting.seed, self.protocol.search
        if isinstance(answers, ClassScores):
            scores = candidate_scores(answers.values, labels, seed=seed)
            return scores if self.protocol.name == "candidate" else _without_top5(scores)
        assert isinstance(answers, Vectors)
        if self.protocol.name == "image":
            return image_scores(answers.gallery, labels, seed=seed)
        assert search is not None
        return search.score_texts(*answers) if self.protocol.name == "rerank" else search.score(*answers)

    @cached_property
    def ridge(self) -> LinearMap:
        queries = unit_rows(self.judging.vectors)
        return fit_ridge(
            self.features[0],
            mean_text_vectors(self.training, self.text),
            lambda fit: self.judge(unit_rows(fit(self.features[1])), queries),
        )

    def fit_mlp(self, *, beside: bool) -> MlpFit:
        """On photos alone, or on photos and the texts beside them (the concatenation MLP)."""
        distinct, position = np.unique(self.training.texts.values, return_inverse=True)
        queries, texts = unit_rows(self.judging.vectors), self.texts_of(self.validation) if beside else None
        return fit_mlp(
            self.features[0],
            unit_rows(self.text.vectors(distinct)),
            Ragged(self.training.texts.offsets, position),
            lambda fit: self.judge(fit.gallery(self.features[1], texts), fit.queries(queries)),
            beside=self.texts_of(self.training) if beside else None,
        )

    @property
    def levels(self) -> dict[str, Answered]:
        """What a metadata protocol's controls are held against: texts alone, and photos alone."""
        if self.protocol.name != "metadata":
            return {}
        search = self.protocol.search
        assert search is not None
        queries, judging = unit_rows(search.vectors), unit_rows(self.judging.vectors)
        known, validation, reported = (
            self.texts_of(pairs) for pairs in (self.training, self.validation, self.setting.pairs)
        )
        linear = fit_ridge(
            known,
            mean_text_vectors(self.training, self.text),
            lambda fit: self.judge(unit_rows(fit(validation)), judging),
        )
        return {
            "text_only": self.answered(Vectors(reported, queries)),
            "text_only_linear": self.answered(Vectors(unit_rows(linear(reported)), queries)),
            "image_only_ridge": self.answered(Vectors(unit_rows(self.ridge(self.features[2])), queries)),
        }


BaselineChoice = Literal["all", "linear", "none"]
Systems = tuple[dict[str, Answered], dict[str, str]]
"""Each baseline, and why one is absent."""


def baselines(material: Material, choice: BaselineChoice = "all") -> Systems:
    """The baselines that a protocol can have; "linear" are those that take seconds."""
    if choice == "none":
        return material.levels, {}
    if material.protocol.name == "metadata":
        return _metadata_baselines(material, choice), {}
    if material.protocol.name == "image":
        return _image_baselines(material), {}
    return _search_baselines(material, choice)


def _search_baselines(material: Material, choice: BaselineChoice) -> Systems:
    """Photos alone, searched by text, as vectors; with classes, classifiers too."""
    search, reported = material.protocol.search, material.features[2]
    assert search is not None
    queries = unit_rows(search.vectors)
    systems = {"ridge": material.answered(Vectors(unit_rows(material.ridge(reported)), queries))}
    if choice == "all":
        mlp = material.fit_mlp(beside=False)
        systems["mlp"] = material.answered(Vectors(mlp.gallery(reported), mlp.queries(queries)))
    absent: dict[str, str] = {}
    own = _own_vectors(material, material.setting.pairs)
    if own is not None and own.shape[1] == queries.shape[1]:
        systems["zero_shot" if _is_aligned(material) else "pooled_cosine"] = material.answered(Vectors(own, queries))
    else:
        widths = "no vector is cached" if own is None else f"widths {own.shape[1]} and {queries.shape[1]}"
        absent["pooled_cosine"] = f"the encoders' own vectors cannot be compared: {widths}"
    if search.protocol == "class" and material.protocol.name != "rerank":
        classifiers, without = _classifiers(material, choice)
        systems |= classifiers
        absent |= without
    return systems, absent


def _classifiers(material: Material, choice: BaselineChoice) -> Systems:
    """Linear probe, nearest class mean and label propagation, by scores of each photo with each class."""
    num_classes = len(material.setting.cache.table.class_names)
    several = any(len(of_one) != 1 for pairs in (material.training, material.validation) for of_one in pairs.labels)
    if several or num_classes < 2:
        reason = "some photos have several classes, or there is one class alone"
        return {}, {"linear_probe": reason, "class_means": reason, "zlap": reason}
    training, validation, reported = material.features
    known = material.training.labels.values

    def judge(scores: np.ndarray) -> float:
        scored = candidate_scores(scores, material.validation.labels, intervals=False)
        return scored[material.protocol.main_metric].value

    probe = fit_linear_probe(training, known, num_classes, lambda fit: judge(log_odds(fit(validation))))
    means = fit_class_means(training, known, num_classes)
    found = {"linear_probe": log_odds(probe(reported)), "class_means": means(reported)}
    absent = {}
    if choice == "all" and len(training) > 100:
        found["zlap"] = _zlap(material, judge)
    elif choice == "all":
        absent["zlap"] = "fewer than 100 photos to propagate over"
    return {name: material.answered(ClassScores(scores)) for name, scores in found.items()}, absent


def _zlap(material: Material, score: Callable[[np.ndarray], float]) -> np.ndarray:
    """Label propagation over the training photos, from texts that the ridge regression maps photos to."""
    search = material.protocol.search
    assert search is not None
    classes = unit_rows(search.vectors).T
    parts = (material.training, material.validation, material.setting.pairs)
    own = [_own_vectors(material, pairs) for pairs in parts]
    images = [
        unit_rows(features) if vectors is None else vectors
        for features, vectors in zip(material.features, own, strict=True)
    ]
    similar = [unit_rows(material.ridge(features)) @ classes for features in material.features]

    def judge(fit: LabelPropagation) -> float:
        return score(fit.scores(images[1], similar[1]))

    return fit_zlap(images[0], similar[0], judge).scores(images[2], similar[2])


def _metadata_baselines(material: Material, choice: BaselineChoice) -> dict[str, Answered]:
    """Text alone, photo alone, their late fusion, and an MLP on both."""
    search = material.protocol.search
    assert search is not None
    queries, judging = unit_rows(search.vectors), unit_rows(material.judging.vectors)
    texts = [material.texts_of(pairs) for pairs in (material.validation, material.setting.pairs)]
    _, validation, reported = material.features
    systems = dict(material.levels)
    ridge = [unit_rows(material.ridge(features)) for features in (validation, reported)]
    weight = tune_late_fusion(ridge[0], texts[0], lambda gallery: material.judge(gallery, judging))
    systems["late_fusion_ridge"] = material.answered(Vectors(fuse_late(ridge[1], texts[1], weight), queries))
    if choice == "linear":
        return systems
    mlp, concat = material.fit_mlp(beside=False), material.fit_mlp(beside=True)
    systems["image_only_mlp"] = material.answered(Vectors(mlp.gallery(reported), mlp.queries(queries)))
    systems["concat_mlp"] = material.answered(Vectors(concat.gallery(reported, texts[1]), concat.queries(queries)))
    photos = [mlp.gallery(features) for features in (validation, reported)]
    mapped = [mlp.queries(vectors) for vectors in texts]
    weight = tune_late_fusion(photos[0], mapped[0], lambda gallery: material.judge(gallery, mlp.queries(judging)))
    late = Vectors(fuse_late(photos[1], mapped[1], weight), mlp.queries(queries))
    systems["late_fusion_mlp"] = material.answered(late)
    return systems


def _image_baselines(material: Material) -> dict[str, Answered]:
    """Photos by the encoder's own vectors, by centred summaries, and by the ridge regression's vectors."""
    training, _, reported = material.features
    galleries = {
        "summary_cosine": unit_rows(reported - training.mean(axis=0)),
        "ridge": unit_rows(material.ridge(reported)),
    }
    own = _own_vectors(material, material.setting.pairs)
    if own is not None:
        galleries["pooled_cosine"] = own
    return {name: material.answered(Vectors(gallery, gallery)) for name, gallery in galleries.items()}


def _is_aligned(material: Material) -> bool:
    """Whether both encoders are halves of one model that project into one space."""
    manifests = material.gallery.manifest, material.text.manifest
    models = {manifest.fingerprint.fields["model_id"] for manifest in manifests}
    return len(models) == 1 and all(manifest.vector == "projected" for manifest in manifests)


def _own_vectors(material: Material, pairs: Pairs) -> np.ndarray | None:
    """The photo encoder's own vectors, of unit length; None where none are cached."""
    if material.gallery.manifest.vector not in material.gallery.manifest.arrays:
        return None
    return unit_rows(material.gallery.vectors(pairs.rows))


def _without_top5(scores: Scores) -> Scores:
    """What the class protocol reports."""
    return {metric: score for metric, score in scores.items() if metric != "top5"}


def log_odds(logits: np.ndarray) -> np.ndarray:
    """Of each class against all others, [n, c]: ranks the photos of a class where its probability is all but 1."""
    rows, top = np.arange(len(logits)), logits.argmax(axis=1)
    highest, rest = logits[rows, top].astype(np.float64), logits.astype(np.float64)
    rest[rows, top] = -np.inf
    others = _log_sum(rest)
    chances = logits - np.logaddexp(highest, others)[:, None]
    odds = np.asarray(chances - np.log1p(-np.exp(chances).clip(max=0.5)))  # but the highest, none has more than a half
    odds[rows, top] = highest - others
    return odds


def _log_sum(values: np.ndarray) -> np.ndarray:
    most = values.max(axis=1, keepdims=True)
    return np.asarray(most[:, 0] + np.log(np.exp(values - most).sum(axis=1)))
