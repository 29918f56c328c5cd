"""What a FAM is fed is the same wherever it lies, and is what the cache holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from synthetic_cache import WIDTH, make_cache

from saffe_cache.core.outputs import read_json
from saffe_cache.inputs.feature_loader import FeatureLoader, choose_residency
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.store.dtypes import from_storage, numbers_of, to_storage
from saffe_cache.store.layout import STORAGE_DTYPES
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.train import train


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("inputs") / "cache.zarr"
    return make_cache(path, {"train": 70, "dev": 30}, captions=3, text_width=WIDTH, joint=True)


def config(cache: str, out: Path, **changes: Any) -> TrainConfig:
    given: dict[str, Any] = {"epochs": 2, "batch_size": 32, "log": ("none",), "control_epochs": 0, "device": "cpu"}
    return TrainConfig(cache=cache, out=str(out), gallery_text="first_caption", **{**given, **changes})


@pytest.fixture(scope="module")
def opened(cache_path: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, RunSpec]:
    cache = open_cache(cache_path)
    return cache, resolve_run(config(cache_path, tmp_path_factory.mktemp("inputs")), cache)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_numbers_of_tensors_are_those_of_arrays(dtype: str) -> None:
    values = np.random.default_rng(0).normal(size=(4, 5, 8)).astype(np.float32)
    values[1] *= 1e-3
    stored = to_storage(values, dtype)
    found = numbers_of(torch.from_numpy(stored.view(np.int16) if dtype == "bfloat16" else stored), dtype)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), from_storage(stored, dtype).astype(np.float32))


@pytest.mark.parametrize("residency", ["mapped", "memory"])
def test_tokens_are_those_of_the_cache(opened: tuple[Cache, RunSpec], residency: Literal["mapped", "memory"]) -> None:
    cache, spec = opened
    inputs = FeatureLoader(cache, spec, "cpu", residency)
    rows = np.array([5, 0, 69, 5])
    for encoder, layers, (states, mask) in (
        (inputs.gallery, spec.gallery_layers, inputs.photos(rows)),
        (inputs.text, spec.text_layers, (inputs.texts(rows).states, inputs.texts(rows).mask)),
    ):
        expected = encoder.tokens(rows, layers)
        for state, of_cache in zip(states, expected.states, strict=True):
            np.testing.assert_array_equal(state.numpy(), of_cache.astype(np.float32))
        if expected.mask is None:
            assert mask is None
        else:
            assert mask is not None
            np.testing.assert_array_equal(mask.numpy(), expected.mask)


def test_training_does_not_depend_on_the_residency(cache_path: str, tmp_path: Path) -> None:
    runs = [Path(train(config(cache_path, tmp_path / name, residency=name))) for name in ("mapped", "memory")]
    assert [read_json(run / "result.json")["residency"] for run in runs] == ["mapped", "memory"]
    assert len({(run / "model.safetensors").read_bytes() for run in runs}) == 1


def test_auto_takes_files_on_a_cpu_and_memory_behind_a_url(
    opened: tuple[Cache, RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, spec = opened
    assert choose_residency("auto", cache, spec, "cpu") == "mapped"
    assert choose_residency("memory", cache, spec, "cpu") == "memory"
    with pytest.raises(ValueError, match="--residency: found device on a CPU, expected memory or mapped"):
        choose_residency("device", cache, spec, "cpu")
    monkeypatch.setattr(cache.storage, "_local", None)
    for encoder in cache.encoders.values():
        monkeypatch.setattr(encoder, "_readers", {})
    assert choose_residency("auto", cache, spec, "cpu") == "memory"


def test_auto_takes_the_accelerator_where_there_is_room(
    opened: tuple[Cache, RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, spec = opened
    layers = [
        (cache.encoders[spec.gallery_key], spec.gallery_layers),
        (cache.encoders[spec.text_key], spec.text_layers),
    ]
    arrays = [encoder.array(f"hidden_states/{layer}") for encoder, of in layers for layer in of]
    needed = sum(len(array) * array.spec.row_bytes for array in arrays)
    for free, expected in ((2 * needed, "device"), (needed, "memory")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, free))
        assert choose_residency("auto", cache, spec, "cuda") == expected
