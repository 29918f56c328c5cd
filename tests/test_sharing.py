"""Runs as folders and on the hub: equal vectors after a round trip, a card with all numbers, no path of a machine."""

from __future__ import annotations

import ast
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from quick_runs import quick_train, report_of
from safetensors.numpy import save
from stub_hub import stub_hub

import saffe_cache as sc
from saffe_cache.inference import card
from saffe_cache.inference.card import evaluations_of, licence_of, model_card
from saffe_cache.inference.model import load_run
from saffe_cache.training.runs import BLOCKS

Models = Callable[[str], Path]


class Shared(NamedTuple):
    run: str
    folder: Path
    """What save_pretrained has written."""
    photos: list[Path]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Models) -> Shared:
    """A run with one evaluation, whose encoders are in folders of their own."""
    work = tmp_path_factory.mktemp("sharing")
    for number in range(48):
        path = work / "animals" / ("train", "test")[number % 4 == 3] / f"kind{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)][number % 3])
        noise = np.random.default_rng(number).normal(0, 30, (40, 40, 3))
        Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(path)
    cache = sc.extract(
        data=str(work / "animals"),
        cache=str(work / "cache.zarr"),
        encoder={"image": str(tiny_model("dinov2")), "text": str(tiny_model("bert"))},
        class_prompt=("word1 {} word2",),
        device="cpu",
    )
    run = quick_train(cache, work / "run", fusion="linear", epochs=2)
    report_of(cache, run)
    folder = work / "given" / "kinds-fam"
    load_run(run, device="cpu").save_pretrained(folder)
    return Shared(run, folder, sorted((work / "animals" / "test").rglob("*.png")))


def where(tiny_model: Models) -> dict[str, str]:
    return {"image": str(tiny_model("dinov2")), "text": str(tiny_model("bert"))}


def test_saved_run_gives_the_same_vectors(shared: Shared, tiny_model: Models) -> None:
    own, given = load_run(shared.run, device="cpu"), load_run(shared.folder, encoder=where(tiny_model), device="cpu")
    assert np.array_equal(given.embed_images(shared.photos), own.embed_images(shared.photos))
    assert np.array_equal(given.embed_texts(["word3"]), own.embed_texts(["word3"]))
    assert given.fingerprint == own.fingerprint


def test_saved_run_names_no_place_of_the_machine(shared: Shared, tiny_model: Models) -> None:
    places = [str(shared.photos[0].parents[2]), str(tiny_model("bert").parent), shared.run, os.path.expanduser("~/")]
    files = [path for path in shared.folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"README.md", "config.json", "encoders.json", "result.json"}
    for path in files:
        assert not [place for place in places if place.encode() in path.read_bytes()], path


