"""Decode files into pictures, sounds and clips, and tell one from the other. The only importer of soundfile."""

from __future__ import annotations

import hashlib
import io
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saffe_cache.core.features import Modality
from saffe_cache.sources.clips import SIGNATURES, decode_clip

_FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Supported formats of pictures. PIL knows forty more, among them EPS, for which it runs Ghostscript on the file."""
_PNG = b"\x89PNG\r\n\x1a\n"
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
"""Brands of files in the HEIF container that only pillow-heif decodes."""
_SIGNATURES: tuple[tuple[Modality, bytes], ...] = (
    ("image", rb"\xff\xd8\xff|\x89PNG\r\n|GIF8|BM.{4}\0{4}|P[1-6]\s|\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    ("image", rb"RIFF.{4}WEBP|.{4}ftyp(?:avi[fs]|" + b"|".join(_HEIC) + rb")"),
    ("audio", rb"RIFF.{4}WAVE|RF64|fLaC|OggS|ID3|\xff[\xfb\xfa\xf3\xf2]|FORM.{4}AIF[FC]|caff\0|riff\x2e\x91|\.snd"),
    ("audio", rb".{4}ftypM4[AB]"),
    *(("video", begin) for begin in SIGNATURES.values()),
)
"""How files of each kind begin. TIFF is not among them: raw photos of cameras begin in the same way."""
CONTENT_RULES = hashlib.sha256(repr(_SIGNATURES).encode()).hexdigest()
"""Which release's `modality_of_content` it is."""
_CANCELLED = 0.01
"""Power of a sound's mean, as a fraction of its loudest channel's, below which that channel replaces the mean."""
_EMPTY = "the sound has no samples"


LOW_GREY = 4095
"""Largest value of 16-bit grey that looks as if only 8 to 12 of the bits were used."""


def decode(
    modality: Modality,
    data: bytes,
    sampling_rate: int | None = None,
    grey_bits: int | None = None,
    num_frames: int | None = None,
    edge: int | None = None,
) -> Any:
    """Decode an upright RGB picture, a mono float32 waveform at the sampling rate (Hz), or so many frames of a clip.

    Transparency is dropped, as in transformers. 16-bit grey is scaled to 8 bits; a picture whose values are all low,
    and whose file does not say how many bits it uses, has `low_grey` in its `info`. Channels are averaged; if they
    cancel out, the loudest is taken.

    Args:
        grey_bits: how many bits of 16-bit grey are used, where a file does not say it.
        edge: the shorter edge in pixels that is enough: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that leaves
            as many. Such a picture has `reduced` in its `info`. None decodes all pixels.

    Raises:
        OSError, ValueError: the bytes are no readable picture or sound.
    """
    if modality == "video":
        return decode_clip(data, num_frames or 1)
    return _decode_image(data, grey_bits, edge) if modality == "image" else _decode_audio(data, sampling_rate or 16_000)


def has_edge(picture: Any, edge: int | None) -> bool:
    """Whether `decode` of the same file with this larger edge, or None, would give the same pixels; False if unsure."""
    return "reduced" not in getattr(picture, "info", {}) or (edge is not None and min(picture.size) > edge)


def modality_of_content(data: bytes) -> Modality | None:
    """Whether a file is a picture, a sound or a film, by its first 16 bytes; None if they do not say."""
    for modality, signature in _SIGNATURES:
        if re.match(signature, data[:16], re.DOTALL):
            return modality
    return None


