"""Every fusion for composed queries, trained and evaluated on a small cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from composed_cache import make_composed
from quick_runs import quick_train, report_of, value

from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.store.reader import open_cache
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.runs import open_run

COMPOSED = [name for name, entry in FUSIONS.items() if entry.for_composed]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_composed(tmp_path_factory.mktemp("composed") / "cache.zarr", {"train": 100, "dev": 60}, captions=True)


@pytest.mark.parametrize("fusion", COMPOSED)
def test_training_lowers_the_loss(fusion: str, path: str, tmp_path: Path) -> None:
    options = {"gallery_photos": 40, "learning_rate": 2e-3, "layers": {"image": (1, 2)}, "control_epochs": 0}
    run = quick_train(path, tmp_path / "run", fusion=fusion, epochs=4, batch_size=25, **options)
    lines = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines[1:]]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_auto_is_compose_where_queries_train(path: str, tmp_path: Path) -> None:
    config = TrainConfig(cache=path, out=str(tmp_path / "run"), device="cpu")
    assert resolve_run(config, open_cache(path)).shape.fusion == "compose"
    assert config.chosen_fusion == "linear"  # as long as the cache is not known


def test_compose_keeps_the_training_photos_moments(path: str, tmp_path: Path) -> None:
    run = quick_train(path, tmp_path / "run", fusion="compose", epochs=0, control_epochs=0, layers={"image": (1, 2)})
    cache = open_cache(path)
    _, model, _ = open_run(Path(run), cache)
    photos = cache.table.rows["image"][cache.table.in_split("train")]
    states = [torch.from_numpy(cache.encoder("image").tokens(photos, (layer,)).states[0]).float() for layer in (1, 2)]
    found = model.summaries(states, None)
    torch.testing.assert_close(model.mean, found.mean(dim=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.deviation, found.std(dim=0, correction=0) + 1e-3, atol=1e-4, rtol=1e-4)


def test_artemis_is_evaluated_by_scores_of_its_own(path: str, tmp_path: Path) -> None:
    run = quick_train(path, tmp_path / "run", fusion="artemis", epochs=6, batch_size=25, layers={"image": (1,)})
    report = report_of(path, run, split="dev")
    best = json.loads(Path(run, "result.json").read_text())["best_validation_score"]
    assert value(report, "map") == pytest.approx(best, abs=1e-5)
    assert report["protocol"] == "composed"
