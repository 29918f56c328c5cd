"""Training from a synthetic cache: it learns, resumes exactly, splits by photo, and refuses what does not fit."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quick_runs import quick_train, report_of, value
from safetensors.torch import load_file
from synthetic_cache import LAYERS, WIDTH, make_cache

from saffe_cache.core.atomic_io import LOCK_NAME, FolderInUseError, hold_folder
from saffe_cache.core.features import CacheError
from saffe_cache.core.outputs import read_json
from saffe_cache.evaluation.evaluate import EvaluateConfig, evaluate
from saffe_cache.evaluation.results import EvaluationResult
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.inputs.feature_loader import FeatureLoader, summaries
from saffe_cache.inputs.pairs import (
    hold_out,
    mean_text_rows,
    same_training_pairs,
    select_pairs,
    training_pairs,
)
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.protocols.registry import load_protocol, own_protocol
from saffe_cache.protocols.setting import Setting
from saffe_cache.retrieval.baselines import LinearMap, fit_ridge, unit_rows
from saffe_cache.retrieval.scores import caption_scores
from saffe_cache.store.reader import open_cache
from saffe_cache.training import batches
from saffe_cache.training import loop as fitting
from saffe_cache.training import train as train_module
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.loop import TrainingState
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.result import TrainResult
from saffe_cache.training.runs import load_permuted, open_run
from saffe_cache.training.train import train


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(tmp_path_factory.mktemp("train") / "cache.zarr", {"train": 120, "test": 30})


@pytest.fixture(scope="module")
def notes_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Captions that tell of the photo and of a note, which is the first caption; encoders of equal width."""
    path = tmp_path_factory.mktemp("train") / "notes.zarr"
    return make_cache(path, {"train": 120, "dev": 40}, captions=3, text_width=WIDTH, joint=True)


