"""Draws a small captioned photo set that needs no download: coloured shapes at places on soft backgrounds.

    python data/scenes.py --out DIR --train 1600 --dev 200 --test 300 --seed 0          (20 s, 31 MB)

writes `DIR/{split}/{split}-00000.png`, ..., one `DIR/{split}/metadata.jsonl` with a line per picture,

    {"file_name": "train-00000.png", "captions": [five different captions]}

and `DIR/scenes.json` with the settings. DIR appears by one rename, so a folder that exists is complete:
the same settings return it as it is, other settings are refused.

Design: a `Scene` says what is where, and everything else is derived from it. `sample_scene` draws one,
`render` turns it into a picture and `captions` into text, each from a random stream of its own, so that
another rendering of the same scenes changes neither the pictures nor the captions.

What makes it a fair retrieval set: a *composition* is the set of (colour, shape) pairs in a scene. A split
never repeats one, and a hash of the composition says which split may have it, so that no composition of
`test` is seen in `train`, whatever the numbers of scenes. A larger split begins with the scenes of a smaller.
"""

from __future__ import annotations

import cmath
import hashlib
import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

if not __package__:  # run as a script: the path then holds data/, not its parent
    sys.path.insert(0, str(Path(__file__).parents[1]))

from data.drawn import draw_once, run_command

VERSION = 1
"""Counts up when the same settings would draw other pictures or captions."""

SIZE = 112
SPLITS = {"train": 1600, "dev": 200, "test": 300}

COLOURS = {
    "red": (205, 25, 35),
    "orange": (245, 130, 15),
    "yellow": (250, 222, 25),
    "green": (30, 145, 60),
    "blue": (30, 85, 205),
    "purple": (120, 45, 160),
    "pink": (245, 125, 180),
    "black": (28, 28, 30),
}

RADII = {"small": (0.085, 0.1), "large": (0.14, 0.155)}
"""Radius of the circle around an object, as (least, most) of the picture's side."""

PLACE_GRID = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
PLACES = {place: complex(x - 1, y - 1) for y, row in enumerate(PLACE_GRID) for x, place in enumerate(row)}
"""Column + row * 1j of every place, from the middle of the picture; rows count downwards."""

SPACING = 0.25
"""Between neighbouring columns or rows, of the side; a centre crop of 7/8 cuts no object."""

JITTER = 0.012
"""How far an object may be off its place along each axis, of the side; objects never touch."""


def _heart(t: float) -> complex:
    height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return complex(16 * math.sin(t) ** 3, -height - 2) / 18


CROSS_ARM = (-0.3 - 0.95j, 0.3 - 0.95j, 0.3 - 0.3j)
CIRCLE = [math.tau * i / 72 for i in range(72)]
OUTLINES: dict[str, list[complex]] = {
    "circle": [cmath.rect(1, t) for t in CIRCLE],
    "square": [cmath.rect(1, math.tau * (i + 0.5) / 4) for i in range(4)],
    "triangle": [-1j * cmath.rect(1, math.tau * i / 3) for i in range(3)],
    "star": [-1j * cmath.rect(0.42 if i % 2 else 1, math.tau * i / 10) for i in range(10)],
    "cross": [turn * corner for turn in (1, 1j, -1, -1j) for corner in CROSS_ARM],
    "heart": [_heart(t) for t in CIRCLE],
    "diamond": [-1j, 0.6, 1j, -0.6],
    "moon": [0.42 + 0.9 * complex(min(-math.sin(t), 0.25 * math.sin(t)), math.cos(t)) for t in CIRCLE],
}
"""Corners of every shape, x + y * 1j, inside the unit circle; y counts downwards."""


def _apart(places: tuple[str, ...]) -> bool:
    """Whether no two of the places share a side."""
    return all(abs(PLACES[a] - PLACES[b]) > 1 for a, b in itertools.combinations(places, 2))


PLACEMENTS = {n: [p for p in itertools.combinations(PLACES, n) if _apart(p)] for n in (2, 3)}
"""By number of objects, the sets of places that they may take together."""


