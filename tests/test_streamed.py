"""Training from shards that have to be loaded: window after window, each shard once an epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import convert
from synthetic_cache import WIDTH, make_cache

from saffe_cache.core.atomic_io import Buffer
from saffe_cache.core.outputs import read_json
from saffe_cache.inputs import feature_loader
from saffe_cache.inputs.feature_loader import FeatureLoader, choose_residency
from saffe_cache.inputs.pairs import training_pairs
from saffe_cache.store.reader import open_cache
from saffe_cache.store.storage import Storage
from saffe_cache.training.batches import TrainingData, draw_order
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.train import train

pytestmark = pytest.mark.slow

PHOTOS = 200


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same cache, mapped and compressed; shards of a few photos."""
    folder = tmp_path_factory.mktemp("streamed")
    plain = make_cache(folder / "plain", {"train": PHOTOS, "dev": 30}, captions=2, text_width=WIDTH, joint=True)
    return {"plain": plain, "zstd": convert(plain, folder / "zstd", compression="zstd", shard_mb=0)}


def config(cache: str, out: Path, **changes: Any) -> TrainConfig:
    given: dict[str, Any] = {"epochs": 2, "batch_size": 32, "log": ("none",), "control_epochs": 1, "device": "cpu"}
    return TrainConfig(cache=cache, out=str(out), gallery_text="first_caption", **{**given, **changes})


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=80), st.integers(1, 5), st.integers(0, 3))
def test_an_order_draws_all_pairs_window_by_window(shards: list[int], per_window: int, epoch: int) -> None:
    of_pair = np.array(shards)
    order = draw_order(of_pair, per_window, 0, epoch)
    assert sorted(order.pairs) == list(range(len(shards)))
    assert order.windows is not None
    assert (np.diff(order.windows) >= 0).all()
    for window in np.unique(order.windows):
        inside = {shards[i] for i in order.pairs[order.windows == window]}
        outside = {shards[i] for i in order.pairs[order.windows != window]}
        assert len(inside) <= per_window
        assert not inside & outside


def test_orders_differ_by_epoch_and_mix_the_shards_of_a_window() -> None:
    shards = np.arange(400) // 10
    orders = [draw_order(shards, 5, 0, epoch) for epoch in range(3)]
    assert len({tuple(order.pairs) for order in orders}) == 3
    assert tuple(draw_order(shards, 5, 0, 1).pairs) == tuple(orders[1].pairs)
    first = shards[orders[0].pairs[:20]]
    assert len(set(first)) > 2
    assert len({tuple(sorted(set(shards[order.pairs[:50]]))) for order in orders}) == 3
    assert draw_order(shards, None, 0, 0).windows is None


@pytest.mark.slow
def test_a_run_is_the_same_from_any_storage(caches: dict[str, str], tmp_path: Path) -> None:
    """One window holds all of this small cache, so that its order is the usual one."""
    runs = [Path(train(config(caches[name], tmp_path / name, residency="streamed"))) for name in caches]
    assert all(read_json(run / "config.json")["run"]["shuffled_shards"] for run in runs)
    runs += [Path(train(config(caches[name], tmp_path / f"auto {name}"))) for name in caches]
    found = [read_json(run / "result.json")["residency"] for run in runs]
    assert found == ["streamed", "streamed", "mapped", "memory"]
    assert len({(run / "model.safetensors").read_bytes() for run in runs}) == 1


def test_an_epoch_fetches_each_shard_once(caches: dict[str, str], tmp_path: Path, count_reads: Counter[str]) -> None:
    data = streamed(caches["zstd"], tmp_path, window_bytes=2**12)
    assert data.inputs.spec.shuffled_shards is not None
    count_reads.clear()
    seen = sum(len(batch.states[0]) for batch in data.batches(0, data.steps_per_epoch))
    assert seen > PHOTOS - 32
    photos = {name: count for name, count in count_reads.items() if "image" in name and "hidden_states/2" in name}
    assert len(photos) > 3 * data.inputs.spec.shuffled_shards
    assert set(photos.values()) == {1}


@pytest.fixture
def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each shard was read."""
    counts: Counter[str] = Counter()
    read: Callable[[Storage, str], Buffer] = Storage.read_buffer

    def counted(storage: Storage, name: str) -> Buffer:
        counts[name] += 1
        return read(storage, name)

    monkeypatch.setattr(Storage, "read_buffer", counted)
    return counts


def streamed(cache: str, tmp_path: Path, window_bytes: int) -> TrainingData:
    opened = open_cache(cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_loader, "_WINDOW_BYTES", window_bytes)
        spec = resolve_run(config(cache, tmp_path), opened)
        window = feature_loader.window_shards(opened, spec)
    spec = type(spec)(**{**vars(spec), "shuffled_shards": window})
    training, validation, _ = training_pairs(spec, opened)
    return TrainingData(FeatureLoader(opened, spec, "cpu", "streamed"), training, validation, 32, 0)


def test_auto_streams_what_cannot_be_mapped_and_is_too_large(
    caches: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(caches["zstd"])
    spec = resolve_run(config(caches["zstd"], tmp_path), cache)
    assert choose_residency("auto", cache, spec, "cpu") == "memory"
    monkeypatch.setattr(feature_loader, "_MEMORY_PART", 0)
    assert choose_residency("auto", cache, spec, "cpu") == "streamed"
    plain = open_cache(caches["plain"])
    assert choose_residency("auto", plain, resolve_run(config(caches["plain"], tmp_path), plain), "cpu") == "mapped"
    with pytest.raises(ValueError, match=r"found mapped, of shards that are compressed .* expected memory or streamed"):
        choose_residency("mapped", cache, spec, "cpu")


def test_a_run_is_not_resumed_in_another_order(caches: dict[str, str], tmp_path: Path) -> None:
    train(config(caches["plain"], tmp_path, residency="streamed"))
    with pytest.raises(ValueError, match=r"holds another result .*shuffled_shards: .* there, None now"):
        train(config(caches["plain"], tmp_path))
