"""The drawn set for composed queries: its texts are read back by a parser of their own and applied to the scenes."""

import json
import random
import re
from pathlib import Path

import pytest

from data import composed
from data.composed import Edit, Family, draw_composed, photo_only, plan_families, queries_of
from data.scenes import Scene, SceneObject

COLOURS = "red|orange|yellow|green|blue|purple|pink|black"
SHAPES = "circle|square|triangle|star|cross|heart|diamond|moon"
WHERE = r"(?:at the ((?:top|bottom)(?: left| right)?)|on the (left|right)(?: side)?|in the (centre|middle))"
OLD = rf"the (?:(?:(?:(?:small|large) )?({COLOURS}) ({SHAPES}))|(?:({SHAPES})|object) {WHERE})"
NEW = rf"a (small|large) ({COLOURS}) ({SHAPES}) {WHERE}"
Key = frozenset[tuple[str, str, str, str]]


def key(scene: Scene) -> Key:
    return frozenset((item.colour, item.shape, item.size, item.place) for item in scene.objects)


def followed(text: str, scene: Key) -> Key:
    """The scene after what the text says, by other means than the generator's."""
    added = re.search(NEW, text)
    if added:
        size, colour, shape, *places = added.groups()
        assert re.fullmatch(r"add #|the same with #|put #|# in addition", re.sub(NEW, "#", text)), text
        return scene | {(colour, shape, size, place_in(places))}
    (named,) = re.finditer(OLD, text)
    colour, shape, shape_there, *places = named.groups()
    place = place_in(places)
    shape = shape or shape_there
    fits = [o for o in scene if colour in (None, o[0]) and shape in (None, o[1]) and place in (None, o[3])]
    (old,) = fits  # a text names one object alone
    rest = re.sub(OLD, "#", text)
    if re.fullmatch("remove #|without #|take # away|the same, but # is gone", rest):
        return scene - {old}
    return scene - {old} | {changed(old, rest)}


def changed(old: tuple[str, str, str, str], rest: str) -> tuple[str, str, str, str]:
    if found := re.fullmatch(
        "make # (larger|smaller)|# should be (larger|smaller)|the same with # (larger|smaller)", rest
    ):
        size = {"larger": "large", "smaller": "small"}["".join(filter(None, found.groups()))]
        assert size != old[2]
        return old[0], old[1], size, old[3]
    if found := re.fullmatch(rf"turn # into a ({SHAPES})|a ({SHAPES}) instead of #|change # to a ({SHAPES})", rest):
        return old[0], "".join(filter(None, found.groups())), old[2], old[3]
    found = re.fullmatch(rf"(?:make|paint) # ({COLOURS})|change # to ({COLOURS})|# should be ({COLOURS})", rest)
    assert found, rest
    return "".join(filter(None, found.groups())), old[1], old[2], old[3]


def place_in(places: list[str | None]) -> str | None:
    found = "".join(filter(None, places))
    return found.replace("middle", "centre") or None


@pytest.mark.parametrize("split", composed.SPLITS)
def test_targets_are_all_pictures_that_the_texts_ask_for(split: str) -> None:
    families = plan_families(split, 20, seed=1)
    shown = {f"{split}-{n:05d}.png": key(s) for n, s in enumerate(s for f in families for s in f.pictures)}
    lines = list(queries_of(split, families, seed=1))
    assert len(lines) == 20 * 8
    for line in lines:
        assert len(set(line["texts"])) == len(line["texts"]) == 2
        for text in line["texts"]:
            asked = followed(text, shown[line["reference"]])
            assert line["targets"] == [name for name, scene in shown.items() if scene == asked], text
        assert line["reference"] not in line["targets"]
        assert len(set(line["members"])) == 9
        assert line["reference"] in line["members"]
        assert len(set(line["members"]) & set(line["targets"])) == 1
    assert any(len(line["targets"]) > 1 for line in lines)


def test_a_wrong_text_is_noticed() -> None:
    scene = frozenset({("red", "star", "small", "left"), ("blue", "circle", "large", "right")})
    assert followed("make the object on the left larger", scene) == scene - {("red", "star", "small", "left")} | {
        ("red", "star", "large", "left")
    }
    for lie in ("make the green star larger", "make the star on the right larger", "make the red star smaller"):
        with pytest.raises((AssertionError, ValueError)):
            followed(lie, scene)


