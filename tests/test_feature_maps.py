"""CNN encoders from extraction to report: their places are tokens, none of which stands for the whole photo."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from extraction_cases import files_of, tiny_config
from PIL import Image
from quick_runs import quick_train, report_of
from safetensors.torch import load_file, save_file
from store_cases import convert, describe, export_hdf5, import_hdf5, verify
from synthetic_cache import make_cache
from test_encoders import row_by_row
from tiny_models import load_tiny, rand
from torch.nn import functional

from saffe_cache.core.features import CacheError
from saffe_cache.extraction.config import ExtractConfig, RepairConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.extraction.repair import repair
from saffe_cache.fusion.known.insertion import inserted_tokens
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.inputs.feature_loader import FeatureLoader, summaries
from saffe_cache.store.reader import open_cache
from saffe_cache.studies.captioning.caption import caption
from saffe_cache.studies.captioning.config import CaptionConfig
from saffe_cache.studies.captioning.inserting import photo_side, pool_photos
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.runs import open_run
from saffe_cache.training.train import train

WITHOUT_BLOCKS = (
    "linear, concat, late, hadamard, two_tower, flamingo, limber, magma, deep_insert, frozen, fromage, pang, albef"
)
NEED_BLOCKS = ("reuse", "paper", "reference", "mbt")


@pytest.fixture
def config(tmp_path: Path, tiny_model: Callable[[str], Path]) -> ExtractConfig:
    """A ResNet's output, and a text encoder."""
    tiny = tiny_config(tmp_path, tiny_model)
    encoder = {"image": str(tiny_model("resnet")), "text": str(tiny_model("bert"))}
    return replace(tiny, encoder=encoder, layers={"image": (3,), "text": (1, 2, 3)})


@pytest.fixture(scope="module")
def maps_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("maps") / "maps.zarr"
    return make_cache(path, {"train": 120, "dev": 40}, captions=3, joint=True, deep=True, feature_maps=True)


def test_cached_stages_are_the_models_own(config: ExtractConfig) -> None:
    """A larger stage that is added later leaves what is there as it is."""
    extract(config)
    before = files_of(config.cache)
    cache = open_cache(extract(replace(config, layers={"image": (1,), "text": (1, 2, 3)})))
    after = files_of(config.cache)
    assert {name: after[name] for name in before} == before
    image = cache.encoder("image")
    shapes = {layer: image.array(f"hidden_states/{layer}").spec.row_shape for layer in image.layers}
    assert (shapes, image.block_layers) == ({1: (64, 16), 3: (4, 32)}, [])
    model = transformers.ResNetModel.from_pretrained(config.encoder["image"]).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(config.encoder["image"], backend="pil")
    photos = [Image.open(Path(config.data) / cache.table.ids[item]) for item in (7, 21)]
    with torch.inference_mode():
        output = model(**processor(photos, return_tensors="pt"), output_hidden_states=True)
    rows = cache.table.rows["image"][[7, 21]]
    for layer in shapes:
        expected = row_by_row(output.hidden_states[layer])
        np.testing.assert_allclose(image.tokens(rows, (layer,)).states[0], expected, atol=1e-5)
    np.testing.assert_allclose(image.vectors(rows), output.last_hidden_state.mean(dim=(2, 3)), atol=1e-5)


