"""Fusions in closed form against independent references: solvers of numpy, scipy and scikit-learn, and plain loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.linalg
import torch
from quick_runs import quick_train, report_of, value
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import rbf_kernel
from synthetic_cache import make_cache

from saffe_cache.core.items import Ragged
from saffe_cache.fusion.base import Blocks, TrainingVectors
from saffe_cache.fusion.closed_form import kernel as kernel_module
from saffe_cache.fusion.closed_form.asif import AsifFusion, axis_weights, relative
from saffe_cache.fusion.closed_form.cca import Canonical, canonical
from saffe_cache.fusion.closed_form.csa import held_out_correlations
from saffe_cache.fusion.closed_form.kernel import KernelRegression, gaussian_kernel
from saffe_cache.fusion.closed_form.moments import Moments, Side, unit
from saffe_cache.fusion.closed_form.procrustes import procrustes
from saffe_cache.fusion.closed_form.ridge import ridge_map
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.inference.exporting import export_onnx
from saffe_cache.store.reader import open_cache
from saffe_cache.studies.sweep.ablate import ablate
from saffe_cache.studies.sweep.recipe import AblateConfig
from saffe_cache.studies.sweep.result import SweepResult
from saffe_cache.training import train as training
from saffe_cache.training.runs import load_permuted, open_run, weights_hash

CLOSED = [name for name, entry in FUSIONS.items() if entry.is_closed_form]
NO_STEPS: dict[str, Any] = {"epochs": None, "batch_size": None}


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def draw_pairs(n: int, photo: int, text: int, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray, Ragged]:
    """Photos, texts and each photo's captions, of which there are one to three; photos tell of their captions."""
    positives = Ragged.from_rows([list(range(3 * i, 3 * i + 1 + i % 3)) for i in range(n)])
    topics = draw(n, 4, seed=1)
    texts = np.repeat(topics @ draw(4, text, seed=2), 3, axis=0) + noise * draw(3 * n, text, seed=3)
    return topics @ draw(4, photo, seed=4) + noise * draw(n, photo, seed=5), texts, positives


