"""Recipes and sweeps: each run is made once, killed sweeps resume, tables hold the reports' numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from quick_runs import quick_train, report_of
from synthetic_cache import WIDTH, make_cache

from saffe_cache.cli import main
from saffe_cache.core.features import CacheError
from saffe_cache.fusion.options import FusionShape
from saffe_cache.inputs.pairs import data_fingerprint, reported_fingerprint
from saffe_cache.protocols.registry import load_protocol
from saffe_cache.store import exchange
from saffe_cache.store.manifest import read_encoder, write_encoder
from saffe_cache.store.reader import open_cache
from saffe_cache.studies.sweep import ablate as running
from saffe_cache.studies.sweep.ablate import ablate
from saffe_cache.studies.sweep.recipe import AblateConfig, read_recipe
from saffe_cache.studies.sweep.result import SweepResult
from saffe_cache.studies.sweep.runs import chosen
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.runs import open_run
from saffe_cache.training.train import train_many

ROOT = Path(__file__).parents[1]
RECIPE = """
title = "T"
question = "Q?"
x = "layers.image"
x_label = "layer"
seeds = [0, 1]
[shared]
epochs = 1
control_epochs = 1
fusion = "linear"
[[series]]
name = "one"
layers.image = [[2], [3]]
[[series]]
name = "both"
layers = { image = [2, 3] }
head = ["attention", "mean"]
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a history, as an extraction leaves one."""
    path = make_cache(tmp_path_factory.mktemp("ablate") / "cache.zarr", {"train": 80, "test": 30}, text_width=WIDTH)
    opened = open_cache(path)
    for key in opened.encoders:
        manifest = read_encoder(opened.storage, key)
        config = {"data": "my data", "encoder": {"image": "i/e", "text": "t/e"}, "cache": "old", "image_size": 64}
        seconds = {"encoding": 11.0, "total": 13.0}
        manifest.history.append({"config": config, "inputs": [0, 110], "seconds": seconds, "threads": 3})
        write_encoder(opened.storage, manifest)
    return path


def recipe_file(folder: Path, text: str = RECIPE, name: str = "layers.toml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def swept(cache: str, tmp_path_factory: pytest.TempPathFactory) -> AblateConfig:
    folder = tmp_path_factory.mktemp("swept")
    config = AblateConfig(recipe=(recipe_file(folder),), cache=cache, out=str(folder / "out"), device="cpu", workers=1)
    ablate(config)
    return config


def outcome(config: AblateConfig, name: str = "layers") -> SweepResult:
    return SweepResult.load(Path(config.out) / name)


def modified(config: AblateConfig) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (Path(config.out) / "runs").rglob("*") if path.is_file()}


def test_a_recipe_spans_its_grid(tmp_path: Path) -> None:
    recipe = read_recipe(recipe_file(tmp_path))
    places = [(cell.series, cell.x) for cell in recipe.cells]
    assert places == [("one", "2"), ("one", "3"), ("both, head attention", "2+3"), ("both, head mean", "2+3")]
    configs = [cell.config("c", "o", 5, "cpu") for cell in recipe.cells]
    shared = {"cache": "c", "out": "o", "seed": 5, "device": "cpu", "epochs": 1, "control_epochs": 1}
    assert configs[0] == TrainConfig(**shared, fusion="linear", layers={"image": (2,)})
    assert configs[3] == TrainConfig(**shared, fusion="linear", layers={"image": (2, 3)}, head="mean")


def test_both_layers_axes_span_a_heat_map(tmp_path: Path) -> None:
    text = RECIPE.split("[[series]]")[0].replace('x_label = "layer"', 'x_label = "l"\ny = "layers.text"\ny_label = "t"')
    series = '[[series]]\nname = "pairs"\nfusion = "reuse"\nlayers.image = [[1], [2]]\nlayers.text = [[2], [3], [4]]\n'
    recipe = read_recipe(recipe_file(tmp_path, text + series))
    assert {(cell.x, cell.y) for cell in recipe.cells} == {(x, y) for x in "12" for y in "234"}


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("title", "name", "a recipe: 'name' is no field"),
        ('title = "T"', "", "a recipe: 'title' is missing"),
        ("[shared]\nepochs = 1", "[shared]\nepoch = 1", "no option 'epoch' to vary"),
        ("[shared]\nepochs = 1", '[shared]\nepochs = "one"', "epochs: 'one', expected int"),
        ('head = ["attention", "mean"]', 'head = ["attention", "average"]', "series 'both, head average'"),
        ('name = "both"', 'name = "one"\nseeds = 3', "'seeds'"),
        ("[[2], [3]]", "[[2], [2]]", "('one', '2', None) is given twice"),
        ('x = "layers.image"', 'x = "layers.sound"', "says no 'sound'"),
        ("[shared]", "[shared", "not TOML"),
        ("seeds = [0, 1]", "seeds = []", "seeds: [], expected at least one"),
        ("seeds = [0, 1]", "seeds = [0, 1, 0]", "seeds: [0, 1, 0], expected whole numbers from 0, each once"),
        ("seeds = [0, 1]", "seeds = [-1]", "seeds: [-1], expected whole numbers from 0, each once"),
        (RECIPE[RECIPE.index("seeds") :], "series = []", "series: [], expected at least one"),
        ('head = ["attention", "mean"]', "head = []", "series 'both': head is empty"),
        ("layers.image = [[2], [3]]", "layers = []", "series 'one': layers is empty"),
        ("layers.image = [[2], [3]]", "layers = {}", "series 'one': layers is empty"),
        ("layers.image = [[2], [3]]", "layers.image = []", "series 'one': layers.image is empty"),
        ("layers.image = [[2], [3]]", "layers.image = [[2], []]", "series 'one': layers.image is empty"),
        ("[[2], [3]]", "[[2]]\nlayers.text = []", "series 'one': layers.text is empty"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_place(tmp_path: Path, before: str, after: str, told: str) -> None:
    path = recipe_file(tmp_path, RECIPE.replace(before, after))
    with pytest.raises(ValueError, match=r"layers\.toml: ") as caught:
        read_recipe(path)
    assert told in str(caught.value)


def test_cells_of_several_protocols_are_refused_before_training(cache: str, tmp_path: Path) -> None:
    """In either order; what one --protocol measures of all of them is one table, and what it cannot is refused too."""
    for texts in ('["null", "first_caption"]', '["first_caption", "null"]'):
        text = STORED.replace('storage = ["float32", "int8"]', f"gallery_text = {texts}").replace(
            "storage", "gallery_text"
        )
        config = AblateConfig(recipe=(recipe_file(tmp_path, text),), cache=cache, out=str(tmp_path / "out"), workers=1)
        with pytest.raises(
            ValueError, match=r"layers\.toml: found .* (caption|metadata) .* and (caption|metadata) .*--pro"
        ):
            ablate(config)
        with pytest.raises(ValueError, match="--gallery-text null, it has not learned to fuse"):
            ablate(replace(config, protocol="metadata"))
    assert not list((tmp_path / "out").rglob("config.json"))
    ablate(replace(config, protocol="caption"))
    assert outcome(config).protocol == "caption"


def test_unknown_metric_is_refused_before_training(cache: str, tmp_path: Path) -> None:
    for metric in ("recall@1", "top1"):
        path = recipe_file(tmp_path, f'metric = "{metric}"\n{RECIPE}')
        with pytest.raises(ValueError, match=rf"layers\.toml: metric: '{metric}', expected .* caption .*recall_at_1, "):
            ablate(AblateConfig(recipe=(path,), cache=cache, out=str(tmp_path / "out")))
    assert not list((tmp_path / "out").rglob("config.json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "protocols"), [(0, ("caption", "metadata", "rerank")), (7, ("class", "candidate", "rerank", "image"))]
)
def test_metric_names_are_known_before_scores(tmp_path: Path, classes: int, protocols: Sequence[str]) -> None:
    path = make_cache(tmp_path / "cache.zarr", {"train": 40, "test": 21}, classes=classes, captions=3)
    matching = {"objective": {"info_nce": 1.0, "matching": 1.0}}
    options: dict[str, Any] = matching if classes else {"gallery_text": "first_caption"}
    run = quick_train(path, tmp_path / "run", epochs=1, fusion="concat", **options)
    cache = open_cache(path)
    spec, _, _ = open_run(run, cache)
    for protocol in protocols:
        scores = report_of(path, run, protocol=protocol)["systems"]["fam"]
        assert list(scores) == load_protocol(protocol).metric_names(cache, spec)


@pytest.mark.parametrize("seeds", [(0, 0), (-1,), (2**63,)])
def test_seeds_are_each_given_once(seeds: tuple[int, ...]) -> None:
    """Or one run would count as several, of which an interval is of no width."""
    with pytest.raises(ValueError, match="--seeds: found "):
        AblateConfig(recipe=("a.toml",), cache="c", out="o", seeds=seeds)


@pytest.mark.slow
def test_points_hold_the_numbers_of_their_reports(swept: AblateConfig) -> None:
    found = outcome(swept)
    points = dict(found.points)
    assert set(points) == {"one, 2", "one, 3", "both, head attention, 2+3", "both, head mean, 2+3"}
    for point in points.values():
        reports = [
            json.loads((Path(swept.out) / "layers" / name / "result.json").read_text()) for name in point.reports
        ]
        assert tuple(report["run"]["seed"] for report in reports) == point.seeds == (0, 1)
        for system in ("fam", "ridge"):
            values = tuple(report["systems"][system]["mrr"]["value"] for report in reports)
            assert point.systems[system]["mrr"] == values
        assert {report["cost"]["fusing_flops"] for report in reports} >= {point.fusing_flops}
        layers = [int(layer) for layer in point.x.split("+")]
        assert all(report["run"]["gallery_layers"] == layers for report in reports)
    frame = found.to_frame().set_index(["setting", "system", "metric"])
    values = points["one, 2"].values["mrr"]
    row = frame.loc["one, 2", "fam", "mrr"]
    assert row["value"] == pytest.approx(statistics.mean(values))
    half = 12.706 * statistics.stdev(values) / 2**0.5
    assert row["high"] - row["value"] == pytest.approx(half)
    line = next(
        line for line in (Path(swept.out) / "layers" / "report.txt").read_text().splitlines() if "one, 2" in line
    )
    assert line.split()[2] == f"{100 * statistics.mean(values):.1f}"


@pytest.mark.slow
def test_levels_are_what_all_cells_agree_on(swept: AblateConfig) -> None:
    """Cells of several encoders have cosines of their own, and some have none."""
    [level] = outcome(swept).levels
    assert level.name == "pooled_cosine"
    folder = Path(swept.out) / "layers"
    first = outcome(swept).series[0].points[0]
    reports = {path: path.read_text() for path in (folder / name / "result.json" for name in first.reports)}
    try:
        for other in (0.5, None):
            for path, text in reports.items():
                content = json.loads(text)
                if other is None:
                    del content["systems"]["pooled_cosine"]
                else:
                    content["systems"]["pooled_cosine"]["mrr"]["value"] = other
                path.write_text(json.dumps(content))
            ablate(swept)
            assert outcome(swept).levels == ()
        assert "cosine" in (folder / "report.txt").read_text()
    finally:
        for path, text in reports.items():
            path.write_text(text)
        ablate(swept)


@pytest.mark.slow
def test_a_failed_control_of_a_cell_sets_the_exit_status(
    swept: AblateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only of this command's recipes: others may lie in the same folder."""
    arguments = [*swept.recipe, "--cache", swept.cache, "--out", swept.out, "--device", "cpu", "--workers", "1"]
    assert main(["ablate", *arguments]) == 0
    path = Path(swept.out) / "layers" / outcome(swept).series[1].points[0].reports[0] / "result.json"
    text = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(text) | {"failures": ["photos shuffled: 50.0"]}))
        capsys.readouterr()
        assert main(["ablate", *arguments]) == 3
        printed = capsys.readouterr().out
        assert printed.startswith(
            "CONTROL FAILED: both, head attention, 2+3, seed 0: photos shuffled: 50.0. Do not use"
        )
        assert printed.splitlines()[-1] == str(Path(swept.out) / "layers")
    finally:
        path.write_text(text)
        ablate(swept)


