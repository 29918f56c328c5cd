"""Ridge regression and the linear probe against scikit-learn, class means against a loop, late fusion."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import unit_rows
from sklearn.linear_model import LogisticRegression, Ridge

from saffe_cache.retrieval import baselines
from saffe_cache.retrieval.baselines import (
    LinearMap,
    Rows,
    fit_class_means,
    fit_linear_probe,
    fit_ridge,
    fuse_late,
    tune_late_fusion,
)


def regression(num_samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of very different scales and means, and three targets."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(num_samples, 20)) * np.logspace(-1, 1, 20) + generator.normal(size=20) * 5
    targets = features @ generator.normal(size=(20, 3)) + generator.normal(size=(num_samples, 3)) + 7
    return features.astype(np.float32), targets.astype(np.float32)


@pytest.fixture
def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few numbers at once that small data take several turns."""
    monkeypatch.setattr(baselines, "_ROWS_AT_ONCE", 64)
    monkeypatch.setattr(baselines, "_COLUMNS_AT_ONCE", 5)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("num_samples", [200, 12])  # more samples than features, and fewer
@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_ridge_equals_scikit_learn(num_samples: int, strength: float) -> None:
    features, targets = regression(num_samples)
    fit = fit_ridge(features, targets, judge=lambda fit: 0.0, strengths=(strength,))
    expected = Ridge(alpha=strength * num_samples).fit(features.astype(np.float64), targets.astype(np.float64))
    np.testing.assert_allclose(fit.weight, expected.coef_, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fit.bias, expected.intercept_, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(fit(features), expected.predict(features), rtol=1e-4, atol=1e-3)
    assert fit(features).dtype == np.float32


@pytest.mark.usefixtures("many_blocks")
def test_ridge_reads_rows_once_and_a_few_at_a_time() -> None:
    features, targets = regression(200)
    read: list[int] = []

    def compute(rows: slice) -> np.ndarray:
        read.extend(range(rows.start, rows.stop))
        assert rows.stop - rows.start <= 64
        return features[rows]

    of_rows = fit_ridge(Rows(200, compute), Rows(200, targets.__getitem__), judge=lambda fit: fit.strength)
    of_arrays = fit_ridge(features, targets, judge=lambda fit: fit.strength)
    np.testing.assert_array_equal(of_rows.weight, of_arrays.weight)
    np.testing.assert_array_equal(of_rows.bias, of_arrays.bias)
    assert sorted(set(read)) == list(range(200))
    assert len(read) == 200 + 64  # the first rows also give the means to start from


@pytest.mark.usefixtures("many_blocks")
def test_rows_are_kept_where_they_are_small() -> None:
    values, read = np.arange(400.0).reshape(200, 2), []

    def compute(rows: slice) -> np.ndarray:
        read.append(rows)
        return values[rows]

    rows = Rows(200, compute)
    np.testing.assert_array_equal(rows.mapped(lambda some: some + 1), values + 1)
    assert [one.start for one in read] == [0, 64, 128, 192]
    for most, is_kept in ((values.nbytes, True), (values.nbytes - 1, False)):
        kept = rows.kept(most)
        read.clear()
        np.testing.assert_array_equal(kept.whole, values)
        assert bool(read) != is_kept


def test_ridge_takes_the_strength_that_the_judge_likes_best() -> None:
    features, targets = regression(40)
    seen: list[float] = []

    def judge(fit: LinearMap) -> float:
        seen.append(fit.strength)
        return -abs(np.log10(fit.strength) - np.log10(0.02))

    assert fit_ridge(features, targets, judge).strength == 1e-2
    assert seen == list(baselines.RIDGE_STRENGTHS)


def test_ridge_strength_is_chosen_on_validation_data() -> None:
    features, targets = regression(30)
    noisy = targets + np.random.default_rng(1).normal(size=targets.shape).astype(np.float32) * 400
    more, answers = regression(500)

    def judge(fit: LinearMap) -> float:
        return -float(np.square(fit(more) - answers).mean())

    errors = {
        alpha: np.square(Ridge(alpha=alpha * 30).fit(features, noisy).predict(more) - answers).mean()
        for alpha in baselines.RIDGE_STRENGTHS
    }
    assert fit_ridge(features, noisy, judge).strength == min(errors, key=lambda alpha: errors[alpha])


def classification(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(5, size=300)
    centers = generator.normal(size=(5, 12))
    features = (centers[labels] + 1.3 * generator.normal(size=(300, 12))) * np.logspace(-1, 2, 12) + 30
    return features.astype(np.float32), labels


def loss_of(logits: np.ndarray, labels: np.ndarray, weight: np.ndarray, strength: float) -> float:
    logits = logits.astype(np.float64)
    normal = np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)) + logits.max(axis=1)
    return float((normal - logits[np.arange(len(labels)), labels]).mean() + strength / 2 * np.square(weight).sum())


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("strength", [1e-4, 1e-2])
def test_linear_probe_equals_scikit_learn(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "PROBE_STRENGTHS", (strength,))
    features, labels = classification()
    fit = fit_linear_probe(features, labels, 5, judge=lambda fit: 0.0)
    center, scale = features.astype(np.float64).mean(axis=0), features.astype(np.float64).std(axis=0)
    standard = (features - center) / scale
    # scikit-learn minimises the sum of losses + |W|^2 / (2 C)
    expected = LogisticRegression(C=1 / (strength * 300), max_iter=5000, tol=1e-8).fit(standard, labels)
    assert (fit(features).argmax(axis=1) == expected.predict(standard)).mean() > 0.99
    own = loss_of(fit(features), labels, fit.weight * scale, strength)
    best = loss_of(expected.decision_function(standard), labels, expected.coef_, strength)
    assert own == pytest.approx(best, rel=1e-3)
    assert own >= best * (1 - 1e-6)


