"""saffe match on caches whose photos predict their texts, or do not."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extraction_cases import draw
from report_cases import make_page
from sklearn.linear_model import Ridge
from synthetic_cache import make_cache

from saffe_cache.cli import main
from saffe_cache.core.features import CacheError
from saffe_cache.core.results import exit_status
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.inputs.pairs import Pairs, in_one_space
from saffe_cache.store.reader import EncoderCache, open_cache
from saffe_cache.studies.matching import match as match_module
from saffe_cache.studies.matching.config import MatchConfig
from saffe_cache.studies.matching.examples import Examples
from saffe_cache.studies.matching.match import Bench, match, split_parts
from saffe_cache.studies.matching.planning import plan_cells
from saffe_cache.studies.matching.result import MatchResult
from saffe_cache.studies.matching.scores import judge_controls, null_trials
from saffe_cache.verbs import VERBS

SPLITS = {"train": 120, "test": 60}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(tmp_path_factory.mktemp("match") / "c.zarr", SPLITS, signal=2, text_width=6, shared=5)


def config_of(cache: str, out: Path, **options: Any) -> MatchConfig:
    quick: dict[str, Any] = {
        "fusions": ("concat", "cross"),
        "scales": (60, 120, 200),
        "negatives": (1,),
        "token_scales": (),
        "noise": (),
        "rotation": (),
        "seeds": (0, 1),
        "epochs": 3,
        "batch_size": 32,
        "learning_rate": 3e-3,
        "tsne_pairs": 0,
    }
    return MatchConfig(cache=cache, out=str(out), device="cpu", **(quick | options))


def result_of(config: MatchConfig) -> MatchResult:
    return MatchResult.load(match(config))


@pytest.mark.slow
def test_only_what_can_be_found_is_found(cache: str, tmp_path: Path) -> None:
    """Photos predict their texts linearly: ridge finds it; attention over one key does not see the text."""
    options: dict[str, Any] = {
        "fusions": ("concat", "cross", "tokens"),
        "token_scales": (200,),
        "noise": (2.0,),
        "rotation": (1.0,),
    }
    options |= {"negatives": (1, 5), "scales": (60, 120, 200, 9999), "seeds": (0,), "epochs": 6, "tsne_pairs": 10}
    result = result_of(config_of(cache, tmp_path, **options))
    assert result.failures == ()
    assert exit_status(str(tmp_path)) == 0
    assert result.features == "non-aligned"
    names = [(one.setting, one.scale) for one in result.settings]
    assert names == [
        *(("1:1 clean", scale) for scale in (60, 120, 200)),
        *((setting, 200) for setting in ("1:1 noise 2", "1:1 rotation 1")),
        ("1:5 clean", 200),
    ]
    settings = dict(zip(names, result.settings, strict=True))
    largest = settings["1:1 clean", 200]
    assert (largest.chance, largest.majority) == (0.5, 0.5)
    accuracy = {name: scores["accuracy"].value for name, scores in largest.systems.items()}
    assert accuracy["ridge_products"] > 0.8
    assert accuracy["concat"] > 0.6
    assert largest.systems["cross"]["accuracy"].values == (0.5,)
    assert "cosine" not in accuracy  # widths differ
    assert math.isfinite(accuracy["tokens"])
    of_five = settings["1:5 clean", 200]
    assert of_five.majority == pytest.approx(5 / 6)
    assert of_five.systems["cross"]["accuracy"].value == pytest.approx(5 / 6)
    parted = settings["1:1 rotation 1", 200].systems["ridge_products"]["accuracy"].value
    destroyed = settings["1:1 noise 2", 200].systems["ridge_products"]["accuracy"].value
    assert parted == pytest.approx(accuracy["ridge_products"], abs=0.02)
    assert destroyed < accuracy["ridge_products"] - 0.15
    assert {"concat", "cross", "tokens"} == set(result.cost)
    assert [one.names for one in result.crossovers] == [("concat", "cross"), ("concat", "tokens")]
    assert any(reason.startswith("9999 pairs at 1:1: --scales: found 9999,") for reason in result.skipped)
    permuted = [one for one in result.controls if "permuted" in one.name]
    assert [one.name.split(", ")[1:3] for one in permuted] == [
        ["60 pairs", "concat"],
        ["60 pairs", "cross"],
        ["200 pairs", "tokens"],
    ]
    text = (tmp_path / "report.txt").read_text()
    assert "against cross (which sees only one modality)" in " ".join(text.split())
    assert "Percent, one seed" in text
    assert "3 are undecided" in text
    assert "±" not in text
    assert "CONTROL FAILED" not in text
    assert set(result.planes) == {"ridge"}
    rows = result.to_frame().set_index(["setting", "system", "metric"])["value"]
    assert rows["1:1 clean, 200 pairs", "concat", "accuracy"] == accuracy["concat"]
    [section] = result.page_sections(tmp_path)
    assert [figure.name for figure in section.figures] == ["sizes", "errors", "noise", "rotation", "planes"]
    assert [table.folded for table in section.tables] == [False, *[True] * 5, *[False] * 3]
    assert section.tables[0].caption.startswith("1:1 clean, 200 training pairs")
    page = make_page([str(tmp_path)], tmp_path / "page")
    assert "Does a text belong to a photo?" in page
    assert "±" not in page
    assert "The rule for non-aligned features, that cross-attention wins at any size" in page
    content = json.loads((tmp_path / "result.json").read_text())
    del content["settings"][0]["chance"]
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"result\.json: it is damaged .*'chance'.* Run the command that writes it again"
    ):
        make_page([str(tmp_path)], tmp_path / "page")
    assert (tmp_path / "page" / "data" / "match-1.csv").read_text().startswith("setting,system,metric,value")


def test_each_photo_is_in_one_part(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Pairs]] = []

    def look(photo: Any, text: Any, parts: dict[str, Pairs], *_: Any) -> None:
        seen.append(parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(match_module, "Bench", look)
    with pytest.raises(KeyboardInterrupt):
        match(config_of(cache, tmp_path))
    [parts] = seen
    rows = {name: set(of.rows.tolist()) for name, of in parts.items()}
    assert len(set.union(*rows.values())) == sum(map(len, rows.values()))
    assert len(rows["test"]) == 60
    assert len(rows["train"]) + len(rows["validation"]) == 115  # five are also in test
    hashes = open_cache(cache).table.inputs["image"].content_hash
    assert len({hashes[row].tobytes() for of in rows.values() for row in of}) == 175


def test_photos_of_other_splits_are_not_trained_on(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", {"train": 60, "test": 20, "unused": 20}, shared=5)
    opened = open_cache(cache)
    photo, text = (opened.encoder(kind) for kind in ("image", "text"))
    for validation in ("heldout", "unused"):
        config = config_of(cache, tmp_path, validation=validation)
        parts = split_parts(config, opened, photo, text)
        trained = {*parts["train"].ids, *(parts["validation"].ids if validation == "heldout" else ())}
        assert trained == {f"train/{number}" for number in range(5, 60)}


def test_leak_fails_a_control(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that reveals whether it matches is found without the photo."""
    photo, text = (open_cache(cache).encoder(kind) for kind in ("image", "text"))
    assert photo.key != text.key
    true = match_module.scores_of

    def leaking(model: Any, inputs: Any, examples: Examples, device: str) -> np.ndarray:
        return true(model, inputs, examples, device) + 5 * examples.labels

    monkeypatch.setattr(match_module, "scores_of", leaking)
    options = [f"--{name}={value}" for name, value in (("scales", "60"), ("seeds", "0,1"), ("epochs", 1))]
    options += ["--fusions=concat", "--negatives=1", "--tsne-pairs=0", "--noise=1", "--rotation=1", "--device=cpu"]
    assert main(["match", "--cache", cache, "--out", str(tmp_path), *options]) == 3
    lines = (tmp_path / "report.txt").read_text().splitlines()
    assert lines[0].startswith("CONTROL FAILED: 1:1 clean, 60 pairs, concat, photos shuffled: AUC is ")