def repeated(photos: np.ndarray, texts: np.ndarray, positives: Ragged) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row for each caption with its photo, and its weight."""
    return photos[positives.owners], texts[positives.values], 1 / positives.lengths[positives.owners]


# Moments


def test_covariances_count_each_photo_once() -> None:
    photos, texts, positives = draw_pairs(40, 6, 5)
    found = Moments.of(photos, texts, positives)
    x, y, weights = repeated(photos, texts, positives)
    expected = np.cov(np.hstack([x, y]).T, aweights=weights, bias=True)
    for side, own in ((found.photos, expected[:6, :6]), (found.texts, expected[6:, 6:])):
        np.testing.assert_allclose(side.axes @ np.diag(side.variances) @ side.axes.T, own, atol=1e-12)
        assert side.mean_variance == pytest.approx(np.trace(own) / len(own))
    np.testing.assert_allclose(found.shared, expected[:6, 6:], atol=1e-12)


def test_repeated_texts_are_as_good_as_one_row() -> None:
    photos, texts, positives = draw_pairs(30, 6, 5)
    shared = Ragged(positives.offsets, positives.values // 9)  # three photos share each text
    one = Moments.of(photos, texts, shared)
    several = Moments.of(photos, texts[shared.values], Ragged(shared.offsets, np.arange(len(shared.values))))
    np.testing.assert_allclose(one.texts.variances, several.texts.variances)
    np.testing.assert_allclose(one.shared, several.shared, atol=1e-12)


@pytest.mark.parametrize("n", [9, 40])
def test_dual_form_equals_primal_form(n: int) -> None:
    """The dual form is taken for 9 vectors of width 20."""
    x, y = draw(n, 20), draw(n, 7, seed=1)
    side, centred = Side.of(x, np.ones(n)), x - x.mean(axis=0)
    shared = centred.T @ (y - y.mean(axis=0)) / n
    assert side.axes.shape[1] == min(n - 1, 20)
    for strength in (1e-3, 1.0, 100.0):
        penalty = strength * np.trace(centred.T @ centred / n) / 20
        primal = np.linalg.solve(centred.T @ centred / n + penalty * np.eye(20), shared)
        dual = centred.T @ np.linalg.solve(centred @ centred.T + n * penalty * np.eye(n), y - y.mean(axis=0))
        np.testing.assert_allclose(primal, dual, atol=1e-8)
        np.testing.assert_allclose(ridge_map(side, shared, strength), primal, atol=1e-8)


# Ridge


def test_ridge_equals_scikit_learn_on_captions() -> None:
    photos, texts, positives = draw_pairs(40, 6, 5)
    moments = Moments.of(photos, texts, positives)
    x, y, weights = repeated(photos, texts, positives)
    for side, source, target, shared in (
        (moments.photos, x, y, moments.shared),
        (moments.texts, y, x, moments.shared.T),
    ):
        penalty = 0.1 * side.mean_variance * 40  # scikit-learn sums over samples; each photo weighs 1
        expected = Ridge(alpha=penalty).fit(source, target, sample_weight=weights).coef_.T
        np.testing.assert_allclose(ridge_map(side, shared, 0.1), expected, atol=1e-8)


def test_large_penalty_tends_to_the_covariance() -> None:
    moments = Moments.of(*draw_pairs(40, 6, 5))
    found = ridge_map(moments.photos, moments.shared, 1e9)
    np.testing.assert_allclose(unit(found.reshape(1, -1)), unit(moments.shared.reshape(1, -1)), atol=1e-6)


def test_constant_vector_changes_no_map() -> None:
    photos, texts, positives = draw_pairs(40, 6, 5)
    one, moved = Moments.of(photos, texts, positives), Moments.of(photos + 3.0, texts - 1.0, positives)
    np.testing.assert_allclose(ridge_map(moved.photos, moved.shared, 0.1), ridge_map(one.photos, one.shared, 0.1))


# Kernel ridge


@pytest.mark.parametrize("strength", [0.03, 3.0])
def test_kernel_regression_equals_scikit_learn(strength: float) -> None:
    inputs, targets, new = draw(50, 6), draw(50, 4, seed=1), draw(9, 6, seed=2)
    expected = KernelRidge(alpha=strength, kernel="rbf", gamma=0.4 / 6).fit(inputs, targets).predict(new)
    weights = KernelRegression(inputs, targets, inputs, 0.4).weights(strength)
    kernel = gaussian_kernel(torch.from_numpy(new), torch.from_numpy(inputs), 0.4).numpy()
    np.testing.assert_allclose(kernel @ weights, expected, atol=1e-5)


def test_fewer_anchors_solve_the_normal_equations_of_all_pairs() -> None:
    inputs, targets = draw(80, 5), draw(80, 3, seed=1)
    anchors, new = inputs[::8], draw(7, 5, seed=2)
    of_all, own = rbf_kernel(inputs, anchors, gamma=0.2 / 5), rbf_kernel(anchors, anchors, gamma=0.2 / 5)
    expected = np.linalg.solve(of_all.T @ of_all + 0.5 * own, of_all.T @ targets)
    weights = KernelRegression(inputs, targets, anchors, 0.2).weights(0.5)
    kernel = rbf_kernel(new, anchors, gamma=0.2 / 5)
    np.testing.assert_allclose(kernel @ weights, kernel @ expected, atol=1e-5)


@torch.no_grad()
def test_kernels_learn_what_no_linear_map_can() -> None:
    """Texts tell of products of a photo's coordinates."""
    photos = draw(460, 6)
    texts = np.stack([photos[:, i] * photos[:, j] for i in range(6) for j in range(i)], axis=1)
    seen, found = Ragged.from_rows([[i] for i in range(400)]), {}
    for name in ("ridge", "kernel_ridge"):
        fusion = make(name, 6, texts.shape[1])
        fusion.fit(seen_of(fusion, photos[:400], texts, seen))
        scores = scores_of(fusion, photos[400:], texts[400:])
        found[name] = float((scores.argmax(axis=0) == np.arange(60)).mean())
    assert found["ridge"] < 0.15
    assert found["kernel_ridge"] > 0.5


@torch.no_grad()
def test_kernels_have_a_bounded_number_of_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_module, "MOST_ANCHORS", 30)
    photos, texts, positives = draw_pairs(90, 10, 7, noise=0.2)
    fusion = make("kernel_ridge", 10, 7)
    fusion.fit(seen_of(fusion, photos, texts, positives))
    assert len(fusion.photo_anchors) == len(fusion.text_anchors) == 30
    assert fusion.num_fitted == 30 * (10 + 2 * 7 + 10) + 10 * (10 + 1) + 7 + 6
    own = texts[positives.values[positives.offsets[:-1]]]
    assert (scores_of(fusion, photos, own).argmax(axis=0) == np.arange(90)).mean() > 0.3


