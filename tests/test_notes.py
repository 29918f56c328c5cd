"""The noted set: notes and queries are read back and held against the scenes, the references against brute force."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import notes, scenes
from data.notes import NotedScene, SceneObject, draw_notes, expected_average_precision, note_and_query, plan_notes

SPLITS = {"train": 5, "dev": 2, "test": 3}
SCENES = plan_notes("test", 1000, seed=0)

# Where to look for an object, written down apart from the generator's own table.
MIDDLE = {"left": (0.25, 0.5), "right": (0.75, 0.5), "top": (0.5, 0.25), "bottom": (0.5, 0.75)}
PALETTE = {colour: scenes.COLOURS[colour] for colour in ("red", "yellow", "green", "blue", "pink", "black")}
ATTRIBUTE = "(?P<attribute>fragile|heavy|sold|new|urgent|wet)"
SIDE = "(?P<place>left|right|top|bottom)"
WHERE = "(?:on the (?P<x>left|right)|at the (?P<y>top|bottom))"
NOTES = (
    f"the {SIDE} one is {ATTRIBUTE}",
    f"the object {WHERE} is {ATTRIBUTE}",
    f"{ATTRIBUTE}: the object {WHERE}",
    f"please treat the thing {WHERE} as {ATTRIBUTE}",
    f"what you see {WHERE} is {ATTRIBUTE}",
    f"mark the {SIDE} item as {ATTRIBUTE}",
    f"{WHERE} is something {ATTRIBUTE}",
    f"note that the {SIDE} shape is {ATTRIBUTE}",
)
QUERY = rf"(a|an) {ATTRIBUTE} (red|yellow|green|blue|pink|black) (circle|triangle|star|heart|moon)"


def read_note(text: str) -> tuple[str, str]:
    """Place and attribute of a note, which must have one of the known wordings."""
    (match,) = filter(None, (re.fullmatch(wording, text) for wording in NOTES))
    found = match.groupdict()
    return found.get("place") or found["x"] or found["y"], found["attribute"]


def check_captions(texts: list[str], scene: NotedScene) -> None:
    """Assert that note and query say the truth about one and the same object."""
    note, query = texts
    place, attribute = read_note(note)
    (item,) = (item for item in scene.objects if item.place == place)
    match = re.fullmatch(QUERY, query)
    assert match, query
    article, *words = match.groups()
    assert article == ("an" if attribute[0] in "aeiou" else "a")
    assert words == [attribute, item.colour, item.shape]
    assert (item, attribute) == (scene.objects[scene.noted], scene.attribute)


@pytest.mark.parametrize("split", SPLITS)
def test_note_and_query_are_true_of_the_scene(split: str) -> None:
    for index, scene in enumerate(plan_notes(split, 100, seed=1)):
        check_captions(note_and_query(scene, random.Random(index)), scene)


@pytest.mark.parametrize(
    "texts",
    [
        ["the right one is fragile", "a fragile red star"],
        ["the left one is heavy", "a fragile red star"],
        ["the left one is fragile", "a fragile blue circle"],
        ["the left one is fragile", "a red star"],
        ["the top one is fragile", "a fragile red star"],
        ["the left star is fragile", "a fragile red star"],
        ["the left one is fragile", "an fragile red star"],
    ],
)
def test_the_reader_notices_a_lie(texts: list[str]) -> None:
    scene = two_objects(noted=0, attribute="fragile")
    check_captions(["the left one is fragile", "a fragile red star"], scene)
    with pytest.raises((AssertionError, ValueError)):
        check_captions(texts, scene)


KINDS = (("red", "star"), ("blue", "circle"))


def two_objects(*, noted: int, attribute: str, places: tuple[str, str] = ("left", "right")) -> NotedScene:
    star, circle = (SceneObject(*kind, "large", place) for kind, place in zip(KINDS, places, strict=True))
    return NotedScene(objects=(star, circle), noted=noted, attribute=attribute)


def test_wordings_places_and_attributes_are_balanced() -> None:
    texts = [note_and_query(scene, random.Random(index))[0] for index, scene in enumerate(SCENES)]
    wordings = Counter(wording for text in texts for wording in NOTES if re.fullmatch(wording, text))
    places, attributes = zip(*map(read_note, texts), strict=True)
    counts = [list(counted.values()) for counted in (wordings, Counter(places), Counter(attributes))]
    assert [len(values) for values in counts] == [len(NOTES), len(MIDDLE), 6]
    for values in counts:
        assert chi_squared(values) < 3 * len(values) + 8


def chi_squared(counts: list[int]) -> float:
    """Pearson's statistic against equal counts: about their number minus one where they are equal but for chance."""
    expected = sum(counts) / len(counts)
    return float(sum((count - expected) ** 2 / expected for count in counts))


