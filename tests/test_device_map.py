"""Encoders that accelerate places in memory and on the disk give what they give on one device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo_runs
from extraction_cases import files_of, tiny_config
from store_cases import verify
from tiny_models import CASES, inputs_of, load_tiny

from saffe_cache.encoders.encoder import FrozenEncoder, load_encoder
from saffe_cache.encoders.loading import EncoderRequest
from saffe_cache.encoders.offloading import is_spread
from saffe_cache.encoders.probing import Probe
from saffe_cache.extraction.blocks import checked_blocks
from saffe_cache.extraction.config import ExtractConfig, RepairConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.extraction.repair import repair
from saffe_cache.store.reader import open_cache

Models = Callable[[str], Path]


@pytest.fixture
def accelerate() -> None:
    pytest.importorskip("accelerate")


def placed(encoder: FrozenEncoder, **request: object) -> FrozenEncoder:
    """The same encoder in 60 kB of memory, and the rest of it on the disk."""
    spread = load_encoder(replace(encoder.request, device_map="sequential", max_memory={"cpu": "60KB"}, **request))
    assert is_spread(spread._model)
    assert any(one.is_meta for one in spread._model.parameters())
    return spread


def assert_equal(found: FrozenEncoder, expected: FrozenEncoder, inputs: dict[str, torch.Tensor]) -> None:
    """The same key, states, vectors and blocks, also where the forward pass ends at a layer."""
    assert found.fingerprint == expected.fingerprint
    ours, theirs = found.encode(inputs), expected.encode(inputs)
    assert ours.states.keys() == theirs.states.keys()
    assert ours.vectors.keys() == theirs.vectors.keys()
    pairs = [(ours.states[i], theirs.states[i]) for i in ours.states]
    pairs += [(ours.vectors[name], theirs.vectors[name]) for name in ours.vectors]
    for one in (found, expected):
        one.select((1,), vectors=False)
    pairs.append((found.encode(inputs).states[1], expected.encode(inputs).states[1]))
    (blocks, problems), (own_blocks, own_problems) = (checked_blocks(one, (1, 2)) for one in (found, expected))
    assert problems == own_problems
    for layer, block in own_blocks.items():
        assert blocks[layer].spec == block.spec
        pairs += [(blocks[layer].tensors[name], values) for name, values in block.tensors.items()]
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("accelerate")
@pytest.mark.parametrize(
    "name", ["dinov2", "mpnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("clip-vision", "whisper"))]
)
def test_spread_family_equals_one_on_a_device(name: str, tiny_model: Models) -> None:
    assert CASES[name].modality in ("image", "text", "audio")
    encoder = load_tiny(name, tiny_model(name))
    assert_equal(placed(encoder), encoder, inputs_of(name, encoder))


@pytest.mark.usefixtures("accelerate")
@pytest.mark.parametrize(
    ("name", "modality", "more"),
    [
        ("siglip", "image", {}),
        pytest.param("clip", "text", {}, marks=pytest.mark.slow),
        pytest.param("t5", "text", {}, marks=pytest.mark.slow),
        ("qwen3", "text", {"language_model": True, "position_offset": 3}),
        pytest.param("mixtral", "text", {"dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_spread_discovered_model_equals_one_on_a_device(
    name: str, modality: str, more: dict[str, object], tmp_path: Path
) -> None:
    folder = zoo_runs.Bench(tmp_path).checkpoint(name)
    encoder = load_encoder(EncoderRequest(modality=modality, model_id=str(folder), layers=(0, 1, 2), **more))
    spread = placed(encoder)
    if encoder.language_model:
        own = encoder.language_model.tensors
        found = spread.language_model
        assert found is not None
        assert found.tensors.keys() == own.keys()
        for key, values in own.items():
            np.testing.assert_array_equal(found.tensors[key], values)
    assert_equal(spread, encoder, Probe(encoder).inputs())


@pytest.mark.usefixtures("accelerate")
def test_spread_extraction_writes_the_same_and_is_repaired(tmp_path: Path, tiny_model: Models) -> None:
    config = replace(tiny_config(tmp_path, tiny_model, train=4), device="auto")
    spread = {"device_map": "auto", "max_memory": {"cpu": "60KB"}}
    cache = extract(replace(config, cache=str(tmp_path / "spread.zarr"), **spread))
    assert files_of(cache) == files_of(extract(config))
    assert extract(replace(config, cache=cache)) == cache  # nothing remains for one device
    shard = next(path for path in Path(cache).rglob("hidden_states/3/c/0/0/0"))
    content = shard.read_bytes()
    shard.unlink()
    repair(RepairConfig(cache=cache, device="cpu"))
    assert shard.read_bytes() == content
    assert verify(cache)[1] == []
    assert len(open_cache(cache).table) == 10


def test_spread_needs_accelerate(tiny_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r"needs the package accelerate.* pip install 'saffe-cache\[large\]'"):
        load_tiny("dinov2", tiny_model("dinov2"), device_map="auto")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"device_map": "auto", "device": "cpu"}, "--device: found cpu with --device-map"),
        ({"max_memory": {"cpu": "1GB"}}, "--max-memory: found no --device-map"),
        ({"device_map": "auto", "max_memory": {"disk": "1GB"}}, "--max-memory: found disk=1GB"),
        ({"device_map": "auto", "max_memory": {"0": "1"}}, "--max-memory: found 0=1, expected a size"),
    ],
)
def test_wrong_placement_is_refused(options: dict[str, object], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        ExtractConfig(data="data", cache="cache", encoder={"image": "model"}, **options)


def test_encoder_larger_than_its_device_names_the_option(tiny_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: torch.nn.Module, device: str) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(
        ValueError, match=r"dinov2: its weights do not fit into the memory of cpu. Use --device-map auto"
    ):
        load_tiny("dinov2", tiny_model("dinov2"))