# Procrustes


def test_procrustes_finds_a_rotation() -> None:
    x, rotation = draw(50, 8), np.linalg.qr(draw(8, 8, seed=1))[0]
    moments = Moments.of(x, x @ rotation, Ragged.from_rows([[i] for i in range(50)]))
    photo, text, _ = procrustes(moments.shared)
    np.testing.assert_allclose(photo @ text.T, rotation, atol=1e-12)


def test_procrustes_equals_scipy_and_has_orthonormal_maps() -> None:
    x, y = draw(50, 8), draw(50, 8, seed=1)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    photo, text, _ = procrustes(x.T @ y / 50)
    np.testing.assert_allclose(photo @ text.T, scipy.linalg.orthogonal_procrustes(x, y)[0], atol=1e-10)
    photo, text, values = procrustes(x[:, :5].T @ y)
    assert photo.shape[1] == text.shape[1] == len(values) == 5
    np.testing.assert_allclose(text.T @ text, np.eye(5), atol=1e-12)


# CCA and CSA


def one_caption(n: int, photo: int, text: int) -> tuple[np.ndarray, np.ndarray, Ragged]:
    topics = draw(n, 3, seed=7)
    x, y = (topics @ draw(3, w, seed=w) + draw(n, w, seed=w + 1) for w in (photo, text))
    return x, y, Ragged.from_rows([[i] for i in range(n)])


def test_cca_equals_the_angles_between_spaces() -> None:
    """Björck and Golub 1973: singular values of the product of orthonormal bases."""
    x, y, positives = one_caption(60, 7, 5)
    found = canonical(Moments.of(x, y, positives), 0.0)
    bases = [np.linalg.qr(of - of.mean(axis=0))[0] for of in (x, y)]
    np.testing.assert_allclose(found.correlations, np.linalg.svd(bases[0].T @ bases[1], compute_uv=False), atol=1e-10)
    a, b = (x - x.mean(axis=0)) @ found.photo, (y - y.mean(axis=0)) @ found.text
    np.testing.assert_allclose((a * b).mean(axis=0), found.correlations, atol=1e-10)
    np.testing.assert_allclose(a.T @ a / 60, np.eye(5), atol=1e-10)


def test_penalised_cca_equals_matrix_roots() -> None:
    x, y, positives = one_caption(12, 9, 20)  # fewer pairs than text coordinates
    found = canonical(Moments.of(x, y, positives), 0.3)
    a, b = x - x.mean(axis=0), y - y.mean(axis=0)
    roots = [
        scipy.linalg.inv(scipy.linalg.sqrtm(own + 0.3 * np.trace(own) / len(own) * np.eye(len(own)))).real
        for own in (a.T @ a / 12, b.T @ b / 12)
    ]
    left, values, right = np.linalg.svd(roots[0] @ (a.T @ b / 12) @ roots[1])
    np.testing.assert_allclose(found.correlations, values[: len(found.correlations)], atol=1e-8)
    expected = (roots[0] @ left[:, :9]) @ (right[:9] @ roots[1])
    np.testing.assert_allclose(found.photo @ found.text.T, expected, atol=1e-6)


def csa_scores(x: np.ndarray, y: np.ndarray, maps: Canonical, rho: np.ndarray) -> np.ndarray:
    a, b = unit((x - x.mean(axis=0)) @ maps.photo), unit((y - y.mean(axis=0)) @ maps.text)
    return np.asarray((a * rho) @ b.T)


def test_csa_is_invariant_without_a_penalty() -> None:
    """To any invertible linear map of a side, and to which side is called photos."""
    x, y, positives = one_caption(60, 7, 5)
    scores = []
    for photos, texts in ((x, y), (x @ draw(7, 7, seed=9), y + 4), (y, x)):
        maps = canonical(Moments.of(photos, texts, positives), 0.0)
        scores.append(csa_scores(photos, texts, maps, maps.correlations))
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-8)
    np.testing.assert_allclose(scores[2].T, scores[0], atol=1e-8)