@pytest.mark.parametrize(
    ("known", "num_values"),
    [
        pytest.param(lambda scene: scene.objects[scene.noted].colour, 6, id="noted colour"),
        pytest.param(lambda scene: scene.objects[scene.noted].shape, 5, id="noted shape"),
        pytest.param(lambda scene: scene.objects[scene.noted].place, 4, id="noted place"),
        pytest.param(lambda scene: len(scene.objects), 2, id="number of objects"),
        pytest.param(lambda scene: scene.noted, 3, id="order"),
    ],
)
def test_the_attribute_is_independent_of_the_rest(known: Callable[[NotedScene], object], num_values: int) -> None:
    groups: dict[object, list[str]] = {}
    for scene in plan_notes("train", 5000, seed=0):
        groups.setdefault(known(scene), []).append(scene.attribute)
    assert len(groups) == num_values
    for attributes in groups.values():
        assert chi_squared([attributes.count(attribute) for attribute in notes.ATTRIBUTES]) < 20.5  # p = 0.001


def test_the_noted_object_is_any_of_the_picture() -> None:
    planned = plan_notes("train", 5000, seed=0)
    for num_objects in (2, 3):
        chosen = [scene for scene in planned if len(scene.objects) == num_objects]
        assert chi_squared(list(Counter(scene.noted for scene in chosen).values())) < 13.8  # p = 0.001
        for order in (lambda item: (item.colour, item.shape), lambda item: item.place):
            ranks = Counter(sorted(scene.objects, key=order).index(scene.objects[scene.noted]) for scene in chosen)
            assert len(ranks) == num_objects
            assert chi_squared(list(ranks.values())) < 13.8


def test_the_picture_does_not_depend_on_the_note() -> None:
    for scene in SCENES[:20]:
        other = NotedScene(objects=scene.objects, noted=(scene.noted + 1) % len(scene.objects), attribute="new")
        first, second = (scenes.render(drawn, random.Random(0), 56).tobytes() for drawn in (scene, other))
        assert first == second


def test_the_note_does_not_depend_on_what_the_object_is() -> None:
    for scene in SCENES[:100]:
        place = scene.objects[scene.noted].place
        other = two_objects(noted=1, attribute=scene.attribute, places=("left" if place == "top" else "top", place))
        note, other_note = (note_and_query(s, random.Random(1))[0] for s in (scene, other))
        assert note == other_note


@pytest.mark.parametrize("index", range(20))
def test_a_picture_shows_its_objects_and_nothing_elsewhere(index: int) -> None:
    scene = SCENES[index]
    pixels = np.asarray(scenes.render(scene, random.Random(index), 112), dtype=float)
    distances = np.linalg.norm(pixels[:, :, None] - np.array(list(PALETTE.values()), dtype=float), axis=-1)
    held = {item.place: item.colour for item in scene.objects}
    for place, (x, y) in MIDDLE.items():
        column, row = round(112 * x), round(112 * y)
        near = distances[row - 17 : row + 18, column - 17 : column + 18].reshape(-1, len(PALETTE))
        counts = np.bincount(near.argmin(axis=1)[near.min(axis=1) < 30], minlength=len(PALETTE))
        if place in held:
            assert list(PALETTE)[counts.argmax()] == held[place]
            assert counts.max() > 150
        else:
            assert counts.max() < 20


def test_objects_differ_in_kind_and_in_place() -> None:
    for scene in SCENES:
        assert len({(item.colour, item.shape) for item in scene.objects}) == len(scene.objects)
        assert len({item.place for item in scene.objects}) == len(scene.objects)
        assert {item.place for item in scene.objects} <= MIDDLE.keys()
    assert 240 < sum(len(scene.objects) == 2 for scene in SCENES) < 360
    assert {len(scene.objects) for scene in SCENES} == {2, 3}


def test_no_arrangement_is_in_two_scenes() -> None:
    planned = [scene for split, n in notes.SPLITS.items() for scene in plan_notes(split, n, seed=0)]
    shown = {frozenset((item.colour, item.shape, item.place) for item in scene.objects) for scene in planned}
    assert len(shown) == len(planned) == 7000


def test_split_of_an_arrangement_ignores_order_and_note() -> None:
    for scene in SCENES[:50]:
        turned = NotedScene(objects=scene.objects[::-1], noted=0, attribute="wet")
        assert notes.split_of(turned, 0) == "test"