def test_linear_probe_takes_the_best_penalty() -> None:
    features, labels = classification()
    fit = fit_linear_probe(features, labels, 5, judge=lambda fit: -abs(np.log10(fit.strength) + 4.1))
    assert fit.strength == 1e-4


def test_linear_probe_handles_constants_and_absent_classes() -> None:
    features, labels = classification()
    features[:, 3] = 1000.1
    fit = fit_linear_probe(features, labels.astype(np.int32), 7, judge=lambda fit: -abs(fit.strength - 1e-2))
    assert np.isfinite(fit(features)).all()
    assert (fit(features).argmax(axis=1) == labels).mean() > 0.6


def test_class_means_equal_a_loop() -> None:
    features, labels = classification()
    fit = fit_class_means(features, labels, 5)
    center = features.astype(np.float64).mean(axis=0)
    by_class: dict[int, list[np.ndarray]] = {}
    for row, label in zip(features.astype(np.float64), labels, strict=True):
        by_class.setdefault(int(label), []).append((row - center) / np.linalg.norm(row - center))
    expected = np.zeros((len(features), 5))
    for i, row in enumerate(features.astype(np.float64)):
        for label, members in by_class.items():
            mean = np.mean(members, axis=0)
            cosine = (row - center) @ mean / np.linalg.norm(row - center) / np.linalg.norm(mean)
            expected[i, label] = cosine
    np.testing.assert_allclose(fit(features), expected, atol=1e-5)
    np.testing.assert_allclose(fit.gallery(features) @ fit.means.T, expected, atol=1e-5)
    assert fit(features).dtype == np.float32


def test_class_means_stand_absent_classes() -> None:
    features, labels = classification()
    fit = fit_class_means(features, labels, 7)
    assert (fit(features)[:, 5:] == 0).all()
    assert fit(features).argmax(axis=1).max() < 5
    np.testing.assert_allclose(np.linalg.norm(fit.gallery(features), axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("image_noise", "text_noise", "low", "high"), [(1, 50, 0.85, 1), (50, 1, 0, 0.15), (2, 2, 0.3, 0.7)]
)
def test_late_fusion_takes_the_informative_side(image_noise: float, text_noise: float, low: float, high: float) -> None:
    generator = np.random.default_rng(0)
    queries = unit_rows(generator.normal(size=(200, 16)))
    noise = unit_rows(generator.normal(size=(200, 16))), unit_rows(generator.normal(size=(200, 16)))
    image, text = unit_rows(queries + image_noise * noise[0]), unit_rows(queries + text_noise * noise[1])
    seen: list[float] = []

    def judge(gallery: np.ndarray) -> float:
        cosines = queries @ gallery.T
        seen.append(float((1 / (1 + (cosines > np.diag(cosines)[:, None]).sum(axis=1))).mean()))
        return seen[-1]

    weight = tune_late_fusion(image, text, judge)
    assert low <= weight <= high
    assert judge(fuse_late(image, text, weight)) == max(seen)
    assert seen[0] == judge(text)
    assert seen[len(baselines.LATE_WEIGHTS) - 1] == judge(image)


def test_late_fusion_orders_as_the_average_score() -> None:
    image, text = np.array([[1, 0], [0, 1]], np.float32), np.array([[0, 1], [-1, 0]], np.float32)
    fused = fuse_late(image, text, 0.6)
    np.testing.assert_allclose(fused, np.array([[0.6, 0.4], [-0.4, 0.6]]) / np.sqrt(0.52), rtol=1e-5)
    assert fused.dtype == np.float32
