"""Draws a set for composed queries, in the manner of CSS: a picture and a text that changes one of its objects.

    python data/composed.py --out DIR --train 500 --dev 60 --test 120 --unseen 80 --seed 0      (60 s, 70 MB)

writes, for each split, `DIR/{split}/{split}-00000.png`, ..., a metadata.jsonl with a line per picture, as scenes.py
does, and a queries.jsonl with a line per query,

    {"reference": "train-00003.png", "texts": ["make the star on the left blue", "change the red star to blue"],
     "targets": ["train-00005.png"], "members": ["train-00000.png", ..., "train-00005.png"]}

and `DIR/composed.json` with the settings. The numbers are those of *families*: five scenes, each of which differs from
one of the others in one object, and six pictures, as one scene is drawn twice. Two scenes that differ in one object
make a query each way, so that every text of adding has one of removing. All pictures of the scene that a query asks for
are its targets; a family's five scenes are its members, the reference among them, and only one of them is right.

A text alone fits many pictures, as it does not say what else is there, and a picture alone does not say what to change:
the other members are as near.

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

if not __package__:  # run as a script: the path then holds data/, not its parent
    sys.path.insert(0, str(Path(__file__).parents[1]))

from data.drawn import draw_once, run_command
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

VERSION = 1
"""Counts up when the same settings would draw other pictures or queries."""

SPLITS = {"train": 500, "dev": 60, "test": 120, "unseen": 80}
"""Families of each split."""

SHARES = {"train": 11, "dev": 1, "test": 2}
"""Of the arrangements without a pair that is held out, what part each split may draw from, as weights."""

HELD_OUT = frozenset(zip(COLOURS, OUTLINES, strict=True))
"""Pairs of colour and shape that only split `unseen` has."""

NUM_SCENES = 5
"""Different scenes of a family."""

_TRIES = 5000

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

    @property
    def inverse(self) -> Edit:
        return Edit(self.new, self.old)

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
    """Scenes, all different, each but the first, which has two objects, made by an edit of one before it."""

    scenes: tuple[Scene, ...]
    edits: tuple[tuple[int, Edit], ...]
    """Of each scene but the first: the number of the scene before it that was changed, and how."""
    twin: int
    """The scene that is drawn twice."""

    @property
    def pictures(self) -> tuple[Scene, ...]:
        """What is drawn, in order."""
        return (*self.scenes, self.scenes[self.twin])

    @property
    def queries(self) -> Iterator[tuple[int, Edit, int]]:
        """Reference, edit and scene that is asked for, each edit both ways."""
        for number, (before, edit) in enumerate(self.edits, start=1):
            yield before, edit, number
            yield number, edit.inverse, before


def key_of(scene: Scene) -> tuple[tuple[str, str, str, str], ...]:
    """Equal for scenes with the same objects: sorted (colour, shape, size, place)."""
    return tuple(sorted((item.colour, item.shape, item.size, item.place) for item in scene.objects))


def split_of(scene: Scene, seed: int) -> str:
    """The one split that may hold the scene's arrangement."""
    if HELD_OUT & set(scene.composition):
        return "unseen"
    arrangement = sorted((item.colour, item.shape, item.place) for item in scene.objects)
    digest = hashlib.sha256(f"{seed}/{arrangement}".encode()).digest()
    owners = [split for split, share in SHARES.items() for _ in range(share)]
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
    else:
        old = rng.choice(scene.objects)
        values = {"colour": list(COLOURS), "shape": list(OUTLINES), "size": list(RADII)}[kind]
        value = rng.choice([value for value in values if value != getattr(old, kind)])
        edit = Edit(old, replace(old, **{kind: value}))
    changed = edit.apply(scene)
    return edit if len(set(changed.composition)) == len(changed.objects) else None


def _fits(places: Sequence[str]) -> bool:
    return any(set(places) == set(known) for known in PLACEMENTS.get(len(places), ()))


def sample_family(split: str, rng: random.Random, *, seed: int) -> Family | None:
    """A family of a split; None where the draws lead nowhere."""
    drawn = (scene for scene in (sample_scene(rng) for _ in range(_TRIES)) if len(scene.objects) == 2)
    first = next((scene for scene in drawn if split_of(scene, seed) == split), None)
    if first is None:
        return None
    scenes, edits = [first], list[tuple[int, Edit]]()
    while len(scenes) < NUM_SCENES:
        kind = rng.choice(["add", "colour", "shape", "size"])
        for _ in range(_TRIES):
            before = rng.randrange(len(scenes))
            edit = sample_edit(scenes[before], kind, rng)
            changed = None if edit is None else edit.apply(scenes[before])
            is_new = changed is not None and key_of(changed) not in map(key_of, scenes)
            if edit is not None and changed is not None and is_new and split_of(changed, seed) == split:
                scenes.append(changed)
                edits.append((before, edit))
                break
        else:
            return None
    return Family(tuple(scenes), tuple(edits), rng.randrange(NUM_SCENES))


def plan_families(split: str, num_families: int, *, seed: int) -> list[Family]:
    """The families of one split; a larger split begins with those of a smaller."""
    if split not in SPLITS:
        raise ValueError(f"split {split}: expected one of {', '.join(SPLITS)}. Choose among these.")
    rng = random.Random(f"{seed}/{split}/families")
    families: list[Family] = []
    while len(families) < num_families:
        family = sample_family(split, rng, seed=seed)
        families += [] if family is None else [family]
    return families


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
        for reference, edit, asked in family.queries:
            yield {
                "reference": own[reference],
                "texts": edit.texts(rng),
                "targets": named[key_of(family.scenes[asked])],
                "members": own,
            }


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
