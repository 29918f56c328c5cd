"""The page: what it says agrees with what was measured, nothing in data breaks it, and a real browser shows it."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browsing, find_browser
from report_cases import (
    EVIL,
    Made,
    heat_map,
    make_page,
    make_run,
    matches,
    saved,
    sweep,
    sweep_point,
)

from saffe_cache.cli import main
from saffe_cache.evaluation.details import read_details
from saffe_cache.report.page import find_results
from saffe_cache.report.plots import draw
from saffe_cache.store.reader import open_cache
from saffe_cache.studies.sweep.result import heat_maps, series_plot


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Made:
    return make_run(tmp_path_factory.mktemp("report"), tiny_model)


@pytest.fixture(scope="module")
def page(made: Made) -> str:
    folder = made.data.parent
    others = [saved(sweep(), folder / "sweep"), saved(heat_map(12, 6), folder / "pairs")]
    others.append(saved(matches(), folder / "match"))
    return make_page([made.run, *others], folder / "page", queries=("again",))


class Parsed(HTMLParser):
    """Tags, addresses, and the marks of the galleries: query, system, photo, right or wrong."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.marks: list[tuple[int, str, str, bool]] = []
        self.ids: list[str] = []
        self._query, self._system = 0, ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.tags.append(tag)
        self.addresses += [
            given[name] for name in ("href", "src", "xlink:href", "action", "data", "poster") if name in given
        ]
        self.ids += [given["id"]] if "id" in given else []
        self._query = int(given.get("data-query", self._query))
        self._system = given.get("data-system", self._system)
        if "data-id" in given:
            self.marks.append((self._query, self._system, given["data-id"], given["class"] == "right"))


def test_the_page_loads_nothing_and_data_do_not_break_out(page: str) -> None:
    parsed = Parsed(page)
    assert not {"script", "img", "link", "iframe", "object", "embed", "form", "base"} & set(parsed.tags)
    assert all(address.startswith("#") for address in parsed.addresses)
    assert not re.search(r"url\((?!#|data:image/jpeg;base64,)|@import|https?://(?!example\.org/x\.png)", page)
    assert "<script" not in page
    assert "a dog &lt;/style&gt;&lt;script&gt;alert(1)&lt;/script&gt; &amp; " in page
    assert "Layers &lt;i&gt;" in page
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {address[1:] for address in parsed.addresses} <= set(parsed.ids)


def test_marks_are_those_of_the_captions_in_the_cache(made: Made, page: str) -> None:
    table = open_cache(made.cache).table
    texts = table.inputs["text"].texts
    assert texts is not None
    queries = [texts[row] for item in table.in_split("dev") for row in table.captions[int(item)]]
    marks = Parsed(page).marks
    assert {system for _, system, _, _ in marks} == {"fam", *(made.metrics["systems"].keys() - {"fam"})}
    for query, _, photo, right in marks:
        captions = [texts[row] for row in table.captions[table.ids.index(photo)]]
        assert right == (queries[query - 1] in captions)
    assert 0 < sum(right for *_, right in marks) < len(marks)


def test_thumbnails_are_embedded_once(page: str) -> None:
    embedded = re.findall(r"url\(data:image/jpeg;base64,([^)]+)\)", page)
    shown = set(re.findall(r'class="photo (photo-\d+)"', page))
    assert len(embedded) == len(set(embedded)) == len(shown) > 8
    assert len(page) < 5e6


