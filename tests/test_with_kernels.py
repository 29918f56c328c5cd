"""The kernel ridge regressions beside `linear`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from quick_runs import quick_train, report_of, setting_of, value
from synthetic_cache import make_cache

from saffe_cache.fusion.with_kernels import WithKernels
from saffe_cache.inference.model import load_run
from saffe_cache.inputs.feature_loader import encode_gallery, encode_queries
from saffe_cache.inputs.pairs import training_pairs
from saffe_cache.training import starting


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(tmp_path_factory.mktemp("kernels") / "c.zarr", {"train": 120, "test": 40}, signal=0.5)


def test_it_is_kept_where_it_helps_and_survives_loading(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = quick_train(cache, tmp_path / "both", fusion="linear", epochs=1)
    setting, model = setting_of(cache, run, "captions")
    assert isinstance(model, WithKernels)
    assert model.kernels is not None
    gallery = encode_gallery(model, setting.inputs, setting.pairs.rows)
    assert gallery.shape[1] > model.shape.text_size
    np.testing.assert_allclose(np.linalg.norm(gallery, axis=1), 1, atol=1e-5)
    queries = encode_queries(model, setting.inputs.text.vectors(setting.pairs.texts.values))
    assert queries.shape[1] == gallery.shape[1] == load_run(run, device="cpu").size
    monkeypatch.setattr(starting, "_KERNEL_WEIGHTS", (0.0,))
    alone = quick_train(cache, tmp_path / "alone", fusion="linear", epochs=1)
    _, without = setting_of(cache, alone, "captions")
    assert isinstance(without, WithKernels)
    assert without.kernels is None
    own = encode_gallery(without, setting.inputs, setting.pairs.rows)
    weight = float(model.kernels.weight)
    np.testing.assert_allclose(gallery[:, : own.shape[1]], np.sqrt(1 - weight) * own, atol=1e-5)
    run = quick_train(cache, tmp_path / "kernels", fusion="kernel_ridge", epochs=None, batch_size=None)
    of_kernels, kernels = setting_of(cache, run, "captions")
    others = encode_gallery(kernels, of_kernels.inputs, setting.pairs.rows)
    np.testing.assert_allclose(gallery[:, own.shape[1] :], np.sqrt(weight) * others, atol=1e-5)


def test_its_weight_searches_best_with_and_without_correction(cache: str, tmp_path: Path) -> None:
    run = quick_train(cache, tmp_path / "run", fusion="linear", epochs=1)
    setting, model = setting_of(cache, run, "captions")
    assert isinstance(model, WithKernels)
    assert model.kernels is not None
    inputs, chosen = setting.inputs, float(model.kernels.weight)
    training, validation, _ = training_pairs(inputs.spec, inputs.cache)
    bank = inputs.text.vectors(np.unique(training.texts.values))
    scores = []
    for weight in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        model.kernels.weight.fill_(weight)
        gallery = encode_gallery(model, inputs, validation.rows)
        queries = encode_queries(model, inputs.text.vectors(validation.texts.values))
        nearest = np.sort(gallery @ encode_queries(model, bank).T, axis=1)[:, -10:]
        products = gallery @ queries.T
        mrr = []
        for corrected in (products, products - 0.5 * nearest.mean(axis=1, keepdims=True)):
            own = corrected[validation.owners, np.arange(len(queries))]
            mrr.append((1 / (corrected >= own).sum(axis=0)).mean())
        scores.append((np.mean(mrr), weight))
    assert max(scores)[0] - {weight: score for score, weight in scores}[round(chosen, 1)] < 1e-6


def test_controls_hold_with_both(cache: str, tmp_path: Path) -> None:
    report = report_of(cache, quick_train(cache, tmp_path / "run", fusion="linear", epochs=1), split="test")
    assert report["status"] == 0
    assert value(report, "mrr") > 1.3 * value(report, "mrr", "pairs_permuted")


def test_paired_texts_leave_it_out(cache: str, tmp_path: Path) -> None:
    run = quick_train(cache, tmp_path / "run", fusion="linear", epochs=1, gallery_text="first_caption")
    _, model = setting_of(cache, run, "captions", paired_texts=True)
    assert isinstance(model, WithKernels)
    assert model.kernels is None