@pytest.mark.slow
def test_the_cost_counts_what_was_seen(swept: AblateConfig) -> None:
    """80 photos, 8 of them held out: one epoch of 2 steps of 32, and two validations."""
    cost = outcome(swept).cost
    assert cost.num_runs == 8
    photos = 8 * (2 * 32 + 2 * 8)
    texts = 8 * (2 * 32 * 2 + 2 * 8 * 2)
    assert (cost.photos_seen, cost.texts_seen) == (photos, texts)
    assert cost.re_encoding_seconds == pytest.approx((photos + texts) * 11 / 110)
    assert cost.extraction_seconds == 26
    assert "10 photos/s and 10 texts/s, 3 threads" in cost.basis


@pytest.mark.slow
def test_the_cost_adds_up_runs_and_reports(swept: AblateConfig) -> None:
    """Whichever of several commands made them."""
    runs = sorted((Path(swept.out) / "runs").iterdir())
    results = {path / "result.json": (path / "result.json").read_text() for path in runs}
    evaluation = sum(
        json.loads(path.read_text())["cost"]["evaluation_seconds"]
        for path in (Path(swept.out) / "runs").glob("*/*/result.json")
    )
    control = sum(json.loads(text)["control_seconds"] for text in results.values())
    assert control > 0
    try:
        for path, text in results.items():
            path.write_text(json.dumps(json.loads(text) | {"seconds": 600.0}))
        ablate(replace(swept, workers=2))
        cost = outcome(swept).cost
        assert cost.training_seconds == 4800
        assert cost.control_seconds == pytest.approx(control)
        assert cost.wall_seconds == pytest.approx((4800 + control + evaluation) / 2)
        written = (Path(swept.out) / "layers" / "report.txt").read_text()
        assert "8, 2 at a time" in written
        assert "80 min" in written
    finally:
        for path, text in results.items():
            path.write_text(text)
        ablate(swept)


