"""Training from a synthetic cache: it learns, resumes exactly, splits by photo, and refuses what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_cache import LAYERS, make_cache

from saffe_cache import fitting
from saffe_cache.checkpoints import TrainingState
from saffe_cache.features import CacheError
from saffe_cache.pairs import hold_out, mean_text_vectors, select_pairs, summaries, unit_rows
from saffe_cache.retrieval.baselines import LinearMap, fit_ridge
from saffe_cache.retrieval.protocols import caption_scores
from saffe_cache.runs import load_run, same_training_pairs, training_pairs
from saffe_cache.store.reader import open_cache
from saffe_cache.train import TrainConfig, resolve_run, train


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(tmp_path_factory.mktemp("train") / "cache.zarr", {"train": 120, "test": 30})


def config_for(cache: str, out: Path, **changes: object) -> TrainConfig:
    quick = TrainConfig(cache=cache, out=str(out), epochs=6, batch_size=32, tensorboard=False, device="cpu")
    return replace(quick, **changes)  # type: ignore[arg-type]


def result_of(out: Path) -> dict[str, float]:
    return json.loads((out / "result.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("fusion", ["linear", "decoder"])
@pytest.mark.parametrize("head", ["attention", "mean", "flatten"])
def test_every_fusion_and_head_learns(cache_path: str, tmp_path: Path, fusion: str, head: str) -> None:
    train(config_for(cache_path, tmp_path, fusion=fusion, head=head, epochs=15))
    chance = (1 / np.arange(1, 13)).sum() / 12
    assert result_of(tmp_path)["best_validation_score"] > 1.5 * chance


def test_nothing_is_learned_without_a_signal(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache.zarr", {"train": 400, "dev": 200}, signal=0.0)
    train(config_for(cache, tmp_path / "run"))
    chance = (1 / np.arange(1, 201)).sum() / 200
    assert result_of(tmp_path / "run")["best_validation_score"] < chance + 0.02


@pytest.mark.parametrize("fusion", ["linear", "decoder"])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    cache_path: str, tmp_path: Path, fusion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of an epoch, three times."""
    train(config_for(cache_path, tmp_path / "whole", fusion=fusion))
    config = config_for(cache_path, tmp_path / "killed", fusion=fusion, checkpoint_seconds=0.0)
    step = fitting._step
    for last in (1, 5, 10):

        def dying_step(options: object, state: TrainingState, *rest: object, last: int = last) -> float:
            if state.step == last:
                raise KeyboardInterrupt
            return step(options, state, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(fitting, "_step", dying_step)
        with pytest.raises(KeyboardInterrupt):
            train(config)
        assert (tmp_path / "killed" / "state.safetensors").exists()
    monkeypatch.setattr(fitting, "_step", step)
    train(config)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    logs = [[json.loads(line) for line in (run / "log.jsonl").open()] for run in (whole, killed)]
    for name in ("step", "epoch", "loss", "validation_score", "temperature"):
        assert [line[name] for line in logs[0]] == [line[name] for line in logs[1]]
    assert not (killed / "state.safetensors").exists()


def test_finished_run_is_left_alone_and_another_config_is_refused(cache_path: str, tmp_path: Path) -> None:
    config = config_for(cache_path, tmp_path, epochs=1)
    train(config)
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    train(config)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"learning_rate: 0\.002 there, 0\.5 now"):
        train(replace(config, learning_rate=0.5))


