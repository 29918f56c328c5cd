"""Label propagation against a dense solve of the same graph, and what it is good for."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from drawn import unit_rows

from saffe_cache.retrieval import baselines
from saffe_cache.retrieval.baselines import LabelPropagation, fit_zlap


def one(
    images: np.ndarray,
    image_text: np.ndarray,
    k: int,
    gamma: float,
    alpha: float,
) -> LabelPropagation:
    return fit_zlap(images, image_text, lambda fit: 0.0, neighbours=(k,), gammas=(gamma,), alphas=(alpha,))


def dense_scores(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    k: int,
    gamma: float,
    alpha: float,
) -> np.ndarray:
    """The paper's inductive form: solve the graph anew for each test photo, and read the text nodes."""
    images, image_text = (part.astype(np.float64) for part in train)
    num_photos, num_classes = image_text.shape

    def edges(image: np.ndarray, to_text: np.ndarray, itself: int | None) -> np.ndarray:
        row = np.zeros(num_classes + num_photos)
        to_text = to_text.clip(0)
        for c in np.argsort(-to_text)[:k]:
            row[c] = to_text[c] ** gamma
        cosines = images @ image
        others = [j for j in np.argsort(-cosines) if j != itself]
        for j in others[:k]:
            row[num_classes + j] = max(cosines[j], 0)
        return row

    graph = np.zeros((num_classes + num_photos,) * 2)
    for i in range(num_photos):
        graph[num_classes + i] = edges(images[i], image_text[i], i)
    graph = graph + graph.T
    degrees = graph.sum(axis=1)
    degrees[degrees == 0] = 1
    laplacian = np.eye(len(graph)) - alpha * graph / np.sqrt(np.outer(degrees, degrees))
    rows = [np.linalg.solve(laplacian, edges(*photo, None))[:num_classes] for photo in zip(*test, strict=True)]
    return unit_rows(np.stack(rows))


@pytest.mark.parametrize(("k", "gamma", "alpha"), [(3, 1.0, 0.3), (5, 3.0, 0.9), (12, 5.0, 0.7)])
def test_scores_equal_a_dense_solve(k: int, gamma: float, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_PHOTOS_AT_ONCE", 16)  # several blocks, the last one short
    monkeypatch.setattr(baselines, "_CLASSES_AT_ONCE", 4)
    generator = np.random.default_rng(0)
    images, texts = unit_rows(generator.normal(size=(50, 6)) + 0.4), unit_rows(generator.normal(size=(7, 6)) + 0.2)
    train, test = (images[:40], images[:40] @ texts.T), (images[40:], images[40:] @ texts.T)
    fit = one(*train, k, gamma, alpha)
    found = fit.scores(*test)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, dense_scores(train, test, k, gamma, alpha), rtol=1e-4, atol=1e-6)


def clusters(num_photos: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photos of three tight clusters; their similarities to texts are right on average, but noisy."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(3, size=num_photos)
    images = unit_rows(np.eye(3, 16)[labels] + 0.05 * generator.normal(size=(num_photos, 16)))
    image_text = 0.3 + 0.1 * np.eye(3)[labels] + 0.1 * generator.normal(size=(num_photos, 3))
    return images, image_text.astype(np.float32), labels


def test_propagation_corrects_what_texts_say_of_single_photos() -> None:
    images, image_text, _ = clusters(300, seed=0)
    validation, validation_text, answers = clusters(100, seed=1)
    test, test_text, labels = clusters(200, seed=2)

    def judge(fit: LabelPropagation) -> float:
        return float((fit.scores(validation, validation_text).argmax(axis=1) == answers).mean())

    fit = fit_zlap(images, image_text, judge)
    assert (test_text.argmax(axis=1) == labels).mean() < 0.75
    assert (fit.scores(test, test_text).argmax(axis=1) == labels).mean() > 0.95
    contrary = np.roll(np.eye(3, dtype=np.float32), 1, axis=1)[labels] * 0.01 + 0.3
    assert (contrary.argmax(axis=1) == labels).mean() == 0
    assert (fit.scores(test, contrary).argmax(axis=1) == labels).mean() > 0.95


def test_every_candidate_is_judged_once_and_the_best_is_taken() -> None:
    images, image_text, _ = clusters(60, seed=0)
    seen: list[tuple[int, float, float]] = []

    def judge(fit: LabelPropagation) -> float:
        seen.append((fit.k, fit.gamma, fit.alpha))
        return float(seen[-1] == (10, 5.0, 0.3))

    fit = fit_zlap(images, image_text, judge)
    assert (fit.k, fit.gamma, fit.alpha) == (10, 5.0, 0.3)
    assert seen == list(product(baselines.NEIGHBOURS, baselines.GAMMAS, baselines.ALPHAS))


def test_answers_do_not_depend_on_what_was_asked_before() -> None:
    images, image_text, _ = clusters(60, seed=0)
    fit = one(images, image_text, 5, 3.0, 0.7)
    first, text, _ = clusters(20, seed=1)
    second, other_text, _ = clusters(20, seed=2)
    expected = fit.scores(first, text)
    fit.scores(second, other_text)
    np.testing.assert_array_equal(fit.scores(first, text), expected)
    np.testing.assert_array_equal(fit.scores(first[:7], text[:7]), expected[:7])


def test_a_photo_without_edges_is_of_no_class() -> None:
    images, image_text, _ = clusters(60, seed=0)
    fit = one(images, image_text, 5, 3.0, 0.7)
    far = np.zeros((1, 16), np.float32)
    far[0, :3] = -1 / np.sqrt(3)
    np.testing.assert_allclose(fit.scores(far, -np.ones((1, 3), np.float32)), 1 / np.sqrt(3), rtol=1e-5)
    image_text[:, 2] = -1  # a text without edges
    scores = one(images, image_text, 5, 3.0, 0.7).scores(images, image_text)
    assert np.isfinite(scores).all()
    assert (scores[:, 2] == 0).all()


def test_too_few_photos_are_refused() -> None:
    images, image_text, _ = clusters(20, seed=0)
    with pytest.raises(ValueError, match="k=20 with 20 training items"):
        fit_zlap(images, image_text, lambda fit: 0.0)


def test_conjugate_gradients_converge_at_every_default_alpha() -> None:
    images, image_text, _ = clusters(400, seed=0)
    for alpha in baselines.ALPHAS:
        fit = one(images, image_text, 5, 3.0, alpha)
        more = torch.from_numpy(fit.spread).double()
        found, weights = fit.search.find(fit.search.images, 5, is_training=True)
        graph = baselines._graph(found, weights, baselines._text_weights(image_text.clip(0), 5, 3.0))
        residual = more - alpha * (graph @ more) - torch.eye(403, 3, dtype=torch.float64)
        assert float(residual.abs().max()) < 1e-5