@pytest.fixture(scope="module")
def deep_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with a layer more, and encoders of other widths."""
    path = tmp_path_factory.mktemp("train") / "deep.zarr"
    return make_cache(path, {"train": 120, "dev": 40}, captions=3, joint=True, deep=True)


@pytest.fixture(scope="module")
def classes_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(tmp_path_factory.mktemp("train") / "classes.zarr", {"train": 90, "test": 30}, classes=3)


def config_for(cache: str, out: Path, **changes: object) -> TrainConfig:
    """A quick run, without its control."""
    given: dict[str, Any] = {"epochs": 6, "batch_size": 32, "log": ("none",), "device": "cpu", "control_epochs": 0}
    return TrainConfig(cache=cache, out=str(out), **(given | changes))


def mrr_by_chance(num: int) -> float:
    return float((1 / np.arange(1, num + 1)).sum() / num)


def logged_scores(out: Path) -> list[float]:
    """Of each epoch; the first one is before any step."""
    return [json.loads(line)["validation_score"] for line in (out / "log.jsonl").open()]


def result_of(out: Path) -> dict[str, float]:
    return json.loads((out / "result.json").read_text())  # type: ignore[no-any-return]


LEARNING = [
    {"fusion": "linear", "head": "attention"},
    {"fusion": "linear", "head": "mean"},
    {"fusion": "linear", "head": "flatten"},
    {"fusion": "reuse", "head": "attention"},
    {"fusion": "reuse", "head": "mean"},
    {"fusion": "reuse", "head": "flatten"},
    {"fusion": "reuse", "query_side": "text"},
    {"fusion": "paper", "head": "attention"},
    {"fusion": "paper", "head": "mean", "share_decoder": True},
    {"fusion": "paper", "head": "flatten", "freeze_decoder": True},
    {"fusion": "paper", "query_side": "text"},
    {"fusion": "reuse", "objective": {"siglip": 1.0}},
]


def first_quick(cases: list[dict[str, Any]]) -> list[Any]:
    """The first case of each fusion as it is, the others marked as slow."""
    firsts = {case["fusion"]: number for number, case in reversed(list(enumerate(cases)))}
    return [
        case if firsts[case["fusion"]] == number else pytest.param(case, marks=pytest.mark.slow)
        for number, case in enumerate(cases)
    ]


def name_of(changes: dict[str, Any]) -> str:
    return "-".join(str(value) if isinstance(value, str) else name for name, value in changes.items())


@pytest.mark.parametrize("changes", first_quick(LEARNING), ids=name_of)
def test_every_fusion_and_head_learns(cache_path: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    """To find a photo by its caption, with nothing beside it."""
    train(config_for(cache_path, tmp_path, epochs=15, **changes))
    assert result_of(tmp_path)["best_validation_score"] > 1.5 * mrr_by_chance(12)


RUNNING: list[dict[str, Any]] = [
    *({"fusion": fusion, "gallery_text": "first_caption"} for fusion in ("linear", "concat", "reuse", "paper")),
    *({"fusion": fusion, "gallery_text": "matched"} for fusion in ("linear", "concat", "reuse", "paper")),
    *(
        {"fusion": fusion, "query_side": "text", "gallery_text": beside}
        for fusion in ("reuse", "paper", "reference")
        for beside in ("null", "first_caption", "matched")
        if (fusion, beside) != ("paper", "null")
    ),
    {"fusion": "reference", "gallery_text": "null"},
    {"fusion": "reference", "gallery_text": "first_caption", "share_decoder": False},
    {"fusion": "linear", "head": "flatten", "gallery_text": "first_caption"},
    {"fusion": "reuse", "head": "mean", "gallery_text": "first_caption", "text_dropout": 0.5},
    {"fusion": "reuse", "head": "mean", "query_side": "text", "gallery_text": "first_caption"},
    {"fusion": "reuse", "gallery_text": "first_caption", "pooled_text": False},
    {"fusion": "paper", "gallery_text": "first_caption", "pooled_text": True, "share_decoder": True},
    {"fusion": "reuse", "freeze_decoder": True, "gallery_text": "first_caption"},
    {"fusion": "reuse", "objective": {"pair": 1.0, "matching": 0.5}},
    {"fusion": "reuse", "query_side": "text", "objective": {"info_nce": 1.0, "pair": 1.0, "matching": 1.0}},
    {"fusion": "paper", "head": "mean", "objective": {"soft_target": 1.0, "pair": 1.0}},
    {"fusion": "concat", "objective": {"matching": 1.0}},
    {"fusion": "linear", "pooled_text": True, "objective": {"info_nce": 1.0, "pair": 1.0}},
    *(
        {"fusion": fusion, "gallery_text": beside}
        for fusion in FUSIONS
        if "head" not in FUSIONS[fusion].options
        and not FUSIONS[fusion].is_closed_form
        and not FUSIONS[fusion].is_special
        for beside in ("null", "first_caption")
        if (fusion, beside) != ("hadamard", "null")
    ),
    {"fusion": "hadamard", "objective": {"info_nce": 1.0, "pair": 1.0}},
    {"fusion": "albef", "gallery_text": "first_caption", "objective": {"pair": 1.0, "info_nce": 1.0}},
]


@pytest.mark.parametrize("changes", first_quick(RUNNING), ids=name_of)
def test_every_combination_runs(notes_path: str, deep_path: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    """One epoch; its loss is finite, and the best weights load and are as good as they were."""
    if changes["fusion"] == "reference" and changes.get("query_side") == "text":
        changes = {"head": "attention", **changes}
    if changes["fusion"] == "fusemix" and changes.get("gallery_text", "null") != "null":
        changes = {"mixup": 0.0, **changes}
    path = notes_path if "head" in FUSIONS[changes["fusion"]].options else deep_path
    train(config_for(path, tmp_path, epochs=1, **changes))
    cache = open_cache(path)
    spec, model, result = open_run(tmp_path, cache)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert np.isfinite(lines[1]["loss"])
    _, validation, _ = training_pairs(spec, cache)
    data = batches.TrainingData(FeatureLoader(cache, spec), validation, validation, 32, 0)
    if spec.shape.fusion != "reference":  # which scores something else each time
        assert data.protocol.validate(model) == pytest.approx(result.best_validation_score, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["linear", "concat", "reuse", "paper"])
def test_text_beside_photos_helps_to_find_them(notes_path: str, tmp_path: Path, fusion: str) -> None:
    """Captions tell of both: the photo alone finds less, and, where the text is added as it is, the note alone."""
    scores = {}
    alone = "linear" if fusion == "concat" else fusion  # concat without a text is linear, and refused
    for beside, name in (("null", alone), ("first_caption", fusion)):
        out = tmp_path / beside
        train(config_for(notes_path, out, fusion=name, gallery_text=beside, epochs=10))
        scores[beside] = result_of(out)["best_validation_score"]
    assert scores["first_caption"] > scores["null"] + 0.1
    if fusion != "paper":
        assert scores["first_caption"] > text_only_score(notes_path, tmp_path)


def text_only_score(path: str, out: Path) -> float:
    """What the notes' own vectors find, without photos."""
    cache = open_cache(path)
    spec = resolve_run(config_for(path, out, gallery_text="first_caption"), cache)
    pairs = training_pairs(spec, cache)[1]
    search = load_protocol(own_protocol(spec))(Setting(FeatureLoader(cache, spec), pairs)).validation_search()
    assert search.main_metric == "map"
    notes = unit_rows(cache.encoder("text").vectors(pairs.paired_texts))
    return search.validation_score(notes, unit_rows(search.queries.vectors))


