"""A trained fusion as an ONNX file: cached or computed tokens of photos in, unit vectors f(x, null) out.

Inputs are `hidden_states_{layer}` [n, tokens, d], float32, for each layer of the gallery that the run fuses, and
for inputs of differing lengths (sounds) `mask` [n, tokens], bool; the output is `vectors` [n, d]. `n` is free, and so
is the number of tokens where there is a mask. The encoder is not part of the file, and paired texts cannot enter.

`reference` is refused, as it draws weights at random in each call.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from saffe_cache.core.atomic_io import write_whole
from saffe_cache.fusion.base import Fusion, as_read

_TOLERANCE = 1e-4
"""How far a coordinate of a unit vector may be from torch's."""
_TOKENS = 26
"""Tokens of the example where their number is free."""


def export_onnx(model: Fusion, layers: Sequence[int], path: str | Path) -> Path:
    """Write a fusion as ONNX, and return the path. The file is run first, and compared with torch.

    Raises:
        ValueError: the fusion cannot be exported, or the file computes something else than torch.
        ImportError: a package is missing.
        OSError: the disk is full or gone.
    """
    shape = model.shape
    if not shape.entry.is_deterministic:
        raise ValueError(f"to_onnx: the fusion {shape.fusion} draws weights in each call. Export another fusion.")
    if shape.media:
        raise ValueError(f"to_onnx: the fusion {shape.fusion} takes several media. Export a fusion of one.")
    gallery = _NullGallery(copy.deepcopy(model).cpu().eval(), has_mask=not shape.num_tokens)
    names = [f"hidden_states_{layer}" for layer in layers] + ["mask"] * gallery.has_mask
    data = _exported(gallery, names)
    for count in (1, 5):
        _require_equal(gallery, data, names, _example(gallery, count))
    write_whole(Path(path), data)
    return Path(path)


class _NullGallery(nn.Module):
    """f(x, null), with all inputs in one list, so that their number is free."""

    def __init__(self, model: Fusion, *, has_mask: bool) -> None:
        super().__init__()
        self.model, self.has_mask = model, has_mask

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        states, mask = (inputs[:-1], inputs[-1]) if self.has_mask else (inputs, None)
        return self.model(*as_read(self.model.shape, states, mask))  # type: ignore[no-any-return]


def _example(gallery: _NullGallery, count: int) -> list[torch.Tensor]:
    """Random tokens; where there is a mask, an input is padded."""
    shape, generator = gallery.model.shape, torch.Generator().manual_seed(count)
    num_tokens = shape.num_tokens or _TOKENS + count
    size = count, num_tokens, shape.hidden_size
    inputs = [torch.randn(size, generator=generator) for _ in range(shape.num_layers)]
    if gallery.has_mask:
        lengths = torch.linspace(num_tokens, num_tokens // 2, count).long()
        inputs.append(torch.arange(num_tokens) < lengths[:, None])
    return inputs


def _exported(gallery: _NullGallery, names: Sequence[str]) -> bytes:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise _missing(error) from None
    free = {0: torch.export.Dim("n")} | ({1: torch.export.Dim("tokens", min=2)} if gallery.has_mask else {})
    fusion = gallery.model.shape.fusion
    try:
        with torch.no_grad(), _quiet():
            program: Any = torch.onnx.export(
                gallery,
                (_example(gallery, 3),),
                dynamo=True,
                dynamic_shapes={"inputs": [free for _ in names]},
                input_names=list(names),
                output_names=["vectors"],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"to_onnx: torch cannot export the fusion {fusion} ({cause}). Export another one.") from None
    data = io.BytesIO()
    program.save(data)
    return data.getvalue()


def _require_equal(gallery: _NullGallery, data: bytes, names: Sequence[str], inputs: Sequence[torch.Tensor]) -> None:
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing(error) from None
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    [found] = session.run(["vectors"], {name: one.numpy() for name, one in zip(names, inputs, strict=True)})
    with torch.no_grad():
        farthest = float(np.abs(found - gallery(list(inputs)).numpy()).max())
    if not farthest <= _TOLERANCE:
        what = f"the file of {gallery.model.shape.fusion} differs from torch by {farthest:.1e}"
        raise ValueError(f"to_onnx: {what}, expected {_TOLERANCE} or less. Export with another version of torch.")


def _missing(error: ImportError) -> ImportError:
    return ImportError(f"to_onnx needs the package {error.name}: pip install 'saffe-cache[onnx]'.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own progress."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
