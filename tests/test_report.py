"""The page: what it says agrees with what was measured, nothing in data breaks it, and a real browser shows it."""

from __future__ import annotations

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browsing, find_browser
from report_cases import (
    EVIL,
    Made,
    ablation,
    alignment,
    captions,
    episodes,
    heat_map,
    make_page,
    make_run,
    matches,
    write,
)

from saffe_cache.cli import main
from saffe_cache.core.tables import flops as flops_in_words
from saffe_cache.evaluation.details import read_details
from saffe_cache.report import plots, sections
from saffe_cache.report.ablations import read_ablation, spread
from saffe_cache.store.reader import open_cache


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Made:
    return make_run(tmp_path_factory.mktemp("report"), tiny_model)


@pytest.fixture(scope="module")
def page(made: Made) -> str:
    folder = made.data.parent
    others = [write(folder / "sweep", "ablation.json", ablation()), write(folder / "few", "binding.json", episodes())]
    others.append(write(folder / "align", "alignment.json", alignment()))
    others.append(write(folder / "pairs", "ablation.json", heat_map(12, 6)))
    others.append(write(folder / "match", "match.json", matches()))
    others += [write(folder / f"layer-{i}", "caption.json", captions(i, 3.5 + i / 8)) for i in (4, 0)]
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


def test_csv_holds_the_reported_numbers(made: Made, page: str) -> None:
    folder = made.data.parent / "page"
    with (folder / "data" / "evaluation-1.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["kind"], row["name"], row["metric"]): row for row in rows}
    for system, scores in made.metrics["systems"].items():
        for metric, score in scores.items():
            row = found["fam" if system == "fam" else "baseline", system, metric]
            for part in ("value", "chance", "low", "high"):
                assert row[part] == ("" if score[part] is None else repr(score[part]))
    for control, of in made.metrics["controls"].items():
        assert float(found["control", control, of["metric"]]["value"]) == of["value"]
    with (folder / "data" / "evaluation-1-queries.csv").open(newline="") as file:
        values = [float(row["fam: mrr"]) for row in csv.DictReader(file)]
    assert np.mean(values) == pytest.approx(made.metrics["systems"]["fam"]["mrr"]["value"])
    flops = made.metrics["cost"]["fusing_flops"]
    with (folder / "data" / "ledger.csv").open(newline="") as file:
        assert [row["fusing_flops"] for row in csv.DictReader(file)] == [f"caption={flops}"]
    assert page.count(flops_in_words(flops)) == 2  # of the run and of its evaluation
    for plot in ("evaluation-1-systems", "run-1-training", "ablation-1", "episodes-1", "alignment-1-cka"):
        assert (folder / "figures" / f"{plot}.svg").read_text().startswith("<?xml")
        assert (folder / "figures" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{plot}-figure_1" in page


@pytest.mark.parametrize(("places", "frames", "joined"), [(("0", "1+2"), 2, True), (("late", "mbt"), 1, False)])
def test_names_along_the_axis_share_a_frame_and_are_not_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: tuple[str, str], frames: int, joined: bool
) -> None:
    """Two series, a place each: numbers have a frame each, fusions stand side by side."""
    content = ablation(published=[])
    first, second = content["series"][0]["points"]
    first["x"], second["x"] = places
    content["series"] = [{"name": name, "points": [one]} for name, one in (("a", first), ("b", second))]
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        plots, "draw_series", lambda name, panels, *_, joined: drawn.update(panels=panels, joined=joined)
    )
    found = read_ablation(Path(write(tmp_path / "a", "ablation.json", content)) / "ablation.json")
    sections.ablation_section(found, "ablation-1", [])
    assert (len(drawn["panels"]), drawn["joined"]) == (frames, joined)
    assert [list(bars.means) for panel in drawn["panels"] for bars in panel.series] == [
        [pytest.approx(32)], [pytest.approx(41)],
    ]  # fmt: skip


def test_the_best_baseline_is_drawn_whichever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = ablation(published=[])
    for point in content["series"][0]["points"]:
        point["baselines"] |= {"mlp": {"mrr": [0.3, 0.32]}, "concat_mlp": {"mrr": [0.4, 0.42]}}
    drawn: list[plots.Panel] = []
    monkeypatch.setattr(plots, "draw_series", lambda name, panels, *_, joined: drawn.extend(panels))
    found = read_ablation(Path(write(tmp_path / "a", "ablation.json", content)) / "ablation.json")
    sections.ablation_section(found, "ablation-1", [])
    names = {bars.name for panel in drawn for series in panel.series for bars in series.beside}
    assert "concat mlp" in names
    assert "mlp" not in names