@pytest.mark.slow
def test_finished_runs_are_shared_and_not_repeated(swept: AblateConfig, tmp_path: Path) -> None:
    before = modified(swept)
    ablate(swept)
    assert modified(swept) == before
    other = recipe_file(tmp_path, RECIPE.replace('name = "one"', 'name = "a new name"'), "other.toml")
    more = replace(swept, recipe=(other,), seeds=(0, 1, 2))
    ablate(more)
    after = modified(swept)
    assert {path: after[path] for path in before} == before
    assert len(list((Path(swept.out) / "runs").iterdir())) == 8 + 4
    assert outcome(more, "other").series[0].points[0].seeds == (0, 1, 2)


@pytest.mark.slow
def test_reports_of_a_changed_split_are_repeated(tmp_path: Path) -> None:
    """And so is one that does not say what it is of, as earlier releases wrote them. Nothing is trained again."""
    text = STORED.replace('["float32", "int8"]', '"float32"')
    path = make_cache(tmp_path / "cache.zarr", {"train": 40, "test": 20})
    config = AblateConfig(recipe=(recipe_file(tmp_path, text),), cache=path, out=str(tmp_path / "out"), workers=1)
    ablate(config)
    shutil.rmtree(path)
    make_cache(Path(path), {"train": 40, "test": 30})
    ablate(config)
    [metrics] = Path(config.out).glob("runs/*/*/result.json")
    report = json.loads(metrics.read_text())
    assert report["num_photos"] == 30
    assert outcome(config).series[0].points[0].values["mrr"] == (report["systems"]["fam"]["mrr"]["value"],)
    metrics.write_text(json.dumps({name: value for name, value in report.items() if name != "data"}))
    ablate(config)
    assert json.loads(metrics.read_text())["data"] == report["data"]


