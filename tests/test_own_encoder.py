"""Encoders that are no models of transformers: the user's own modules, and timm's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
import zoo_runs
from torch import nn

import saffe_cache as sc

DOCS = Path(__file__).parents[1] / "docs" / "encoders.md"


class Net(nn.Module):
    """Patches and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True) for _ in range(2))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = self.patches(pixels).flatten(2).transpose(1, 2)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def prepare(photo: Any) -> torch.Tensor:
    """A photo as 32 x 32 numbers."""
    values = np.asarray(photo.convert("RGB").resize((32, 32)), dtype=np.float32) / 255
    return torch.from_numpy(values).permute(2, 0, 1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> zoo_runs.Bench:
    return zoo_runs.Bench(tmp_path_factory.mktemp("own"))


def extracted(bench: zoo_runs.Bench, cache: Path, **options: Any) -> sc.Cache:
    """A cache of photos with an encoder of one's own, and BERT."""
    chosen = {"image": sc.OwnEncoder(prepare=prepare, **options), "text": str(bench.checkpoint("bert"))}
    sc.extract(data=str(bench.work / "photos"), cache=str(cache), encoder=chosen, storage="float32", dtype="float32")
    return sc.open_cache(cache)


def test_own_modules_states_are_what_its_layers_take(bench: zoo_runs.Bench, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    cache = extracted(bench, tmp_path / "own.zarr", model=model, layers="blocks", pool=lambda found: found[:, 0])
    encoder, inputs = cache.encoder("image"), cache.table.inputs["image"]
    assert encoder.key.startswith("image-Net-")
    photos = [zoo_runs.Image.fromarray(bench.media[one.tobytes()]) for one in inputs.content_hash]
    with torch.no_grad():
        first = model.patches(torch.stack([prepare(one) for one in photos])).flatten(2).transpose(1, 2)
        second = model.blocks[0](first)
        last = model.blocks[1](second)
    rows = np.arange(len(inputs))
    for found, expected in zip(encoder.tokens(rows, (1, 2)).states, (second, last), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(encoder.vectors(rows), last[:, 0], atol=1e-5)


def test_own_module_trains_and_its_blocks_are_refused(bench: zoo_runs.Bench, tmp_path: Path) -> None:
    cache = extracted(bench, tmp_path / "own.zarr", model=Net(), layers="blocks")
    options: dict[str, Any] = {"epochs": 1, "control_epochs": 0, "log": ("none",), "device": "cpu"}
    run = sc.TrainConfig(cache=str(cache.storage.root), out=str(tmp_path / "run"), fusion="linear", **options)
    assert sc.train(run) == str(tmp_path / "run")
    with pytest.raises(sc.CacheError, match="Net is no class of transformers, which rebuilds blocks"):
        sc.train(sc.TrainConfig(cache=run.cache, out=str(tmp_path / "reuse"), fusion="reuse", **options))


def test_own_modules_layers_must_exist(bench: zoo_runs.Bench, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no list of modules 'layers', .* one of \['blocks'\]"):
        extracted(bench, tmp_path / "own.zarr", model=Net(), layers="layers")


def test_example_in_the_docs_extracts(bench: zoo_runs.Bench, tmp_path: Path) -> None:
    (code,) = [one for one in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "OwnEncoder" in one]
    code = code.replace("flickr8k", str(bench.work / "photos")).replace("own.zarr", str(tmp_path / "own.zarr"))
    code = code.replace("sentence-transformers/all-MiniLM-L6-v2", str(bench.checkpoint("bert")))
    exec(code, {})  # noqa: S102 — of this repository
    assert sc.open_cache(tmp_path / "own.zarr").encoder("image").layers == [3, 4]


TIMM_FOLDER = Path(sys.prefix) / "timm"
"""Where `make` installs timm and torchvision, without which it cannot be imported: apart, so that transformers takes
its own image processors in all other tests."""
TIMM = """
import sys
import zoo_timm
zoo_timm.declare_operators()
import numpy as np, torch, timm
from pathlib import Path
from PIL import Image
from saffe_cache.encoders.encoder import load_encoder
from saffe_cache.encoders.loading import EncoderRequest
from saffe_cache.extraction.blocks import checked_blocks

def compare(folder):
    zoo_timm.save(folder.name, folder)
    encoder = load_encoder(EncoderRequest(modality="image", model_id=str(folder)))
    encoder.select(range(encoder.num_layers + 1), vectors=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8))
    prepared = encoder.prepare(picture)
    found = encoder.encode(prepared)
    last = torch.from_numpy(found.states[encoder.num_layers])
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        pixels = transform(picture)[None]
        vector, features = model(pixels), model.forward_features(pixels)
        _, layers = model.forward_intermediates(pixels, norm=False)
        own = model.norm(last) if hasattr(model, "norm") else model.norm_pre(last)
    assert torch.equal(prepared["pixel_values"], pixels)
    np.testing.assert_allclose(found.vectors["pooled"], vector, atol=1e-5)
    np.testing.assert_allclose(own, features if features.ndim == 3 else flat(features, own), atol=1e-5)
    if layers[-1].shape[-2:].numel() + encoder.anatomy.class_tokens == last.shape[1]:
        for index, layer in enumerate(layers[-encoder.num_layers:], start=1):
            rows = found.states[index][:, encoder.anatomy.class_tokens:]
            np.testing.assert_allclose(rows, layer.flatten(2).transpose(1, 2), atol=1e-5)
    usable, unusable = checked_blocks(encoder, encoder.block_layers)
    assert not unusable
    return len(usable)

def flat(features, own):
    channels_last = features if features.shape[-1] == own.shape[-1] else features.permute(0, 2, 3, 1)
    return channels_last.flatten(1, 2)

print(*(compare(Path(sys.argv[1]) / name) for name in sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not (TIMM_FOLDER / "timm").is_dir(), reason=f"timm is not installed in {TIMM_FOLDER}")
def test_timm_folders_give_timms_states_and_vectors(tmp_path: Path) -> None:
    blocks = {"timm_vit_reg4": 3, "timm_vit_siglip": 3, "timm_eva02": 3, "timm_swin": 0, "timm_convnext": 0}
    places = [str(Path(zoo.__file__).parent), *sys.path, str(TIMM_FOLDER)]
    shown = subprocess.run(
        [sys.executable, "-c", TIMM, str(tmp_path), *blocks],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
    )
    assert shown.stdout.split() == [str(one) for one in blocks.values()], shown.stderr[-2000:]
