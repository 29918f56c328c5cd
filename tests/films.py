"""Films for the tests, whose frames are stored without loss."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
import pytest

av = pytest.importorskip("av")


def film(frames: Iterable[np.ndarray], kind: str = "matroska", codec: str = "ffv1") -> bytes:
    """A file of frames, each uint8 [height, width, 3]."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = None
        for pixels in frames:
            if stream is None:
                stream = container.add_stream(codec, rate=8)
                stream.height, stream.width = pixels.shape[:2]
                stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())
    return file.getvalue()


def noise(num_frames: int, seed: int, height: int = 40, width: int = 56) -> np.ndarray:
    """Random frames, uint8 [frames, height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