def test_data_holds_the_unrounded_numbers(made: Made, page: str) -> None:
    folder = made.data.parent / "page"
    with (folder / "data" / "ablate-1.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(row["setting"], row["system"], row["metric"], float(row["value"])) for row in rows]
    measured = [(one.setting, one.system, one.metric, one.value) for one in sweep().measurements()]
    assert found == [pytest.approx(one) for one in measured]
    with (folder / "data" / "evaluate-1-queries.csv").open(newline="") as file:
        values = [float(row["fam: mrr"]) for row in csv.DictReader(file)]
    assert np.mean(values) == pytest.approx(made.metrics["systems"]["fam"]["mrr"]["value"])
    for plot in ("evaluate-1-systems", "train-1-training", "ablate-1-series", "ablate-2-map-1"):
        assert (folder / "figures" / f"{plot}.svg").read_text().startswith("<?xml")
        assert (folder / "figures" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{plot}-figure_1" in page
        assert json.loads((folder / "data" / f"{plot}.json").read_text())["caption"]


@pytest.mark.parametrize(("places", "frames", "joined"), [(("0", "1+2"), 2, True), (("late", "mbt"), 1, False)])
def test_names_on_the_axis_share_a_frame(places: tuple[str, str], frames: int, joined: bool) -> None:
    """Two series, a place each: numbers have a frame each; fusions stand side by side and are not joined."""
    points = [sweep_point(x, None, values) for x, values in zip(places, ((0.32,), (0.41,)), strict=True)]
    plot = series_plot(sweep(("a", points[:1]), ("b", points[1:]), published=()))
    assert (len(plot.panels), plot.joined) == (frames, joined)
    assert [list(one.means) for panel in plot.panels for one in panel.series] == [
        [pytest.approx(32)], [pytest.approx(41)],
    ]  # fmt: skip


def test_the_best_baseline_is_always_drawn() -> None:
    baselines = {name: {"mrr": (value,) * 3} for name, value in (("ridge", 0.2), ("mlp", 0.3), ("concat_mlp", 0.4))}
    points = [sweep_point(x, None, (0.3, 0.4, 0.5), baselines=baselines) for x in ("1", "2")]
    [panel] = series_plot(sweep(("linear", points))).panels
    assert [one.name for series in panel.series for one in series.baselines] == ["ridge", "concat mlp"]


def test_what_is_wrong_comes_first(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.out, tmp_path / "bad")
    path = tmp_path / "bad" / "result.json"
    content = json.loads(path.read_text())
    content |= {"failures": ["photos_shuffled is at <b>9</b>"], "warnings": ["the epoch was chosen here"]}
    path.write_text(json.dumps(content))
    page = make_page([str(made.out), str(tmp_path / "bad")], tmp_path / "page")
    failed, warned = page.index("photos_shuffled is at &lt;b&gt;9"), page.index("the epoch was chosen here")
    assert "1 control failed" in page[:failed] or "controls failed" in page[:failed]
    assert failed < warned < page.index("<main")
    assert "Do not use these numbers" in page[failed:warned]


def test_a_photo_that_is_gone_or_another_is_never_shown(made: Made, tmp_path: Path) -> None:
    whole = make_page([str(made.out)], tmp_path / "page")
    gone, other = sorted({photo for _, _, photo, _ in Parsed(whole).marks})[3:5]
    data = tmp_path / "data"
    shutil.copytree(made.data, data)
    (data / gone).unlink()
    shutil.copy(data / "train" / "000.png", data / other)
    page = make_page([str(made.out)], tmp_path / "page", data=(str(data),))
    count = len(re.findall(r"url\(data:", whole))
    assert len(re.findall(r"url\(data:", page)) == count - 2
    assert re.search(rf"{gone}, [^\"]*; not shown: unreadable image: No such file", page)
    assert re.search(rf"{other}, [^\"]*; not shown: its file has changed", page)
    assert f"2 of the {count} photos of its gallery are not shown" in page
    page = make_page([str(made.out)], tmp_path / "page", data=(str(tmp_path / "nowhere"),))
    assert "url(data:" not in page
    assert f"{count} of the {count} photos of its gallery are not shown" in page


def test_a_sweep_is_drawn_with_its_intervals(tmp_path: Path) -> None:
    page = make_page([saved(sweep(), tmp_path / "sweep")], tmp_path / "page")
    half = 4.302652729911275 * np.std([0.3, 0.32, 0.34], ddof=1) / np.sqrt(3)
    assert f"[{100 * (0.32 - half):.1f}, {100 * (0.32 + half):.1f}]" in page
    assert "6.91 M" in page
    drawing = re.search(r"<svg.*?</svg>", page, re.DOTALL)
    assert drawing is not None
    assert "Same" in drawing.group()
    assert "Other" not in drawing.group()
    cost = replace(sweep().cost, re_encoding_seconds=None, photo_seconds=None, text_seconds=None)
    unknown = make_page([saved(sweep(cost=cost), tmp_path / "sweep")], tmp_path / "page")
    assert "unknown, unknown" in unknown


@pytest.mark.parametrize(
    ("columns", "rows", "is_turned"), [(6, 6, False), (8, 2, True), pytest.param(7, 9, False, marks=pytest.mark.slow)]
)
def test_a_heat_map_shows_intervals_and_the_best_baseline(columns: int, rows: int, is_turned: bool) -> None:
    """The longer axis runs downwards where a phone has no room for it; both maps have one scale of colours."""
    maps = heat_maps(heat_map(columns, rows))
    axes = [f"t{y}" for y in range(rows)], [f"p{x}" for x in range(columns)]
    half = 4.302652729911275 * np.std([0.2, 0.25, 0.3], ddof=1) / np.sqrt(3)
    highest = 100 * (0.25 + (columns - 1 + rows * (rows - 1)) / 200)
    assert [one.name for one in maps] == ["map-1", "map-1-baseline"]
    for one, gain in zip(maps, (0.25, 0.1), strict=True):
        assert (one.rows, one.columns) == (axes[::-1] if is_turned else axes)
        labels = ("text layer", "photo layer") if is_turned else ("photo layer", "text layer")
        assert (one.column_label, one.row_label) == labels
        column, row = (1, 4) if is_turned else (4, 1)  # of photo layer 4 and text layer 1
        assert one.cells[row][column] == pytest.approx(100 * (gain + (4 + rows) / 200))
        assert one.notes is not None
        assert one.notes[row][column] == f"± {100 * half:.1f}"
        assert one.limits == pytest.approx((10, highest))
        assert ("late fusion, the best one" in one.caption) == (gain == 0.1)
        place = "t1, p4" if is_turned else "p4, t1"
        assert f"{place}: {one.cells[row][column]:.1f} ± {100 * half:.1f};" in draw(one, "plot").inline
    assert "Chance: 1.0." in maps[0].caption
    assert f"reuse has the higher mean in {columns * rows} of {columns * rows}." in maps[1].caption


def test_a_heat_map_of_one_seed_has_no_intervals(tmp_path: Path) -> None:
    places = [(f"p{x}", f"t{y}", (x + 3 * y) / 200 + 0.2) for x in range(2) for y in range(3)]
    points = [sweep_point(x, y, (value,), baselines={}) for x, y, value in places]
    result = sweep(("reuse", points), y_label="text layer", levels=(), published=())
    page = make_page([saved(result, tmp_path / "sweep")], tmp_path / "page")
    drawing = re.search(r"<svg.*?</svg>", page, re.DOTALL)
    assert drawing is not None
    assert re.findall(r">(\d+\.\d)</text>", drawing.group()) == ["20.0", "20.5", "21.5", "22.0", "23.0", "23.5"]
    assert "±" not in drawing.group()
    assert page.count("<svg") == 1


def test_several_results_have_names_and_their_run_is_shown(made: Made, tmp_path: Path) -> None:
    """An evaluation brings its run; folders above results bring all of them, each once."""
    for name in ("one", "two"):
        saved(sweep(title=name), tmp_path / name)
    found = find_results([str(made.out), str(tmp_path), str(tmp_path / "one")])
    assert [one.result.verb for one in found] == ["evaluate", "ablate", "ablate", "train"]
    assert [one.name.split(" / ")[-1] for one in found] == ["dev-caption", "one", "two", "run"]


def test_folders_without_results_and_damage_are_refused(made: Made, tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_page([str(folder)], tmp_path / "page")
        assert not (tmp_path / "page").exists()

    refused(tmp_path / "none", r"none: nothing is there. Give an output folder of saffe train, ")
    refused(made.data / "train", r"train: no result\.json is in it or in a folder directly below\.")
    path = Path(saved(sweep(), tmp_path / "sweep")) / "result.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"verb": "sing"}))
    refused(path.parent, r"result\.json: found verb 'sing', expected one of train")
    path.write_text(json.dumps(content | {"verb": None}))
    refused(path.parent, r"result\.json: found verb None, expected one of")
    path.write_text(json.dumps(content | {"version": 0}))
    refused(path.parent, r"result\.json: found 'ablate' version 0, expected 'ablate' version 1")
    content["series"][0]["points"][0]["seeds"] = [0, 1]
    path.write_text(json.dumps(content))
    refused(path.parent, "damaged .*3 entries for 2 seeds")
    shutil.copytree(made.out, tmp_path / "mixed")
    path = tmp_path / "mixed" / "result.json"
    path.write_text(path.read_text().replace(str(made.metrics["systems"]["fam"]["mrr"]["value"]), "0.5"))
    refused(tmp_path / "mixed", "they belong to two evaluations")


def test_the_command_prints_the_path(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(made.out), "--out", str(tmp_path / "page"), "--random-queries", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "page" / "index.html")
    assert read_details(made.out).texts[0] == EVIL
    assert main(["report", str(made.data), "--out", str(tmp_path / "other")]) == 1


_CONTRAST = """
(() => {
  const parse = text => { const of = text.match(/[\\d.]+/g).map(Number); return of.length < 4 ? [...of, 1] : of; };
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = node => { for (; node; node = node.parentElement) {
    const of = parse(getComputedStyle(node).backgroundColor); if (of[3] > 0) return of; } return [255, 255, 255, 1]; };
  let worst = [21, ''];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some(one => one.nodeType == 3 && one.textContent.trim());
    if (!own || !node.getClientRects().length || node.classList.contains('skip')) continue;
    const style = getComputedStyle(node);
    const ink = light(parse(node.closest('svg') ? style.fill : style.color)), paper = light(ground(node));
    const ratio = (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
    if (ratio < worst[0]) worst = [ratio, node.outerHTML.slice(0, 200)];
  }
  return worst;
})()"""
_DECODED = """
Promise.all([...new Set([...document.querySelectorAll('.photo:not(.empty)')].map(
  node => getComputedStyle(node).backgroundImage.slice(5, -2)))].map(source => new Promise(done => {
    const image = new Image(); image.onload = () => done(image.naturalWidth); image.onerror = () => done(0);
    image.src = source; })))"""


_HEAT_MAPS = """
(() => { const sizes = [...document.querySelectorAll('#ablate-2 svg text')].map(
  node => parseFloat(getComputedStyle(node).fontSize) * node.getScreenCTM().a || 99);
  return [Math.min(...sizes), sizes.length]; })()"""
"""Size of the smallest letters in pixels, and how many texts there are. Turned ones count as large."""
_TEXTS_MEET = """
[...document.querySelectorAll('svg')].flatMap(svg => {
  const boxes = [...svg.querySelectorAll('text')].map(node => [node.textContent, node.getBoundingClientRect()]);
  const meet = (a, b) => a.left < b.right && b.left < a.right
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > a.height / 3;
  return boxes.flatMap(([name, a], i) => boxes.slice(i + 1).filter(([_, b]) => meet(a, b)).map(
    ([other]) => `${name} | ${other}`)); })"""
"""Texts of a drawing that lie over each other; boxes of lines are a little higher than their letters."""


@pytest.mark.skipif(find_browser() is None, reason="no chromium or chrome is installed")
def test_a_browser_shows_it_on_a_phone_in_light_and_dark(made: Made, page: str, tmp_path: Path) -> None:
    path = made.data.parent / "page" / "index.html"
    assert path.read_text() == page
    with browsing(tmp_path) as opened:
        for width in (360, 1200):
            for dark in (False, True):
                opened.open(path, width, dark=dark)
                opened.run("document.querySelectorAll('details').forEach(one => { one.open = true })")
                assert opened.run("document.documentElement.scrollWidth") <= width
                contrast, where = opened.run(_CONTRAST)
                assert contrast >= 4.5, where
                paper = opened.run("getComputedStyle(document.body).backgroundColor")
                assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) == dark
        for width, least in ((360, 7), (640, 11)):
            opened.open(path, width)
            assert opened.run(_TEXTS_MEET) == []
            smallest, count = opened.run(_HEAT_MAPS)
            assert count == 2 * 2 * 72 + 2 * (12 + 6 + 2)  # numbers and intervals, places, names of the axes
            assert smallest >= least
        widths = opened.run(_DECODED)
        assert len(widths) == len(re.findall(r"url\(data:", page))
        assert min(widths) > 0
        assert opened.complaints == []
        assert {one.split(":")[0] for one in opened.requests} <= {"file", "data"}
        assert len({one for one in opened.requests if one.startswith("file:")}) == 1