@pytest.mark.slow
@pytest.mark.parametrize("signal", [0.1, 1.0], ids=["dim", "clear"])
def test_text_beside_photos_starts_as_late_fusion(tmp_path: Path, signal: float) -> None:
    """Before the first step no worse than the text alone, whether the photos tell much or little."""
    path = make_cache(tmp_path / "cache.zarr", {"train": 120, "dev": 40}, captions=3, joint=True, signal=signal)
    alone = text_only_score(path, tmp_path)
    for fusion in ("linear", "concat", "reuse"):
        train(config_for(path, tmp_path / fusion, fusion=fusion, gallery_text="first_caption", epochs=1))
        assert logged_scores(tmp_path / fusion)[0] >= alone


def test_nothing_is_learned_without_a_signal(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache.zarr", {"train": 120, "dev": 100}, signal=0.0)
    train(config_for(cache, tmp_path / "run", fusion="linear", epochs=4))
    assert result_of(tmp_path / "run")["best_validation_score"] < mrr_by_chance(100) + 0.04


# The control


def test_control_on_permuted_pairs_learns_nothing(tmp_path: Path) -> None:
    """The same model on photos that belong to other texts: near chance, where the run itself is far above it."""
    path = make_cache(tmp_path / "cache.zarr", {"train": 120, "dev": 100})
    train(config_for(path, tmp_path / "run", fusion="linear", epochs=2, control_epochs=3))
    assert result_of(tmp_path / "run")["best_validation_score"] > 3 * mrr_by_chance(100)
    control = tmp_path / "run" / "permuted"
    assert len(logged_scores(control)) == 4
    assert max(logged_scores(control)) < mrr_by_chance(100) + 0.04
    assert sorted(file.name for file in control.iterdir()) == ["log.jsonl", "model.safetensors"]
    spec, model, _ = open_run(tmp_path / "run", open_cache(path))
    other = load_permuted(tmp_path / "run", spec, open_cache(path))
    assert other is not None
    assert not torch.equal(model.head.get_parameter("linear.weight"), other.head.get_parameter("linear.weight"))


def test_no_control_where_none_is_asked_for(cache_path: str, tmp_path: Path) -> None:
    train(config_for(cache_path, tmp_path, fusion="linear", epochs=1, control_epochs=0))
    assert not (tmp_path / "permuted").exists()
    cache = open_cache(cache_path)
    assert load_permuted(tmp_path, open_run(tmp_path, cache)[0], cache) is None
    assert TrainConfig(cache="", out="").control_epochs > 0


def test_permuted_pairs_differ_in_their_photos_alone(notes_path: str) -> None:
    cache = open_cache(notes_path)
    encoders = cache.encoder("image"), cache.encoder("text")
    pairs = select_pairs(cache.table, *encoders, "train", "captions", first_paired=True)
    permuted = pairs.permuted(3)
    assert sorted(permuted.rows) == sorted(pairs.rows)
    assert (permuted.rows != pairs.rows).mean() > 0.9
    np.testing.assert_array_equal(permuted.rows, pairs.permuted(3).rows)
    assert not np.array_equal(permuted.rows, pairs.permuted(4).rows)
    for one in fields(pairs):
        if one.name != "rows":
            assert getattr(permuted, one.name) is getattr(pairs, one.name)


# Resuming

ALL_TERMS = {"info_nce": 1.0, "pair": 1.0, "matching": 1.0}
UNPAIRED_TERMS = {"info_nce": 1.0, "structure": 10.0, "transport": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"fusion": "linear"},
        {"fusion": "reuse"},
        {"fusion": "reuse", "objective": ALL_TERMS, "gallery_text": "first_caption", "text_dropout": 0.5},
        {"fusion": "concat", "objective": {"siglip": 1.0, "pair": 0.5}, "gallery_text": "first_caption"},
        {"fusion": "reference"},
        {"fusion": "linear", "objective": UNPAIRED_TERMS, "train_fraction": 0.85, "unpaired": "rest"},
        {"fusion": "sotalign"},
    ],
    ids=["linear", "reuse", "reuse-all-terms", "concat-siglip-pair", "reference", "unpaired", "sotalign"],
)
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    notes_path: str, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of an epoch, twice, and once in its control."""
    given: dict[str, Any] = {"epochs": 3, "control_epochs": 2, "text_dropout": 0.0, **changes}
    train(config_for(notes_path, tmp_path / "whole", **given))
    config = config_for(notes_path, tmp_path / "killed", checkpoint_seconds=0.0, **given)
    step, count = fitting._step, 0
    for last in (1, 5, 4):

        def dying_step(options: object, state: TrainingState, *rest: object, last: int = last) -> float:
            nonlocal count
            count += 1
            if count > last:
                raise KeyboardInterrupt
            return step(options, state, *rest)  # type: ignore[arg-type]

        count = 0
        monkeypatch.setattr(fitting, "_step", dying_step)
        with pytest.raises(KeyboardInterrupt):
            train(config)
        assert (tmp_path / "killed" / "state.safetensors").exists()
    monkeypatch.setattr(fitting, "_step", step)
    assert (tmp_path / "killed" / "permuted" / "state.safetensors").exists()
    train(config)
    for part in (".", "permuted"):
        whole, killed = tmp_path / "whole" / part, tmp_path / "killed" / part
        assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
        logs = [[json.loads(line) for line in (run / "log.jsonl").open()] for run in (whole, killed)]
        timeless = [[{k: v for k, v in line.items() if k != "seconds"} for line in log] for log in logs]
        assert timeless[0] == timeless[1]
        assert not (killed / "state.safetensors").exists()


def test_a_kill_before_the_first_state_leaves_no_line_in_the_log(cache_path: str, tmp_path: Path) -> None:
    """Nor does one behind the result leave the state, or one within a write the file under its temporary name."""
    config = config_for(cache_path, tmp_path / "run", epochs=1)
    train(config_for(cache_path, tmp_path / "whole", epochs=1))
    train_until(fitting, "_step", config)
    assert logged_scores(tmp_path / "run")
    (tmp_path / "run" / ".model.safetensors.1.partial").write_bytes(b"half")
    train_until(train_module, "_remove_states", config)
    assert (tmp_path / "run" / "state.safetensors").exists()
    (tmp_path / "run" / LOCK_NAME).write_text("of the dead")
    train(config)
    assert logged_scores(tmp_path / "run") == logged_scores(tmp_path / "whole")
    names = [sorted(path.name for path in (tmp_path / out).iterdir()) for out in ("run", "whole")]
    assert names[0] == names[1]


def train_until(module: object, name: str, config: TrainConfig) -> None:
    """Die when a function is called."""

    def dying(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, dying)
        with pytest.raises(KeyboardInterrupt):
            train(config)


@pytest.mark.locks
def test_a_folder_that_another_process_trains_into_is_refused(cache_path: str, tmp_path: Path) -> None:
    config = config_for(cache_path, tmp_path / "run", epochs=1)
    with hold_folder(tmp_path / "run"), pytest.raises(FolderInUseError, match="another process is writing to it"):
        train(config)
    assert not list((tmp_path / "run").iterdir())
    out = tmp_path / "report"
    train(config)
    report = EvaluateConfig(
        cache=cache_path, run=config.out, split="test", out=str(out), baselines="none", device="cpu"
    )
    with hold_folder(out), pytest.raises(FolderInUseError, match="another process is writing to it"):
        evaluate(report)


def test_finished_run_is_kept_and_another_config_refused(cache_path: str, tmp_path: Path) -> None:
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


def test_validation_is_held_out_by_photo_without_a_dev_split(cache_path: str, tmp_path: Path) -> None:
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


def validation_rows(path: str, out: Path, **changes: Any) -> np.ndarray:
    cache = open_cache(path)
    return training_pairs(resolve_run(config_for(path, out, **changes), cache), cache).validation.rows


def test_validation_looks_at_a_drawn_part_of_many_photos(tmp_path: Path) -> None:
    """The part of fewer photos lies within that of more, and one of grown data is mostly the same photos."""
    path = make_cache(tmp_path / "some.zarr", {"train": 40, "dev": 30})
    of_all, of_nine, of_ten = (validation_rows(path, tmp_path, validation_photos=most) for most in (0, 9, 10))
    assert len(of_all) == len(validation_rows(path, tmp_path, validation_photos=30)) == 30
    assert len(of_nine) == 9
    assert set(of_nine) < set(of_ten) < set(of_all)
    assert set(of_nine) != set(of_all[:9])
    assert set(of_nine) != set(validation_rows(path, tmp_path, validation_photos=9, seed=1))
    more = make_cache(tmp_path / "more.zarr", {"train": 40, "dev": 33})  # whose first rows are those of the other
    assert len(set(validation_rows(more, tmp_path, validation_photos=9)) & set(of_nine)) >= 6


def test_what_is_not_held_out_is_trained_on(cache_path: str, tmp_path: Path) -> None:
    cache = open_cache(cache_path)
    spec = resolve_run(config_for(cache_path, tmp_path, validation_photos=5), cache)
    training, validation, _ = training_pairs(spec, cache)
    assert (len(training), len(validation), validation.drawn_from) == (115, 5, 12)
    assert not set(training.rows) & set(validation.rows)


def test_drawn_validation_is_told_and_known_to_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_cache(tmp_path / "cache.zarr", {"train": 64, "dev": 30, "test": 20})
    with caplog.at_level("INFO"):
        run = train(config_for(path, tmp_path / "run", epochs=1, validation_photos=9))
    assert "9 of 30 to validate on (dev)" in caplog.text
    assert "9 items choose the best epoch, among which chance finds much" in caplog.text
    result = TrainResult.load(run)
    assert (result.validation_photos, result.validation_photos_drawn_from) == (9, 30)
    assert "9 of 30 to validate on" in dict(result.sections()[0].facts)["photos"]
    evaluated = EvaluationResult.load(evaluate(EvaluateConfig(cache=path, run=run, baselines="linear")))
    assert (evaluated.validation_photos, evaluated.validation_photos_drawn_from) == (9, 30)
    assert "dev, 9 of 30 photos" in str(evaluated._origin({}))
    earlier = train(config_for(path, tmp_path / "earlier", epochs=1, validation_photos=0))
    config = json.loads((Path(earlier) / "config.json").read_text())
    del config["run"]["validation_photos"]
    (Path(earlier) / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(RunSpec, "validation_photos", 9)
    spec, _, _ = open_run(earlier, open_cache(path))
    assert len(same_training_pairs(spec, open_cache(path), earlier)[1]) == 30
    train(config_for(path, tmp_path / "earlier", epochs=1, validation_photos=0))  # goes on, or is finished
    with pytest.raises(ValueError, match="data: "):
        train(config_for(path, tmp_path / "earlier", epochs=1, validation_photos=5))


def test_mean_text_rows_of_a_part_are_those_of_all(cache_path: str) -> None:
    cache = open_cache(cache_path)
    text = cache.encoder("text")
    pairs = select_pairs(cache.table, cache.encoder("image"), text, "train", "captions")
    means = mean_text_rows(pairs, text)
    expected = [unit_rows(text.vectors(of_photo)).mean(axis=0) for of_photo in pairs.texts]
    np.testing.assert_allclose(means.whole, expected, atol=1e-6)
    np.testing.assert_array_equal(means[7:30], means.whole[7:30])


def test_smaller_part_lies_within_a_larger_one(cache_path: str, tmp_path: Path) -> None:
    cache = open_cache(cache_path)
    parts = {
        fraction: training_pairs(resolve_run(config_for(cache_path, tmp_path, train_fraction=fraction), cache), cache)
        for fraction in (0.1, 0.5, 1.0)
    }
    rows = {fraction: set(training.rows) for fraction, (training, _, _) in parts.items()}
    assert [len(of) for of in rows.values()] == [11, 54, 108]
    assert rows[0.1] < rows[0.5] < rows[1.0]
    assert len({tuple(validation.rows) for _, validation, _ in parts.values()}) == 1
    other = resolve_run(config_for(cache_path, tmp_path, train_fraction=0.5, seed=1, validation="test"), cache)
    same = resolve_run(config_for(cache_path, tmp_path, train_fraction=0.5, validation="test"), cache)
    assert set(training_pairs(other, cache)[0].rows) != set(training_pairs(same, cache)[0].rows)


def test_type_of_training_steps(cache_path: str, tmp_path: Path) -> None:
    """bfloat16 differs from float32 by its rounding, and a CPU takes it only if it is asked for."""

    def trained(dtype: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        out = quick_train(cache_path, tmp_path / dtype, fusion="contrastive", dtype=dtype)
        return read_json(Path(out) / "result.json"), load_file(Path(out) / "model.safetensors")

    (whole, weights), (_, of_auto), (rounded, of_rounded) = map(trained, ("float32", "auto", "bfloat16"))
    assert all(torch.equal(weights[name], of_auto[name]) for name in weights)
    assert not all(torch.equal(weights[name], of_rounded[name]) for name in weights)
    assert rounded["best_validation_score"] == pytest.approx(whole["best_validation_score"], abs=0.05)


def test_an_untrained_run_is_its_start(cache_path: str, tmp_path: Path) -> None:
    """From random weights it is at chance; from the ridge regression it is that; no step is taken."""
    scores = {}
    for name in ("random", "ridge"):
        config = config_for(cache_path, tmp_path / name, epochs=0, start=name)
        result = json.loads((Path(train(config)) / "result.json").read_text())
        assert (result["steps"], result["best_epoch"]) == (0, 0)
        scores[name] = result["best_validation_score"]
    assert scores["random"] < 2 * mrr_by_chance(12) < scores["ridge"]


def test_option_unknown_to_a_folder_has_its_default(cache_path: str, tmp_path: Path) -> None:
    """A run of an earlier release goes on, unless the new option is used."""
    config = config_for(cache_path, tmp_path, epochs=1)
    train(config)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["config"]["start"], content["run"]["train_fraction"], content["run"]["shape"]["num_blocks"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    train(config)
    with pytest.raises(ValueError, match="start: 'ridge' there, 'random' now"):
        train(replace(config, start="random"))


def test_photos_that_other_splits_share_are_not_trained_on(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache.zarr", {"train": 60, "test": 20}, shared=7)
    cache = open_cache(path)
    training, validation, shared = training_pairs(resolve_run(config_for(path, tmp_path), cache), cache)
    tested = select_pairs(cache.table, cache.encoder("image"), cache.encoder("text"), "test", "captions")
    assert shared == 7
    assert not {*training.rows, *validation.rows} & set(tested.rows)


@pytest.mark.parametrize("objective", [{"info_nce": 1.0}, ALL_TERMS], ids=["info_nce", "all terms"])
def test_classes_train_with_several_photos_for_a_text(
    classes_path: str, tmp_path: Path, objective: dict[str, float]
) -> None:
    train(config_for(classes_path, tmp_path, objective=objective, epochs=3))
    assert result_of(tmp_path)["validation_score"] == "map"
    assert result_of(tmp_path)["best_validation_score"] > 0.8


@pytest.mark.slow
def test_pairs_alone_are_validated_as_pairs(cache_path: str, tmp_path: Path) -> None:
    """The score of the weights that are kept is that of the report's candidate protocol; null text means nothing."""
    cache = make_cache(tmp_path / "cache.zarr", {"train": 90, "dev": 30}, classes=3)
    run = train(config_for(cache, tmp_path / "run", fusion="paper", objective={"pair": 1.0}))
    report = report_of(cache, run, split="dev")
    assert report["protocol"] == "candidate"
    assert value(report, "map") == pytest.approx(result_of(tmp_path / "run")["best_validation_score"], abs=1e-6)
    assert any(
        "without null text" in warning for warning in report_of(cache, run, split="dev", protocol="class")["warnings"]
    )
    with pytest.raises(ValueError, match="--objective: found pair alone, expected info_nce=1 too"):
        train(config_for(cache_path, tmp_path / "captions", objective={"pair": 1.0}))


