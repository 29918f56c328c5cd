"""The drawn photo set: its captions are read back by a parser of their own and held against the scenes."""

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import scenes
from data.scenes import Scene, SceneObject, captions, draw_scenes, plan_scenes, render, sample_scene

SPLITS = {"train": 5, "dev": 2, "test": 3}

# The middle of every place in the picture, written down apart from the generator's own table.
MIDDLE = {
    "top left": (0.25, 0.25),
    "top": (0.5, 0.25),
    "top right": (0.75, 0.25),
    "left": (0.25, 0.5),
    "centre": (0.5, 0.5),
    "right": (0.75, 0.5),
    "bottom left": (0.25, 0.75),
    "bottom": (0.5, 0.75),
    "bottom right": (0.75, 0.75),
}
COLOURS = "red|orange|yellow|green|blue|purple|pink|black"
SHAPES = "circle|square|triangle|star|cross|heart|diamond|moon"
OBJECT = rf"(an?) (?:(small|large) )?({COLOURS}) ({SHAPES})"
RELATION = (
    r"(?:(?:(?:above|below) and )?to the (?:left|right) of|(?:left|right) of|above|below"
    r"|(?:higher up|lower down) than)"
)
VERB = "(?:is |sits |can be seen )"
PLACE = r"(?:at the (?:top|bottom)(?: left| right)?|on the (?:left|right)(?: side)?|in the (?:centre|middle))"
LIST = "#(?:, #)? and #"
SENTENCES = (  # with # for every object
    rf"# {RELATION} #",
    rf"(?:there is |we see )?# {VERB}?{RELATION} #(?:, with # {PLACE})?",
    rf"(?:a picture with|an image of|this picture shows) {LIST}",
    rf"{LIST} on a pale background",
    rf"(?:two|three) (?:shapes:|objects,) {LIST}",
    rf"a scene of (?:two|three) things: {LIST}",
    rf"# {PLACE}(?:, # {PLACE})? and # {PLACE}",
    rf"{PLACE} #(?:, {PLACE} #)? and {PLACE} #",
)


def read_caption(text: str, scene: Scene) -> list[SceneObject]:
    """Parse a caption, assert that every statement in it holds, and return the objects that it names."""
    named = []
    for article, size, colour, shape in re.findall(OBJECT, text):
        assert article == ("an" if (size or colour)[0] in "aeiou" else "a"), text
        (item,) = (o for o in scene.objects if (o.colour, o.shape) == (colour, shape))
        assert size in ("", item.size), text
        named.append(item)
    sentence = re.sub(OBJECT, "#", text)
    assert any(re.fullmatch(known, sentence) for known in SENTENCES), sentence
    for count in re.findall("two|three", sentence):
        assert len(scene.objects) == {"two": 2, "three": 3}[count], text
    places = re.findall(PLACE, sentence)
    placed = named[len(named) - len(places) :]  # a statement tells the place of its last object alone
    for item, place in zip(placed, places, strict=True):
        words = place.split(" ", 2)[2].removesuffix(" side").replace("middle", "centre")
        assert item.place == words, text
    for wording in re.findall(f"# {VERB}?({RELATION}) #", sentence):
        check_relation(wording, MIDDLE[named[0].place], MIDDLE[named[1].place])
    return named


def check_relation(wording: str, first: tuple[float, float], second: tuple[float, float]) -> None:
    right, down = first[0] - second[0], first[1] - second[1]
    claims = {"left": -right, "right": right, "above": -down, "higher": -down, "below": down, "lower": down}
    claimed = [amount for word, amount in claims.items() if word in wording]
    assert min(claimed) > 0, wording
    assert max(claimed) >= max(abs(right), abs(down)), f"{wording}: not the main direction"


@pytest.mark.parametrize("seed", range(150))
def test_captions_are_five_and_different_and_true(seed: int) -> None:
    rng = random.Random(seed)
    scene = sample_scene(rng)
    texts = captions(scene, rng)
    assert len(texts) == len(set(texts)) == 5
    for text in texts:
        assert len(set(read_caption(text, scene))) >= 2


@pytest.mark.parametrize(
    "lie",
    [
        "a red star to the right of a blue circle",
        "a red star above a blue circle",
        "a red star above and to the left of a blue circle",
        "a small red star to the left of a blue circle",
        "a red star at the top and a blue circle on the right",
        "at the bottom a red star and on the left a blue circle",
        "three shapes: a red star and a blue circle",
        "three red stars",
        "a picture with a red star and a blue circle in the snow",
    ],
)
def test_the_reader_notices_a_lie(lie: str) -> None:
    star = SceneObject(colour="red", shape="star", size="large", place="left")
    circle = SceneObject(colour="blue", shape="circle", size="small", place="right")
    with pytest.raises(AssertionError):
        read_caption(lie, Scene(objects=(star, circle)))


@pytest.mark.parametrize("seed", range(30))
def test_a_picture_shows_its_objects_at_their_places(seed: int) -> None:
    rng = random.Random(seed)
    scene = sample_scene(rng)
    pixels = np.asarray(render(scene, rng, 112), dtype=float)
    palette = np.array(list(scenes.COLOURS.values()), dtype=float)
    distances = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    for item in scene.objects:
        x, y = (round(112 * middle) for middle in MIDDLE[item.place])
        near = distances[y - 17 : y + 18, x - 17 : x + 18].reshape(-1, len(palette))
        counts = np.bincount(near.argmin(axis=1)[near.min(axis=1) < 30], minlength=len(palette))
        assert list(scenes.COLOURS)[counts.argmax()] == item.colour


