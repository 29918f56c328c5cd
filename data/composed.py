"""Draws a set for composed queries, in the manner of CSS: a picture and a text that changes one of its objects.

    python data/composed.py --out DIR --train 400 --dev 40 --test 100 --unseen 60 --seed 0      (45 s, 89 MB)

writes, for each split, `DIR/{split}/{split}-00000.png`, ..., a metadata.jsonl with a line per picture, as scenes.py
does, and a queries.jsonl with a line per query,

    {"reference": "train-00000.png", "texts": ["make the star on the left blue", "change the red star to blue"],
     "targets": ["train-00005.png"], "members": ["train-00000.png", ..., "train-00008.png"]}

and `DIR/composed.json` with the settings. The numbers are those of *families*: a scene, eight others that each differ
from it in one object, and ten pictures, as one scene is drawn twice. The first scene is the reference of eight queries.
All pictures of the scene that a query asks for are its targets; a family's nine scenes are its members, the reference
among them, and only one of them is right.

A picture alone does not say what to change: eight others are as near, and `photo_only` says how far it could get at
best. A text alone says only one object, by its place or by its kind, and not what else is there.

An *arrangement* is the set of (colour, shape, place) in a scene. A hash of it says which split may have it, so that no
scene is in two splits. Eight pairs of colour and shape, in which each colour and each shape is once, are held out:
every scene of split `unseen` has one of them, and those of other splits have none.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a script: the path then holds data/, not its parent
    sys.path.insert(0, str(Path(__file__).parents[1]))

from data.drawn import draw_once, run_command
from data.notes import expected_average_precision
from data.scenes import (
    COLOURS,
    OUTLINES,
    PLACEMENTS,
    PLACES,
    RADII,
    SIZE,
    Scene,
    SceneObject,
    captions,
    draw_split,
    place_words,
    sample_scene,
)

VERSION = 2
"""Counts up when the same settings would draw other pictures or queries."""

SPLITS = {"train": 400, "dev": 40, "test": 100, "unseen": 60}
"""Families of each split."""

HELD_OUT = frozenset(zip(COLOURS, OUTLINES, strict=True))
"""Pairs of colour and shape that only split `unseen` has."""

NUM_SCENES = 9
"""Different scenes of a family."""

_TRIES = {"remove": 60, "size": 60}
"""Draws of a kind of edit before another is taken: a scene has few of these. Of other kinds _MOST_TRIES."""
_MOST_TRIES = 500

TEXTS = {
    "add": ("add {new} {where}", "the same with {new} {where}", "put {new} {where}", "{new} {where} in addition"),
    "remove": ("remove {old}", "without {old}", "take {old} away", "the same, but {old} is gone"),
    "colour": ("make {old} {colour}", "change {old} to {colour}", "{old} should be {colour}", "paint {old} {colour}"),
    "shape": ("turn {old} into a {shape}", "a {shape} instead of {old}", "change {old} to a {shape}"),
    "size": ("make {old} {size}", "{old} should be {size}", "the same with {old} {size}"),
}


@dataclass(frozen=True)
class Edit:
    """What leads from one scene to another: an object is replaced, added (`old` is None) or removed (`new` is None)."""

    old: SceneObject | None
    new: SceneObject | None

    @property
    def kind(self) -> str:
        """A key of TEXTS."""
        if self.old is None or self.new is None:
            return "add" if self.old is None else "remove"
        return next(part for part in ("colour", "shape", "size") if getattr(self.old, part) != getattr(self.new, part))

    def apply(self, scene: Scene) -> Scene:
        """The changed scene."""
        kept = [item for item in scene.objects if item != self.old]
        return Scene(objects=tuple(kept if self.new is None else [*kept, self.new]))

    def texts(self, rng: random.Random) -> list[str]:
        """Two texts in different words."""
        return [self._text(words, rng) for words in rng.sample(TEXTS[self.kind], 2)]

    def _text(self, words: str, rng: random.Random) -> str:
        old, new = self.old, self.new
        if new is None:
            assert old is not None
            return words.format(old=_reference(old, rng))
        if old is None:
            return words.format(new=f"a {new.size} {new.colour} {new.shape}", where=place_words(new, rng))
        size = "larger" if new.size == "large" else "smaller"
        return words.format(old=_reference(old, rng), colour=new.colour, shape=new.shape, size=size)


def _reference(item: SceneObject, rng: random.Random) -> str:
    """the star on the left; by place, or by colour and shape, either of which no other object of its scene has."""
    kinds = (f"{item.colour} {item.shape}", f"{item.size} {item.colour} {item.shape}")
    placed = (f"{item.shape} {place_words(item, rng)}", f"object {place_words(item, rng)}")
    return f"the {rng.choice([*kinds, *placed])}"


@dataclass(frozen=True)
class Family:
    """A scene and what edits make of it, all different."""

    first: Scene
    edits: tuple[Edit, ...]
    twin: int
    """The scene that is drawn twice."""

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """The first one, and one of each edit."""
        return (self.first, *(edit.apply(self.first) for edit in self.edits))

    @property
    def pictures(self) -> tuple[Scene, ...]:
        """What is drawn, in order."""
        return (*self.scenes, self.scenes[self.twin])


def key_of(scene: Scene) -> tuple[tuple[str, str, str, str], ...]:
    """Equal for scenes with the same objects: sorted (colour, shape, size, place)."""
    return tuple(sorted((item.colour, item.shape, item.size, item.place) for item in scene.objects))


def split_of(scene: Scene, seed: int) -> str:
    """The one split that may hold the scene's arrangement."""
    if HELD_OUT & set(scene.composition):
        return "unseen"
    arrangement = sorted((item.colour, item.shape, item.place) for item in scene.objects)
    digest = hashlib.sha256(f"{seed}/{arrangement}".encode()).digest()
    owners = [split for split in SPLITS if split != "unseen"]
    return owners[int.from_bytes(digest) % len(owners)]


