"""FLOPs of fusing one photo, against those of the fusions' formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from quick_runs import quick_train, report_of
from synthetic_cache import TEXT_WIDTH, TOKENS, WIDTH, make_cache

from saffe_cache.core.tables import flops as flops_in_words
from saffe_cache.evaluation.evaluate import fusing_flops
from saffe_cache.fusion.registry import FUSIONS, GalleryText
from saffe_cache.inputs.feature_loader import FeatureLoader
from saffe_cache.inputs.pairs import select_pairs
from saffe_cache.protocols.searches import MetadataProtocol
from saffe_cache.protocols.setting import Setting
from saffe_cache.store.reader import open_cache
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.runs import build_fusion

LONGEST = 4
"""Tokens of the longest of the first texts."""


def flops(cache: str, out: Path, protocol: str = "auto", **options: Any) -> int:
    """What a report of an untrained run says."""
    run = quick_train(cache, out, epochs=0, control_epochs=0, **options)
    report = report_of(cache, run, protocol=protocol)
    assert f"FLOPs of fusing one photo: {flops_in_words(report['cost']['fusing_flops'])}\n" in report["text"]
    return int(report["cost"]["fusing_flops"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(tmp_path_factory.mktemp("cost") / "cache.zarr", {"train": 40, "test": 12}, deep=True)


@pytest.fixture(scope="module")
def equally_wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As the release's fusion needs its encoders."""
    path = tmp_path_factory.mktemp("equal") / "cache.zarr"
    return make_cache(path, {"train": 40, "test": 12}, deep=True, text_width=WIDTH)


def test_flops_of_late_fusion_are_those_of_its_matrices(cache: str, tmp_path: Path) -> None:
    """Sums over tokens for the first one and the mean of the others, a linear map of both, and the map of the text."""
    options: dict[str, Any] = {"fusion": "late", "layers": {"image": (3,)}}
    photo = 2 * TOKENS * WIDTH + 2 * WIDTH * TEXT_WIDTH
    assert flops(cache, tmp_path / "alone", **options) == 2 * photo
    text = TEXT_WIDTH * TEXT_WIDTH + 2 * TEXT_WIDTH * 512
    assert flops(cache, tmp_path / "both", **options, gallery_text="first_caption") == 2 * (photo + text)


def test_tokens_that_enter_a_layer_later_are_spared_its_block(cache: str, tmp_path: Path) -> None:
    """Four maps of the attention, its scores and its sums, and the MLP of twice the width, over all tokens."""
    found = [
        flops(
            cache,
            tmp_path / str(layer),
            fusion="deep_insert",
            layers={"image": (3,), "text": (layer,)},
            gallery_text="first_caption",
        )
        for layer in (1, 2)
    ]
    tokens, width = TOKENS + LONGEST, TEXT_WIDTH
    assert found[0] - found[1] == 2 * (8 * tokens * width**2 + 2 * tokens**2 * width)


@pytest.mark.parametrize(
    "fusion", [name for name, entry in FUSIONS.items() if not entry.is_closed_form and not entry.is_special]
)
def test_all_fusions_are_counted(equally_wide: str, fusion: str) -> None:
    """At least the maps of the photo and of the text."""
    opened = open_cache(equally_wide)
    beside: GalleryText = "matched" if fusion == "reference" else "first_caption"
    spec = resolve_run(TrainConfig(cache=equally_wide, out="", fusion=fusion, gallery_text=beside, mixup=0), opened)
    gallery, text = opened.encoders[spec.gallery_key], opened.encoders[spec.text_key]
    pairs = select_pairs(opened.table, gallery, text, "test", "captions", first_paired=True)
    setting = Setting(FeatureLoader(opened, spec), pairs, pairs.rows, 0)
    model = build_fusion(spec, opened).eval()
    found = fusing_flops(model, MetadataProtocol(setting))
    assert found > 2 * WIDTH * WIDTH
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_candidate_is_fused_with_a_class(tmp_path: Path) -> None:
    """What is searched with null text is not."""
    cache = make_cache(tmp_path / "cache.zarr", {"train": 40, "test": 12}, classes=3)
    options: dict[str, Any] = {"fusion": "limber", "layers": {"image": (3,), "text": (2,)}}
    alone, pair = (flops(cache, tmp_path / name, name, **options) for name in ("class", "candidate"))
    width, tokens = TEXT_WIDTH, (TOKENS, TOKENS + LONGEST)
    blocks = [2 * (8 * count * width**2 + 2 * count**2 * width) for count in tokens]
    assert pair - alone == blocks[1] - blocks[0]


@pytest.mark.parametrize(
    ("count", "told"), [(None, "–"), (1_088, "1.09 K"), (6_912_345, "6.91 M"), (1_234_567_890, "1.23 G")]
)
def test_flops_in_words(count: int | None, told: str) -> None:
    assert flops_in_words(count) == told
