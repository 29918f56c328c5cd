"""Pointed collages of captioned photos: what is where, and what the notes point at."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import collages
from data.collages import ideal_late_fusion, make_collages, plan_collages, read_collages

NAMES = [f"{number}.png" for number in range(40)]
WORDS = {2: ("left", "right"), 4: ("top left", "top right", "bottom left", "bottom right")}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photos of one shade each: photo n of a split that starts at s has the grey value s + 5 n."""
    for split, start, count in (("train", 10, 20), ("dev", 130, 17)):
        folder = tmp_path / "photos" / split
        folder.mkdir(parents=True)
        lines = []
        for number in range(count):
            Image.new("RGB", (30, 20 + number % 3), (start + 5 * number,) * 3).save(folder / f"{number}.png")
            lines.append(
                json.dumps({"file_name": f"{number}.png", "captions": [f"{split} {number} {i}" for i in (1, 2)]})
            )
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "photos"


@pytest.mark.parametrize("cells", [2, 4])
def test_every_photo_is_pointed_at_once_and_shown_as_often(cells: int) -> None:
    planned = plan_collages(NAMES, cells, random.Random(0))
    assert Counter(photo for one in planned for photo in one.photos) == dict.fromkeys(NAMES, cells)
    assert Counter(one.photos[one.pointed] for one in planned) == dict.fromkeys(NAMES, 1)
    assert len({frozenset(one.photos) for one in planned}) == len(NAMES)
    for one in planned:
        assert len(set(one.photos)) == cells
        (named,) = {words for words in WORDS[cells] if one.note.endswith(words)}
        assert WORDS[cells].index(named) == one.pointed
    places = Counter(one.pointed for one in plan_collages([str(n) for n in range(2000)], cells, random.Random(1)))
    assert all(abs(places[cell] - 2000 / cells) < 120 for cell in range(cells))


@pytest.mark.parametrize("cells", [2, 4])
def test_pictures_notes_and_captions_fit_the_source(photos: Path, tmp_path: Path, cells: int) -> None:
    out = make_collages(photos, tmp_path / "out", cells, 0, size=40)
    middles = {2: [(10, 20), (30, 20)], 4: [(10, 10), (30, 10), (10, 30), (30, 30)]}[cells]
    for split, start, count in (("train", 10, 20), ("dev", 130, 17)):
        rows = [json.loads(line) for line in (out / split / "metadata.jsonl").read_text().splitlines()]
        assert len(rows) == count
        for row, known in zip(rows, read_collages(out, split), strict=True):
            with Image.open(out / split / row["file_name"]) as picture:
                assert picture.size == (40, 40)
                pixels = np.asarray(picture.convert("L"), dtype=float)
            shown = [round((pixels[y, x] - start) / 5) for x, y in middles]
            assert [f"{number}.png" for number in shown] == list(known.photos)
            note, *captions = row["captions"]
            place = next(place for place, words in enumerate(WORDS[cells]) if note.endswith(words))
            assert captions == [f"{split} {shown[place]} {i}" for i in (1, 2)]


def test_other_settings_of_a_made_folder_are_refused(photos: Path, tmp_path: Path) -> None:
    out = make_collages(photos, tmp_path / "out", 2, 0, size=16)
    before = (out / "train" / "metadata.jsonl").stat().st_mtime_ns
    assert make_collages(photos, out, 2, 0, size=16) == out
    assert (out / "train" / "metadata.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="Choose another --out"):
        make_collages(photos, out, 4, 0, size=16)
    other = make_collages(photos, tmp_path / "other", 2, 1, size=16)
    assert read_collages(other, "train") != read_collages(out, "train")


def test_a_photo_in_two_splits_is_left_out(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "dev" / "3.png").write_bytes((photos / "train" / "7.png").read_bytes())
    out = make_collages(photos, tmp_path / "out", 2, 0, size=16)
    assert "2 photos are left out" in capsys.readouterr().out
    assert "3.png" not in {photo for one in read_collages(out, "dev") for photo in one.photos}
    assert "7.png" not in {photo for one in read_collages(out, "train") for photo in one.photos}
    assert [len(read_collages(out, split)) for split in ("train", "dev")] == [19, 16]


def test_too_few_photos_and_no_captions_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a split has 8 photos, expected more than 8"):
        make_collages(photos, tmp_path / "out", 2, 0, most=8)
    with pytest.raises(ValueError, match=r"found no SPLIT/metadata.jsonl"):
        make_collages(tmp_path, tmp_path / "out", 2, 0)
    with pytest.raises(ValueError, match="--cells 3: expected 2 or 4"):
        plan_collages(NAMES, 3, random.Random(0))
    assert not (tmp_path / "out").exists()


def test_ideal_late_fusion_is_the_mean_over_orders() -> None:
    rng = np.random.default_rng(0)
    for cells in collages.PLACES:
        ranks = rng.integers(1, cells + 1, 200_000)
        assert ideal_late_fusion(cells)["map"] == pytest.approx((1 / ranks).mean(), abs=0.005)
        assert ideal_late_fusion(cells)["recall_at_1"] == pytest.approx((ranks == 1).mean(), abs=0.005)