def test_csa_vectors_score_as_the_paper_says() -> None:
    fusion = make("csa", 6, 5)
    photos, texts, positives = draw_pairs(40, 6, 5)
    maps = canonical(Moments.of(unit(photos), unit(texts), positives), 0.1)
    rho, mean = np.array([0.9, 0.5, 0.1]), unit(photos).mean(axis=0)
    values = {"from_photo": maps.photo[:, :3], "from_text": maps.text[:, :3], "correlations": rho, "photo_mean": mean}
    fusion.set(values)
    a, b = unit((unit(photos) - mean) @ maps.photo[:, :3]), unit(unit(texts) @ maps.text[:, :3])
    np.testing.assert_allclose(scores_of(fusion, photos, texts), (a * rho) @ b.T, atol=1e-5)
    fusion.set({"correlations": np.ones(3)})
    np.testing.assert_allclose(scores_of(fusion, photos, texts), a @ b.T, atol=1e-5)


def test_held_out_correlations_are_honest() -> None:
    """Near the width, the training pairs seem to correlate perfectly; independent sides do not."""
    x, y, positives = draw(30, 20), draw(30, 25, seed=1), Ragged.from_rows([[i] for i in range(30)])
    assert canonical(Moments.of(x, y, positives), 1e-6).correlations[:5].min() > 0.99
    assert held_out_correlations(x, y, positives, [1e-6])[0].mean() < 0.3
    x, y, positives = one_caption(300, 7, 5)
    [rho] = held_out_correlations(x, y, positives, [1e-6])
    np.testing.assert_allclose(rho[:3], canonical(Moments.of(x, y, positives), 0.0).correlations[:3], atol=0.05)


# ASIF


def asif(x: np.ndarray, anchors: np.ndarray, kept: int, power: float, weights: np.ndarray | None = None) -> np.ndarray:
    ones = np.ones(len(anchors)) if weights is None else weights
    tensors = (torch.from_numpy(of.astype(np.float64)) for of in (x, anchors, ones))
    return unit(relative(*tensors, kept, torch.tensor([power], dtype=torch.float64)).numpy())


def test_anchors_find_themselves() -> None:
    photos, texts = unit(draw(30, 8)), unit(draw(30, 5, seed=1))
    np.testing.assert_array_equal(asif(photos, photos, 1, 8.0) @ asif(texts, texts, 1, 8.0).T, np.eye(30))


def test_relative_vectors_equal_a_plain_loop() -> None:
    """Negative similarities are 0 also with an even power and all anchors kept."""
    queries, anchors = unit(draw(6, 4)), unit(draw(20, 4, seed=1))
    for kept, power in ((5, 2.0), (20, 2.0), (3, 1.0)):
        expected = np.zeros((6, 20))
        for row, query in enumerate(queries):
            for place in np.argsort(-(anchors @ query))[:kept]:
                expected[row, place] = max(float(anchors[place] @ query), 0.0) ** power
        np.testing.assert_allclose(asif(queries, anchors, kept, power), unit(expected), atol=1e-12)


def test_asif_is_invariant_to_rotations_and_order() -> None:
    photos, texts = unit(draw(30, 8)), unit(draw(30, 5, seed=1))
    queries, gallery = unit(draw(7, 5, seed=2)), unit(draw(9, 8, seed=3))
    expected = asif(gallery, photos, 6, 4.0) @ asif(queries, texts, 6, 4.0).T
    turn, order = np.linalg.qr(draw(8, 8, seed=4))[0], np.random.default_rng(5).permutation(30)
    turned = asif(gallery @ turn, photos @ turn, 6, 4.0) @ asif(queries, texts, 6, 4.0).T
    np.testing.assert_allclose(turned, expected, atol=1e-10)
    ordered = asif(gallery, photos[order], 6, 4.0) @ asif(queries, texts[order], 6, 4.0).T
    np.testing.assert_allclose(ordered, expected, atol=1e-10)


def test_repeated_text_counts_as_one_axis() -> None:
    texts = unit(draw(4, 5))
    anchors = texts[[0, 0, 0, 1, 2, 3]]
    weights = axis_weights(anchors)
    np.testing.assert_allclose(weights, [3**-0.5] * 3 + [1] * 3)
    once, several = asif(texts, texts, 4, 1.0), asif(texts, anchors, 6, 1.0, weights)
    np.testing.assert_allclose(several @ several.T, once @ once.T, atol=1e-10)
    # photos of the text that is repeated are all kept, whichever comes first
    assert np.count_nonzero(asif(texts[:1], anchors, 1, 1.0, weights)) == 3


# All


def make(name: str, photo: int, text: int) -> Any:
    shape = FusionShape(
        fusion=name, num_layers=1, hidden_size=photo, num_tokens=5, text_hidden_size=text, text_size=text,
        pooled_text=False, has_class_token=False,
    )  # fmt: skip
    return FUSIONS[name].make(shape, Blocks()).eval()