@pytest.mark.slow
def test_killed_run_resumes_and_finished_one_stays(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(cache, tmp_path / "killed", scales=(60,))
    whole = result_of(config_of(cache, tmp_path / "whole", scales=(60,)))
    measure, calls = match_module.measure_cell, []

    def dying(bench: Any, cell: Any, **options: Any) -> Any:
        calls.append(cell)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(bench, cell, **options)

    monkeypatch.setattr(match_module, "measure_cell", dying)
    with pytest.raises(KeyboardInterrupt):
        match(config)
    result = result_of(config)
    assert len(calls) == 1 + len([name for name in result.seconds if name.startswith("1-to-1")])
    for part in ("settings", "controls", "verdict"):
        assert getattr(result, part) == getattr(whole, part), part
    before = (tmp_path / "killed" / "result.json").read_bytes()
    match(config)
    assert (tmp_path / "killed" / "result.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"holds another result \(epochs: 3 there, 4 now"):
        match(replace(config, epochs=4))


@pytest.fixture(scope="module")
def even_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of one width, so that there are cosines, in spaces that have nothing in common."""
    path = tmp_path_factory.mktemp("even") / "c.zarr"
    return make_cache(path, {"train": 200, "test": 80}, signal=2, width=12, shared=5)


def aligning_bench(cache: str, config: MatchConfig) -> tuple[Bench, dict[str, Pairs]]:
    opened = open_cache(cache)
    photo, text = (opened.encoder(kind) for kind in ("image", "text"))
    parts = split_parts(config, opened, photo, text)
    return Bench(photo, text, parts, [], (3, 3)), parts


def test_aligning_photos_are_in_no_pair(even_cache: str, tmp_path: Path) -> None:
    config = config_of(even_cache, tmp_path, scales=(60, 120), noise=(0.1,), align_fraction=0.5)
    bench, parts = aligning_bench(even_cache, config)
    plain = aligning_bench(even_cache, replace(config, align_fraction=0.0))[1]
    assert len(parts["aligning"]) == round(0.5 * len(plain["train"]))
    assert {*parts["train"].ids, *parts["aligning"].ids} == set(plain["train"].ids)
    for name in ("validation", "test"):
        assert parts[name].ids == plain[name].ids
    hashes = open_cache(even_cache).table.inputs["image"].content_hash
    aligning = {hashes[row].tobytes() for row in parts["aligning"].rows}
    cells = plan_cells(config, parts)[0]
    assert {cell.is_permuted for cell in cells} == {True, False}
    used = {hashes[row].tobytes() for cell in cells for drawn in bench.examples(cell) for row in drawn.photos}
    assert len(used) > 150
    assert not used & aligning


def test_features_are_aligned_by_ridge_of_those_photos(even_cache: str, tmp_path: Path) -> None:
    bench, parts = aligning_bench(even_cache, config_of(even_cache, tmp_path, align_fraction=0.5))
    others = parts["aligning"]
    photos, texts = bench.own.of_photos(others.rows[others.owners]), bench.own.of_texts(others.texts.values)
    assert bench.alignment_map is not None
    peer = Ridge(alpha=bench.alignment_map.strength * len(photos)).fit(photos.astype(float), texts)
    expected = peer.predict(bench.own.photos)
    assert np.allclose(bench.clean.photos, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-4)
    assert np.array_equal(bench.clean.texts, bench.own.texts)


@pytest.mark.slow
def test_pre_aligned_features_are_reported_as_such(even_cache: str, tmp_path: Path) -> None:
    """The cosine, at chance before, tells pairs apart; maps of permuted pairs leave it at chance."""
    options: dict[str, Any] = {"fusions": ("concat", "cross", "tokens"), "scales": (60, 9999), "rotation": (1.0,)}
    options |= {"token_scales": (60,), "tsne_pairs": 10, "epochs": 1}
    plain = result_of(config_of(even_cache, tmp_path / "plain", **options))
    config = config_of(even_cache, tmp_path / "made", align_fraction=0.5, **options)
    made = result_of(config)
    before, after, parted = (
        of.settings[place].systems["cosine"]["auc"].value for of, place in ((plain, 0), (made, 0), (made, 1))
    )
    assert before == pytest.approx(0.5, abs=0.1)
    assert after > 0.85
    assert parted < 0.7
    assert made.settings[0].alignment["matching_pairs"] > made.settings[0].alignment["other_pairs"] + 0.3
    found = made.made_alignment
    assert found is not None
    assert (found.auc_before, found.auc) == pytest.approx((before, after), abs=0.1)
    assert np.mean(found.auc_permuted) == pytest.approx(0.5, abs=0.08)
    [null] = [one for one in made.controls if "permuted pairs" in one.name]
    assert null.passed
    leak = null_trials(replace(found, auc_permuted=(0.8, 0.79, 0.81)), 80)
    assert judge_controls([leak])[0].passed is False
    assert (plain.features, plain.made_alignment, made.features) == ("non-aligned", None, "pre-aligned")
    count = made.photos["aligning"]
    assert made.features_in_words == f"features made pre-aligned by a ridge regression of {count} other photos"
    rule = "the rule for {}, that concatenation wins at any size, is undecided"
    assert any(one.startswith(rule.format(made.features_in_words)) for one in made.verdict)
    assert {"concat", "cross"} == set(made.cost)
    assert [reason.split(":")[0] for reason in made.skipped] == [
        "9999 pairs at 1",
        "tokens",
        "cross_residual with noise or rotation",
    ]
    assert f"which {made.photos['train']} training photos" in made.skipped[0]
    assert made.features_in_words in " ".join((tmp_path / "made" / "report.txt").read_text().split())
    assert made.features_in_words in make_page([str(tmp_path / "made")], tmp_path / "page")
    with pytest.raises(ValueError, match=r"another result .*align_fraction: 0\.5 there, 0\.25 now"):
        match(replace(config, align_fraction=0.25))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 6])
def test_classes_match_their_names(tmp_path: Path, classes: int) -> None:
    cache = make_cache(tmp_path / "c.zarr", {"train": 90, "test": 60}, classes=classes, signal=8, width=32)
    result = result_of(config_of(cache, tmp_path / "out", scales=(120,), epochs=8))
    [setting] = result.settings
    assert setting.systems["concat"]["accuracy"].value > 0.7
    assert result.failures == ()


def test_impossible_ratio_is_found_before_measuring(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", {"train": 90, "test": 60}, classes=4, width=8)
    config = config_of(cache, tmp_path / "out", scales=(60,), seeds=(0,), epochs=1)
    with pytest.raises(ValueError, match=r"--negatives: found 5, and the 4 different texts .* Use fewer"):
        match(replace(config, negatives=(5,)))
    result = result_of(replace(config, negatives=(1, 5)))  # in the same folder
    assert [one.setting for one in result.settings] == ["1:1 clean"]
    [reason] = result.skipped
    assert reason.startswith("60 pairs at 1:5: --negatives: found 5, and the 4 different texts")
    assert "not measured: 60 pairs at 1:5:" in (tmp_path / "out" / "report.txt").read_text()


def test_skipped_fusions_are_reported(cache: str, tmp_path: Path) -> None:
    def skipped(**options: Any) -> list[str]:
        config = config_of(cache, tmp_path, **{"fusions": ("concat", "tokens"), "seeds": (0,), **options})
        opened = open_cache(cache)
        parts = split_parts(config, opened, *(opened.encoder(kind) for kind in ("image", "text")))
        return [reason.split(":")[0] for reason in plan_cells(config, parts)[1]]

    assert skipped(token_scales=(60, 120)) == []
    assert skipped(token_scales=(60, 512)) == ["tokens at 512 pairs"]
    assert skipped(token_scales=(512, 1024)) == ["tokens at 512, 1024 pairs"]
    assert skipped(token_scales=()) == ["tokens at any number of pairs"]
    degraded = {"fusions": ("concat",), "degraded_fusions": ("concat", "cross", "tokens")}
    assert skipped(**degraded) == []
    for kind in ("noise", "rotation"):
        found = skipped(**degraded, **{kind: (0.5,)})
        assert found == ["cross with noise or rotation", "tokens with noise or rotation"]


def test_token_layers_stay_when_a_run_resumes(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that was added in between would now be the last one."""
    tokens = config_of(cache, tmp_path / "tokens", fusions=("tokens",), scales=(60,), token_scales=(60,), seeds=(0,))
    plain = config_of(cache, tmp_path / "plain", fusions=("concat",), scales=(60,), seeds=(0,), epochs=1)

    def dying(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as before:
        before.setattr(EncoderCache, "layers", [2])
        before.setattr(match_module, "measure_cell", dying)
        for config in (tokens, plain):
            with pytest.raises(KeyboardInterrupt):
                match(config)
    with pytest.raises(ValueError, match=r"another result \(layers: \[2, 2\] there, \[3, 3\] now\)"):
        match(tokens)
    assert result_of(plain).failures == ()
    chosen = replace(tokens, out=str(tmp_path / "chosen"), layers={"image": (2,)}, epochs=1)
    assert result_of(chosen).layers_of_tokens == (2, 3)


@pytest.mark.slow
def test_halves_of_one_model_are_aligned(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    for split, count in (("train", 16), ("test", 6)):
        lines = []
        for number in range(count):
            draw(tmp_path / "data" / split / f"{number}.png", number + 100 * len(split))
            captions = [f"word{number} {split}", f"{split} word{number + 1}"]
            lines.append(json.dumps({"file_name": f"{number}.png", "captions": captions}))
        (tmp_path / "data" / split / "metadata.jsonl").write_text("\n".join(lines))
    both = str(tiny_model("clip-vision"))
    cache = str(tmp_path / "c.zarr")
    extract(
        ExtractConfig(data=str(tmp_path / "data"), cache=cache, encoder={"image": both, "text": both}, device="cpu")
    )
    options = {
        "fusions": ("concat", "tokens"),
        "scales": (8,),
        "token_scales": (8,),
        "seeds": (0,),
        "query_modality": "photo",
    }
    result = result_of(config_of(cache, tmp_path / "out", **options))
    assert result.features == "pre-aligned"
    [setting] = result.settings
    assert {"cosine", "tokens"} < set(setting.systems)
    assert -1 <= setting.alignment["matching_pairs"] <= 1
    text = open_cache(cache).encoder("text")
    with pytest.raises(ValueError, match=r"--align-fraction: found 0\.5, expected 0: .* aligned already"):
        match(config_of(cache, tmp_path / "twice", align_fraction=0.5, **options))
    other = replace(text.manifest.fingerprint, fields={**text.manifest.fingerprint.fields, "model_id": "another"})
    photo = open_cache(cache).encoder("image")
    assert in_one_space(photo, text)
    text.manifest.fingerprint = other
    assert not in_one_space(photo, text)


def test_options_that_do_not_fit_are_refused(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"--fusions: found gated, expected concat or"):
        config_of(cache, tmp_path, fusions=("gated",))
    with pytest.raises(ValueError, match=r"--fusions: found only tokens, expected others too: --align-fraction"):
        config_of(cache, tmp_path, fusions=("tokens",), align_fraction=0.5)
    with pytest.raises(ValueError, match=r"--align-fraction: found 1\.0, expected 0 or more, below 1"):
        config_of(cache, tmp_path, align_fraction=1.0)
    with pytest.raises(ValueError, match=r"--split: found train, expected three different splits"):
        config_of(cache, tmp_path, split="train")
    with pytest.raises(ValueError, match=r"--scales: found 9999, expected 2 to \d+ pairs, which 10\d training"):
        match(config_of(cache, tmp_path / "a", scales=(9999,)))
    with pytest.raises(ValueError, match="split 'dev' has no items"):
        match(config_of(cache, tmp_path / "b", split="dev"))
    with pytest.raises(CacheError, match=r"hidden states of layers \[2, 3\], requested \[1\]"):
        match(config_of(cache, tmp_path / "c", layers={"image": (1,)}))


def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "saffe_cache.studies.matching.match")
    monkeypatch.setitem(sys.modules, "sklearn", None)  # type: ignore[arg-type]
    for name in [name for name in sys.modules if name.startswith("saffe_cache.studies.matching.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"needs the package sklearn.*: pip install 'saffe-cache\[match\]'"):
        VERBS["match"].load_run()
