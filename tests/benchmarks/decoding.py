"""Decoding JPEGs of 640 px and 12 megapixels for an encoder that resizes to 256. See bench.py.

    pip install simplejpeg PyTurboJPEG opencv-python-headless pyvips pyvips-binary torchcodec    (each optional)
    python tests/benchmarks/bench.py --sections decoding

*Plain PIL* is what one would write: open, exif_transpose, convert("RGB"). The others return RGB pixels and ignore EXIF
data; *scaled* ones decode at the same part of the size as ours. Libraries are compared by processor time, which other
jobs change less; two threads or processes beside one, by elapsed time. Photos are noise of many scales.
"""

from __future__ import annotations

import io
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from timing import Figure, not_installed, take_turns

from saffe_cache.sources.decoding import decode

EDGE = 512
"""Twice the shorter edge of DINOv2's resize."""
PHOTOS = {"640 px": ((640, 480), 16, 1.3), "12 MP": ((4032, 3024), 2, 3.0)}
"""Width and height, number, and target of ours over plain PIL."""
ROUNDS = 5

Decoder = Callable[[bytes], Any]


def measure(work: Path) -> list[Figure]:
    return [figure for name in PHOTOS for figure in measure_size(name)]


def measure_size(name: str) -> Iterator[Figure]:
    size, count, target = PHOTOS[name]
    photos = [draw_photo(size, seed) for seed in range(count)]
    factor = max(one for one in (1, 2, 4, 8) if one == 1 or min(size) // one >= EDGE)
    kilobytes = sum(map(len, photos)) / count / 1000
    yield Figure(name=f"{name}: size of a photo", unit="kB", value=kilobytes)
    decoders: dict[str, Decoder | None] = {"ours": ours, "plain PIL": plain}
    for find in (with_simplejpeg, with_turbojpeg, with_opencv, with_vips, with_torchcodec):
        decoders |= find(factor)
    found = {title: partial(decode_all, decoder, photos) for title, decoder in decoders.items() if decoder}
    rounds = take_turns(found, ROUNDS, clock=time.process_time)
    yield rounds.rate("ours", f"{name}: ours", "images/s", note="of processor time")
    for title in decoders:
        if title in found and title != "plain PIL":
            goal = {"at_least": target} if title == "ours" else {}
            yield rounds.ratio(title, "plain PIL", f"{name}: {title} / plain PIL", **goal)
        elif title not in found:
            yield not_installed(f"{name}: {title} / plain PIL")
    yield from measure_workers(name, photos * 2)


def measure_workers(name: str, photos: Sequence[bytes]) -> Iterator[Figure]:
    """Two workers over one."""
    fork = multiprocessing.get_context("fork")
    with ThreadPoolExecutor(2) as threads, ProcessPoolExecutor(2, fork) as processes:
        candidates = {
            "one": partial(decode_all, ours, photos),
            "threads": partial(decode_in, threads, photos),
            "processes": partial(decode_in, processes, photos),
        }
        rounds = take_turns(candidates, ROUNDS)
    for kind in ("threads", "processes"):
        yield rounds.ratio(kind, "one", f"{name}: ours, two {kind} / one", note="of elapsed time")


def draw_photo(size: tuple[int, int], seed: int) -> bytes:
    """A JPEG of noise of many scales, the finer the weaker; it has about the bytes of a photo."""
    generator, (width, height) = np.random.default_rng(seed), size
    pixels = np.zeros((height, width, 3), np.float32)
    scale = 1
    while scale < width:
        coarse = generator.integers(0, 256, (max(1, height // scale), max(1, width // scale), 3), dtype=np.uint8)
        pixels += scale**0.4 * (
            np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float32) - 128
        )
        scale *= 2
    file = io.BytesIO()
    Image.fromarray(np.clip(128 + 0.045 * pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def decode_all(decoder: Decoder, photos: Sequence[bytes]) -> int:
    for photo in photos:
        decoder(photo)
    return len(photos)


def decode_in(pool: Executor, photos: Sequence[bytes]) -> int:
    return len(list(pool.map(size_of, photos)))


def size_of(photo: bytes) -> tuple[int, int]:
    """Processes do not send pictures back."""
    size: tuple[int, int] = ours(photo).size
    return size


def ours(photo: bytes) -> Any:
    return decode("image", photo, edge=EDGE)


def plain(photo: bytes) -> Any:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(photo))).convert("RGB")


def with_simplejpeg(factor: int) -> dict[str, Decoder | None]:
    try:
        import simplejpeg
    except ImportError:
        return {"simplejpeg": None}
    least = {"min_height": EDGE, "min_width": EDGE, "min_factor": 1}
    return {
        "simplejpeg, whole": lambda photo: simplejpeg.decode_jpeg(photo, "RGB"),
        "simplejpeg, scaled": lambda photo: simplejpeg.decode_jpeg(photo, "RGB", **least),
    }


def with_turbojpeg(factor: int) -> dict[str, Decoder | None]:
    try:
        import turbojpeg

        library = turbojpeg.TurboJPEG()
    except (ImportError, OSError, RuntimeError):  # its shared library is installed apart
        return {"PyTurboJPEG": None}
    read = partial(library.decode, pixel_format=turbojpeg.TJPF_RGB)
    return {"PyTurboJPEG, whole": read, "PyTurboJPEG, scaled": partial(read, scaling_factor=(1, factor))}


def with_opencv(factor: int) -> dict[str, Decoder | None]:
    try:
        import cv2
    except ImportError:
        return {"OpenCV": None}
    cv2.setNumThreads(1)
    reduced = cv2.IMREAD_COLOR if factor == 1 else getattr(cv2, f"IMREAD_REDUCED_COLOR_{factor}")

    def read(flag: int, photo: bytes) -> Any:
        return cv2.cvtColor(cv2.imdecode(np.frombuffer(photo, np.uint8), flag), cv2.COLOR_BGR2RGB)

    return {"OpenCV, whole": partial(read, cv2.IMREAD_COLOR), "OpenCV, scaled": partial(read, reduced)}


def with_vips(factor: int) -> dict[str, Decoder | None]:
    try:
        import pyvips
    except (ImportError, OSError):
        return {"pyvips": None}
    pyvips.cache_set_max(0)

    def read(shrink: int, photo: bytes) -> Any:
        return pyvips.Image.new_from_buffer(photo, "", access="sequential", shrink=shrink).numpy()

    return {"pyvips, whole": partial(read, 1), "pyvips, scaled": partial(read, factor)}


def with_torchcodec(factor: int) -> dict[str, Decoder | None]:
    try:
        import torch
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError):  # its libraries may be of another build of torch
        return {"torchcodec": None}
    return {"torchcodec, whole": lambda photo: decode_jpeg(torch.frombuffer(bytearray(photo), dtype=torch.uint8))}