def test_seed_decides_everything(cache_path: str, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(config_for(cache_path, tmp_path / name, seed=seed, epochs=1))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_validation_is_held_out_by_photo_unless_a_dev_split_exists(cache_path: str, tmp_path: Path) -> None:
    cache = open_cache(cache_path)
    spec = resolve_run(config_for(cache_path, tmp_path), cache)
    assert spec.validation == "heldout"
    training, validation, _ = training_pairs(spec, cache)
    assert not set(training.rows) & set(validation.rows)
    assert not set(training.texts.values) & set(validation.texts.values)
    assert len(validation) == 12
    with_dev = make_cache(tmp_path / "dev.zarr", {"train": 40, "dev": 10})
    assert resolve_run(config_for(with_dev, tmp_path), open_cache(with_dev)).validation == "dev"


def test_held_out_photos_stay_held_out_as_the_data_grow(cache_path: str) -> None:
    cache = open_cache(cache_path)
    gallery, text = cache.encoder("image"), cache.encoder("text")
    pairs = select_pairs(cache.table, gallery, text, "train", "captions")
    hashes = cache.table.inputs["image"].content_hash
    _, of_all = hold_out(pairs, 0.2, 0, hashes)
    _, of_half = hold_out(pairs.take(np.arange(60)), 0.2, 0, hashes)
    order_of_half = [row for row in of_half.rows if row in of_all.rows]
    assert len(order_of_half) >= len(of_half) // 2
    assert set(of_half.rows) != set(hold_out(pairs.take(np.arange(60)), 0.2, 1, hashes)[1].rows)


def test_photos_that_other_splits_share_are_not_trained_on(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache.zarr", {"train": 60, "test": 20}, shared=7)
    cache = open_cache(path)
    training, validation, shared = training_pairs(resolve_run(config_for(path, tmp_path), cache), cache)
    tested = select_pairs(cache.table, cache.encoder("image"), cache.encoder("text"), "test", "captions")
    assert shared == 7
    assert not {*training.rows, *validation.rows} & set(tested.rows)


def test_classes_train_with_several_photos_for_a_text(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache.zarr", {"train": 90, "test": 30}, classes=3)
    train(config_for(path, tmp_path / "run"))
    assert result_of(tmp_path / "run")["validation_score"] == "map"
    assert result_of(tmp_path / "run")["best_validation_score"] > 0.8


def test_decoder_takes_only_layers_with_a_block(cache_path: str, tmp_path: Path) -> None:
    spec = resolve_run(config_for(cache_path, tmp_path, fusion="decoder"), open_cache(cache_path))
    assert spec.gallery_layers == (2,)
    with pytest.raises(CacheError, match=r"can use layers \[2\] \(a decoder needs the block"):
        resolve_run(
            config_for(cache_path, tmp_path, fusion="decoder", layers={"image": (LAYERS,)}), open_cache(cache_path)
        )


def test_differing_widths_are_projected(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache.zarr", {"train": 40}, text_width=8)
    train(config_for(path, tmp_path / "run", fusion="decoder", epochs=1))
    _, model, _ = load_run(tmp_path / "run", open_cache(path))
    assert isinstance(model.decoders[0].cross_attention.context_projection, torch.nn.Linear)


def test_the_attention_head_starts_as_the_ridge_and_is_never_worse_on_validation(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache.zarr", {"train": 60, "dev": 40})
    train(config_for(path, tmp_path / "run", learning_rate=1.0))  # it diverges
    cache = open_cache(path)
    gallery, text = cache.encoder("image"), cache.encoder("text")
    pairs = {split: select_pairs(cache.table, gallery, text, split, "captions") for split in ("train", "dev")}
    features = {split: summaries(gallery, of_split.rows, (2, 3)) for split, of_split in pairs.items()}
    owners = np.repeat(np.arange(40), 2)
    queries = unit_rows(text.vectors(pairs["dev"].texts.values))

    def judge(fit: LinearMap) -> float:
        return caption_scores(unit_rows(fit(features["dev"])), queries, owners, intervals=False)["mrr"].value

    ridge = judge(fit_ridge(features["train"], mean_text_vectors(pairs["train"], text), judge))
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["epoch"] == 0
    assert first["validation_score"] == pytest.approx(ridge, abs=1e-6)
    assert result_of(tmp_path / "run")["best_validation_score"] >= first["validation_score"]


def test_only_what_null_text_reaches_counts_as_trainable(cache_path: str, tmp_path: Path) -> None:
    train(config_for(cache_path, tmp_path, fusion="decoder", epochs=1))
    _, model, _ = load_run(tmp_path, open_cache(cache_path))
    model.freeze_text_path()
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert result_of(tmp_path)["trainable_parameters"] == trainable
    photos = model([torch.randn(4, 5, 16)])
    (photos.sum() + model.encode_queries(torch.randn(4, 12)).sum()).backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []


def test_cache_that_grew_or_is_another_one_is_refused(cache_path: str, tmp_path: Path) -> None:
    config = config_for(cache_path, tmp_path / "run", epochs=1)
    train(config)
    spec, _, _ = load_run(tmp_path / "run", open_cache(cache_path))
    same_training_pairs(spec, open_cache(cache_path), "run")
    other = make_cache(tmp_path / "other.zarr", {"train": 130, "test": 30})
    with pytest.raises(ValueError, match="trained on other photos or texts"):
        same_training_pairs(spec, open_cache(other), "run")
    with pytest.raises(ValueError, match="holds another run"):
        train(replace(config, cache=other))


def test_all_photos_in_another_split_too(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache.zarr", {"train": 20, "test": 30}, shared=20)
    with pytest.raises(ValueError, match="all of its 20 photos stand in other splits too"):
        train(config_for(path, tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs: found 0, expected a number above 0"),
        ({"validation": "train"}, "--validation: found train, expected another split"),
        ({"layers": {"img": (3,)}}, "--layers: found img=…, expected image=… or"),
        ({"layers": {"image": (3, 3)}}, "each layer once"),
        ({"warmup": 2.0}, "--warmup: found 2.0, expected a fraction"),
        ({"device": "gpu"}, "--device gpu: torch cannot use it"),
    ],
)
def test_wrong_options_are_named(cache_path: str, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(config_for(cache_path, tmp_path, **changes))


def test_run_of_another_cache_is_refused(cache_path: str, tmp_path: Path) -> None:
    train(config_for(cache_path, tmp_path / "run", epochs=1))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["run"]["gallery_key"] = "image-other-000000000000"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trained on image-other"):
        load_run(tmp_path / "run", open_cache(cache_path))


def test_too_little_data_is_an_error(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache.zarr", {"train": 1})
    with pytest.raises(ValueError, match="too few"):
        train(config_for(path, tmp_path / "run"))
