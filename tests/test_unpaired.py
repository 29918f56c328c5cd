"""Photos and texts without their pairing: which they are, that no pairing is used, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_cache import make_cache

from saffe_cache.core.controls import failed
from saffe_cache.core.items import Ragged
from saffe_cache.evaluation.config import EvaluateConfig
from saffe_cache.evaluation.evaluate import evaluate
from saffe_cache.evaluation.results import EvaluationResult
from saffe_cache.inputs.pairs import training_pairs, unpaired_inputs
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.result import TrainResult
from saffe_cache.training.train import train, train_many

TERMS = {"info_nce": 1.0, "structure": 1.0, "transport": 1.0}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The last split has 5 photos of the first one."""
    folder = tmp_path_factory.mktemp("unpaired")
    return make_cache(folder / "cache.zarr", {"train": 160, "dev": 30, "test": 30, "extra": 40}, shared=5)


def config_for(cache: str, out: Path, **changes: Any) -> TrainConfig:
    given: dict[str, Any] = {"fusion": "linear", "objective": TERMS, "unpaired": "extra"}
    given |= {"structure_warmup": 2} if "structure" in changes.get("objective", TERMS) else {}
    quick: dict[str, Any] = {"epochs": 2, "batch_size": 32, "control_epochs": 0, "log": ("none",), "device": "cpu"}
    return TrainConfig(cache=cache, out=str(out), **(given | quick | changes))


def with_permuted_captions(path: str, split: str) -> Cache:
    """The cache, where the items of a split have one another's captions, except for the 5 of two splits."""
    cache = open_cache(path)
    table, order = cache.table, np.arange(len(cache.table))
    items = table.in_split(split)[5:]
    order[items] = np.roll(items, 7)
    cache.table = replace(table, captions=Ragged.from_rows([table.captions[item] for item in order]))
    return cache


@pytest.mark.parametrize("fusion", ["linear", "sotalign"])
def test_permuted_captions_of_the_unpaired_split_change_nothing(path: str, tmp_path: Path, fusion: str) -> None:
    changed = {"train": with_permuted_captions(path, "train"), "extra": with_permuted_captions(path, "extra")}
    for name in ("as it is", *changed):
        opened = {path: changed[name]} if name in changed else None
        train_many([config_for(path, tmp_path / name, fusion=fusion, epochs=1)], opened=opened)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("as it is", *changed)}
    assert weights["extra"] == weights["as it is"]
    assert weights["train"] != weights["as it is"]  # where a pairing counts, it does


def test_unpaired_photos_are_of_no_other_split(path: str, tmp_path: Path) -> None:
    cache = open_cache(path)
    spec = resolve_run(config_for(path, tmp_path), cache)
    unpaired = unpaired_inputs(spec, cache)
    assert unpaired is not None
    table = cache.table
    assert len(unpaired.rows) == len(np.unique(unpaired.rows)) == 35
    assert len(unpaired.texts) == len(np.unique(unpaired.texts)) == 70
    elsewhere = table.rows["image"][~table.splits.are("extra")]
    assert not np.isin(unpaired.rows, elsewhere).any()
    assert not (np.diff(unpaired.rows) > 0).all()  # not in the items' order, which would tell of the pairing


def test_rest_is_what_the_fraction_leaves_out(path: str, tmp_path: Path) -> None:
    cache = open_cache(path)
    spec = resolve_run(config_for(path, tmp_path, unpaired="rest", train_fraction=0.4), cache)
    training, validation, _ = training_pairs(spec, cache)
    whole = training_pairs(replace(spec, train_fraction=1.0), cache).training
    unpaired = unpaired_inputs(spec, cache)
    assert unpaired is not None
    assert sorted([*training.rows, *unpaired.rows]) == sorted(whole.rows)
    assert not np.isin(unpaired.rows, validation.rows).any()
    assert set(unpaired.texts) == set(whole.texts.values) - set(training.texts.values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"info_nce": 1.0}}, "structure or structure_published or transport"),
        ({"unpaired": "train"}, "neither trains nor validates"),
        ({"unpaired": "dev"}, "neither trains nor validates"),
        ({"unpaired": "rest"}, "a smaller --train-fraction"),
        ({"unpaired": "nowhere"}, "nowhere"),
        ({"residency": "streamed"}, "memory or mapped"),
    ],
)
def test_unpaired_data_that_cannot_be_used_are_refused(
    path: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(config_for(path, tmp_path / "run", **changes))


def test_report_on_the_unpaired_split_counts_its_photos_as_seen(path: str, tmp_path: Path) -> None:
    run = train(config_for(path, tmp_path / "run", epochs=1, control_epochs=1))
    found = {}
    for split in ("test", "extra"):
        report: dict[str, Any] = {"split": split, "baselines": "none", "device": "cpu"}
        out = evaluate(EvaluateConfig(cache=path, run=run, out=str(tmp_path / split), **report))
        found[split] = EvaluationResult.load(Path(out)).duplicates
    assert found["test"]["photos"] == 0
    assert found["extra"] == {"photos": 35, "texts": 70}


@pytest.mark.parametrize(("fusion", "unpaired"), [("structure", "extra"), ("sotalign", "rest")])
def test_published_fusions_learn_and_pass_their_controls(
    path: str, tmp_path: Path, fusion: str, unpaired: str | None
) -> None:
    options: dict[str, Any] = {"objective": {}, "train_fraction": 0.7, "epochs": 12, "control_epochs": 2}
    faster: dict[str, Any] = {"learning_rate": 1e-2, "dropout": 0.0}
    faster |= {"structure_warmup": 2} if fusion == "structure" else {}
    run = train(config_for(path, tmp_path / "run", fusion=fusion, unpaired=unpaired, **options, **faster))
    assert TrainResult.load(Path(run)).best_epoch > 0
    report: dict[str, Any] = {"split": "test", "baselines": "none", "device": "cpu"}
    out = evaluate(EvaluateConfig(cache=path, run=run, out=str(tmp_path / "test"), **report))
    result = EvaluationResult.load(Path(out))
    assert not failed(result.controls.values())
    assert result.controls
    assert result.main().low > result.main().chance