@dataclass(frozen=True)
class SceneObject:
    """One object: names out of COLOURS, OUTLINES, RADII and PLACES."""

    colour: str
    shape: str
    size: str
    place: str


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Two or three objects, no two alike in both colour and shape and no two in neighbouring places."""

    objects: tuple[SceneObject, ...]

    @property
    def composition(self) -> tuple[tuple[str, str], ...]:
        """What is in the scene, wherever and however large: sorted (colour, shape) pairs."""
        return tuple(sorted((item.colour, item.shape) for item in self.objects))


def sample_scene(rng: random.Random) -> Scene:
    """Draw a scene; three in ten have two objects, the others three."""
    num_objects = 2 if rng.random() < 0.3 else 3
    kinds = rng.sample([(colour, shape) for colour in COLOURS for shape in OUTLINES], num_objects)
    places = rng.sample(rng.choice(PLACEMENTS[num_objects]), num_objects)
    sizes = [rng.choice(list(RADII)) for _ in kinds]
    parts = zip(kinds, sizes, places, strict=True)
    return Scene(objects=tuple(SceneObject(*kind, size, place) for kind, size, place in parts))


def render(scene: Scene, rng: random.Random, size: int = SIZE) -> Image.Image:
    """Draw a scene as a square RGB picture of `size` pixels, with jitter in place, size, angle and colour."""
    oversampling = 4  # draw large, then average: smooth edges
    layer = Image.new("RGBA", (size * oversampling, size * oversampling))
    pen = ImageDraw.Draw(layer)
    for item in scene.objects:
        jitter = complex(rng.uniform(-JITTER, JITTER), rng.uniform(-JITTER, JITTER))
        middle = 0.5 + 0.5j + SPACING * PLACES[item.place] + jitter
        spread = cmath.rect(rng.uniform(*RADII[item.size]), math.radians(rng.uniform(-10, 10)))
        corners = [layer.width * (middle + spread * corner) for corner in OUTLINES[item.shape]]
        shade = tuple(min(255, max(0, channel + rng.randint(-10, 10))) for channel in COLOURS[item.colour])
        pen.polygon([(corner.real, corner.imag) for corner in corners], fill=shade)
    picture = _background(rng, size).convert("RGBA")
    picture.alpha_composite(layer.reduce(oversampling))
    return picture.convert("RGB")


def _background(rng: random.Random, size: int) -> Image.Image:
    """A pale background: one tint, a soft uneven light over it, and grain."""
    noise = np.random.default_rng(rng.getrandbits(64))
    tint = noise.uniform(185, 225, 3)
    light = noise.uniform(-20, 20, (3, 3, 1)) + noise.uniform(-8, 8, (3, 3, 3))
    coarse = Image.fromarray((tint + light).astype(np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
    grain = noise.normal(0, noise.uniform(1, 4), (size, size, 1))
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


LISTINGS = ("a picture with {}", "an image of {}", "{} on a pale background", "this picture shows {}")
COUNTS = ("{number} shapes: {}", "{number} objects, {}", "a scene of {number} things: {}")
STATEMENTS = ("there is {} {} {}", "{} is {} {}", "{} sits {} {}", "we see {} {} {}", "{} can be seen {} {}")


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Five captions in random order, true of the scene; they differ, as each is of another kind."""
    made = [make(scene, rng) for make in (_relation, _statement, _places)]
    made += [_listing(frames, scene, rng) for frames in (LISTINGS, COUNTS)]
    rng.shuffle(made)
    return made


def _relation(scene: Scene, rng: random.Random) -> str:
    """a large red star to the left of a small blue circle"""
    (first, first_name), (second, second_name), *_ = _named(scene, rng)
    return f"{first_name} {rng.choice(relations(first, second))} {second_name}"


def _statement(scene: Scene, rng: random.Random) -> str:
    """there is a green cross above a yellow heart, with a pink moon on the left"""
    (first, first_name), (second, second_name), *others = _named(scene, rng)
    text = rng.choice(STATEMENTS).format(first_name, rng.choice(relations(first, second)), second_name)
    return text + "".join(f", with {name} {place_words(item, rng)}" for item, name in others)


def _listing(frames: Sequence[str], scene: Scene, rng: random.Random) -> str:
    """a picture with a large red star, a small blue circle and a small pink moon"""
    names = [name for _, name in _named(scene, rng)]
    number = {2: "two", 3: "three"}[len(names)]
    return rng.choice(frames).format(_enumerate(names), number=number)


