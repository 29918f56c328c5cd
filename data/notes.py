"""Draws a set that needs binding: pictures of coloured shapes, each with a note about one of them by its place.

    python data/notes.py --out DIR --train 5500 --dev 500 --test 1000 --seed 0          (40 s, 110 MB)

writes `DIR/{split}/{split}-00000.png`, ..., one `DIR/{split}/metadata.jsonl` with a line per picture,

    {"file_name": "train-00000.png", "captions": ["the left one is fragile", "a fragile green triangle"]}

whose first caption is the note and whose second is the query that the picture *with* its note answers, and
`DIR/notes.json` with the settings and the truth; `read_notes` reads that back.

Design: the note tells an attribute and a place, the picture tells what is at every place, and only both
together tell which object has the attribute. A `NotedScene` says all of it and everything else is derived
from it, as in scenes.py, which renders the pictures and writes the files. The attribute and the noted object
are drawn apart from what the scene holds, so neither part gives the query away.

An *arrangement* is the set of (colour, shape, place) in a scene. A split never repeats one, and a hash of the
arrangement says which split may have it, in fixed shares, whatever the numbers of pictures. The queries of
`test` are not new, its pictures are.

The references tell what retrieval must reach: queries are the distinct query texts of a split, and a picture
with its note is relevant to a query if that is its own. Ties stand in random order; the figures are exact
expectations over it.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a script: the path then holds data/, not its parent
    sys.path.insert(0, str(Path(__file__).parents[1]))

from data.drawn import draw_once, run_command
from data.scenes import SIZE, Scene, SceneObject, draw_split

VERSION = 1
"""Counts up when the same settings would draw other pictures, notes or queries."""

SPLITS = {"train": 5500, "dev": 500, "test": 1000}

SHARES = {"train": 11, "dev": 1, "test": 2}
"""Of the arrangements, what part each split may draw from, as weights."""

COLOURS = ("red", "yellow", "green", "blue", "pink", "black")
SHAPES = ("circle", "triangle", "star", "heart", "moon")
"""Of the colours and shapes of scenes.py, those that differ most in CIELAB and in the area they share."""

PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}

ATTRIBUTES = ("fragile", "heavy", "sold", "new", "urgent", "wet")
"""Words that MiniLM tells well apart: once centred, their cosines are below 0.2."""

WORDINGS = (
    "the {place} one is {attribute}",
    "the object {where} is {attribute}",
    "{attribute}: the object {where}",
    "please treat the thing {where} as {attribute}",
    "what you see {where} is {attribute}",
    "mark the {place} item as {attribute}",
    "{where} is something {attribute}",
    "note that the {place} shape is {attribute}",
)


@dataclass(frozen=True, kw_only=True)
class NotedScene(Scene):
    """A scene and what its note tells: `objects[noted]` has the attribute."""

    noted: int
    attribute: str

    @property
    def arrangement(self) -> tuple[tuple[str, str, str], ...]:
        """What the picture shows and where: sorted (colour, shape, place)."""
        return tuple(sorted((item.colour, item.shape, item.place) for item in self.objects))

    @property
    def query(self) -> str:
        """a fragile green triangle"""
        item = self.objects[self.noted]
        return f"{'an' if self.attribute[0] in 'aeiou' else 'a'} {self.attribute} {item.colour} {item.shape}"


def sample_noted_scene(rng: random.Random, num_objects: int) -> NotedScene:
    """Draw large objects, no two alike in both colour and shape, at different places, and a note about one."""
    kinds = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], num_objects)
    places = rng.sample(list(PLACES), num_objects)
    objects = tuple(SceneObject(*kind, "large", place) for kind, place in zip(kinds, places, strict=True))
    return NotedScene(objects=objects, noted=rng.randrange(num_objects), attribute=rng.choice(ATTRIBUTES))


def note_and_query(scene: NotedScene, rng: random.Random) -> list[str]:
    """The captions of a picture: the note, in a random wording, and the query."""
    place = scene.objects[scene.noted].place
    note = rng.choice(WORDINGS).format(place=place, where=PLACES[place], attribute=scene.attribute)
    return [note, scene.query]


def plan_notes(split: str, num_scenes: int, *, seed: int) -> list[NotedScene]:
    """Draw the scenes of one split; a larger split begins with the scenes of a smaller.

    Three in ten have two objects, the others three. That number is drawn first, once for each scene: there
    are 5,220 arrangements of two objects and 97,440 of three, so that repeats would else thin out the twos.
    """
    rng = random.Random(f"{seed}/{split}/notes")
    scenes: dict[tuple[tuple[str, str, str], ...], NotedScene] = {}
    for _ in range(num_scenes):
        num_objects = 2 if rng.random() < 0.3 else 3
        tries = (sample_noted_scene(rng, num_objects) for _ in range(5000))
        fitting = (s for s in tries if s.arrangement not in scenes and split_of(s, seed) == split)
        scene = next(fitting, None)
        if scene is None:
            found = f"found {len(scenes)} different scenes, expected {num_scenes}"
            raise ValueError(f"split {split}: {found}. Ask for fewer scenes, of the splits {', '.join(SHARES)}.")
        scenes[scene.arrangement] = scene
    return list(scenes.values())


def split_of(scene: NotedScene, seed: int) -> str:
    """The one split that may hold the scene's arrangement."""
    digest = hashlib.sha256(f"{seed}/{scene.arrangement}".encode()).digest()
    owners = [split for split, share in SHARES.items() for _ in range(share)]
    return owners[int.from_bytes(digest) % len(owners)]