def test_saved_run_asks_for_encoders_that_were_local(shared: Shared, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny-dinov2.*--encoder image=PLACE"):
        load_run(shared.folder, device="cpu").embed_images(shared.photos[:1])


def test_encoder_that_training_chose_by_its_place(shared: Shared, tmp_path: Path) -> None:
    run = Path(shutil.copytree(shared.run, tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    config["config"]["encoder"] = {"image": "/home/somebody/models/own-vit"}
    (run / "config.json").write_text(json.dumps(config))
    load_run(run, device="cpu").save_pretrained(tmp_path / "given")
    saved = json.loads((tmp_path / "given" / "config.json").read_text())
    assert saved["config"]["encoder"] == {"image": "own-vit"}


def test_hostile_names_stay_names_in_the_card(shared: Shared) -> None:
    fam = load_run(shared.run, device="cpu")
    described = copy.deepcopy(json.loads((Path(shared.run) / "encoders.json").read_text()))
    for one in described.values():
        one["extraction"]["data"] = "a: b\n---\n# Heading <script>alert(1)</script> \udcff"
    name = 'x"); import os\n---\nlicense: mit\n```'
    text = model_card(fam, described, {}, name)
    parsed = ModelCard(text.encode().decode())
    assert parsed.data.library_name == "saffe-cache"
    assert parsed.data.license is None
    lines = parsed.text.splitlines()
    assert not {"---", "license: mit"} & set(lines)
    assert [line for line in lines if line.startswith("# ")] == ['# x"); import os --- license: mit \\`\\`\\`']
    assert not re.search(r"(?<!\\)<script", parsed.text)
    code = ast.parse(parsed.text.partition("```python")[2].partition("\n```")[0])
    assert name in [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]


def test_card_shows_evaluations_of_these_weights_alone(shared: Shared, tmp_path: Path) -> None:
    run = Path(shutil.copytree(shared.run, tmp_path / "run"))
    assert list(evaluations_of(run)) == ["test-class"]
    config = json.loads((run / "test-class" / "config.json").read_text())
    config["resolved"]["weights"] = "0123456789abcdef"
    (run / "test-class" / "config.json").write_text(json.dumps(config))
    assert evaluations_of(run) == {}


def test_card_says_where_weights_of_encoders_are(shared: Shared, tmp_path: Path) -> None:
    assert "Their weights are not here" in (shared.folder / "README.md").read_text()
    run = Path(shutil.copytree(shared.run, tmp_path / "run"))
    (run / BLOCKS).write_bytes(save({}))
    load_run(run, device="cpu").save_pretrained(tmp_path / "given")
    text = (tmp_path / "given" / "README.md").read_text()
    assert "blocks.safetensors holds blocks of theirs" in text
    assert "Their weights are not here" not in text


def test_licence_of_a_local_encoder_is_not_that_of_a_namesake(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "licence_of", lambda place, revision=None: f"licence of {place}")
    load_run(shared.run, device="cpu").save_pretrained(tmp_path / "given", encoders={"image": "someone/dinov2"})
    text = (tmp_path / "given" / "README.md").read_text()
    assert "licence of someone/dinov2" in text
    assert "licence of tiny-bert" not in text


def test_names_of_encoders_on_the_hub(shared: Shared, tmp_path: Path) -> None:
    load_run(shared.run, device="cpu").save_pretrained(tmp_path / "given", encoders={"image": "someone/dinov2"})
    content = json.loads((tmp_path / "given" / "encoders.json").read_text())
    places = {one["manifest"]["modality"]: one["extraction"]["encoder"] for one in content.values()}
    assert places == {"image": {"image": "someone/dinov2"}, "text": {"text": "tiny-bert"}}
    assert ModelCard((tmp_path / "given" / "README.md").read_text()).data.base_model == ["someone/dinov2"]
    with pytest.raises(ValueError, match="encoders: found audio, expected image or text"):
        load_run(shared.run, device="cpu").save_pretrained(tmp_path / "other", encoders={"audio": "a/b"})
    assert not (tmp_path / "other").exists()


def test_card_has_every_number(shared: Shared) -> None:
    card = ModelCard((shared.folder / "README.md").read_text())
    assert card.data.library_name == "saffe-cache"
    result = sc.load_result(Path(shared.run) / "test-class")
    for row in result.measurements():
        assert f"{100 * row.value:.1f}" in card.content, row
    for part in ("| chance (a random order) |", "control: photos_shuffled", "32 photos to train on", "layers 2, 3"):
        assert part in card.content, part
    assert 'sc.load_run("kinds-fam")' in card.content
    assert "It has no vectors of photos fused with a text" in card.content
    assert "Tables below call it FAM" in card.content


def test_card_of_a_run_without_evaluation(shared: Shared, tmp_path: Path) -> None:
    for path in Path(shared.run).glob("*/result.json"):
        assert path.parent.name == "test-class"
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors", "encoders.json", "result.json"):
        (bare / name).write_bytes((Path(shared.run) / name).read_bytes())
    load_run(bare, device="cpu").save_pretrained(tmp_path / "given")
    card = (tmp_path / "given" / "README.md").read_text()
    assert "It has not been evaluated" in card
    assert "Tables below" not in card


def test_licence_is_read_from_the_card_of_an_encoder(tmp_path: Path) -> None:
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# An encoder\n")
    assert licence_of(str(tmp_path)) == "apache-2.0"
    assert licence_of("someone/unreachable") is None


def test_folder_that_is_not_empty_is_kept(shared: Shared, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"is not empty\. Choose a new folder"):
        load_run(shared.run, device="cpu").save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_hub_round_trip(shared: Shared, tiny_model: Models, tmp_path: Path) -> None:
    """In a process of its own, since the hub's address is read once; huggingface_hub itself speaks to the stand-in."""
    code = """
import sys, numpy as np, saffe_cache as sc
run, photo, out, image, text = sys.argv[1:]
address = sc.load_run(run, device="cpu").push_to_hub("someone/kinds-fam", token="hf_x")
fam = sc.TrainedFusion.from_pretrained("someone/kinds-fam", encoder=dict(image=image, text=text), device="cpu")
np.save(out, fam.embed_images([photo]))
print(address, fam.folder)
"""
    with stub_hub() as hub:
        hub.repositories["someone/kinds-fam"] = {"dev-class/result.json": b"{}", "own_notes.md": b"kept"}
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        places = where(tiny_model)
        arguments = [shared.run, str(shared.photos[0]), str(tmp_path / "out.npy"), places["image"], places["text"]]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]
    address, folder = done.stdout.split()[-2:]
    assert address == f"{hub.url}/someone/kinds-fam"
    assert str(tmp_path / "home") in folder
    there = hub.repositories["someone/kinds-fam"].keys()
    assert {"README.md", "model.safetensors", "test-class/result.json", "own_notes.md"} <= there
    assert "dev-class/result.json" not in there  # of an older run
    own = load_run(shared.run, device="cpu").embed_images(shared.photos[:1])
    assert np.array_equal(np.load(tmp_path / "out.npy"), own)
