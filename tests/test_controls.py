"""Every control catches what it is for, and a healthy run passes all."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quick_runs import Report, error_of, first_labels, quick_train, report_of, setting_of, value
from synthetic_cache import make_cache

from saffe_cache.core.controls import Control
from saffe_cache.core.items import Ragged
from saffe_cache.evaluation.baselines import fit_baselines
from saffe_cache.evaluation.evaluate import duplicates, failures, run_controls, sensitivity
from saffe_cache.evaluation.material import Material
from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.feature_loader import encode_queries
from saffe_cache.inputs.pairs import same_training_pairs
from saffe_cache.protocols.base import Protocol
from saffe_cache.protocols.fused_pairs import CandidateProtocol, RerankProtocol
from saffe_cache.protocols.searches import CaptionProtocol, ClassProtocol, ImageProtocol, MetadataProtocol, dealt_map
from saffe_cache.protocols.setting import Answered, Arrangement, Setting, Vectors
from saffe_cache.retrieval.scores import Score
from saffe_cache.training.runs import load_permuted

CONTROLS = {"photos_shuffled", "photos_constant", "pairs_permuted"}


@dataclass(frozen=True)
class Trained:
    """A healthy run and what its report is measured on."""

    cache: str
    run: str
    setting: Setting
    model: Fusion
    permuted: Fusion

    def controls(self, protocol: Protocol, **changes: Any) -> dict[str, Control]:
        given = {"system": self.model, "permuted": self.permuted, "baselines": {}} | changes
        return run_controls(protocol, **given)[0]


def trained(folder: Path, kind: str, splits: dict[str, int], cache_options: dict[str, Any], **options: Any) -> Trained:
    cache = make_cache(folder / "cache.zarr", splits, **cache_options)
    run = quick_train(cache, folder / "run", **options)
    setting, model = setting_of(cache, run, kind, paired_texts=options.get("gallery_text") == "first_caption")
    permuted = load_permuted(run, setting.spec, setting.cache)
    assert permuted is not None
    return Trained(cache, run, setting, model, permuted)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    sizes = {"train": 400, "dev": 80, "test": 200}
    return trained(tmp_path_factory.mktemp("c"), "classes", sizes, {"classes": 8, "signal": 0.3}, fusion="linear")


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    sizes = {"train": 300, "dev": 40, "test": 100}
    return trained(tmp_path_factory.mktemp("t"), "captions", sizes, {}, fusion="linear")


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    sizes = {"train": 400, "dev": 60, "test": 200}
    options = {"captions": 3, "joint": True, "width": 64}
    training = {"fusion": "linear", "gallery_text": "first_caption", "epochs": 8}
    return trained(tmp_path_factory.mktemp("m"), "captions", sizes, options, **training)


def levels_of(metadata: Trained, protocol: Protocol) -> Any:
    training = same_training_pairs(metadata.setting.spec, metadata.setting.cache, metadata.run)
    levels, _ = fit_baselines(Material(protocol, *training, metadata.setting.spec.gallery_layers), "none")
    return {name: of.scores for name, of in levels.items()}


def failed(controls: dict[str, Control]) -> set[str]:
    return {name for name, control in controls.items() if not control.passed}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["class", "candidate", "rerank", "image", "caption", "caption-rerank", "metadata"])
def test_healthy_run_passes_every_control(name: str, request: pytest.FixtureRequest) -> None:
    if name == "metadata":
        of: Trained = request.getfixturevalue("metadata")
        options, expected = {"protocol": "metadata"}, CONTROLS | {"texts_shuffled"}
    elif name.startswith("caption"):
        of, expected = request.getfixturevalue("captions"), CONTROLS | {"queries_constant"}
        options = {"protocol": name.removeprefix("caption-"), "rerank_queries": 60}
    else:
        of, expected = request.getfixturevalue("classes"), CONTROLS | {"queries_constant"}
        options = {"protocol": name}
    if "rerank" in name or name == "candidate":
        expected = CONTROLS
    if name == "image":
        expected = CONTROLS - {"pairs_permuted"}
    report = report_of(of.cache, of.run, **options)
    assert report["failures"] == []
    takes_no_text = "no text enters fusion linear: a pair's score is that of the photo alone."
    assert report["warnings"] == ([takes_no_text] if "rerank" in name or name == "candidate" else [])
    assert report["status"] == 0
    assert set(report["controls"]) == expected
    assert all(control["passed"] for control in report["controls"].values())
    metric = report["controls"]["photos_shuffled"]["metric"]
    assert value(report, metric) > report["controls"]["photos_shuffled"]["limit"]


def labels_in_the_gallery(setting: Setting) -> Any:
    """A gallery that holds at each place the text that belongs there, whatever the photo."""
    cache, spec, pairs = setting.cache, setting.spec, setting.pairs
    texts = cache.encoders[spec.text_key].vectors(pairs.texts.values[pairs.texts.offsets[:-1]])

    def gallery(self: Setting, model: Fusion, arrangement: Arrangement) -> np.ndarray:
        return encode_queries(model, texts)

    return gallery


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classes", "captions"])
def test_gallery_that_holds_its_labels_by_place(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    of: Trained = request.getfixturevalue(kind)
    protocol = (ClassProtocol if kind == "classes" else CaptionProtocol)(of.setting)
    monkeypatch.setattr(Setting, "gallery", labels_in_the_gallery(of.setting))
    controls = of.controls(protocol)
    assert {"photos_shuffled", "photos_constant"} <= failed(controls)
    assert controls["photos_shuffled"].value > 0.95
    lines = failures(controls, {"to_image": 1.0}, {"photos": 0}, has_permuted=True)
    assert lines[0].startswith(f"photos_shuffled: {protocol.main_metric} is ")
    assert lines[0].endswith("(chance)")


@pytest.mark.parametrize(
    "protocol", ["image", *(pytest.param(name, marks=pytest.mark.slow) for name in ("candidate", "rerank"))]
)
def test_controls_catch_protocols_that_ignore_arrangements(
    protocol: str, classes: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measure that ignores the arrangement scores the same with the photos shuffled."""
    made: Protocol = {
        "candidate": CandidateProtocol,
        "rerank": lambda setting: RerankProtocol(setting, 16, 100),
        "image": ImageProtocol,
    }[protocol](classes.setting)
    assert failed(classes.controls(made)) == set()
    honest, answer = classes.setting.honest(), made.answer
    monkeypatch.setattr(made, "answer", lambda model, arrangement: answer(model, honest))
    assert {"photos_shuffled", "photos_constant"} <= failed(classes.controls(made))


