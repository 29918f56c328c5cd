"""Views of a photo that are encoded besides the photo itself: its mirror image and random crops.

A view is known by its name: "" is the plain photo, `flip` its mirror image, `crop-1`, `crop-2` and so on random crops.
Which crop follows from the photo's content and the view's name alone. Parallel processes, a resumed extraction and a
repair therefore encode the same pixels, and views may be added later.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from typing import Any, Literal

from saffe_cache.core.options import refuse

IndexViews = Literal["plain", "mean"]
"""Whether the vector of a photo that is searched for is its own, or the mean of those of all its views, made unit."""
PLAIN, FLIP = "", "flip"
_MIRRORED = 0
"""PIL's number of a transposition from left to right."""
_SCALE, _RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
"""Part of the photo's area that a crop covers, and its width over its height."""
_SHORTEST = math.sqrt(_SCALE[0] * _RATIO[0])
"""Shorter edge of the smallest crop over that of its photo, or more."""
_ATTEMPTS = 10


def parse_views(text: str) -> tuple[str, ...]:
    """Names of the views that an option such as flip,crop=3 asks for besides the plain photo, in their order.

    Raises:
        ValueError: it asks for something else, or for a view twice.
    """
    found: list[str] = []
    for part in filter(None, text.split(",")):
        crops = re.fullmatch(r"crop=([1-9][0-9]?)", part)
        if part != FLIP and not crops:
            refuse("views", part, "flip, or crop=N with N from 1 to 99")
        found += [f"crop-{number}" for number in range(1, int(crops[1]) + 1)] if crops else [FLIP]
    if len(set(found)) < len(found):
        refuse("views", text, "flip and crop=N, each once")
    return tuple(sorted(found, key=place_of))


def place_of(view: str) -> int:
    """Where a view comes in the order of all: the plain one first, then the mirror image, then the crops.

    Raises:
        ValueError: this release does not know the view.
    """
    if view in (PLAIN, FLIP):
        return int(view == FLIP)
    crop = re.fullmatch(r"crop-([1-9][0-9]?)", view)
    if not crop:
        raise ValueError(f"view {view!r:.60}: found an unknown one, expected flip or crop-N. Use a later release.")
    return 1 + int(crop[1])


def indexed_views(choice: IndexViews, others: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The views whose vectors are averaged; `others` are all that there are besides the plain one.

    Raises:
        ValueError: there are no others, and the mean is asked for.
    """
    if choice == "plain":
        return (PLAIN,)
    if not others:
        refuse(
            "index_views", f"mean, and no views in {where}", "plain, or a cache of saffe extract --views flip,crop=3"
        )
    return (PLAIN, *others)


def seen_as(picture: Any, view: str, content_hash: bytes) -> Any:
    """A view of a picture of PIL, whose file has this SHA-256; the plain one is the picture itself."""
    if view == PLAIN:
        return picture
    if view == FLIP:
        return picture.transpose(_MIRRORED)
    return picture.crop(crop_box(picture.width, picture.height, view, content_hash))


def edge_of_photo(view: str, edge: int) -> int:
    """Pixels of a photo's shorter edge from which the view's own has `edge` pixels."""
    return edge if view in (PLAIN, FLIP) else math.ceil((edge + 1) / _SHORTEST)  # 1 for rounding


def crop_box(width: int, height: int, view: str, content_hash: bytes) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random crop of a picture, in pixels.

    The crop of torchvision's RandomResizedCrop with scale 0.5 to 1: area and ratio are drawn up to ten times until it
    fits into the picture; else it is the largest central one of an allowed ratio. The four numbers of an attempt, in
    [0, 1), are the little-endian 64-bit words of SHA-256(content hash, "VIEW/ATTEMPT"), over 2**64.
    """
    for attempt in range(_ATTEMPTS):
        words = struct.unpack("<4Q", hashlib.sha256(content_hash + f"{view}/{attempt}".encode()).digest())
        scale, ratio, x, y = (word / 2**64 for word in words)
        area = width * height * (_SCALE[0] + scale * (_SCALE[1] - _SCALE[0]))
        aspect = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** ratio
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(x * (width - wide + 1)), int(y * (height - high + 1))
            return left, top, left + wide, top + high
    wide, high = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high