def draw_notes(out_dir: Path, splits: dict[str, int], seed: int, size: int = SIZE) -> Path:
    """Draw `splits[name]` pictures of `size` pixels with note and query per split into `out_dir`; return it."""

    def draw(drawing: Path) -> dict[str, Any]:
        planned = {split: plan_notes(split, num_scenes, seed=seed) for split, num_scenes in splits.items()}
        for split, scenes in planned.items():
            draw_split(drawing / split, scenes, note_and_query, seed=seed, size=size)
        return {"scenes": {split: [asdict(scene) for scene in scenes] for split, scenes in planned.items()}}

    settings = {"version": VERSION, "seed": seed, "size": size, "splits": splits}
    return draw_once(out_dir, "notes.json", settings, draw)


def read_notes(notes_dir: Path, split: str) -> list[NotedScene]:
    """The truth of a drawn set: the scenes of one split, in the order of its metadata.jsonl."""
    found = json.loads((notes_dir / "notes.json").read_text())["scenes"][split]
    return [NotedScene(**{**row, "objects": tuple(SceneObject(**item) for item in row["objects"])}) for row in found]


def chance(scenes: Sequence[NotedScene]) -> dict[str, float]:
    """mAP and R@1 of a random order."""
    return _expected_scores(scenes, lambda scene, asked: 0)


def text_only_chance(scenes: Sequence[NotedScene]) -> dict[str, float]:
    """mAP and R@1 where only the note's attribute is known: what pictures shuffled over the notes must not exceed."""
    return _expected_scores(scenes, lambda scene, asked: float(scene.attribute == asked.attribute))


def ideal_late_fusion(scenes: Sequence[NotedScene]) -> dict[str, float]:
    """mAP and R@1 of the sum of two ideal scores: log P(relevant | note) + log P(relevant | picture).

    Given the attribute, the note's does not depend on its place; the picture's is 1 / number of objects where it
    holds the asked one, else 0. So: attribute and object first, fewer objects before more, the rest last.

    The best sum whose scores treat all places alike: it sees of an item what leaves it relevant with just that
    probability, and falling probability is the best order. Not the best of all sums: see `place_ordered_fusion`.
    """

    def score(scene: NotedScene, asked: NotedScene) -> float:
        return 1 / len(scene.objects) if _is_candidate(scene, asked) else 0

    return _expected_scores(scenes, score)


def place_ordered_fusion(scenes: Sequence[NotedScene]) -> dict[str, float]:
    """mAP and R@1 of a sum that gains by favouring places: what no sum can reach lies above this.

    Every place has a height: 0, 1, M, M^2 in the order of PLACES, M being large. The note scores minus the height
    of its place. A picture whose asked object is the lowest of its objects scores plus that height: the sum is 0
    with the fitting note, negative with another. Another that holds the asked object scores so far below 0, and
    so far from all others (at random; fewer lower objects first), that notes of lower places change nothing, yet
    less far than the next height. So notes of places higher than the asked object always fall behind it, those of
    lower places cannot be told. No sum tells both: where two objects swap places, the fitting pairs of pictures
    and notes score together just as much as the others.
    """
    order = list(PLACES)

    def score(scene: NotedScene, asked: NotedScene) -> float:
        if not _is_candidate(scene, asked):
            return -100
        (place,) = (item.place for item in scene.objects if _kind(item) == _kind(asked.objects[asked.noted]))
        told, seen = order.index(scene.objects[scene.noted].place), order.index(place)
        if told > seen:
            return -3 * told
        num_lower = sum(order.index(item.place) < seen for item in scene.objects)
        return -3 * seen - num_lower if num_lower else 0

    return _expected_scores(scenes, score)


def _kind(item: SceneObject) -> tuple[str, str]:
    return item.colour, item.shape


def _is_candidate(scene: NotedScene, asked: NotedScene) -> bool:
    """Whether the note has the attribute and the picture the object that `asked` notes."""
    held = [_kind(item) for item in scene.objects]
    return scene.attribute == asked.attribute and _kind(asked.objects[asked.noted]) in held


def _expected_scores(
    scenes: Sequence[NotedScene], score: Callable[[NotedScene, NotedScene], float]
) -> dict[str, float]:
    """Mean over the distinct queries of what ranking by `score(scene, scene that asks)` is expected to reach."""
    asking = {scene.query: scene for scene in scenes}
    figures = [
        expected_average_precision(
            np.array([score(scene, asked) for scene in scenes]), np.array([scene.query == query for scene in scenes])
        )
        for query, asked in asking.items()
    ]
    average_precision, first = np.mean(figures, axis=0)
    return {"map": float(average_precision), "recall_at_1": float(first)}


def expected_average_precision(scores: np.ndarray, is_relevant: np.ndarray) -> tuple[float, float]:
    """Average precision and R@1 of a ranking by falling score, expected over random orders of equal scores.

    Let n items tie, r of them relevant, behind a better ones of which b are relevant. The i-th of them is
    relevant with probability r / n, and then (i - 1)(r - 1) / (n - 1) of the i - 1 before it are on average.
    So the group adds sum over i of r / n * (b + 1 + (i - 1)(r - 1) / (n - 1)) / (a + i) to R * AP.
    """
    total, a, b, first = 0.0, 0, 0, None
    for value in np.unique(scores)[::-1]:
        tied = is_relevant[scores == value]
        n, r = len(tied), int(tied.sum())
        i = np.arange(1, n + 1)
        among = (i - 1) * (r - 1) / max(n - 1, 1)
        total += float((r / n * (b + 1 + among) / (a + i)).sum())
        first = r / n if first is None else first
        a, b = a + n, b + r
    return total / b, first or 0.0


if __name__ == "__main__":
    run_command(draw_notes, "Draw pictures of coloured shapes, each with a note about one of them.", SPLITS)