@pytest.mark.slow
def test_their_cache_is_repaired_converted_and_exchanged(config: ExtractConfig, tmp_path: Path) -> None:
    """None of it looks for blocks; batches are smaller from where a stage has more places."""
    config = replace(config, batch_size=None, batch_tokens=64)
    extract(config)
    extract(replace(config, layers={"image": (1, 2), "text": (1, 2, 3)}))
    whole = files_of(config.cache)
    assert verify(config.cache)[1] == []
    assert "feature maps" in describe(config.cache)
    damaged = [name for name in whole if name.startswith("encoders/image") and "/c/" in name]
    for name in damaged:
        path = Path(config.cache) / name
        path.write_bytes(path.read_bytes()[::-1])
    assert len(verify(config.cache)[1]) == len(damaged) == 4
    repair(RepairConfig(cache=config.cache, device="cpu"))
    assert files_of(config.cache) == whole
    converted = convert(config.cache, tmp_path / "int8.zarr", storage="int8")
    exported = export_hdf5(config.cache, tmp_path / "cache.h5")
    imported = import_hdf5(exported, tmp_path / "imported.zarr")
    assert files_of(imported).keys() == whole.keys()
    for path in (converted, imported):
        assert verify(path)[1] == []
        assert open_cache(path).encoder("image").manifest.has_feature_maps


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["linear", "deep_insert"])
def test_a_resnet_is_trained_on_and_reported(config: ExtractConfig, tmp_path: Path, fusion: str) -> None:
    """By default on its last stage alone."""
    extract(replace(config, layers={"image": (2, 3), "text": (1, 2, 3)}))
    run = quick_train(config.cache, tmp_path / "run", fusion=fusion, epochs=1, validation="heldout")
    spec, _, _ = open_run(run, open_cache(config.cache))
    assert (spec.gallery_layers, spec.shape.num_tokens, spec.shape.hidden_size) == ((3,), 4, 32)
    report = report_of(config.cache, run, split="dev", protocol="caption", baselines="all", out=str(tmp_path / "out"))
    assert {"fam", "ridge"} <= report["systems"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("fusion", WITHOUT_BLOCKS.split(", "))
def test_every_fusion_without_blocks_of_the_photo_encoder_learns(maps_path: str, tmp_path: Path, fusion: str) -> None:
    """And takes no place for the whole photo: but for insertion, which has a grid, their order is nothing to it."""
    beside = "null" if fusion == "linear" else "first_caption"
    run = quick_train(maps_path, tmp_path / "run", fusion=fusion, gallery_text=beside, epochs=6)
    cache = open_cache(maps_path)
    spec, model, result = open_run(run, cache)
    assert result.best_validation_score > 1.5 * np.mean(1 / np.arange(1, 41))  # chance among 40 photos
    states, _ = FeatureLoader(cache, spec).photos(np.arange(6))
    with torch.inference_mode():
        vectors, of_shuffled = model(states), model([state[:, [3, 0, 4, 1, 2]] for state in states])
    assert fusion in ("limber", "magma", "deep_insert") or torch.allclose(vectors, of_shuffled, atol=1e-5)


@pytest.mark.parametrize("fusion", NEED_BLOCKS)
def test_a_fusion_that_needs_blocks_is_refused(maps_path: str, tmp_path: Path, fusion: str) -> None:
    others = ", ".join(name for name in FUSIONS if name not in NEED_BLOCKS)
    assert others.startswith(WITHOUT_BLOCKS)
    with pytest.raises(CacheError, match=rf"are feature maps, .*; --fusion {fusion} .* {others}\."):
        train(TrainConfig(cache=maps_path, out=str(tmp_path / "run"), fusion=fusion, device="cpu"))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_may_lack_the_count_of_training_steps_alone(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of a batch norm; its running mean is part of the forward pass."""
    folder = Path(shutil.copytree(tiny_model("resnet"), tmp_path / "resnet"))
    whole = load_file(folder / "model.safetensors")
    expected = load_tiny("resnet", folder)
    for lacking in ("num_batches_tracked", "running_mean"):
        kept = {name: values for name, values in whole.items() if not name.endswith(lacking)}
        assert len(kept) < len(whole)
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        if lacking == "running_mean":
            with pytest.raises(ValueError, match=r"checkpoint lacks .*running_mean"):
                load_tiny("resnet", folder)
        else:
            assert load_tiny("resnet", folder).fingerprint == expected.fingerprint


def test_stages_of_several_shapes_are_not_fused_together(config: ExtractConfig, tmp_path: Path) -> None:
    extract(replace(config, layers={"image": (2, 3), "text": (3,)}))
    message = r"found layer 2: 16 x 24; layer 3: 4 x 32\. Choose --layers image=3\."
    with pytest.raises(CacheError, match=message):
        quick_train(config.cache, tmp_path / "run", fusion="linear", layers={"image": (2, 3)})


def test_the_mean_of_all_places_stands_for_the_photo(maps_path: str) -> None:
    """In the summary that the baselines see, too."""
    encoder = open_cache(maps_path).encoder("image")
    tokens = torch.from_numpy(encoder.tokens(np.arange(5), (2,)).states[0]).float()
    expected = functional.layer_norm(tokens, tokens.shape[-1:]).mean(dim=1)
    np.testing.assert_allclose(summaries(encoder, np.arange(5), (2,)), expected, atol=1e-5)


def test_inserted_are_means_of_places_alone() -> None:
    places = rand(2, 64, 3)
    fields = places.reshape(2, 4, 2, 4, 2, 3).mean(dim=(2, 4)).flatten(1, 2)
    inserted, mask = inserted_tokens(places, None, has_class_token=False)
    torch.testing.assert_close(inserted, fields)
    assert mask.all()
    pooled = pool_photos(places, 4, has_class_token=False)
    torch.testing.assert_close(pooled, torch.cat([places.mean(dim=1, keepdim=True), fields], dim=1))
    assert photo_side(49, has_class_token=False) == 7
    with pytest.raises(ValueError, match="photos of 50 tokens: expected a square of places"):
        photo_side(50, has_class_token=False)


@pytest.mark.slow
def test_a_language_model_sees_them(config: ExtractConfig, tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    """From a stage whose width is not the last one's; in the class token's stead the mean of its 4 x 4 places."""
    encoder = {**config.encoder, "text": str(tiny_model("gpt2"))}
    extract(replace(config, encoder=encoder, layers={"image": (2,), "text": (1,)}, position_offset=5))
    options = {"layer": 1, "image_layer": 2, "grid": 2, "others": 3, "split": "dev", "epochs": 1, "device": "cpu"}
    out = caption(CaptionConfig(cache=config.cache, out=str(tmp_path / "out"), **options))  # type: ignore[arg-type]
    assert load_file(Path(out) / "projector.safetensors")["linear.weight"].shape == (32, 24)