def media_bytes(value: Any) -> bytes:
    """The bytes of a picture or a sound in memory. Pixels become a PNG file, and a waveform a WAV file.

    Args:
        value: bytes, a path, a picture of PIL, pixels as uint8 [height, width] or with channels first or last, or a
            mapping with bytes or a path, or with the array and sampling_rate of a waveform.

    Raises:
        OSError: it is none of these, or the file cannot be read.
    """
    if isinstance(value, Mapping) and "array" in value:
        return _wave_file(np.asarray(value["array"], np.float32), int(value["sampling_rate"]))
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, (str, os.PathLike)):
        return Path(value).expanduser().read_bytes()
    if hasattr(value, "convert") and hasattr(value, "save"):  # of PIL
        return _png_file(_upright(value))  # as a file with the same EXIF data is read
    if value is None:
        raise OSError("there is none")
    pixels = np.asarray(value)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise OSError(
            f"found {type(value).__name__} of {pixels.dtype} and shape {pixels.shape}, expected a picture of PIL, "
            "bytes, a path, or uint8 pixels. Pass pictures before they are normalised"
        )
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) and pixels.shape[2] not in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    from PIL import Image

    return _png_file(Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels))


def _png_file(image: Any) -> bytes:
    file = io.BytesIO()
    stored = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")
    stored.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _wave_file(waveform: np.ndarray, rate: int, subtype: str = "FLOAT") -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, waveform, rate, format="WAV", subtype=subtype)
    return file.getvalue()


def count_samples(data: bytes, sampling_rate: int | None = None) -> int:
    """Samples of the waveform that `decode` returns for a sound, from its header alone where that can be trusted.

    Raises:
        ImportError: a package for sounds is missing.
        ValueError: the bytes are no readable sound.
    """
    soundfile, _ = _sound_packages()
    rate = sampling_rate or 16_000
    try:
        header = soundfile.info(io.BytesIO(data))
    except soundfile.SoundFileError as error:
        raise _unreadable_sound(error) from None
    if header.format == "MP3":  # a header may state more than a truncated file has
        return len(_decode_audio(data, rate))
    frames, stored_rate = int(header.frames), int(header.samplerate)
    return (2 * frames * rate + stored_rate) // (2 * stored_rate)  # rounded, as soxr does


def thumbnail(data: bytes, side: int, modality: Modality = "image") -> bytes:
    """A JPEG of a picture, or of the middle frame of a video, whose longer side has at most `side` pixels.

    Raises:
        OSError, ValueError: the bytes are no readable picture or video.
    """
    from PIL import Image

    picture = Image.fromarray(decode_clip(data, 3)[1]) if modality == "video" else _decode_image(data, edge=2 * side)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=72, optimize=True)
    return file.getvalue()


def sound_excerpt(data: bytes, seconds: float, sampling_rate: int) -> bytes:
    """A mono WAV file with 16 bits of the first seconds of a sound, for a player.

    Args:
        sampling_rate: the highest one (Hz). A sound with a lower rate keeps its own.

    Raises:
        ImportError: a package for sounds is missing.
        ValueError: the bytes are no readable sound.
    """
    _, soxr = _sound_packages()
    waveform, rate = _read_mono(data, seconds)
    if rate > sampling_rate:
        waveform, rate = soxr.resample(waveform, rate, sampling_rate), sampling_rate
    levels = np.rint(np.nan_to_num(waveform).clip(-1, 1) * 32768).clip(max=32767)
    return _wave_file(levels.astype(np.int16), rate, "PCM_16")


def _decode_image(data: bytes, grey_bits: int | None = None, edge: int | None = None) -> Any:
    try:
        return _decode_pixels(data, grey_bits, edge)
    except (OSError, ValueError):
        pixels = _without_metadata(data)
        if pixels is None:
            raise
    return _decode_pixels(pixels, grey_bits, edge)


