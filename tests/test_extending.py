"""One file and one registry entry add a fusion, metric, protocol, dataset format or study: the documented recipes."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from PIL import Image
from quick_runs import quick_train, report_of, value
from recipes import blocks, install, register
from synthetic_cache import make_cache

import saffe_cache
from saffe_cache import verbs
from saffe_cache.cli import main
from saffe_cache.evaluation import baselines
from saffe_cache.fusion import registry as fusions
from saffe_cache.protocols import registry as protocols
from saffe_cache.protocols.searches import CaptionProtocol
from saffe_cache.retrieval import metrics
from saffe_cache.sources import registry as formats
from saffe_cache.sources.items import Columns


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> str:
    splits = {"train": 60, "dev": 20, "test": 30}
    return make_cache(tmp_path_factory.mktemp("extending") / "cache.zarr", splits, captions=3, joint=True)


def test_documented_fusion_trains(captions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("saffe_cache/fusion/known/gated.py", tmp_path, monkeypatch)
    register("gated", fusions, "FUSIONS", monkeypatch)
    run = quick_train(captions, tmp_path / "run", fusion="gated", gallery_text="first_caption", batch_size=16)
    report = report_of(captions, run)
    assert report["protocol"] == "metadata"
    assert value(report, "map") > 2 * report["systems"]["fam"]["map"]["chance"]


def test_documented_protocol_and_metric_measure(captions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("saffe_cache/protocols/caption_set.py", tmp_path, monkeypatch)
    register("caption_set", protocols, "PROTOCOLS", monkeypatch)
    register("recall_at_20", metrics, "METRICS", monkeypatch)
    run = quick_train(captions, tmp_path / "run", fusion="linear")
    report = report_of(captions, run, protocol="caption_set", baselines="linear")
    assert report["num_queries"] == report["num_photos"] == 30
    assert report["systems"]["fam"]["recall_at_20"]["chance"] == pytest.approx(20 / 30)
    assert value(report, "recall_at_20") >= value(report, "recall_at_10")
    assert set(report["controls"]) == {"photos_shuffled", "photos_constant", "pairs_permuted", "queries_constant"}
    assert "ridge" in report["systems"]


def test_documented_baseline_finds_nothing(captions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = [block for block in blocks() if block.startswith("# in saffe_cache/evaluation/baselines.py\n")]
    names = dict(vars(baselines))
    exec(code, names)  # noqa: S102 -- our own page
    monkeypatch.setitem(baselines.BASELINES, "mean_text", baselines.Baseline("the mean text", names["mean_text"]))
    monkeypatch.setattr(CaptionProtocol, "baselines", ("ridge", "mean_text"))
    out = tmp_path / "out"
    arguments = ["evaluate", "--cache", captions, "--device", "cpu", "--out", str(out), "--system"]
    assert main([*arguments, "mean_text"]) == 0
    result = saffe_cache.load_result(out)
    assert isinstance(result, saffe_cache.EvaluationResult)
    assert result.main().value < 2 * result.main().chance
    assert result.sensitivity == {"to_image": 0}


def test_documented_format_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = install("saffe_cache/sources/zips.py", tmp_path, monkeypatch)
    monkeypatch.setattr(formats, "FORMATS", (module.ZIPS, *formats.FORMATS))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(tmp_path / "red.png", "train/1.png")
        archive.writestr("train/1.txt", "a red square\nnothing but red\n")
    [item] = formats.read_items(str(tmp_path / "photos.zip"), Columns(), ())
    assert (item.id, item.split, item.captions) == ("train/1.png", "train", ("a red square", "nothing but red"))
    assert item.media["image"].read() == (tmp_path / "red.png").read_bytes()


def test_documented_study_runs(
    captions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install("saffe_cache/studies/spread.py", tmp_path, monkeypatch)
    register("spread", verbs, "VERBS", monkeypatch)
    out = tmp_path / "spread"
    assert main(["spread", "--cache", captions, "--out", str(out)]) == 0
    assert "Cosine between photos" in capsys.readouterr().out
    frame = saffe_cache.load_result(out).to_frame()
    assert list(frame.setting) == ["layer 2", "layer 3"]
    assert frame.value.between(-1, 1).all()
