"""Exported fusions: every one computes in onnxruntime what it computes in torch, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import load_tiny

from saffe_cache.core.features import BlockWeights
from saffe_cache.fusion.base import Blocks, Fusion, as_read
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.inference import exporting
from saffe_cache.inference.exporting import export_onnx

pytestmark = pytest.mark.slow

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

Models = Callable[[str], Path]
CASES = [
    (name, side)
    for name, entry in FUSIONS.items()
    for side in (("gallery", "text") if entry.has_decoder else ("gallery",))
    if entry.is_deterministic and not entry.is_closed_form and not entry.is_special
]
LAYERS = (4, 7)


def make(fusion: str, tiny_model: Models, **changes: Any) -> Fusion:
    """Away from its start, where gates are closed and corrections zero."""
    entry = FUSIONS[fusion]

    def blocks_of(name: str, uses: tuple[str, ...]) -> list[BlockWeights]:
        blocks = load_tiny(name, tiny_model(name)).blocks
        return [blocks[1], blocks[2]] if entry.blocks in uses else []

    blocks = Blocks(blocks_of("dinov2", ("paired", "both")), blocks_of("bert", ("paired", "text", "one_text", "both")))
    values: dict[str, Any] = {"fusion": fusion, "head": entry.head, "num_layers": 2 if "head" in entry.options else 1}
    values |= {"hidden_size": 32, "num_tokens": 26, "text_hidden_size": 32, "text_size": 32, "num_blocks": 2}
    torch.manual_seed(2)
    model: Fusion = entry.make(FusionShape(**(values | changes)), blocks).eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def run(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == list(inputs)
    [vectors] = session.run(None, inputs)
    return np.asarray(vectors)


@pytest.mark.parametrize(
    ("fusion", "side"),
    [pytest.param(*case, marks=() if case[0] == "late" else pytest.mark.slow, id="-".join(case)) for case in CASES],
)
@torch.no_grad()
def test_exported_fusion_equals_torch(fusion: str, side: str, tiny_model: Models, tmp_path: Path) -> None:
    model = make(fusion, tiny_model, query_side=side)
    layers = LAYERS[: model.shape.num_layers]
    path = export_onnx(model, layers, tmp_path / "fam.onnx")
    for count in (1, 2, 50):
        states = [torch.randn(count, 26, 32) * 3 for _ in layers]
        found = run(path, {f"hidden_states_{i}": state.numpy() for i, state in zip(layers, states, strict=True)})
        np.testing.assert_allclose(found, model(*as_read(model.shape, states, None)).numpy(), atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["linear", "late"])
@torch.no_grad()
def test_inputs_of_differing_lengths_take_a_mask(fusion: str, tiny_model: Models, tmp_path: Path) -> None:
    model = make(fusion, tiny_model, num_tokens=0, num_layers=1)
    path = export_onnx(model, (4,), tmp_path / "fam.onnx")
    states, mask = torch.randn(3, 11, 32), torch.arange(11) < torch.tensor([[11], [4], [1]])
    found = run(path, {"hidden_states_4": states.numpy(), "mask": mask.numpy()})
    np.testing.assert_allclose(found, model([states], mask).numpy(), atol=1e-4)


def test_fusion_that_draws_weights_is_refused(tiny_model: Models, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the fusion reference draws weights"):
        export_onnx(make("reference", tiny_model), LAYERS, tmp_path / "fam.onnx")


def test_fusion_that_torch_cannot_export_is_named(tiny_model: Models, tmp_path: Path) -> None:
    model = make("linear", tiny_model)
    model.forward = lambda states, *_: torch.empty(32, 32).uniform_() @ states[0][0].T  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="to_onnx: torch cannot export the fusion linear") as caught:
        export_onnx(model, LAYERS, tmp_path / "fam.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_file_that_differs_from_torch_is_not_written(
    tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = make("linear", tiny_model), make("linear", tiny_model, head="mean")
    wrong = exporting._exported(
        exporting._NullGallery(other, has_mask=False), [f"hidden_states_{layer}" for layer in LAYERS]
    )
    monkeypatch.setattr(exporting, "_exported", lambda *_: wrong)
    with pytest.raises(ValueError, match="the file of linear differs from torch by"):
        export_onnx(model, LAYERS, tmp_path / "fam.onnx")
    assert not list(tmp_path.iterdir())