def _decode_pixels(data: bytes, grey_bits: int | None, edge: int | None) -> Any:
    from PIL import Image, UnidentifiedImageError

    Image.init()
    reads_heic = data[8:12] in _HEIC and _register_heif()
    try:
        with Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN]) as image:
            size = image.size
            if edge:
                image.draft(None, (edge, edge))  # PIL keeps at least these pixels; formats other than JPEG ignore it
            is_reduced = image.size != size
            image.load()
            upright = _upright(image)
            if upright.mode == "F" or upright.mode.startswith("I"):
                grey, stated = np.asarray(upright), _stated_maximum(image, data)
                is_low = stated is None and grey_bits is None and 0 < grey.max() <= LOW_GREY
                upright = Image.fromarray(_to_eight_bits(grey, stated or 2 ** (grey_bits or 16) - 1)).convert("RGB")
                upright.info |= {"low_grey": True} if is_low else {}
            elif "transparency" in upright.info:  # avoids a warning of PIL
                upright = upright.convert("RGBA")
            picture = upright if upright.mode == "RGB" else upright.convert("RGB")  # which would copy RGB
            picture.info |= {"reduced": True} if is_reduced else {}
            return picture
    except UnidentifiedImageError:
        if data[8:12] in _HEIC and not reads_heic:
            raise OSError("a HEIC file, which needs pillow-heif: pip install 'saffe-cache[heic]'") from None
        raise OSError("cannot identify image file: it is no picture, or of an unsupported format") from None
    except OSError:
        raise
    except Exception as error:  # PIL's parsers raise SyntaxError, struct.error, TypeError and others
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _register_heif() -> bool:
    """Let PIL read HEIC files, if pillow-heif is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _upright(image: Any) -> Any:
    """The picture turned as its EXIF data say, itself where they say nothing or cannot be read."""
    from PIL import ExifTags, ImageOps

    try:
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if is_turned else image  # which would copy it
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


def _stated_maximum(image: Any, data: bytes) -> int | None:
    """The largest grey value that a file with 16 bits says it uses: MaxSampleValue of TIFF, sBIT of PNG."""
    if image.format == "PPM":
        return 65535  # to which PIL scales the maximum in its header
    if image.format == "TIFF":
        return int(np.max(image.tag_v2[281])) if 281 in image.tag_v2 else None
    place = data.find(b"sBIT", 0, data.find(b"IDAT")) if image.format == "PNG" else -1
    return 2 ** data[place + 4] - 1 if place > 0 else None


def _to_eight_bits(pixels: np.ndarray, stated: int = 65535) -> np.ndarray:
    """Scale 16-bit grey to 8 bits; PIL's own conversion would clip.

    The stated maximum becomes white where no pixel exceeds it: PNG files may also be scaled to all 16 bits.
    """
    if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"{pixels.dtype} pixels from {pixels.min()} to {pixels.max()} have no known scale")
    if not pixels.max() <= stated < 65535 or stated < 1:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return ((pixels.astype(np.uint32) * 510 + stated) // (2 * stated)).astype(np.uint8)


def _sound_packages() -> tuple[Any, Any]:
    """soundfile and soxr, which are imported only where there are sounds."""
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise ImportError(f"Reading sounds needs the package {error.name}: pip install 'saffe-cache[audio]'.") from None
    return soundfile, soxr


def _unreadable_sound(error: Exception) -> ValueError:
    """Says why, without the object in memory that the library's own message names."""
    reason = getattr(error, "error_string", str(error)) or type(error).__name__
    return ValueError(f"libsndfile cannot read it: {reason.rstrip('.')}")


def _decode_audio(data: bytes, sampling_rate: int) -> np.ndarray:
    _, soxr = _sound_packages()
    waveform, rate = _read_mono(data)
    resampled = np.asarray(soxr.resample(waveform, rate, sampling_rate), dtype=np.float32)
    if not len(resampled):
        raise ValueError(_EMPTY)
    return resampled


def _read_mono(data: bytes, seconds: float | None = None) -> tuple[np.ndarray, int]:
    """The waveform of a sound, or of its first seconds, and its sampling rate."""
    soundfile, _ = _sound_packages()
    file = io.BytesIO(data)
    try:
        frames = -1 if seconds is None else round(seconds * soundfile.info(file).samplerate)
        file.seek(0)
        waveform, rate = soundfile.read(file, frames, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, MemoryError) as error:  # a broken header may state any length
        raise _unreadable_sound(error) from None
    if not len(waveform):
        raise ValueError(_EMPTY)
    mono, powers = waveform.mean(axis=1), np.square(waveform).mean(axis=0)
    if np.square(mono).mean() < _CANCELLED * powers.max():  # channels of opposite phase
        mono = np.ascontiguousarray(waveform[:, powers.argmax()])
    return mono, rate