# Layers


@pytest.mark.parametrize("layers", [{}, {"text": (2,)}])
def test_layer_whose_block_cannot_be_used_is_refused(cache_path: str, tmp_path: Path, layers: Any) -> None:
    cache = open_cache(cache_path)
    for encoder in cache.encoders.values():
        encoder.manifest.unusable_blocks[2] = "differs by 0.7 from the model's own next state"
    with pytest.raises(CacheError, match=r"runs its block 2, which cannot be used: differs by 0.7 .*Use another layer"):
        resolve_run(config_for(cache_path, tmp_path, fusion="reuse", layers=layers), cache)


@pytest.mark.parametrize("fusion", ["reuse", "paper"])
def test_decoder_takes_only_layers_with_a_block(cache_path: str, tmp_path: Path, fusion: str) -> None:
    spec = resolve_run(config_for(cache_path, tmp_path, fusion=fusion), open_cache(cache_path))
    assert spec.gallery_layers == spec.text_layers == (2,)
    with pytest.raises(CacheError, match=r"can use layers \[2\] \(it needs the block"):
        resolve_run(
            config_for(cache_path, tmp_path, fusion=fusion, layers={"image": (LAYERS,)}), open_cache(cache_path)
        )


@pytest.mark.parametrize(("convention", "given"), [("hidden_states", 2), ("reference", 2), ("paper", 1)])
def test_layers_are_counted_as_asked(cache_path: str, tmp_path: Path, convention: str, given: int) -> None:
    """The paper's 1 and 2 are the inputs of blocks 2 and 3; of the text too."""
    cache = open_cache(cache_path)
    asked: dict[str, Any] = {"index_convention": convention}
    decoder = config_for(cache_path, tmp_path, fusion="reuse", layers={"image": (given,), "text": (given,)}, **asked)
    assert resolve_run(decoder, cache).gallery_layers == resolve_run(decoder, cache).text_layers == (2,)
    linear = config_for(cache_path, tmp_path, fusion="linear", layers={"image": (given, given + 1)}, **asked)
    assert resolve_run(linear, cache).gallery_layers == (2, 3)
    with pytest.raises(CacheError, match=r"requested \[4\]"):
        resolve_run(replace(linear, layers={"image": (given + 2,)}), cache)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "linear"),
        ({"gallery_text": "null", "objective": {"siglip": 1.0}}, "linear"),
        ({"gallery_text": "first_caption"}, "reuse"),
        ({"objective": {"info_nce": 1.0, "matching": 1.0}}, "reuse"),
    ],
)
def test_fusion_follows_from_what_is_fused(cache_path: str, changes: dict[str, Any], expected: str) -> None:
    spec = resolve_run(TrainConfig(cache=cache_path, out="", **changes), open_cache(cache_path))
    assert spec.shape.fusion == expected