def _places(scene: Scene, rng: random.Random) -> str:
    """on the left a red star, at the top right a blue circle and in the middle a pink moon"""
    order = rng.choice(["{name} {place}", "{place} {name}"])
    return _enumerate([order.format(name=name, place=place_words(item, rng)) for item, name in _named(scene, rng)])


def relations(first: SceneObject, second: SceneObject) -> list[str]:
    """Every wording of where `first` is as seen from `second`, along the axes where they differ most."""
    offset = PLACES[first.place] - PLACES[second.place]
    side = "right" if offset.real > 0 else "left"
    height, level = ("below", "lower down") if offset.imag > 0 else ("above", "higher up")
    wordings = [f"{height} and to the {side} of"] if abs(offset.real) == abs(offset.imag) else []
    if abs(offset.real) >= abs(offset.imag):
        wordings += [f"to the {side} of", f"{side} of"]
    if abs(offset.real) <= abs(offset.imag):
        wordings += [height, f"{level} than"]
    return wordings


def _named(scene: Scene, rng: random.Random) -> list[tuple[SceneObject, str]]:
    """The objects in random order, each with a name; two in three times the names tell the sizes."""
    sized = rng.random() < 2 / 3
    objects = rng.sample(scene.objects, len(scene.objects))
    words = [(f"{item.size} " if sized else "") + f"{item.colour} {item.shape}" for item in objects]
    names = [f"{'an' if text[0] in 'aeiou' else 'a'} {text}" for text in words]
    return list(zip(objects, names, strict=True))


def place_words(item: SceneObject, rng: random.Random) -> str:
    """on the left side"""
    if item.place == "centre":
        return rng.choice(["in the centre", "in the middle"])
    if item.place in ("left", "right"):
        return rng.choice([f"on the {item.place}", f"on the {item.place} side"])
    return f"at the {item.place}"


def _enumerate(phrases: list[str]) -> str:
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def plan_scenes(split: str, num_scenes: int, *, splits: Iterable[str], seed: int) -> list[Scene]:
    """Draw the scenes of one split: different compositions, none of which another of the `splits` can get."""
    rng = random.Random(f"{seed}/{split}/scenes")
    names = sorted(splits)
    scenes: dict[tuple[tuple[str, str], ...], Scene] = {}
    for _ in range(100 * num_scenes):
        if len(scenes) == num_scenes:
            break
        scene = sample_scene(rng)
        digest = hashlib.sha256(f"{seed}/{scene.composition}".encode()).digest()
        if names[int.from_bytes(digest) % len(names)] == split:
            scenes.setdefault(scene.composition, scene)
    if len(scenes) < num_scenes:
        found = f"found {len(scenes)} different scenes, expected {num_scenes}"
        raise ValueError(f"split {split}: {found}. Ask for fewer scenes.")
    return list(scenes.values())


def draw_scenes(out_dir: Path, splits: dict[str, int], seed: int, size: int = SIZE) -> Path:
    """Draw `splits[name]` captioned pictures of `size` pixels per split into `out_dir`, and return it."""

    def draw(drawing: Path) -> dict[str, Any]:
        for split, num_scenes in splits.items():
            scenes = plan_scenes(split, num_scenes, splits=splits, seed=seed)
            draw_split(drawing / split, scenes, captions, seed=seed, size=size)
        return {}

    settings = {"version": VERSION, "seed": seed, "size": size, "splits": splits}
    return draw_once(out_dir, "scenes.json", settings, draw)


Caption = Callable[[Any, random.Random], list[str]]
"""The captions of a scene."""


def draw_split(split_dir: Path, scenes: Sequence[Scene], caption: Caption, *, seed: int, size: int) -> None:
    """Draw the pictures of one split and write its metadata.jsonl."""
    split_dir.mkdir(parents=True)
    with (split_dir / "metadata.jsonl").open("w") as metadata:
        for index, scene in enumerate(scenes):
            name = f"{split_dir.name}-{index:05d}"
            render(scene, random.Random(f"{seed}/{name}/render"), size).save(split_dir / f"{name}.png")
            texts = caption(scene, random.Random(f"{seed}/{name}/captions"))
            metadata.write(json.dumps({"file_name": f"{name}.png", "captions": texts}) + "\n")


if __name__ == "__main__":
    run_command(draw_scenes, "Draw a captioned photo set of coloured shapes.", SPLITS)