def scores_of(fusion: Any, photos: np.ndarray, texts: np.ndarray) -> np.ndarray:
    vectors = fusion([torch.from_numpy(photos.astype(np.float32)).unsqueeze(1)])
    return np.asarray((vectors @ fusion.encode_queries(torch.from_numpy(texts.astype(np.float32))).T).numpy())


def seen_of(fusion: Any, photos: np.ndarray, texts: np.ndarray, positives: Ragged) -> TrainingVectors:
    """Validated on the training pairs: the rank of each photo's first text."""

    def validate() -> float:
        scores = scores_of(fusion, photos, texts)
        assert np.isfinite(scores).all()
        assert np.abs(scores).max() <= 1 + 1e-5
        own = scores[np.arange(len(photos)), positives.values[positives.offsets[:-1]]]
        return float(1 / (1 + (scores > own[:, None]).sum(axis=1)).mean())

    return TrainingVectors(photos.astype(np.float32), unit(texts).astype(np.float32), positives, validate)


def constant(photos: np.ndarray, texts: np.ndarray, positives: Ragged) -> tuple[np.ndarray, np.ndarray, Ragged]:
    return np.ones_like(photos), texts, positives


def one_text(photos: np.ndarray, texts: np.ndarray, positives: Ragged) -> tuple[np.ndarray, np.ndarray, Ragged]:
    return photos, texts, Ragged.from_rows([[0] for _ in photos])


def equal_texts(photos: np.ndarray, texts: np.ndarray, positives: Ragged) -> tuple[np.ndarray, np.ndarray, Ragged]:
    return photos, np.ones_like(texts), positives


def two_photos(photos: np.ndarray, texts: np.ndarray, positives: Ragged) -> tuple[np.ndarray, np.ndarray, Ragged]:
    return photos[:2], texts, positives.take(np.arange(2))


def flat_columns(photos: np.ndarray, texts: np.ndarray, positives: Ragged) -> tuple[np.ndarray, np.ndarray, Ragged]:
    photos, texts = photos.copy(), texts.copy()
    photos[:, :4], texts[:, :2] = 0, 0
    return photos, texts, positives


def zero_photo(photos: np.ndarray, texts: np.ndarray, positives: Ragged) -> tuple[np.ndarray, np.ndarray, Ragged]:
    return np.where(np.arange(len(photos))[:, None] == 3, 0.0, photos), texts, positives


DEGENERATE: list[Callable[..., Any]] = [constant, one_text, equal_texts, two_photos, flat_columns, zero_photo]


@pytest.mark.parametrize("change", DEGENERATE)
@pytest.mark.parametrize("name", CLOSED)
@torch.no_grad()
def test_degenerate_pairs_give_unit_vectors(name: str, change: Callable[..., Any]) -> None:
    photos, texts, positives = change(*draw_pairs(12, 20, 7))
    fusion = make(name, 20, 7)
    fusion.fit(seen_of(fusion, photos, texts, positives))
    others = draw(5, 20, seed=8)
    np.testing.assert_allclose(fusion([torch.from_numpy(others).float().unsqueeze(1)]).norm(dim=1), 1, atol=1e-5)


@pytest.mark.parametrize("name", CLOSED)
@torch.no_grad()
def test_fitted_fusion_finds_new_photos(name: str, tmp_path: Path) -> None:
    """Fewer pairs than coordinates; with permuted pairs it finds no more than chance; its weights load."""
    photos, texts, positives = draw_pairs(150, 80, 60, noise=0.2)
    fitted, new = positives.take(np.arange(60)), positives.take(np.arange(60, 150))
    own = texts[new.values[new.offsets[:-1]]]

    def recall(seen: Ragged) -> float:
        fusion.fit(seen_of(fusion, photos[:60], texts, seen))
        return float((scores_of(fusion, photos[60:], own).argmax(axis=0) == np.arange(90)).mean())

    fusion = make(name, 80, 60)
    permuted = recall(fitted.take(np.random.default_rng(0).permutation(60)))
    honest = recall(fitted)
    assert honest > 0.2
    assert permuted < 1 / 90 + 3 * (1 / 90 / 90) ** 0.5 + 0.02
    loaded = make(name, 80, 60)
    loaded.load_state_dict(fusion.state_dict())
    np.testing.assert_array_equal(scores_of(loaded, photos, own), scores_of(fusion, photos, own))


