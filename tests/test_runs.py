"""A run's folder that is damaged, of another version, or of another cache: refused in words that say what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_runs import quick_train
from safetensors.torch import load_file, save_file
from synthetic_cache import make_cache

from saffe_cache.core.features import CacheError
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.training.runs import open_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, Path]:
    folder = tmp_path_factory.mktemp("runs")
    path = make_cache(folder / "cache.zarr", {"train": 40, "test": 10})
    return open_cache(path), Path(quick_train(path, folder / "run", fusion="linear", epochs=1, control_epochs=0))


@pytest.fixture
def run(trained: tuple[Cache, Path], tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(trained[1], tmp_path / "run"))


def change_spec(**changes: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        content = json.loads((run / "config.json").read_text())
        shape = changes.pop("shape", {})
        content["run"] |= changes
        content["run"]["shape"] |= shape
        (run / "config.json").write_text(json.dumps(content))

    return change


def change_weights(run: Path) -> None:
    weights = load_file(run / "model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, run / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change_spec(gallery_key=["x"]), r"config\.json is damaged or of another version \(gallery_key: \['x'\]"),
        (change_spec(gallery_layers="23"), r"gallery_layers: '23', expected"),
        (change_spec(validation_fraction=None), "validation_fraction: None, expected float"),
        (change_spec(novelty=1), "novelty"),
        (change_spec(shape={"hidden_size": 10**12}), r"tokens \{\(5, 1000000000000\)\} of 2 layers.* or train again"),
        (change_spec(shape={"num_layers": 3}), r"of 3 layers.* holds .* of 2, 12 and \(12,\)"),
        (change_spec(shape={"text_size": 13}), r"vectors \(13,\); .* Give the cache that it was trained on"),
        (change_spec(gallery_layers=[2, 7]), r"has no hidden_states/7; it has .* Add it with saffe extract"),
        (change_spec(gallery_key="image-other"), r"trained on image-other, which .* does not hold"),
        (lambda run: (run / "config.json").write_text("[" * 100_000), "not readable as JSON"),
        (lambda run: (run / "config.json").write_text('{"run": 5}'), "5, expected an object"),
        (lambda run: (run / "result.json").write_text('{"seconds": "x"}'), r"result\.json: found None version None"),
        (lambda run: (run / "result.json").unlink(), "no finished run there"),
        (lambda run: (run / "model.safetensors").write_bytes(b"\xff" * 100), r"not this run's weights .*Train again"),
        (lambda run: (run / "model.safetensors").write_bytes(b""), "not this run's weights"),
        (lambda run: (run / "model.safetensors").unlink(), "not this run's weights"),
        (change_weights, "not this run's weights .*Missing key"),
    ],
)
def test_damaged_runs_are_refused(
    trained: tuple[Cache, Path], run: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(run)
    with pytest.raises((ValueError, CacheError), match=f"(?s){words}"):
        open_run(run, trained[0])


def test_a_cache_of_other_widths_is_refused(trained: tuple[Cache, Path], tmp_path: Path) -> None:
    """Encoders of the same name: their keys do not tell."""
    other = open_cache(make_cache(tmp_path / "wide.zarr", {"train": 40, "test": 10}, width=24))
    with pytest.raises(ValueError, match=r"tokens \{\(5, 16\)\} of 2 layers .* holds \{\(5, 24\)\} of 2"):
        open_run(trained[1], other)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, None], ids=["empty", "no header", "no numbers"])
def test_a_damaged_state_is_not_resumed_from(trained: tuple[Cache, Path], tmp_path: Path, damage: bytes | None) -> None:
    state = tmp_path / "run" / "state.safetensors"
    quick_train(trained[0].storage.root, state.parent, fusion="linear")
    (state.parent / "result.json").unlink()  # as if it had been killed
    if damage is None:
        save_file({"model.x": torch.zeros(1)}, state)
    else:
        state.write_bytes(damage)
    with pytest.raises(ValueError, match=r"state\.safetensors: not this run's state .* Delete it to start again"):
        quick_train(trained[0].storage.root, state.parent, fusion="linear")