def test_an_alignment_shows_advice_nulls_and_every_pair(made: Made, page: str) -> None:
    section = page[page.index('id="alignment-1"') : page.index('id="run-1"')]
    assert "linear (photos alone)" in section
    assert "a line finds &lt;b&gt;20" in section
    assert "A hypothesis." in section
    for shown in ("42.0", "3.0", "permuted", "95 % of them to 2.0", "18.0 – 22.0", "no tokens &lt;i&gt;"):
        assert shown in section, shown
    with (made.data.parent / "page" / "data" / "alignment-1.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["gallery_layer"], row["measure"], row["value"]) for row in rows] == [
        ("2", "cka", "0.31"), ("own", "cka", "0.42"), ("2", "a_0", "0.2"), ("own", "a_0", ""),
    ]  # fmt: skip


def test_captions_of_several_layers_stand_in_one_table(made: Made, page: str) -> None:
    section = page[page.index('id="captions"') : page.index('id="run-1"')]
    assert section.index("layer 0 of 6") < section.index("layer 4 of 6")
    for shown in ("3.500", "4.500", "3.400 – 3.600", "30.0", "99,072", "41.1 G", "a &lt;b&gt;dog", "a dog &amp; its"):
        assert shown in section, shown
    assert page.index("photos shuffled: 4. Do not use") < page.index('id="captions"')
    with (made.data.parent / "page" / "data" / "captions.csv").open(newline="") as file:
        rows = [(row["layer"], row["photo"], row["own_caption"]) for row in csv.DictReader(file)]
    assert rows == [("0", "3.5", "0.3"), ("4", "4.0", "0.3")]


def test_what_is_wrong_comes_first(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.out, tmp_path / "bad")
    path = tmp_path / "bad" / "result.json"
    content = json.loads(path.read_text())
    content |= {"failures": ["photos_shuffled is at <b>9</b>"], "warnings": ["the epoch was chosen here"]}
    path.write_text(json.dumps(content))
    page = make_page([str(made.out), str(tmp_path / "bad")], tmp_path / "page")
    failed, warned = page.index("photos_shuffled is at &lt;b&gt;9"), page.index("the epoch was chosen here")
    assert re.search(r"\d things? (is|are) not as (it|they) must be", page[:failed])
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
    assert re.search(rf"{gone}, [^\"]*; no picture: unreadable image: No such file", page)
    assert re.search(rf"{other}, [^\"]*; no picture: its file has changed", page)
    assert f"2 of the {count} photos of its gallery are not shown" in page
    page = make_page([str(made.out)], tmp_path / "page", data=(str(tmp_path / "nowhere"),))
    assert "url(data:" not in page
    assert f"{count} of the {count} photos of its gallery are not shown" in page