def test_permuted_run_that_learned_the_true_pairs(classes: Trained, captions: Trained) -> None:
    """Something other than the pairs tells: the control finds as much as the run."""
    for of, kind in ((classes, ClassProtocol), (captions, CaptionProtocol), (classes, CandidateProtocol)):
        assert failed(of.controls(kind(of.setting), permuted=of.model)) == {"pairs_permuted"}


def test_level_of_a_permuted_run_is_that_of_random_names(classes: Trained) -> None:
    protocol = ClassProtocol(classes.setting)
    control = classes.controls(protocol)["pairs_permuted"]
    level, spread = protocol.dealt(classes.permuted)
    assert control.expected == "class names assigned at random"
    assert (control.level, control.limit) == pytest.approx((level, level + 3 * spread))
    assert level > 0.9 * protocol.measure(classes.model, classes.setting.honest())["map"].chance


def test_queries_that_know_their_answers(captions: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries that find their photo whatever their text says."""
    monkeypatch.setattr(
        Setting, "queries", lambda self, model, queries: self.gallery(model, self.honest())[queries.units]
    )
    assert "queries_constant" in failed(captions.controls(CaptionProtocol(captions.setting)))


@pytest.mark.slow
def test_texts_beside_photos_that_photos_alone_find(metadata: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gallery that follows the photo and knows its answers: shuffled texts do not set it back."""
    protocol = MetadataProtocol(metadata.setting)
    cache, spec, pairs = metadata.setting.cache, metadata.setting.spec, metadata.setting.pairs
    answers = cache.encoders[spec.text_key].vectors(pairs.texts.values[pairs.texts.offsets[:-1]])

    def gallery(self: Setting, model: Fusion, arrangement: Arrangement) -> np.ndarray:
        return encode_queries(model, answers[arrangement.photos])

    levels = levels_of(metadata, protocol)
    monkeypatch.setattr(Setting, "gallery", gallery)
    controls = metadata.controls(protocol, baselines=levels)
    assert failed(controls) == {"texts_shuffled", "pairs_permuted"}
    assert controls["texts_shuffled"].expected == "no more than image_only_ridge"


@pytest.mark.slow
def test_texts_beside_photos_that_hold_the_answers(metadata: Trained) -> None:
    """Beside each photo lies a text that it is searched with: found as well with one photo everywhere, as is told."""
    protocol = MetadataProtocol(metadata.setting)
    levels = levels_of(metadata, protocol)
    assert failed(metadata.controls(protocol, baselines=levels)) == set()
    leaky = MetadataProtocol(metadata.setting.with_true_texts())
    controls, scores = run_controls(leaky, metadata.model, metadata.permuted, levels)
    assert controls["photos_shuffled"].value > 0.7
    assert controls["photos_shuffled"].expected == "no more than photos_constant"
    constant = scores["photos_constant"]["map"]
    assert controls["photos_shuffled"].limit == pytest.approx(constant.value + 3 * constant.error)
    assert levels["text_only"]["map"].value < constant.value


def test_score_at_the_limit_passes_and_above_it_fails(classes: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = ClassProtocol(classes.setting)
    for shift, passes in ((3 - 1e-3, True), (3 + 1e-3, False)):
        score = Score(0.2 + shift * 0.05, 0.2, (0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05))
        answered = Answered({"map": score, "top1": score}, Vectors(np.zeros((0, 1)), np.zeros((0, 1))))
        monkeypatch.setattr(protocol, "answer", lambda model, arrangement, answered=answered: answered)
        monkeypatch.setattr(protocol, "score_vectors", lambda *vectors, answered=answered: answered.scores)
        control = classes.controls(protocol)["photos_shuffled"]
        assert control.limit == pytest.approx(0.2 + 3 * 0.05)
        assert control.passed is passes
    with pytest.raises(AssertionError, match="interval"):
        _ = Score(1.0, 0.5).error


@pytest.mark.slow
def test_sensitivity_is_the_mean_distance_of_fused_vectors(metadata: Trained) -> None:
    setting, model = metadata.setting, metadata.model
    moves = sensitivity(MetadataProtocol(setting), model)
    order = np.random.default_rng(setting.seed).permutation(len(setting.pairs))
    rolled = np.roll(order, 1)
    arrangements = {"own": (order, order), "image": (rolled, order), "text": (order, rolled)}
    vectors = {name: setting.gallery(model, Arrangement(*places)) for name, places in arrangements.items()}
    for part in ("image", "text"):
        moved = np.linalg.norm(vectors["own"] - vectors[part], axis=1).mean()
        assert moves[f"to_{part}"] == pytest.approx(moved, abs=1e-5)
        assert 0 < moves[f"to_{part}"] < 2


def test_model_that_ignores_the_photo(classes: Trained, tmp_path: Path) -> None:
    _, model = setting_of(classes.cache, classes.run, "classes")
    with torch.no_grad():
        for parameter in (model.head.linear.weight, model.head.mlp[-1].weight):
            parameter.zero_()
    moves = sensitivity(ClassProtocol(classes.setting), model)
    assert moves["to_image"] == pytest.approx(0, abs=1e-6)
    (line,) = failures({}, moves, {"photos": 0}, has_permuted=True)
    assert line == "another photo moves the fused vector by 0.000, expected at least 0.2"
    assert (
        failures({}, sensitivity(ClassProtocol(classes.setting), classes.model), {"photos": 0}, has_permuted=True) == []
    )


@pytest.mark.slow
def test_model_that_ignores_the_text_beside(metadata: Trained, tmp_path: Path) -> None:
    options = {"fusion": "linear", "gallery_text": "first_caption", "pooled_text": False, "epochs": 1}
    report = report_of(metadata.cache, quick_train(metadata.cache, tmp_path / "run", **options), protocol="metadata")
    assert report["sensitivity"]["to_text"] == pytest.approx(0, abs=1e-6)
    assert "another text moves the fused vector by 0.000, expected at least 0.05" in report["failures"]
    assert report["status"] == 3


def test_photos_that_were_trained_on(classes: Trained) -> None:
    report = report_of(classes.cache, classes.run, split="train")
    assert report["duplicates"]["photos"] == 400
    assert "400 photos were trained on" in report["failures"]
    assert report["status"] == 3
    tested = report_of(classes.cache, classes.run)["duplicates"]
    assert tested == {"photos": 0, "texts": 8}  # classes have the same names everywhere


def test_duplicates_are_counted_by_content(tmp_path: Path) -> None:
    """Photos that stand in both splits were taken out of training; their captions are other ones."""
    cache = make_cache(tmp_path / "cache.zarr", {"train": 60, "test": 20}, shared=7)
    setting, _ = setting_of(cache, quick_train(cache, tmp_path / "run", epochs=1, control_epochs=0), "captions")
    training, _ = same_training_pairs(setting.spec, setting.cache, "run")
    inputs = setting.cache.table.inputs["image"]
    assert duplicates(inputs, setting.pairs, training) == {"photos": 0, "texts": 0}
    seen = replace(training, rows=np.concatenate([training.rows, setting.pairs.rows[:5]]), texts=setting.pairs.texts)
    assert duplicates(inputs, setting.pairs, seen) == {"photos": 5, "texts": 40}


def test_missing_control_of_permuted_pairs(captions: Trained, tmp_path: Path) -> None:
    report = report_of(captions.cache, quick_train(captions.cache, tmp_path / "run", epochs=1, control_epochs=0))
    missing = "no control was trained on permuted pairs (train with --control-epochs above 0)"
    assert missing in report["failures"]
    assert f"CONTROL FAILED: {missing}. Do not use these numbers." in " ".join(report["text"].split())
    assert "pairs_permuted" not in report["controls"]
    assert report["status"] == 3


def average_precision(order: np.ndarray, relevant: np.ndarray) -> float:
    ranks = [rank for rank, photo in enumerate(order, start=1) if relevant[photo]]
    return sum(count / rank for count, rank in enumerate(ranks, start=1)) / len(ranks)


@pytest.mark.parametrize(("num_classes", "num_present"), [(3, 3), (4, 4), (4, 3)])
def test_dealt_map_is_the_mean_over_all_ways_to_deal_the_names(num_classes: int, num_present: int) -> None:
    """The last class may be without photos; some photos have two classes."""
    generator = np.random.default_rng(num_classes)
    labels = [[int(photo % num_present)] + [0] * (photo % 5 == 1) for photo in range(30)]
    scores = (
        generator.normal(size=(30, num_classes))
        + 2 * generator.normal(size=(num_present, num_classes))[np.arange(30) % num_present]
    )
    is_member = np.array([[number in of_photo for number in range(num_present)] for of_photo in labels])
    orders = np.argsort(-scores, axis=0).T
    found = [
        np.mean([average_precision(orders[ranking], is_member[:, number]) for number, ranking in enumerate(deal)])
        for deal in itertools.permutations(range(num_classes), num_present)
    ]
    level, spread = dealt_map(scores, Ragged.from_rows([sorted(set(of_photo)) for of_photo in labels]), deals=20_000)
    assert level == pytest.approx(np.mean(found), abs=4 * np.std(found) / 20_000**0.5)
    assert spread == pytest.approx(np.std(found), rel=0.05)


def test_dealt_map_of_one_class_and_of_a_seed() -> None:
    scores = np.random.default_rng(0).normal(size=(20, 5))
    labels = Ragged.from_rows([[int(photo % 5)] for photo in range(20)])
    assert dealt_map(scores, labels, seed=1) == dealt_map(scores, labels, seed=1)
    assert dealt_map(scores, labels, seed=1) != dealt_map(scores, labels, seed=2)
    level, spread = dealt_map(scores[:, :1], Ragged.from_rows([[0]] * 20))
    assert (level, spread) == pytest.approx((1.0, 0.0))


def test_dealt_level_is_above_chance_for_clustered_classes() -> None:
    """Rankings that hold whole classes in one run, of which none is right: a random order would be no fair level."""
    labels = np.arange(200) % 4
    center = np.eye(4)
    scores = (center[labels] @ np.roll(center, 1, axis=0).T) + 0.01 * np.random.default_rng(0).normal(size=(200, 4))
    level, spread = dealt_map(scores, Ragged.from_rows([[int(label)] for label in labels]))
    assert level > 0.35
    wrong = np.mean([average_precision(np.argsort(-scores[:, number]), labels == number) for number in range(4)])
    assert wrong <= level + 3 * spread


@pytest.mark.slow
def test_shuffled_photos_are_at_chance_over_many_shuffles(classes: Trained) -> None:
    """The level itself: the mean over shuffles is chance, and the spread is what the interval says."""
    protocol = ClassProtocol(classes.setting)
    honest = classes.setting.honest()
    found, errors = [], []
    for seed in range(20):
        shuffled = np.random.default_rng(seed).permutation(len(classes.setting.pairs))
        score = protocol.measure(classes.model, Arrangement(shuffled, honest.texts))["map"]
        found.append(score.value - score.chance)
        errors.append(score.error)
    assert abs(np.mean(found)) < 3 * np.std(found) / 20**0.5 + 0.005
    assert np.std(found) < 2 * np.mean(errors)


def test_classes_are_searched_with_their_own_labels(classes: Trained) -> None:
    """The synthetic classes, by hand: the score of the report is that of the photos' own classes."""
    report: Report = report_of(classes.cache, classes.run)
    setting, model = classes.setting, classes.model
    queries = ClassProtocol(setting).queries
    scores = setting.gallery(model, setting.honest()) @ setting.queries(model, queries).T
    assert value(report, "top1") == pytest.approx((scores.argmax(axis=1) == first_labels(setting.pairs.labels)).mean())
    assert error_of(report["systems"]["fam"]["top1"]) > 0