def test_a_centre_crop_cuts_no_object_and_objects_never_touch() -> None:
    assert all(abs(corner) <= 1 for outline in scenes.OUTLINES.values() for corner in outline)
    reach = scenes.JITTER + max(scenes.RADII["large"])
    assert scenes.SPACING + reach <= 0.5 * 7 / 8
    assert math.sqrt(2) * (scenes.SPACING - 2 * scenes.JITTER) > 2 * max(scenes.RADII["large"])


@pytest.mark.parametrize("seed", range(50))
def test_objects_of_a_scene_are_different_and_apart(seed: int) -> None:
    objects = sample_scene(random.Random(seed)).objects
    assert len({(item.colour, item.shape) for item in objects}) == len(objects)
    middles = [MIDDLE[item.place] for item in objects]
    assert all(math.dist(a, b) > 0.3 for i, a in enumerate(middles) for b in middles[:i])


def test_no_composition_is_in_two_scenes() -> None:
    sizes = {"train": 1600, "dev": 200, "test": 300}
    planned = {split: plan_scenes(split, n, splits=sizes, seed=0) for split, n in sizes.items()}
    all_scenes = [scene for split in planned.values() for scene in split]
    compositions = [frozenset((item.colour, item.shape) for item in scene.objects) for scene in all_scenes]
    assert len(set(compositions)) == len(compositions) == sum(sizes.values())


def test_a_larger_split_begins_with_the_scenes_of_a_smaller_one() -> None:
    small, large = (plan_scenes("dev", n, splits=SPLITS, seed=3) for n in (10, 30))
    assert large[:10] == small
    assert plan_scenes("dev", 10, splits=SPLITS, seed=4) != small


def test_more_scenes_than_there_are_compositions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "COLOURS", {"red": (205, 25, 35)})
    with pytest.raises(ValueError, match=r"split train: found \d+ different scenes, expected 300"):
        plan_scenes("train", 300, splits=["train"], seed=0)


def test_files_of_a_drawn_set(tmp_path: Path) -> None:
    out = draw_scenes(tmp_path / "deep" / "set", SPLITS, seed=0, size=56)
    assert out == tmp_path / "deep" / "set"
    assert sorted(path.name for path in out.iterdir()) == ["dev", "scenes.json", "test", "train"]
    assert [path.name for path in out.parent.iterdir()] == ["set"]
    for split, num_scenes in SPLITS.items():
        rows = [json.loads(line) for line in (out / split / "metadata.jsonl").read_text().splitlines()]
        planned = plan_scenes(split, num_scenes, splits=SPLITS, seed=0)
        assert sorted(path.name for path in (out / split).glob("*.png")) == [row["file_name"] for row in rows]
        for row, scene in zip(rows, planned, strict=True):
            assert row.keys() == {"file_name", "captions"}
            with Image.open(out / split / row["file_name"]) as picture:
                assert (picture.size, picture.mode) == ((56, 56), "RGB")
            assert all(read_caption(text, scene) for text in row["captions"])


def test_the_default_size_fits_patches_of_14_pixels() -> None:
    rng = random.Random(0)
    assert render(sample_scene(rng), rng).size == (112, 112)


def test_a_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    """Neither on the hash seed of the process nor on the other splits' numbers."""
    contents = []
    for hash_seed, num_train in (("1", "1"), ("2", "3")):
        out = tmp_path / hash_seed
        options = f"--out {out} --train {num_train} --dev 1 --test 4 --seed 7".split()
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, scenes.__file__, *options], check=True, env=environment)
        contents.append({path.name: path.read_bytes() for path in (out / "test").iterdir()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 5


def test_captions_of_version_1_stay_as_they_are() -> None:
    """If this fails on purpose, count scenes.VERSION up: folders of the old version are then refused."""
    scene = plan_scenes("test", 2, splits=SPLITS, seed=0)[1]
    assert scenes.VERSION == 1
    assert captions(scene, random.Random(0)) == [
        "an image of a large black moon and a small green circle",
        "at the bottom left a large black moon and on the right side a small green circle",
        "a green circle sits right of a black moon",
        "a green circle right of a black moon",
        "two objects, a large black moon and a small green circle",
    ]


def test_complete_set_is_kept_and_other_settings_are_refused(tmp_path: Path) -> None:
    out = draw_scenes(tmp_path / "set", SPLITS, seed=0, size=28)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert draw_scenes(out, SPLITS, seed=0, size=28) == out
    for changed in ({"seed": 1}, {"size": 56}, {"splits": {**SPLITS, "dev": 3}}):
        settings = {"splits": SPLITS, "seed": 0, "size": 28, **changed}
        with pytest.raises(ValueError, match="Choose another --out"):
            draw_scenes(out, **settings)  # type: ignore[arg-type]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").touch()
    with pytest.raises(ValueError, match=r"found no scenes\.json"):
        draw_scenes(tmp_path, SPLITS, seed=0)


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Image.Image:
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "render", fail)
    with pytest.raises(KeyboardInterrupt):
        draw_scenes(tmp_path / "set", SPLITS, seed=0)
    assert list(tmp_path.iterdir()) == []