def test_an_ablation_is_drawn_with_its_intervals(tmp_path: Path) -> None:
    path = Path(write(tmp_path, "ablation.json", ablation()))
    page = make_page([str(path)], tmp_path / "page")
    scipy_interval = 4.302652729911275 * np.std([0.3, 0.32, 0.34], ddof=1) / np.sqrt(3)
    assert spread((0.3, 0.32, 0.34)).half_interval == pytest.approx(scipy_interval, rel=1e-3)
    assert f"± {100 * scipy_interval:.1f}" in page
    with (tmp_path / "page" / "data" / "ablation-1.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == [0.3, 0.32, 0.34, 0.4, 0.4, 0.43]
    assert [row["fusing_flops"] for row in rows] == [""] * 3 + ["6912345"] * 3
    assert page.index("<td>–</td>") < page.index("<td>6.91 M</td>")
    read = read_ablation(path / "ablation.json")
    assert [one.name for one in read.comparable()] == ["Same"]
    drawing = re.search(r"<svg.*?</svg>", page, re.DOTALL)
    assert drawing is not None
    assert "Same" in drawing.group()
    assert "Other" not in drawing.group()
    unknown = ablation(told_besides=[1])
    unknown["ledger"] |= dict.fromkeys(("re_encoding_seconds", "photo_seconds", "text_seconds"))
    assert "unknown, unknown" in make_page([write(tmp_path, "ablation.json", unknown)], tmp_path / "page")


@pytest.mark.parametrize(("columns", "rows", "is_turned"), [(6, 6, False), (8, 2, True), (7, 9, False)])
def test_a_heat_map_shows_intervals_and_the_best_baseline_of_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int, rows: int, is_turned: bool
) -> None:
    """The longer axis runs downwards where a phone has no room for it; both maps have one scale of colours."""
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(plots, "draw_grid", lambda *told, **options: drawn.append((*told, options)))
    path = Path(write(tmp_path / "a", "ablation.json", heat_map(columns, rows)))
    sections.ablation_section(read_ablation(path / "ablation.json"), "ablation-1", [])
    axes = [f"t{y}" for y in range(rows)], [f"p{x}" for x in range(columns)]
    half = 4.302652729911275 * np.std([0.2, 0.25, 0.3], ddof=1) / np.sqrt(3)
    highest = 100 * (0.25 + (columns - 1 + rows * (rows - 1)) / 200)
    assert [told[0] for told in drawn] == ["ablation-1-1", "ablation-1-1-baseline"]
    for (_, cells, texts, names, labels, caption, described, options), gain in zip(drawn, (0.25, 0.1), strict=True):
        assert names == (axes[::-1] if is_turned else axes)
        assert labels == (("text layer", "photo layer") if is_turned else ("photo layer", "text layer"))
        column, row = (1, 4) if is_turned else (4, 1)  # of photo layer 4 and text layer 1
        assert cells[row, column] == pytest.approx(100 * (gain + (4 + rows) / 200))
        assert texts[row][column] == f"{cells[row, column]:.1f}"
        assert options["notes"][row][column] == f"± {100 * half:.1f}"
        assert options["limits"] == pytest.approx((10, highest))
        assert ("late fusion, the best one" in caption) == (gain == 0.1)
        place = "t1, p4" if is_turned else "p4, t1"
        assert f"{place}: {texts[row][column]} ± {100 * half:.1f};" in described
    assert "Chance: 1.0." in drawn[0][5]
    assert f"reuse has the higher mean in {columns * rows} of {columns * rows}." in drawn[1][5]


def test_a_heat_map_of_one_seed_without_baselines_has_no_intervals(tmp_path: Path) -> None:
    content = heat_map(2, 3)
    for point in content["series"][0]["points"]:
        point |= {"baselines": {}, "values": {"mrr": point["values"]["mrr"][:1]}}
        point |= {name: point[name][:1] for name in ("seeds", "reports", "best_epoch", "training_seconds")}
        point["evaluation_seconds"] = [1.0]
    page = make_page([write(tmp_path / "a", "ablation.json", content)], tmp_path / "page")
    drawing = re.search(r"<svg.*?</svg>", page, re.DOTALL)
    assert drawing is not None
    assert re.findall(r">(\d+\.\d)</text>", drawing.group()) == ["20.0", "20.5", "21.5", "22.0", "23.0", "23.5"]
    assert "±" not in drawing.group()
    assert page.count("<svg") == 1


def test_folders_that_are_no_runs_and_broken_files_are_refused(made: Made, tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_page([str(folder)], tmp_path / "page")
        assert not (tmp_path / "page").exists()

    refused(tmp_path / "none", r"none: nothing is there. Give a finished run's folder")
    refused(made.data, r"data: none of result\.json, ablation\.json, binding\.json, .* is in it")
    content = ablation()
    del content["series"][0]["points"][0]["chance"]
    refused(Path(write(tmp_path / "a", "ablation.json", content)), r"ablation\.json: .*'chance'")
    content = ablation()
    content["series"][0]["points"][0]["seeds"] = [0, 1]
    refused(Path(write(tmp_path / "a", "ablation.json", content)), "3 entries for 2 seeds")
    content = episodes()
    content["settings"][0]["systems"]["fam"] = {"mean": "high", "half_interval": 0.1}
    refused(Path(write(tmp_path / "b", "binding.json", content)), r"binding\.json: mean: 'high', expected float")
    content = alignment()
    content["measures"]["cka"]["value"] = [[0.31]]
    refused(
        Path(write(tmp_path / "c", "alignment.json", content)), r"cka: value: rows of \[1\] cells, expected \[1, 1\]"
    )
    content = captions(0, 3.0)
    del content["losses"]["plain_model"]
    refused(Path(write(tmp_path / "d", "caption.json", content)), r"caption\.json: losses: it lacks plain_model")
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
(() => { const sizes = [...document.querySelectorAll('#ablation-2 svg text')].map(
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
