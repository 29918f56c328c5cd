"""The MLP baseline: what it can learn that a linear map cannot, and what lies beside the photos."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawn import unit_rows

from saffe_cache.core.items import Ragged
from saffe_cache.retrieval import fitting
from saffe_cache.retrieval.baselines import fit_ridge
from saffe_cache.retrieval.fitting import MlpFit, fit_mlp

SIZE = 8


def products(num_photos: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features whose first two signs decide the class, as their product: no linear map tells it."""
    generator = np.random.default_rng(seed)
    signs = generator.choice([-1, 1], size=(num_photos, 6))
    features = signs * 5 + generator.normal(size=signs.shape) + 30
    return features.astype(np.float32), (signs[:, 0] * signs[:, 1] > 0).astype(np.int64)


CLASSES = unit_rows(np.random.default_rng(7).normal(size=(2, SIZE)))


def accuracy(photos: np.ndarray, queries: np.ndarray, labels: np.ndarray) -> float:
    return float(((photos @ queries.T).argmax(axis=1) == labels).mean())


def fit_products(seed: int = 0, epochs: int = 15) -> MlpFit:
    features, labels = products(600, seed=1)
    validation, answers = products(200, seed=2)

    def judge(fit: MlpFit) -> float:
        return accuracy(fit.gallery(validation), fit.queries(CLASSES), answers)

    return fit_mlp(
        features, CLASSES, Ragged.from_rows(labels[:, None]), judge, epochs=epochs, dropouts=(0.0,), seed=seed
    )


def test_mlp_learns_what_ridge_cannot() -> None:
    features, labels = products(600, seed=1)
    test, answers = products(300, seed=3)
    fit = fit_products()
    ridge = fit_ridge(features, CLASSES[labels], judge=lambda fit: 0.0, strengths=(1e-3,))
    assert accuracy(ridge(test), CLASSES, answers) < 0.6
    assert accuracy(fit.gallery(test), fit.queries(CLASSES), answers) > 0.95


def test_mlp_gives_unit_vectors_in_float32() -> None:
    fit = fit_products(epochs=1)
    for vectors in (fit.gallery(products(9, seed=4)[0]), fit.queries(CLASSES * 3)):
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_a_fit_is_applied_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner activations are bounded, and each row has its own vector, the last block's too."""
    fit, features = fit_products(epochs=1), products(10, seed=4)[0]
    texts = unit_rows(np.random.default_rng(1).normal(size=(10, SIZE)))
    photos, queries = fit.gallery(features), fit.queries(texts)
    seen: list[int] = []
    fit.model.mlp[1].register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    monkeypatch.setattr(fitting, "ROWS_AT_ONCE", 4)
    np.testing.assert_allclose(fit.gallery(features), photos, atol=1e-6)
    np.testing.assert_allclose(fit.queries(texts), queries, atol=1e-6)
    assert seen == [4, 4, 2]


def test_mlp_follows_from_its_seed_alone() -> None:
    features, _ = products(50, seed=3)
    first = fit_products(epochs=3).gallery(features)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    np.testing.assert_array_equal(fit_products(epochs=3).gallery(features), first)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers were touched"
    assert np.abs(fit_products(seed=1, epochs=3).gallery(features) - first).max() > 1e-2


def test_mlp_returns_the_weights_that_the_judge_liked_best() -> None:
    features, labels = products(300, seed=1)
    seen: list[tuple[float, int]] = []
    galleries: list[np.ndarray] = []

    def judge(fit: MlpFit) -> float:
        seen.append((fit.dropout, fit.epoch))
        galleries.append(fit.gallery(features))
        return 1.0 if (fit.dropout, fit.epoch) == (0.3, 2) else 0.0

    best = fit_mlp(features, CLASSES, Ragged.from_rows(labels[:, None]), judge, epochs=4, dropouts=(0.1, 0.3))
    assert (best.dropout, best.epoch) == (0.3, 2)
    assert seen == [(dropout, epoch) for dropout in (0.1, 0.3) for epoch in range(5)]
    np.testing.assert_array_equal(best.gallery(features), galleries[seen.index((0.3, 2))])
    assert np.abs(galleries[-1] - best.gallery(features)).max() > 1e-3, "training went on after the best epoch"


def test_mlp_stops_early() -> None:
    features, labels = products(300, seed=1)
    epochs: list[int] = []

    def judge(fit: MlpFit) -> float:
        epochs.append(fit.epoch)
        return -float(fit.epoch)

    fit = fit_mlp(features, CLASSES, Ragged.from_rows(labels[:, None]), judge, epochs=50, dropouts=(0.2,))
    assert fit.epoch == 0
    assert len(epochs) < 10


def notes(num_photos: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Ragged]:
    """A caption is the sum of what the photo shows, what the note beside it says, and some noise."""
    generator = np.random.default_rng(seed)
    shown, said = generator.normal(size=(2, num_photos, SIZE))
    mixing = np.random.default_rng(99).normal(size=(SIZE, 12))
    captions = unit_rows(shown + said + 0.2 * generator.normal(size=shown.shape))
    positives = Ragged.from_rows([[photo] for photo in range(num_photos)])
    return (shown @ mixing).astype(np.float32), unit_rows(said), captions, positives


@pytest.mark.slow
def test_concatenation_uses_photo_and_text() -> None:
    features, beside, captions, positives = notes(600, seed=0)
    validation, validation_beside, queries, _ = notes(150, seed=1)
    owners = np.arange(150)

    def recall(fit: MlpFit, features: np.ndarray, beside: np.ndarray | None) -> float:
        return accuracy(fit.queries(queries), fit.gallery(features, beside), owners)

    epochs: list[float] = []

    def judge(fit: MlpFit) -> float:
        epochs.append(recall(fit, validation, validation_beside))
        return epochs[-1]

    both = fit_mlp(features, captions, positives, judge, paired_texts=beside, epochs=12, dropouts=(0.1,))
    alone = fit_mlp(
        features, captions, positives, lambda fit: recall(fit, validation, None), epochs=12, dropouts=(0.1,)
    )
    found = recall(both, validation, validation_beside)
    assert epochs[0] == accuracy(queries, validation_beside, owners), "epoch 0 is the text alone"
    assert found > 2 * epochs[0]
    assert found > 2 * recall(alone, validation, None)
    shuffled = np.random.default_rng(0).permutation(150)
    assert recall(both, validation[shuffled], validation_beside) < found / 2
    assert recall(both, validation, validation_beside[shuffled]) < found / 2


def test_text_beside_is_not_forgotten() -> None:
    features, beside, captions, positives = notes(64, seed=0)
    both = fit_mlp(features, captions, positives, lambda fit: 0.0, paired_texts=beside, epochs=1, dropouts=(0.1,))
    with pytest.raises(ValueError, match="no paired text"):
        both.gallery(features)
    with pytest.raises(ValueError, match="fitted with none"):
        fit_products(epochs=1).gallery(products(5, seed=1)[0], beside[:5])
