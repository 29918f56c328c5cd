"""Fused items of several media: fusions, missing media, and the study on a synthetic cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from several_cache import make_several_cache

from saffe_cache.core.features import Modality
from saffe_cache.core.items import Ragged
from saffe_cache.core.results import read_report
from saffe_cache.fusion.media import Medium
from saffe_cache.inputs.media import Groups
from saffe_cache.studies.subsets.config import FUSIONS, SubsetsConfig
from saffe_cache.studies.subsets.fitting import KINDS, late
from saffe_cache.studies.subsets.result import SubsetsResult
from saffe_cache.studies.subsets.subsets import subsets

WIDTHS: dict[Modality, int] = {"image": 6, "audio": 8, "video": 5}


def media_of(count: int = 7, seed: int = 0) -> dict[Modality, Medium]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Medium(
            torch.randn(count, 3 + place, width, generator=generator), torch.ones(count, 3 + place, dtype=torch.bool)
        )
        for place, (name, width) in enumerate(WIDTHS.items())
    }


@pytest.mark.parametrize("name", FUSIONS)
def test_a_missing_medium_is_the_null_whatever_its_tokens(name: str) -> None:
    torch.manual_seed(0)
    model = KINDS[name](WIDTHS, 10).eval()
    media, others = media_of(), media_of(seed=1)
    gone = torch.tensor([True, False] * 3 + [True])
    hidden = model({**media, "audio": media["audio"].without(gone)})
    swapped = model(
        {
            **media,
            "audio": Medium(
                torch.where(gone[:, None, None], others["audio"].tokens, media["audio"].tokens), media["audio"].mask
            ).without(gone),
        }
    )
    torch.testing.assert_close(hidden, swapped)
    whole = model(media)
    torch.testing.assert_close(hidden[~gone], whole[~gone])
    assert (hidden[gone] - whole[gone]).abs().min(dim=0).values.max() > 1e-4


@pytest.mark.parametrize("name", FUSIONS)
def test_padding_does_not_count(name: str) -> None:
    torch.manual_seed(0)
    model, media = KINDS[name](WIDTHS, 10).eval(), media_of()
    padded = {
        kind: Medium(torch.nn.functional.pad(one.tokens, (0, 0, 0, 2)), torch.nn.functional.pad(one.mask, (0, 2)))
        for kind, one in media.items()
    }
    torch.testing.assert_close(model(padded), model(media))


def test_late_fusion_is_the_weighted_sum_of_scores() -> None:
    generator = np.random.default_rng(0)
    sides = [tuple(generator.normal(size=(count, 4)) for count in (5, 3)) for _ in range(2)]
    units = [tuple(one / np.linalg.norm(one, axis=1, keepdims=True) for one in side) for side in sides]
    items, texts = late(units, (0.3, 0.7))  # type: ignore[arg-type]
    expected = 0.3 * units[0][0] @ units[0][1].T + 0.7 * units[1][0] @ units[1][1].T
    np.testing.assert_allclose(items @ texts.T, expected, atol=1e-6)


def test_fused_items_find_more_than_each_medium(tmp_path: Path) -> None:
    cache = make_several_cache(tmp_path / "several.zarr", {"train": 160, "dev": 40, "test": 120}, classes=4, lacks=20)
    config = SubsetsConfig(cache=cache, out=str(tmp_path / "out"), fusions=("sum",), seeds=(0,), epochs=8, device="cpu")
    result = SubsetsResult.load(subsets(config))
    assert result.items == {"train": 160, "validation": 40, "test": 120 - 12}
    assert (result.metric, result.failures) == ("top1", ())
    fused = result.fusions["sum"]
    assert list(fused.shown) == ["image + audio", "image", "audio"]
    gains = {one.name.split(",")[0]: one.difference for one in fused.gains}
    for name in ("image adds to the others", "audio adds to the others"):
        assert gains[name].sign == 1
    assert {control.name for control in result.controls} == {
        "sum, image shuffled",
        "sum, audio shuffled",
        "sum, texts permuted",
    }
    assert "sum, trained on these alone" in read_report(config.out)


def test_captions_describe_items_and_one_modality_is_refused(tmp_path: Path) -> None:
    cache = make_several_cache(tmp_path / "several.zarr", {"train": 60, "test": 20}, lacks=10)
    with pytest.raises(ValueError, match=r"--modalities: found \('image',\), expected two"):
        SubsetsConfig(cache=cache, out="", modalities=("image",))
    config = SubsetsConfig(
        cache=cache, out=str(tmp_path / "out"), fusions=("sum", "concat"), seeds=(0,), epochs=1, device="cpu"
    )
    with pytest.raises(ValueError, match=r"--validation: found test, expected heldout"):
        subsets(replace(config, validation="test"))
    result = SubsetsResult.load(subsets(config))
    assert (result.metric, result.items["test"]) == ("mrr", 16)
    assert len(result.fusions["sum"].values) == 32
    means = [np.mean(result.fusions[name].values) for name in ("sum", "concat")]
    assert result.differences["sum less concat"].value == pytest.approx(means[0] - means[1])


def test_media_are_regrouped_within_their_class() -> None:
    labels = Ragged.from_rows([[number % 3] for number in range(30)])
    rows: dict[Modality, np.ndarray] = {"image": np.arange(30), "audio": np.where(np.arange(30) % 4, np.arange(30), -1)}
    groups = Groups(labels, rows)
    items = np.repeat(np.arange(30), 40)
    for name, own in rows.items():
        drawn = groups.draw(name, items, np.random.default_rng(0))
        assert (drawn % 3 == items % 3).all()
        assert (own[drawn] >= 0).tolist() == (own[items] >= 0).tolist()
        assert len({*drawn[items == 1].tolist()}) > 5
    assert (groups.draw("audio", items, np.random.default_rng(0))[items == 4] == 4).all()
