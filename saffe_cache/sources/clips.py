"""Decode clips: evenly spaced frames of a film, or of an animated picture. The only importer of PyAV."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

SIGNATURES = {
    "mov": rb".{4}(?:ftyp|moov|wide|mdat)",
    "matroska": rb"\x1a\x45\xdf\xa3",
    "avi": rb"RIFF.{4}AVI ",
    "mpeg": rb"\0\0\x01\xba",
}
"""How films of each supported format begin, by FFmpeg's names. It is told the format: others, such as playlists, may
open further files."""
_ANIMATIONS = ("GIF", "PNG", "WEBP")


def decode_clip(data: bytes, num_frames: int) -> np.ndarray:
    """Frames of a clip as RGB, uint8 [frames, height, width, 3], upright and evenly spaced from the first one on.

    Frame i of n is frame floor(i * total / n) of the clip, as in transformers; a shorter clip repeats frames.

    Raises:
        ImportError: the package for films is missing.
        ValueError: the bytes are no readable clip.
    """
    kind = next((name for name, begin in SIGNATURES.items() if re.match(begin, data[:16], re.DOTALL)), None)
    try:
        return _animation(data, num_frames) if kind is None else _film(data, kind, num_frames)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # FFmpeg's and PIL's many kinds
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _places(total: int, num_frames: int) -> list[int]:
    """Numbers of the frames to take."""
    if not total:
        raise ValueError("it has no frames")
    return [number * total // num_frames for number in range(num_frames)]


def _film(data: bytes, kind: str, num_frames: int) -> np.ndarray:
    try:
        import av
    except ImportError:
        raise ImportError("Reading videos needs the package av: pip install 'saffe-cache[video]'.") from None
    with av.open(io.BytesIO(data), format=kind) as container:
        if not container.streams.video:
            raise ValueError("it has no pictures")
        stated = sum(packet.size > 0 for packet in container.demux(video=0))
    places = _places(stated, num_frames)
    with av.open(io.BytesIO(data), format=kind) as container:
        found, total = _take(container.decode(video=0), places)
    if len(found) < len(set(places)):  # fewer frames than packets
        places = _places(total, num_frames)
        with av.open(io.BytesIO(data), format=kind) as container:
            found, _ = _take(container.decode(video=0), places)
    return np.stack([found[place] for place in places])


def _take(frames: Iterator[Any], places: Sequence[int]) -> tuple[dict[int, np.ndarray], int]:
    """Some frames of a film by their numbers, and how many were decoded."""
    wanted, found, number = set(places), dict[int, np.ndarray](), -1
    for number, frame in enumerate(frames):
        if number in wanted:
            turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            found[number] = np.ascontiguousarray(turned)
            if len(found) == len(wanted):
                break
    return found, number + 1


def _animation(data: bytes, num_frames: int) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=_ANIMATIONS) as image:
        total = getattr(image, "n_frames", 1)
        if total < 2:
            raise ValueError("it is a single picture, expected a film, or an animated GIF, PNG or WebP")
        places, found = _places(total, num_frames), dict[int, np.ndarray]()
        for place in sorted(set(places)):
            image.seek(place)
            found[place] = np.asarray(image.convert("RGB"))
        return np.stack([found[place] for place in places])
