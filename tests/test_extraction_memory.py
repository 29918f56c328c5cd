"""Batches that do not fit into memory: halved, named, and resumed to the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from extraction_cases import dying_behind, files_of, tiny_config
from tiny_models import load_tiny

from saffe_cache.core.features import CacheError
from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.encoders.transfers import HalvingEncoder, Launched
from saffe_cache.extraction import planning
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.store.manifest import read_encoder
from saffe_cache.store.reader import open_cache
from saffe_cache.store.root import read_root
from saffe_cache.store.storage import Storage

Inputs = Mapping[str, torch.Tensor]
launch_for_real = FrozenEncoder.launch


@pytest.fixture
def config(tmp_path: Path, tiny_model: Callable[[str], Path]) -> ExtractConfig:
    return tiny_config(tmp_path, tiny_model)


def limit_memory(
    monkeypatch: pytest.MonkeyPatch, *, photos: int = 1000, tokens: int = 10**6, error: RuntimeError | None = None
) -> list[tuple[int, ...]]:
    """A device that holds so many photos, or tokens of texts; returns the shapes it was given, as they come."""
    shapes: list[tuple[int, ...]] = []
    raised = error or torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def launch(self: FrozenEncoder, inputs: Inputs) -> Launched:
        first = next(iter(inputs.values()))
        shapes.append(tuple(first.shape))
        if (len(first) > photos) if self.request.modality == "image" else (first.numel() > tokens):
            raise raised
        return launch_for_real(self, inputs)

    monkeypatch.setattr(FrozenEncoder, "launch", launch)
    return shapes


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        None,
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_extraction_continues_in_halves(
    config: ExtractConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: RuntimeError | None,
) -> None:
    whole = open_cache(extract(replace(config, cache=config.cache + ".whole")))
    limit_memory(monkeypatch, photos=1, tokens=40, error=error)
    halved = open_cache(extract(config))
    for modality, layer in (("image", 3), ("text", 1)):
        rows = np.arange(20)
        expected, found = (cache.encoder(modality).tokens(rows, (layer,)) for cache in (whole, halved))
        np.testing.assert_allclose(found.states[0], expected.states[0], atol=1e-5)
        np.testing.assert_array_equal(found.mask, expected.mask)
    assert "a batch of shape (4, 3, 32, 32) does not fit into the memory of cpu" in caplog.text
    assert halved.encoder("image").manifest.history[-1]["halved"] == [[4, 3, 32, 32], [2, 3, 32, 32]]


@pytest.mark.slow
@pytest.mark.parametrize(("dies_at", "in_the_middle_of"), [(9, ""), (60, "image"), (110, "text"), (150, "text")])
def test_halved_extraction_resumes_to_the_same_bytes(
    tmp_path: Path,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    dies_at: int,
    in_the_middle_of: str,
) -> None:
    """Photos and texts, with shards that are committed on the way."""
    monkeypatch.setattr(planning, "TEXT_BLOCK_ROWS", 8)
    config = tiny_config(tmp_path, tiny_model, train=140)
    small = replace(config, shard_mb=0, batch_size=8, batch_tokens=60)
    shapes = limit_memory(monkeypatch, photos=3, tokens=20)
    whole = extract(replace(small, cache=config.cache + ".whole"))
    assert dies_at < len(shapes)
    with dying_behind(dies_at):
        extract(small)
    resumed = extract(small)
    encoders = open_cache(resumed).encoders.values()
    starts = {one.manifest.modality: one.manifest.history[-1]["inputs"][0] for one in encoders}
    assert [modality for modality, start in starts.items() if start] == ([in_the_middle_of] if in_the_middle_of else [])
    assert files_of(resumed) == files_of(whole)


def test_batch_that_does_not_fit_is_retried_once(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]
) -> None:
    encoder = load_tiny("bert", tiny_model("bert"))
    shapes = limit_memory(monkeypatch, tokens=12)
    halving = HalvingEncoder(encoder)

    def tried(rows: int, width: int) -> list[tuple[int, ...]]:
        shapes.clear()
        parts = halving.launch(encoder.pad([[5] * width] * rows))
        assert sum(len(part.encoded().lengths) for part in parts) == rows
        return shapes

    assert tried(4, 4) == [(4, 4), (4, 4), (2, 4), (2, 4)]
    assert tried(5, 4) == [(2, 4), (3, 4)]
    assert tried(4, 5) == [(2, 5), (2, 5)]
    assert tried(4, 3) == [(4, 3)]  # fewer tokens: it may fit, and does
    assert tried(3, 5) == [(3, 5), (3, 5), (1, 5), (2, 5)]


def test_temporary_shortage_does_not_halve(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]) -> None:
    """What was in flight held the memory: once it is through, the batch fits."""
    encoder, freed = load_tiny("bert", tiny_model("bert")), []
    monkeypatch.setattr(encoder.transfers, "free_memory", lambda: freed.append(True))

    def launch(self: FrozenEncoder, inputs: Inputs) -> Launched:
        if not freed:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return launch_for_real(self, inputs)

    monkeypatch.setattr(FrozenEncoder, "launch", launch)
    halving = HalvingEncoder(encoder)
    assert len(halving.launch(encoder.pad([[5] * 4] * 4))) == 1
    assert halving.too_large == []


def test_a_single_input_that_does_not_fit_ends_the_run(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []

    def launch(self: FrozenEncoder, inputs: Inputs) -> Launched:
        if len(planned) > 1:  # the first of each encoder learns the number of tokens
            raise torch.cuda.OutOfMemoryError("out of memory")
        planned.append(self)
        return launch_for_real(self, inputs)

    monkeypatch.setattr(FrozenEncoder, "launch", launch)
    with pytest.raises(CacheError, match=r"a single input of shape \(3, 32, 32\) does not fit into the memory of cpu"):
        extract(replace(config, encoder={"image": config.encoder["image"]}, layers={}, batch_size=2))


def test_other_device_errors_are_not_out_of_memory(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = limit_memory(monkeypatch, photos=3, error=RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        extract(config)
    assert shapes.count((4, 3, 32, 32)) == 1
    storage = Storage(config.cache)
    root = read_root(storage)
    assert root is not None
    assert all(read_encoder(storage, key).finished_rows == 0 for key in root.encoders)
