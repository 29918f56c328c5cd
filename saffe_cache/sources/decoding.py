"""Decode files into pictures and sounds. The only importer of PIL and soundfile."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np

from saffe_cache.core.features import Modality

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Supported formats of pictures. PIL knows forty more, among them EPS, for which it runs Ghostscript on the file."""
_PNG = b"\x89PNG\r\n\x1a\n"


_CANCELLED = 0.01
"""Power of a sound's mean, as a fraction of its loudest channel's, below which that channel replaces the mean."""


def decode(modality: Modality, data: bytes, sampling_rate: int | None = None) -> Any:
    """Decode an upright RGB picture, or a mono float32 waveform at the sampling rate (Hz).

    Transparency is dropped, as in transformers. 16-bit grey is scaled to 8 bits. Channels are averaged; if they cancel
    out, the loudest is taken.

    Raises:
        OSError, ValueError: the bytes are no readable picture or sound.
    """
    return _decode_image(data) if modality == "image" else _decode_audio(data, sampling_rate or 16_000)


def thumbnail(data: bytes, side: int) -> bytes:
    """A JPEG of a picture, decoded as for encoders, whose longer side has at most `side` pixels.

    Raises:
        OSError, ValueError: the bytes are no readable picture.
    """
    picture = _decode_image(data)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=72, optimize=True)
    return file.getvalue()


def _decode_image(data: bytes) -> Any:
    try:
        return _decode_pixels(data)
    except (OSError, ValueError):
        pixels = _without_metadata(data)
        if pixels is None:
            raise
    return _decode_pixels(pixels)


def _decode_pixels(data: bytes) -> Any:
    from PIL import Image, UnidentifiedImageError

    Image.init()
    try:
        with Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN]) as image:
            image.load()
            upright = _upright(image)
            if upright.mode == "F" or upright.mode.startswith("I"):
                upright = Image.fromarray(_to_eight_bits(np.asarray(upright), _stated_maximum(image, data)))
            elif "transparency" in upright.info:  # avoids a warning of PIL
                upright = upright.convert("RGBA")
            return upright.convert("RGB")
    except UnidentifiedImageError:
        raise OSError("cannot identify image file: it is no picture, or of an unsupported format") from None
    except OSError:
        raise
    except Exception as error:  # PIL's parsers raise SyntaxError, struct.error, TypeError and others
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _upright(image: Any) -> Any:
    """The picture turned as its EXIF data say; unreadable EXIF data say nothing."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as above; the pixels are loaded and good
        return image


def _without_metadata(data: bytes) -> bytes | None:
    """A PNG without what is not needed for its pixels, such as texts, profiles and damaged EXIF data.

    None for other files, whose decoders pass over such data, and where there is nothing to leave out.
    """
    if not data.startswith(_PNG):
        return None
    kept, place = [_PNG], len(_PNG)
    while place + 12 <= len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        chunk = data[place : place + 12 + size]
        is_whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if not kind[:1].islower() or (
            kind in (b"tRNS", b"sBIT", b"eXIf") and is_whole
        ):  # upper case: needed for the pixels
            kept.append(chunk)
        place += len(chunk)
    kept.append(data[place:])
    without = b"".join(kept)
    return None if len(without) == len(data) else without


def _stated_maximum(image: Any, data: bytes) -> int:
    """The largest grey value that a file with 16 bits says it uses: MaxSampleValue of TIFF, sBIT of PNG."""
    if image.format == "TIFF":
        return int(np.max(image.tag_v2.get(281, 65535)))
    place = data.find(b"sBIT", 0, data.find(b"IDAT")) if image.format == "PNG" else -1
    return 2 ** data[place + 4] - 1 if place > 0 else 65535


def _to_eight_bits(pixels: np.ndarray, stated: int = 65535) -> np.ndarray:
    """Scale 16-bit grey to 8 bits; PIL's own conversion would clip.

    The stated maximum becomes white where no pixel exceeds it: PNG files may also be scaled to all 16 bits.
    """
    if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"{pixels.dtype} pixels from {pixels.min()} to {pixels.max()} have no known scale")
    if not pixels.max() <= stated < 65535 or stated < 1:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return ((pixels.astype(np.uint32) * 510 + stated) // (2 * stated)).astype(np.uint8)


def _decode_audio(data: bytes, sampling_rate: int) -> np.ndarray:
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise ImportError(f"Reading sounds needs the package {error.name}: pip install 'saffe-cache[audio]'.") from None
    try:
        waveform, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, MemoryError) as error:  # a broken header may state any length
        raise ValueError(f"{type(error).__name__}: {error}") from None
    mono = waveform.mean(axis=1)
    if len(mono):
        powers = np.square(waveform).mean(axis=0)
        if np.square(mono).mean() < _CANCELLED * powers.max():  # channels of opposite phase
            mono = np.ascontiguousarray(waveform[:, powers.argmax()])
    resampled = np.asarray(soxr.resample(mono, rate, sampling_rate), dtype=np.float32)
    if not len(resampled):
        raise ValueError("the sound has no samples")
    return resampled