@pytest.mark.parametrize("side", ["gallery", "text"])
@pytest.mark.parametrize("fusion", ["reuse", "paper"])
def test_differing_widths_are_projected(cache_path: str, tmp_path: Path, fusion: str, side: str) -> None:
    """Photos 16 wide, texts 12."""
    train(config_for(cache_path, tmp_path, fusion=fusion, query_side=side, epochs=1))
    _, model, _ = open_run(tmp_path, open_cache(cache_path))
    projection = model.decoders[0].get_submodule("cross_attention.context_projection")
    assert projection.weight.shape == ((16, 12) if side == "gallery" else (12, 16))


def test_reference_refuses_differing_widths(cache_path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--fusion reference: the encoders are 16 and 12 wide"):
        train(config_for(cache_path, tmp_path, fusion="reference"))


def test_reference_resolves_to_what_was_released(notes_path: str, tmp_path: Path) -> None:
    """Matched texts, its own loss, the flattened tokens, one decoder for all layers, queries as they are."""
    spec = resolve_run(config_for(notes_path, tmp_path, fusion="reference"), open_cache(notes_path))
    assert spec.gallery_text == "matched"
    shape = spec.shape
    assert (shape.head, shape.share_decoder, shape.pooled_text, shape.maps_queries) == ("flatten", True, False, False)
    train(config_for(notes_path, tmp_path / "run", fusion="reference", epochs=2))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert not any("temperature" in name for name in lines[0])
    train(config_for(notes_path, tmp_path / "same", fusion="reference", epochs=2, objective={"soft_target": 1.0}))
    assert read_json(tmp_path / "run" / "config.json")["run"] == read_json(tmp_path / "same" / "config.json")["run"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "same")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("fusion", "adds"), [("linear", True), ("concat", True), ("reuse", True), ("paper", False), ("reference", False)]
)
def test_text_is_added_by_default_where_there_is_one(notes_path: str, tmp_path: Path, fusion: str, adds: bool) -> None:
    cache = open_cache(notes_path)
    beside = config_for(notes_path, tmp_path, fusion=fusion, gallery_text="first_caption")
    assert resolve_run(beside, cache).shape.pooled_text == adds
    assert resolve_run(replace(beside, pooled_text=not adds), cache).shape.pooled_text == (not adds)
    if fusion != "concat":
        assert not resolve_run(replace(beside, gallery_text="null"), cache).shape.pooled_text


