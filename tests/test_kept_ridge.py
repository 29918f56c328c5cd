"""The ridge regression that a run keeps is the baseline of its evaluation, and embeds new photos as it does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from quick_runs import report_of, setting_of
from test_trained_fusion import World, trained, world

from saffe_cache.inference.model import load_run
from saffe_cache.inputs.feature_loader import summaries
from saffe_cache.inputs.pairs import mean_text_rows, same_training_pairs
from saffe_cache.protocols.registry import load_protocol
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.store.reader import open_cache
from saffe_cache.training.runs import BLOCKS, RIDGE, kept_ridge, open_run

__all__ = ["world"]


@pytest.fixture(scope="module", params=["linear", "reuse", "two_tower", "reference"])
def run(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(world, tmp_path_factory.mktemp("run") / "run", request.param)


def test_kept_ridge_is_the_closed_form(run: str, world: World) -> None:
    ridge = kept_ridge(Path(run))
    assert ridge is not None
    cache = open_cache(world.cache)
    spec = open_run(run, cache)[0]
    pairs, _ = same_training_pairs(spec, cache, run)
    photos, texts = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
    features = summaries(photos, pairs.rows, spec.gallery_layers).astype(np.float64)
    targets = mean_text_rows(pairs, texts).whole.astype(np.float64)
    own, others = features - features.mean(axis=0), targets - targets.mean(axis=0)
    penalty = ridge.strength * len(own) * np.eye(own.shape[1])
    weight = np.linalg.solve(own.T @ own + penalty, own.T @ others).T
    np.testing.assert_allclose(ridge.weight, weight, atol=1e-4 * np.abs(weight).max())
    np.testing.assert_allclose(ridge.bias, targets.mean(axis=0) - weight @ features.mean(axis=0), atol=1e-4)


def test_what_another_run_left_is_not_used(world: World, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in (RIDGE, BLOCKS, "state.safetensors"):
        (tmp_path / "run" / name).write_bytes(b"of another run, whose config.json was removed")
    run = Path(trained(world, tmp_path / "run", "linear"))
    assert kept_ridge(run) is not None
    assert not (run / BLOCKS).exists()


@pytest.mark.slow
def test_kept_ridge_scores_as_in_the_evaluation(run: str, world: World) -> None:
    report = report_of(world.cache, run, split="test", baselines="linear", baseline_layers="run", protocol="caption")
    ridge = kept_ridge(Path(run))
    assert ridge is not None
    setting, _ = setting_of(world.cache, run, "captions")
    protocol = load_protocol("caption")(setting)
    gallery = unit_rows(ridge(summaries(setting.inputs.gallery, setting.pairs.rows, setting.spec.gallery_layers)))
    scores = protocol.score_vectors(gallery, unit_rows(protocol.queries.vectors))
    expected = {name: score["value"] for name, score in report["systems"]["ridge"].items()}
    assert {name: score.value for name, score in scores.items()} == pytest.approx(expected, abs=1e-9)


def test_new_photos_are_embedded_by_both_at_once(run: str, world: World) -> None:
    fusion, ridge = load_run(run, device="cpu"), kept_ridge(Path(run))
    assert ridge is not None
    paths = sorted((world.photos / "test").glob("*.png"))
    if fusion.spec.shape.fusion != "reference":  # which draws random numbers
        np.testing.assert_array_equal(fusion.embed_with_ridge(paths)[0], fusion.embed_images(paths))
    setting, _ = setting_of(world.cache, run, "captions")
    places = [setting.pairs.ids.index(f"test/{path.name}") for path in paths]
    rows = setting.pairs.rows[places]
    expected = unit_rows(ridge(summaries(setting.inputs.gallery, rows, setting.spec.gallery_layers)))
    np.testing.assert_allclose(fusion.embed_with_ridge(paths)[1], expected, atol=1e-5)
    assert fusion.embed_with_ridge([])[1].shape == (0, len(ridge.bias))


def test_runs_without_a_ridge_say_so(world: World, tmp_path: Path) -> None:
    run = Path(trained(world, tmp_path / "run", "linear"))
    content = (run / RIDGE).read_bytes()
    (run / RIDGE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"ridge.safetensors: damaged \(.*\). Train again"):
        kept_ridge(run)
    (run / RIDGE).unlink()
    with pytest.raises(ValueError, match=r"holds no ridge regression\. Train it again"):
        load_run(run, device="cpu").embed_with_ridge([world.photos / "test" / "0.png"])


def test_a_text_moves_the_fusion_and_not_the_ridge(world: World, tmp_path: Path) -> None:
    fusion = load_run(trained(world, tmp_path / "run", "reuse", gallery_text="first_caption"), device="cpu")
    photo = world.photos / "test" / "0.png"
    first, second = (fusion.embed_with_ridge([photo], [text]) for text in ("word1 word9", "word3 word20"))
    assert not np.allclose(first[0], second[0], atol=1e-4)
    np.testing.assert_array_equal(first[1], second[1])