@pytest.mark.parametrize("name", ["ridge", "asif"])
@pytest.mark.slow
@torch.no_grad()
def test_fitted_fusion_is_exported(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    fusion = make(name, 20, 7)
    fusion.fit(seen_of(fusion, *draw_pairs(30, 20, 7)))
    assert export_onnx(fusion, (4,), tmp_path / "fam.onnx").exists()  # compared with torch


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("closed")
    return make_cache(
        folder / "cache.zarr", {"train": 120, "dev": 40, "test": 40}, captions=3, signal=5.0, text_width=6
    )


FITTED = {
    "ridge": lambda w: 2 * 64 * 6 + 64 + 6 + 4,
    "kernel_ridge": lambda w: 120 * (64 + 2 * 6 + w) + 64 * (w + 1) + 6 + 6,
    "procrustes": lambda w: (64 + 6) * (w + 1),
    "cca": lambda w: (64 + 6) * (w + 1),
    "csa": lambda w: (64 + 6) * (w + 1) + w,
    "asif": lambda w: 120 * (64 + 6 + 1) + 64 + 6 + 2,
}


@pytest.mark.parametrize("name", CLOSED)
def test_run_is_trained_and_evaluated_with_controls(name: str, path: str, tmp_path: Path) -> None:
    run = quick_train(path, tmp_path / "run", fusion=name, **NO_STEPS)
    report = report_of(path, run)
    chance = report["systems"]["fam"]["mrr"]["chance"]
    assert value(report, "mrr") > 1.5 * chance
    assert report["status"] == 0, report["failures"]
    cache = open_cache(path)
    spec, model, result = open_run(run, cache)
    width = next((getattr(model, of).shape[1] for of in ("from_photo", "axes") if hasattr(model, of)), 0)
    assert result.trainable_parameters == model.num_fitted == FITTED[name](width)
    assert load_permuted(run, spec, cache) is not None
    paired = quick_train(path, tmp_path / "paired", fusion=name, gallery_text="first_caption", **NO_STEPS)
    assert value(report_of(path, paired), "mrr") > value(report, "mrr")  # the captions of a photo are alike


def test_resumed_run_is_not_fitted_again(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """asif's weights have shapes that only its data say."""
    expected = quick_train(path, tmp_path / "whole", fusion="asif", control_epochs=0, **NO_STEPS)
    with monkeypatch.context() as patched:
        patched.setattr(training, "_finish", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quick_train(path, tmp_path / "run", fusion="asif", control_epochs=0, **NO_STEPS)
    monkeypatch.setattr(AsifFusion, "fit", None)
    run = quick_train(path, tmp_path / "run", fusion="asif", control_epochs=0, **NO_STEPS)
    assert weights_hash(run) == weights_hash(expected)


def test_sweep_compares_closed_forms(path: str, tmp_path: Path) -> None:
    (tmp_path / "methods.toml").write_text(
        """
        title = "Methods"
        question = "Which?"
        x = "fusion"
        x_label = "fusion"
        seeds = [0]
        shared = { control_epochs = 0 }
        [[series]]
        name = "closed form"
        fusion = ["ridge", "cca"]
        """
    )
    [out] = ablate(
        AblateConfig(
            recipe=(str(tmp_path / "methods.toml"),), cache=path, out=str(tmp_path / "out"), split="test",
            baselines="none", device="cpu", workers=1,
        )
    )  # fmt: skip
    [series] = SweepResult.load(out).series
    assert [point.x for point in series.points] == ["ridge", "cca"]


@pytest.mark.parametrize("name", CLOSED)
def test_classes_are_found(name: str, tmp_path: Path) -> None:
    """Photos of a class share their text."""
    path = make_cache(tmp_path / "classes.zarr", {"train": 90, "test": 40}, classes=4, signal=5.0, text_width=6)
    run = quick_train(path, tmp_path / "run", fusion=name, control_epochs=0, **NO_STEPS)
    report = report_of(path, run)
    assert value(report, "map") > report["systems"]["fam"]["map"]["chance"] + 0.2


def test_docs_list_each_with_its_numbers() -> None:
    page = (Path(__file__).parents[1] / "docs/fusions.md").read_text()
    assert all(f"| `{name}` |" in page for name in CLOSED)
    for name in ("ridge", "procrustes"):  # whose numbers do not depend on the data, at w = k
        assert f" = {make(name, 768, 384).num_fitted:,}" in page