def test_attention_head_starts_as_ridge_and_never_falls_below_it(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache.zarr", {"train": 60, "dev": 40})
    train(config_for(path, tmp_path / "run", fusion="linear", learning_rate=1.0))  # it diverges
    cache = open_cache(path)
    gallery, text = cache.encoder("image"), cache.encoder("text")
    pairs = {split: select_pairs(cache.table, gallery, text, split, "captions") for split in ("train", "dev")}
    features = {split: summaries(gallery, of_split.rows, (2, 3)) for split, of_split in pairs.items()}
    owners = np.repeat(np.arange(40), 2)
    queries = unit_rows(text.vectors(pairs["dev"].texts.values))

    def judge(fit: LinearMap) -> float:
        return caption_scores(unit_rows(fit(features["dev"])), queries, owners, intervals=False)["mrr"].value

    ridge = judge(fit_ridge(features["train"], mean_text_rows(pairs["train"], text).whole, judge))
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["epoch"] == 0
    assert first["validation_score"] == pytest.approx(ridge, abs=1e-6)
    assert result_of(tmp_path / "run")["best_validation_score"] >= first["validation_score"]


@pytest.mark.parametrize("fusion", ["reuse", "paper"])
def test_only_what_null_text_reaches_counts_as_trainable(cache_path: str, tmp_path: Path, fusion: str) -> None:
    train(config_for(cache_path, tmp_path, fusion=fusion, epochs=1))
    _, model, _ = open_run(tmp_path, open_cache(cache_path))
    model.freeze_unused(null_only=True)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert result_of(tmp_path)["trainable_parameters"] == trainable
    photos = model([torch.randn(4, 5, 16)])
    (photos.sum() + model.encode_queries(torch.randn(4, 12)).sum()).backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []


def test_cache_that_grew_or_is_another_one_is_refused(cache_path: str, tmp_path: Path) -> None:
    config = config_for(cache_path, tmp_path / "run", epochs=1)
    train(config)
    spec, _, _ = open_run(tmp_path / "run", open_cache(cache_path))
    same_training_pairs(spec, open_cache(cache_path), "run")
    other = make_cache(tmp_path / "other.zarr", {"train": 130, "test": 30})
    with pytest.raises(ValueError, match="trained on other items or texts"):
        same_training_pairs(spec, open_cache(other), "run")
    with pytest.raises(ValueError, match="holds another result"):
        train(replace(config, cache=other))


def test_all_photos_in_another_split_too(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache.zarr", {"train": 20, "test": 30}, shared=20)
    with pytest.raises(ValueError, match="all of its 20 photos belong to other splits too"):
        train(config_for(path, tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": -1}, "--epochs: found -1, expected 0 or more"),
        ({"validation": "train"}, "--validation: found train, expected another split"),
        ({"layers": {"img": (3,)}}, "--layers: found img=…, expected image=… or"),
        ({"layers": {"image": (3, 3)}}, "each layer once"),
        ({"warmup": 2.0}, "--warmup: found 2.0, expected a fraction"),
        ({"device": "gpu"}, "--device gpu: torch cannot use it"),
        ({"objective": {"triplet": 1.0}}, "--objective: found triplet=…, expected info_nce=…"),
        ({"objective": {"pair": 0.0}}, "--objective: found pair=0.0, expected a weight above 0"),
        (
            {"objective": {"pair": 1.0}, "fusion": "linear"},
            "--objective: found pair, expected no objective over fused pairs",
        ),
        ({"objective": {"matching": 1.0}, "fusion": "linear"}, "linear takes no text"),
        ({"fusion": "concat", "layers": {"text": (2,)}}, "--layers: found text=…, expected no text: concat takes no"),
        (
            {"fusion": "reuse", "head": "flatten", "query_side": "text"},
            "--head: found flatten, expected attention or mean",
        ),
        ({"fusion": "concat"}, "--fusion: found concat with null text, expected --gallery-text first_caption"),
        (
            {"fusion": "concat", "head": "mean", "gallery_text": "matched"},
            "--head: found mean, expected attention",
        ),
        ({"text_dropout": 0.5}, "--text-dropout: found 0.5, expected 0: no text is paired"),
        ({"text_dropout": 1.0, "gallery_text": "matched"}, "--text-dropout: found 1.0, expected a fraction"),
        ({"negatives": 0}, "--negatives: found 0"),
        ({"control_epochs": -1}, "--control-epochs: found -1"),
        ({"seed": 2**64}, "--seed: found 18446744073709551616, expected 0 or more, below"),
        ({"data_seed": -1}, "--data-seed: found -1, expected 0 or more"),
        ({"learning_rate": float("inf")}, "--learning-rate: found inf, expected a number above 0"),
        ({"objective": {"info_nce": float("nan")}}, "--objective: found info_nce=nan, expected a weight above 0"),
    ],
)
def test_wrong_options_are_named(cache_path: str, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(config_for(cache_path, tmp_path, **changes))


def test_a_class_does_not_lie_beside_what_it_is_searched_with(classes_path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--gallery-text: found first_caption with classes, expected null"):
        train(config_for(classes_path, tmp_path, gallery_text="first_caption"))


def test_run_of_another_cache_is_refused(cache_path: str, tmp_path: Path) -> None:
    train(config_for(cache_path, tmp_path / "run", epochs=1))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["run"]["gallery_key"] = "image-other-000000000000"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trained on image-other"):
        open_run(tmp_path / "run", open_cache(cache_path))


def test_too_little_data_is_an_error(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache.zarr", {"train": 1})
    with pytest.raises(ValueError, match="too few"):
        train(config_for(path, tmp_path / "run"))