def test_a_report_of_classes_is_of_those_of_other_splits_too(tmp_path: Path) -> None:
    """They search as well, and may be taken for a photo's own."""
    found = []
    for others in ({}, {"dev": 6}):
        cache = open_cache(make_cache(tmp_path / f"{len(others)}", {"train": 4, "test": 4} | others, classes=6))
        spec = resolve_run(TrainConfig(cache="", out="", fusion="linear"), cache)
        pairs = load_protocol("class").select(cache, spec, "test")
        found.append((data_fingerprint(cache, spec, pairs), reported_fingerprint(cache, spec, pairs)))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


@pytest.mark.slow
def test_runs_that_see_the_same_batches_are_trained_side_by_side(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[list[str | None]] = []

    def remember(configs: Sequence[TrainConfig]) -> list[str]:
        taken.append([config.head for config in configs])
        return train_many(configs)

    monkeypatch.setattr(running, "train_many", remember)
    path = recipe_file(tmp_path, RECIPE.replace("[shared]", "[shared]\ndata_seed = 7"))
    ablate(AblateConfig(recipe=(path,), cache=cache, out=str(tmp_path / "out"), together=3, workers=1))
    assert taken == [[None, None], [None, None], ["attention", "attention", "mean"], ["mean"]]


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_sweep_resumes(cache: str, tmp_path: Path, kill: signal.Signals) -> None:
    """Killed with two workers at their second runs; what was done stays, the workers end too, and the rest follows."""
    out = tmp_path / "out"
    arguments = [recipe_file(tmp_path), "--cache", cache, "--out", str(out), "--device", "cpu", "--workers", "2"]
    code = "import sys; from saffe_cache.cli import main; sys.exit(main(['ablate', *sys.argv[1:]]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    sweep = subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("runs/*/*/result.json")):
        assert sweep.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sweep.send_signal(kill)
    sweep.wait(timeout=60)
    done = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/result.json")}
    assert 1 <= len(done) < 8
    arguments[-1] = "1"
    while (status := main(["ablate", *arguments])) and time.monotonic() < deadline:
        time.sleep(0.5)  # until its workers have let go of the runs that they were at
    assert status == 0
    assert len(list(out.glob("runs/*/*/result.json"))) == 8
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert (out / "layers" / "result.json").exists()


def test_missing_layers_are_named_with_their_command(cache: str, tmp_path: Path) -> None:
    path = recipe_file(tmp_path, RECIPE.replace("[[2], [3]]", "[[0], [1], [2]]"))
    with pytest.raises(CacheError, match="lacks layers 0,1") as caught:
        ablate(AblateConfig(recipe=(path,), cache=cache, out=str(tmp_path / "out")))
    command = str(caught.value).splitlines()[-1]
    assert command == (
        f"saffe extract --data 'my data' --encoder image=i/e --encoder text=t/e --image-size 64 --cache {cache} "
        "--layers image=0,1"
    )
    assert not list((tmp_path / "out").rglob("config.json"))
    running = '[[series]]\nname = "s"\nfusion = "limber"\nlayers = { image = [3], text = [0] }\n'
    path = recipe_file(tmp_path, RECIPE.split("[[series]]")[0] + running)
    with pytest.raises(CacheError, match=r"--layers text=0,1$"):  # whose blocks run, up to those that are there
        ablate(AblateConfig(recipe=(path,), cache=cache, out=str(tmp_path / "out")))
    path = recipe_file(tmp_path, RECIPE.split("[[series]]")[0] + running.replace("limber", "mbt").replace("[0]", "[1]"))
    with pytest.raises(CacheError, match=r"--layers text=1$"):
        ablate(AblateConfig(recipe=(path,), cache=cache, out=str(tmp_path / "out")))
    path = recipe_file(tmp_path, Path(path).read_text().replace("image = [3]", "image = [0, 3]"))
    with pytest.raises(CacheError, match=r"--layers image=0,1 --layers text=1$"):  # as many blocks of both
        ablate(AblateConfig(recipe=(path,), cache=cache, out=str(tmp_path / "out")))
    beyond = recipe_file(tmp_path, RECIPE.replace("[[2], [3]]", "[[4]]"))
    with pytest.raises(CacheError, match="found hidden_states 0 to 3, the recipe needs 4"):
        ablate(AblateConfig(recipe=(beyond,), cache=cache, out=str(tmp_path / "out")))


VARIED = """
title = "T"
question = "Q?"
x = "encoder.image"
x_label = "encoder"
[shared]
fusion = "linear"
"""


def refused(cache: str, tmp_path: Path, *recipes: str) -> list[str]:
    """What a sweep says of what its cache lacks, line by line; nothing has been started."""
    paths = tuple(recipe_file(tmp_path, VARIED + text, f"{number}.toml") for number, text in enumerate(recipes))
    with pytest.raises(CacheError) as caught:
        ablate(AblateConfig(recipe=paths, cache=cache, out=str(tmp_path / "out")))
    assert not list((tmp_path / "out").rglob("config.json"))
    return str(caught.value).splitlines()


def test_missing_encoder_is_named_with_its_command(cache: str, tmp_path: Path) -> None:
    """The picture's size was asked for the other encoder; data and cache are the same."""
    series = '[[series]]\nname = "s"\nencoder = [{ image = "synthetic" }, { image = "a/vit" }]\n'
    told, command = refused(cache, tmp_path, series + "layers.image = [[2], [3]]\n")
    assert "it holds no image encoder 'a/vit'. Add them as follows" in told
    assert "a hub id or a folder" not in told
    assert command == f"saffe extract --data 'my data' --encoder image=a/vit --cache {cache} --layers image=2,3"
    told, command = refused(cache, tmp_path, '[[series]]\nname = "s"\nencoder = { image = "vit" }\n')
    assert "--encoder takes a hub id or a folder: write it in full" in told
    assert command == f"saffe extract --data 'my data' --encoder image=vit --cache {cache}"  # with its last layers


def test_missing_encoders_of_all_recipes_take_few_commands(cache: str, tmp_path: Path) -> None:
    """Two of photos take two commands; one of texts goes with either, and so do layers of an encoder that is there."""
    two = '[[series]]\nname = "s"\nlayers.image = [3]\nencoder = [{ image = "a/vit" }, { image = "b/vit" }]\n'
    told, *commands = refused(
        cache,
        tmp_path,
        two,
        two.replace("[3]", "[1]").replace('"b/vit" }', '"b/vit", text = "a/bert" }'),
        '[[series]]\nname = "s"\nencoder = { image = "synthetic" }\nlayers.image = [[0], [1], [2]]\n',
    )
    assert [told.count(one) for one in ("a/vit", "b/vit", "a/bert", "lacks layers 0,1;")] == [1, 1, 1, 1]
    assert commands == [
        f"saffe extract --data 'my data' --encoder image=i/e --encoder text=a/bert --image-size 64 --cache {cache} "
        "--layers image=0,1",
        f"saffe extract --data 'my data' --encoder image=a/vit --cache {cache} --layers image=1,3",
        f"saffe extract --data 'my data' --encoder image=b/vit --cache {cache} --layers image=1,3",
    ]


def test_missing_encoder_and_existing_layers_take_one_command(cache: str, tmp_path: Path) -> None:
    """The text encoder that is there lacks what runs on from its input; one that is not may have any depth."""
    series = '[[series]]\nname = "s"\nfusion = "limber"\nencoder = { image = "a/vit" }\nlayers.text = [0]\n'
    told, *commands = refused(cache, tmp_path, series + "layers.image = [3]\n")
    assert "text-synthetic-text" in told
    assert commands == [
        f"saffe extract --data 'my data' --encoder image=a/vit --encoder text=t/e --cache {cache} "
        "--layers text=0,1 --layers image=3"
    ]
    told, *commands = refused(cache, tmp_path, series.replace('"a/vit"', '"synthetic", text = "a/bert"'))
    assert "runs blocks of a/bert: let --layers text name all from its first" in told
    assert commands == [f"saffe extract --data 'my data' --encoder text=a/bert --cache {cache} --layers text=0"]


def test_an_encoder_is_known_by_the_id_that_it_was_extracted_by(cache: str) -> None:
    opened = open_cache(cache)
    assert opened.encoders_named("image", "synthetic-image") == opened.encoders_named("image")
    key = opened.encoders_named("text")[0]
    manifest = opened.encoders[key].manifest
    manifest.fingerprint.fields["model_id"] = "hub/synthetic-text"  # as of a hub model: its key holds the end alone
    assert opened.encoder("text", "hub/synthetic-text") is opened.encoders[key]
    assert opened.encoders_named("text", "other/synthetic-text") == []
    assert opened.encoders_named("image", "hub/synthetic-text") == []


STORED = """
title = "T"
question = "Q?"
x = "storage"
x_label = "type"
seeds = [0]
[shared]
epochs = 1
control_epochs = 0
fusion = "linear"
mixup = 0.0
layers.image = [3]
[[series]]
name = "s"
storage = ["float32", "int8"]
"""


def stored(config: AblateConfig) -> list[Path]:
    return sorted((Path(config.out) / "caches").iterdir())


@pytest.mark.slow
def test_storage_types_are_converted_once_and_never_widened(cache: str, tmp_path: Path) -> None:
    config = AblateConfig(recipe=(recipe_file(tmp_path, STORED),), cache=cache, out=str(tmp_path / "out"), workers=1)
    ablate(config)
    [small] = stored(config)
    written = small.stat().st_mtime_ns
    encoder = open_cache(small).encoder("image", None)
    assert encoder.array("hidden_states/3").spec.dtype == "int8"
    points = outcome(config).series[0].points
    assert [point.x for point in points] == ["float32", "int8"]
    assert points[0].values["mrr"] != points[1].values["mrr"]
    ablate(config)
    assert [path.stat().st_mtime_ns for path in stored(config)] == [written]
    with pytest.raises(CacheError, match="it stores int8, from which float32 cannot be made"):
        ablate(replace(config, cache=str(small), out=str(tmp_path / "wide")))


@pytest.mark.slow
def test_a_killed_conversion_starts_again(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AblateConfig(recipe=(recipe_file(tmp_path, STORED),), cache=cache, out=str(tmp_path / "out"), workers=1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(exchange, "write_root", killed)
        with pytest.raises(KeyboardInterrupt):
            ablate(config)
    assert len(stored(config)) == 1
    ablate(config)
    assert [point.x for point in outcome(config).series[0].points] == ["float32", "int8"]


@pytest.mark.slow
def test_a_conversion_is_of_what_the_cache_holds_now(tmp_path: Path) -> None:
    """Another cache for the same folder, or the same one with more photos, has a conversion of its own."""
    out = str(tmp_path / "out")
    for captions in (2, 3):
        path = make_cache(tmp_path / f"{captions}.zarr", {"train": 40, "test": 20}, captions=captions)
        config = AblateConfig(recipe=(recipe_file(tmp_path, STORED),), cache=path, out=out, workers=1)
        ablate(config)
    assert len(stored(config)) == 2
    values = {}
    for folder in ("out", "alone"):
        ablate(replace(config, out=str(tmp_path / folder)))
        values[folder] = outcome(replace(config, out=str(tmp_path / folder))).series[0].points[1].values
    assert values["out"] == values["alone"]
    shutil.rmtree(config.cache)
    make_cache(Path(config.cache), {"train": 40, "test": 20, "dev": 20}, captions=3)
    ablate(replace(config, split="dev"))
    assert len(stored(config)) == 3


def test_the_projects_recipes_are_recipes() -> None:
    found = {path.stem: read_recipe(path) for path in (ROOT / "pipelines").glob("*.toml")}
    assert {"layers", "depth", "fractions", "layer_pairs"} <= set(found)
    assert all(recipe.seeds == (0, 1, 2) for recipe in found.values())
    assert len(found["layer_pairs"].cells) == 4 * 3


def test_documented_recipe_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0]
    assert [cell.x for cell in read_recipe(recipe_file(tmp_path, text)).cells] == ["2", "5", "8", "11", "12"]


def test_a_run_is_known_by_what_was_chosen() -> None:
    """An option at its default tells nothing, so that one which a later release adds leaves runs what they are."""
    config = TrainConfig(cache="c", out="o", epochs=3, layers={"image": (2,)})
    assert chosen(config) == {"cache": "c", "out": "o", "epochs": 3, "layers": {"image": (2,)}}
    shape = FusionShape(
        fusion="linear", head="mean", num_layers=1, hidden_size=4, num_tokens=2, text_hidden_size=4, text_size=4
    )
    assert "dropout" not in chosen(shape)
    assert chosen(replace(shape, dropout=0.1))["dropout"] == 0.1