def sample_edit(scene: Scene, kind: str, rng: random.Random) -> Edit | None:
    """A change that leaves a valid scene of two or three objects; None if there is none of this kind or it fails."""
    if kind == "add":
        taken = [item.place for item in scene.objects]
        free = [place for place in PLACES if place not in taken and _fits([*taken, place])]
        if not free:
            return None
        new = SceneObject(
            rng.choice(list(COLOURS)), rng.choice(list(OUTLINES)), rng.choice(list(RADII)), rng.choice(free)
        )
        edit = Edit(None, new)
    elif kind == "remove":
        edit = Edit(rng.choice(scene.objects), None)
    else:
        old = rng.choice(scene.objects)
        values = {"colour": list(COLOURS), "shape": list(OUTLINES), "size": list(RADII)}[kind]
        value = rng.choice([value for value in values if value != getattr(old, kind)])
        edit = Edit(old, replace(old, **{kind: value}))
    changed = edit.apply(scene)
    return edit if len(set(changed.composition)) == len(changed.objects) else None


def _fits(places: Sequence[str]) -> bool:
    return any(set(places) == set(known) for known in PLACEMENTS.get(len(places), ()))


def sample_family(split: str, rng: random.Random, *, seed: int) -> Family:
    """A family of a split. A scene of two objects gains one in some edits, a scene of three loses one."""
    first = next(scene for scene in iter(lambda: sample_scene(rng), None) if split_of(scene, seed) == split)
    edits, known = list[Edit](), {key_of(first)}
    kinds = ["add" if len(first.objects) == 2 else "remove", "colour", "shape", "size"]
    while len(edits) < NUM_SCENES - 1:
        kind = rng.choice(kinds)
        for _ in range(_TRIES.get(kind, _MOST_TRIES)):
            edit = sample_edit(first, kind, rng)
            changed = None if edit is None else edit.apply(first)
            if edit is None or changed is None or key_of(changed) in known or split_of(changed, seed) != split:
                continue
            edits.append(edit)
            known.add(key_of(changed))
            break
    return Family(first, tuple(edits), rng.randrange(NUM_SCENES))


def plan_families(split: str, num_families: int, *, seed: int) -> list[Family]:
    """The families of one split; a larger split begins with those of a smaller."""
    if split not in SPLITS:
        raise ValueError(f"split {split}: expected one of {', '.join(SPLITS)}. Choose among these.")
    rng = random.Random(f"{seed}/{split}/families")
    return [sample_family(split, rng, seed=seed) for _ in range(num_families)]


def queries_of(split: str, families: Sequence[Family], *, seed: int) -> Iterator[dict[str, Any]]:
    """The lines of queries.jsonl."""
    shown = [scene for family in families for scene in family.pictures]
    names = [f"{split}-{number:05d}.png" for number in range(len(shown))]
    named: dict[tuple[tuple[str, str, str, str], ...], list[str]] = {}
    for name, scene in zip(names, shown, strict=True):
        named.setdefault(key_of(scene), []).append(name)
    rng = random.Random(f"{seed}/{split}/queries")
    for number, family in enumerate(families):
        own = names[number * (NUM_SCENES + 1) :][:NUM_SCENES]
        for edit in family.edits:
            targets = named[key_of(edit.apply(family.first))]
            yield {"reference": own[0], "texts": edit.texts(rng), "targets": targets, "members": own}


def photo_only(families: Sequence[Family]) -> dict[str, float]:
    """mAP and R@1 where only the reference is known: pictures at one edit from it first, at random; then the others.

    The reference's own picture is left out.
    """
    pictures = [scene for family in families for scene in family.pictures]
    keys = [key_of(scene) for scene in pictures]
    figures = []
    for number, family in enumerate(families):
        others = np.arange(len(pictures)) != number * (NUM_SCENES + 1)
        scores = np.array([num_changed(scene, family.first) == 1 for scene in pictures], float)
        for scene in family.scenes[1:]:
            is_relevant = np.array([key == key_of(scene) for key in keys])
            figures.append(expected_average_precision(scores[others], is_relevant[others]))
    average_precision, first = np.mean(figures, axis=0)
    return {"map": float(average_precision), "recall_at_1": float(first)}


def num_changed(one: Scene, other: Scene) -> int:
    """Objects that are added, removed or changed at their place between two scenes."""
    first, second = ({item.place: item for item in scene.objects} for scene in (one, other))
    return sum(first.get(place) != second.get(place) for place in first.keys() | second.keys())


def draw_composed(out_dir: Path, splits: dict[str, int], seed: int, size: int = SIZE) -> Path:
    """Draw `splits[name]` families of pictures of `size` pixels per split, and their queries, into `out_dir`."""

    def draw(drawing: Path) -> dict[str, Any]:
        for split, num_families in splits.items():
            families = plan_families(split, num_families, seed=seed)
            pictures = [scene for family in families for scene in family.pictures]
            draw_split(drawing / split, pictures, captions, seed=seed, size=size)
            lines = map(json.dumps, queries_of(split, families, seed=seed))
            (drawing / split / "queries.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return {"held_out": sorted(map(list, HELD_OUT))}

    settings = {"version": VERSION, "seed": seed, "size": size, "splits": splits}
    return draw_once(out_dir, "composed.json", settings, draw)


if __name__ == "__main__":
    run_command(draw_composed, "Draw pictures of coloured shapes, and queries that change one object.", SPLITS)