def test_a_larger_split_begins_with_the_scenes_of_a_smaller_one() -> None:
    small, large = (plan_notes("dev", n, seed=3) for n in (10, 30))
    assert large[:10] == small
    assert plan_notes("dev", 10, seed=4) != small


def test_more_scenes_than_there_are_arrangements_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "COLOURS", ("red",))
    with pytest.raises(ValueError, match=r"split dev: found \d+ different scenes, expected 300"):
        plan_notes("dev", 300, seed=0)


def test_files_of_a_drawn_set(tmp_path: Path) -> None:
    out = draw_notes(tmp_path / "deep" / "set", SPLITS, seed=0, size=28)
    assert out == tmp_path / "deep" / "set"
    assert sorted(path.name for path in out.iterdir()) == ["dev", "notes.json", "test", "train"]
    assert [path.name for path in out.parent.iterdir()] == ["set"]
    for split, num_scenes in SPLITS.items():
        rows = [json.loads(line) for line in (out / split / "metadata.jsonl").read_text().splitlines()]
        truth = notes.read_notes(out, split)
        assert truth == plan_notes(split, num_scenes, seed=0)
        assert sorted(path.name for path in (out / split).glob("*.png")) == [row["file_name"] for row in rows]
        for row, scene in zip(rows, truth, strict=True):
            assert row.keys() == {"file_name", "captions"}
            check_captions(row["captions"], scene)
            with Image.open(out / split / row["file_name"]) as picture:
                assert (picture.size, picture.mode) == ((28, 28), "RGB")