def test_members_differ_from_the_reference_in_one_object() -> None:
    for family in plan_families("dev", 10, seed=2):
        first, *others = map(key, family.scenes)
        assert len({first, *others}) == 9
        for other in others:
            assert max(len(first - other), len(other - first)) == 1
            assert {len(first), len(other)} <= {2, 3}


def test_every_kind_of_edit_is_common_in_every_split() -> None:
    for split in composed.SPLITS:
        kinds = [edit.kind for family in plan_families(split, 40, seed=0) for edit in family.edits]
        least = {kind: 0.005 if kind == "remove" else 0.05 for kind in composed.TEXTS}  # of few, some fit the split
        assert all(kinds.count(kind) > share * len(kinds) for kind, share in least.items()), split


def test_no_scene_is_in_two_splits_and_held_out_pairs_in_one() -> None:
    found: dict[frozenset[tuple[str, str, str]], str] = {}
    for split in composed.SPLITS:
        for scene in (scene for family in plan_families(split, 40, seed=0) for scene in family.scenes):
            is_held_out = any((item.colour, item.shape) in composed.HELD_OUT for item in scene.objects)
            assert is_held_out is (split == "unseen")
            arrangement = frozenset((item.colour, item.shape, item.place) for item in scene.objects)
            assert found.setdefault(arrangement, split) == split
    assert (
        len(composed.HELD_OUT) == len({c for c, _ in composed.HELD_OUT}) == len({s for _, s in composed.HELD_OUT}) == 8
    )


def test_a_larger_split_begins_with_a_smaller_one() -> None:
    assert plan_families("test", 6, seed=3)[:3] == plan_families("test", 3, seed=3)
    assert plan_families("test", 3, seed=4) != plan_families("test", 3, seed=3)


def test_files_of_a_drawn_set(tmp_path: Path) -> None:
    splits = {"train": 2, "unseen": 1}
    out = draw_composed(tmp_path / "set", splits, seed=0, size=28)
    assert sorted(path.name for path in out.iterdir()) == ["composed.json", "train", "unseen"]
    for split, num_families in splits.items():
        photos = [json.loads(line) for line in (out / split / "metadata.jsonl").read_text().splitlines()]
        names = {row["file_name"] for row in photos}
        assert {path.name for path in (out / split).glob("*.png")} == names
        assert len(names) == 10 * num_families
        assert all(len(row["captions"]) == 5 for row in photos)
        lines = [json.loads(line) for line in (out / split / "queries.jsonl").read_text().splitlines()]
        assert lines == list(queries_of(split, plan_families(split, num_families, seed=0), seed=0))
        assert {name for line in lines for name in (line["reference"], *line["targets"], *line["members"])} <= names


def test_texts_of_version_2_stay_as_they_are() -> None:
    """If this fails on purpose, count composed.VERSION up: folders of the old version are then refused."""
    star = SceneObject("red", "star", "small", "left")
    assert composed.VERSION == 2
    assert Edit(star, None).texts(random.Random(0)) == [
        "the same, but the object on the left side is gone",
        "without the object on the left side",
    ]
    assert next(queries_of("dev", plan_families("dev", 1, seed=0), seed=0))["texts"] == [
        "turn the red diamond into a triangle",
        "a triangle instead of the diamond in the middle",
    ]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split val: expected one of train, dev, test, unseen"):
        plan_families("val", 1, seed=0)


def test_a_family_draws_its_twin_last() -> None:
    (family,) = plan_families("train", 1, seed=0)
    assert isinstance(family, Family)
    assert family.pictures[:-1] == family.scenes
    assert family.pictures[-1] == family.scenes[family.twin]


def test_a_photo_alone_finds_one_in_eight() -> None:
    families = plan_families("test", 12, seed=0)
    found = photo_only(families)
    assert found["recall_at_1"] == pytest.approx(1 / 8, abs=0.01)  # the twin is right for its own query
    assert 0.25 < found["map"] < 0.4