def test_a_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    """Neither on the hash seed of the process nor on the other splits' numbers; run as a script from elsewhere."""
    contents = []
    for hash_seed, num_train, seed in (("1", 1, 7), ("2", 3, 7), ("3", 1, 8)):
        out = tmp_path / hash_seed
        options = f"--out {out} --train {num_train} --dev 1 --test 4 --seed {seed}".split()
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, notes.__file__, *options], check=True, env=environment, cwd=tmp_path)
        contents.append({path.name: path.read_bytes() for path in (out / "test").iterdir()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 5
    assert all(contents[0][name] != contents[2][name] for name in contents[0])


def test_complete_set_is_kept_and_other_settings_are_refused(tmp_path: Path) -> None:
    out = draw_notes(tmp_path / "set", SPLITS, seed=0, size=28)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert draw_notes(out, SPLITS, seed=0, size=28) == out
    for changed in ({"seed": 1}, {"size": 56}, {"splits": {**SPLITS, "dev": 3}}):
        settings = {"splits": SPLITS, "seed": 0, "size": 28, **changed}
        with pytest.raises(ValueError, match="Choose another --out"):
            draw_notes(out, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"found no scenes\.json"):
        scenes.draw_scenes(out, SPLITS, seed=0, size=28)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_notes_of_version_1_stay_as_they_are() -> None:
    """If this fails on purpose, count notes.VERSION up: folders of the old version are then refused."""
    assert notes.VERSION == 1
    assert [note_and_query(scene, random.Random(i)) for i, scene in enumerate(SCENES[:3])] == [
        ["at the top is something sold", "a sold black heart"],
        ["new: the object at the bottom", "a new red triangle"],
        ["the top one is urgent", "an urgent green circle"],
    ]


def average_precision(ranked: np.ndarray) -> np.ndarray:
    """Of complete rankings, bool [rankings, items], best item first."""
    precision = ranked.cumsum(axis=1) / np.arange(1, ranked.shape[1] + 1)
    return np.asarray((precision * ranked).sum(axis=1) / ranked.sum(axis=1))


@pytest.mark.parametrize("seed", range(20))
def test_expected_average_precision_is_the_mean_over_all_orders(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_items = int(rng.integers(1, 7))
    scores = rng.integers(0, 3, num_items)
    is_relevant = rng.permutation(np.arange(num_items) < rng.integers(1, num_items + 1))
    orders = np.array(list(itertools.permutations(range(num_items))))
    ranked = is_relevant[orders[(np.diff(scores[orders], axis=1) <= 0).all(axis=1)]]
    expected = average_precision(ranked).mean(), ranked[:, 0].mean()
    assert expected_average_precision(scores, is_relevant) == pytest.approx(expected)


def brute_force(planned: list[NotedScene], score: Callable[[NotedScene, str], float], num_orders: int) -> list[float]:
    """mAP and R@1 over the distinct queries, the mean of random tie orders; `score` sees the query's text."""
    rng = np.random.default_rng(0)
    results = []
    for query in sorted({scene.query for scene in planned}):
        scores = np.array([score(scene, query) for scene in planned], dtype=float)
        relevant = np.array([scene.query == query for scene in planned])
        orders = [np.lexsort((rng.random(len(planned)), -scores)) for _ in range(num_orders)]
        ranked = relevant[np.array(orders)]
        results.append((average_precision(ranked).mean(), ranked[:, 0].mean()))
    return [float(value) for value in np.mean(results, axis=0)]


def has_attribute(scene: NotedScene, query: str) -> bool:
    return scene.attribute in query.split()


def holds_object(scene: NotedScene, query: str) -> bool:
    return any(query.endswith(f" {item.colour} {item.shape}") for item in scene.objects)


def late_score(scene: NotedScene, query: str) -> float:
    """A sum: note + picture."""
    return 10 * has_attribute(scene, query) + 10 * holds_object(scene, query) - len(scene.objects)


def favouring_places(rng: random.Random) -> Callable[[NotedScene, str], float]:
    """A sum of a score of the note and one of the picture, as `place_ordered_fusion` describes it with M = 1e5."""
    height = {"left": 0.0, "right": 1.0, "top": 1e5, "bottom": 1e10}
    far = dict(zip((scene.arrangement for scene in SCENES), rng.sample(range(1000), 1000), strict=True))

    def of_note(place: str, attribute: str, query: str) -> float:
        return -height[place] - 1e16 * (attribute not in query)

    def of_picture(objects: tuple[SceneObject, ...], far_off: int, query: str) -> float:
        asked = [height[item.place] for item in objects if query.endswith(f" {item.colour} {item.shape}")]
        if not asked:
            return -1e16
        num_lower = sum(height[item.place] < asked[0] for item in objects)
        return -10 * asked[0] * (1000 * num_lower + far_off) if num_lower else asked[0]

    def score(scene: NotedScene, query: str) -> float:
        place = scene.objects[scene.noted].place
        return of_note(place, scene.attribute, query) + of_picture(scene.objects, far[scene.arrangement], query)

    return score


def test_references_equal_the_mean_over_random_orders() -> None:
    planned = SCENES[:200]
    for reference, score in ((notes.ideal_late_fusion, late_score), (notes.text_only_chance, has_attribute)):
        expected = dict(zip(("map", "recall_at_1"), brute_force(planned, score, 200), strict=True))
        assert reference(planned) == pytest.approx(expected, abs=0.005)


@pytest.mark.slow
def test_place_ordered_reference_beats_the_ideal_one() -> None:
    planned = SCENES[:300]
    tries = [brute_force(planned, favouring_places(random.Random(seed)), 1) for seed in range(15)]
    assert list(notes.place_ordered_fusion(planned).values()) == pytest.approx(np.mean(tries, axis=0), abs=0.01)
    found = notes.place_ordered_fusion(SCENES)
    ideal = notes.ideal_late_fusion(SCENES)
    assert all(found[name] > ideal[name] + 0.05 for name in ideal)


def test_chance_is_the_closed_form_over_the_queries() -> None:
    counts = Counter(scene.query for scene in SCENES)
    others = (len(SCENES) - (harmonic := sum(1 / rank for rank in range(1, 1001)))) / (len(SCENES) - 1)
    expected = sum(harmonic + (count - 1) * others for count in counts.values()) / len(counts) / len(SCENES)
    assert notes.chance(SCENES) == pytest.approx({"map": expected, "recall_at_1": 1 / len(counts)})


def test_references_of_pictures_that_only_binding_separates() -> None:
    """Two pictures with swapped places and one note: each of the two queries asks for one of them."""
    planned = [two_objects(noted=0, attribute="wet"), two_objects(noted=1, attribute="wet", places=("right", "left"))]
    assert {scene.query for scene in planned} == {"a wet red star", "a wet blue circle"}
    assert notes.ideal_late_fusion(planned) == pytest.approx({"map": 0.75, "recall_at_1": 0.5})
    assert notes.text_only_chance(planned) == notes.chance(planned) == notes.ideal_late_fusion(planned)


def test_references_of_the_default_test_split() -> None:
    references = (notes.place_ordered_fusion, notes.ideal_late_fusion, notes.text_only_chance, notes.chance)
    assert [round(100 * reference(SCENES)["map"], 1) for reference in references] == [70.6, 54.7, 6.1, 1.2]
