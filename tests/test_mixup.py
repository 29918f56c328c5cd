"""Mixup of pairs, and Lion: their formulas, what they refuse, and whole trainings with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from quick_runs import quick_train
from synthetic_cache import make_cache
from torch.nn import functional

from saffe_cache.fusion.losses import Batch, info_nce, siglip
from saffe_cache.fusion.mixing import MOST_TEXTS, Mix, draw_mix, mixed, pair_texts, shared_cells
from saffe_cache.fusion.registry import FUSIONS, FusionEntry
from saffe_cache.inputs.feature_loader import FeatureLoader
from saffe_cache.inputs.pairs import training_pairs
from saffe_cache.store.reader import EncoderCache, open_cache
from saffe_cache.training import loop
from saffe_cache.training.batches import TrainingData
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.objective import Objective
from saffe_cache.training.optimizers import Lion
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.runs import build_fusion
from saffe_cache.training.train import train


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(tmp_path_factory.mktemp("mixup") / "cache.zarr", {"train": 96, "dev": 24})


def batch_of(cache: str, **options: Any) -> tuple[Any, Batch, Callable[..., Objective]]:
    """A model, a batch, and objectives on them."""
    config = TrainConfig(cache=cache, out="", device="cpu", **({"fusion": "contrastive"} | options))
    opened = open_cache(cache)
    spec = resolve_run(config, opened)
    training, validation, _ = training_pairs(spec, opened)
    data = TrainingData(FeatureLoader(opened, spec), training, validation, 32, 0)
    torch.manual_seed(0)
    batch = next(data.batches(0, 1))
    return build_fusion(spec, opened).eval(), batch, lambda **of: Objective(replace(spec, **of), data.inputs.texts)


def test_partners_are_one_cycle_through_the_batch() -> None:
    for count in (1, 2, 3, 32):
        partners, seen = draw_mix(1.0, count).partners, [0]
        while (following := int(partners[seen[-1]])) not in seen:
            seen.append(following)
        assert sorted(seen) == list(range(count))


def test_weights_are_drawn_from_a_beta_distribution() -> None:
    torch.manual_seed(0)
    uniform, narrow = (np.array([draw_mix(alpha, 1).weight for _ in range(4000)]) for alpha in (1.0, 8.0))
    assert np.maximum(uniform, 1 - uniform).mean() == pytest.approx(0.75, abs=0.01)
    assert narrow.mean() == pytest.approx(0.5, abs=0.01)
    assert narrow.var() == pytest.approx(1 / (4 * 17), rel=0.1)


def test_both_sides_are_mixed_with_the_same_weight(cache: str) -> None:
    """By an adapter that is linear, whose mixed outputs are mixtures of its outputs."""
    model, batch, _ = batch_of(cache)
    torch.manual_seed(5)
    mix = draw_mix(1.0, 32)
    torch.manual_seed(5)
    pairs = mixed(batch, 1.0)
    before = [state.clone() for state in batch.states]
    photos, texts = (model.photo_linear(one) for one in (batch.states[0][:, 0], pairs.states[0][:, 0]))
    torch.testing.assert_close(texts, mix.weight * photos + (1 - mix.weight) * photos[mix.partners])
    assert torch.equal(before[0], batch.states[0])  # runs that train side by side share the batch
    torch.manual_seed(5)
    partners = draw_mix(1.0, 32).partners
    texts = pair_texts(batch.positives, partners)
    expected = mix.weight * batch.vectors[texts.texts] + (1 - mix.weight) * batch.vectors[texts.others]
    torch.testing.assert_close(pairs.vectors, expected)
    assert pairs.positives.sum(dim=0).tolist() == [1] * len(expected)
    assert pairs.positives.int().argmax(dim=0).tolist() == texts.photos.tolist()


def test_each_text_is_mixed_with_one_of_the_partner() -> None:
    """Photos have 1 to 9 texts of their own; the second has one of the first's as well."""
    lengths = [1, 2, 3, 4, 5, 9]
    positives = torch.zeros(6, sum(lengths), dtype=torch.bool)
    for photo, length in enumerate(lengths):
        positives[photo, sum(lengths[:photo]) : sum(lengths[:photo]) + length] = True
    positives[1, 0] = True
    partners = torch.arange(6).roll(-1)
    orders = set()
    for seed in range(20):
        torch.manual_seed(seed)
        texts = pair_texts(positives, partners)
        assert texts.photos.bincount().tolist() == [1, 3, 3, 4, 5, MOST_TEXTS]
        assert texts.photos[texts.starts].tolist() == list(range(6))
        assert positives[texts.photos, texts.texts].all()
        assert positives[partners[texts.photos], texts.others].all()
        of_last = texts.texts[texts.photos == 5].tolist()
        assert len(set(of_last)) == MOST_TEXTS
        assert set(texts.others[texts.photos == 4].tolist()) == set(of_last)
        orders.add(tuple(of_last))
    assert len(orders) > 10


@pytest.mark.parametrize("fusion", ["contrastive", "linear"])
def test_loss_with_weight_1_is_that_of_the_texts_themselves(
    cache: str, fusion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, objective = batch_of(cache, fusion=fusion)
    monkeypatch.setattr("saffe_cache.fusion.mixing.draw_mix", lambda _, count: Mix(1.0, torch.arange(count).roll(1)))
    found = objective(mixup=1.0)(model, batch)
    photos, queries = model(batch.states, batch.mask), model.encode_queries(batch.vectors)
    partners, own = torch.arange(32).roll(1), batch.positives.int().argmax(dim=0)
    near = [{int(partners[i]), *(j for j in range(32) if partners[j] == i)} for i in range(32)]
    is_near = torch.tensor([[int(own[text]) in near[i] for text in range(len(own))] for i in range(32)])
    assert (batch.positives.sum(dim=0) == 1).all()
    torch.testing.assert_close(
        found, info_nce(photos, queries, batch.positives, torch.tensor(0.07), is_near), rtol=1e-5, atol=1e-5
    )
    found.backward()


def test_cells_that_share_a_photo_or_a_text_are_ignored() -> None:
    """Photos 0 and 3 have the same text; 0 is mixed with 1, 1 with 2, and so on."""
    positives = torch.zeros(6, 8, dtype=torch.bool)
    for photo, of_photo in enumerate([[0, 5], [1], [2, 6, 7], [0], [3], [4]]):
        positives[photo, of_photo] = True
    partners = torch.arange(6).roll(-1)
    mix = pair_texts(positives, partners)
    parts = [positives[i] | positives[partners[i]] for i in range(6)]
    expected = [
        [i != int(photo) and bool(parts[i][own] | parts[i][other]) for photo, own, other in zip(*mix[:3], strict=True)]
        for i in range(6)
    ]
    assert shared_cells(positives, partners, mix).tolist() == expected


def test_ignored_cells_do_not_enter_the_losses() -> None:
    """A row whose other cells are all ignored has nothing to learn; otherwise it is as if they were not there."""
    generator = torch.Generator().manual_seed(0)
    photos, texts = (functional.normalize(torch.randn(4, 3, generator=generator), dim=1) for _ in range(2))
    eye, ignored = torch.eye(4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    ignored[3, :3] = ignored[:3, 3] = True
    scale = torch.tensor(0.1)
    part = info_nce(photos[:3], texts[:3], eye[:3, :3], scale)
    torch.testing.assert_close(info_nce(photos, texts, eye, scale, ignored), part * 3 / 4)
    scores = 10 * photos @ texts.T - 1
    cells = functional.logsigmoid(torch.where(eye, scores, -scores))
    found = siglip(photos, texts, eye, torch.tensor(10.0), torch.tensor(-1.0), ignored)
    torch.testing.assert_close(found, -cells[~ignored].sum() / 4)


def test_mixup_trains_and_tells_nothing_else(cache: str, tmp_path: Path) -> None:
    runs = {alpha: quick_train(cache, tmp_path / str(alpha), fusion="linear", mixup=alpha) for alpha in (0.0, 0.5)}
    configs = [json.loads((Path(run) / "config.json").read_text()) for run in runs.values()]
    assert [one["config"]["mixup"] for one in configs] == [0.0, 0.5]
    assert [one["run"]["mixup"] for one in configs] == [None, 0.5]
    logs = [(Path(run) / "log.jsonl").read_text().splitlines() for run in runs.values()]
    assert json.loads(logs[0][1])["loss"] != json.loads(logs[1][1])["loss"]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"gallery_text": "first_caption"}, "with --gallery-text first_caption, expected 0: paired texts"),
        ({"objective": {"info_nce": 1.0, "pair": 1.0}, "pooled_text": True}, "with pair, expected 0: these objectives"),
    ],
)
def test_mixup_refuses_what_cannot_be_mixed(cache: str, options: dict[str, Any], found: str) -> None:
    config = TrainConfig(cache=cache, out="", fusion="linear", mixup=1.0, **options)
    with pytest.raises(ValueError, match=rf"--mixup: found 1.0 {found}"):
        resolve_run(config, open_cache(cache))
    with pytest.raises(ValueError, match="--mixup: found -1, expected 0 or more"):
        TrainConfig(cache=cache, out="", mixup=-1)


def test_fixed_temperature_is_not_learned(cache: str) -> None:
    model, batch, objective = batch_of(cache, fusion="sharelock")
    fixed = objective()
    photos, queries = model(batch.states), model.encode_queries(batch.vectors)
    expected = info_nce(photos, queries, batch.positives, torch.tensor(1 / np.exp(2.6592), dtype=torch.float32))
    torch.testing.assert_close(fixed(model, batch), expected, rtol=1e-4, atol=1e-4)
    assert fixed.scalars() == {}
    assert objective(temperature=None).scalars() != {}
    with pytest.raises(ValueError, match=r"--temperature: found 0, expected a number from 0\.001"):
        TrainConfig(cache=cache, out="", temperature=0)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"fusion": "ridge", "temperature": 0.1}, "temperature: found 0.1 with no loss"),
        ({"fusion": "sail", "temperature": 0.1}, "temperature: found 0.1 with sail"),
        ({"fusion": "linear", "structure_levels": 2}, "structure-levels: found 2 with info_nce"),
        ({"fusion": "sotalign", "structure_warmup": 0}, "structure-warmup: found 0 with siglip, transport"),
    ],
)
def test_options_of_losses_that_do_not_train_are_refused(cache: str, options: dict[str, Any], found: str) -> None:
    config = TrainConfig(cache=cache, out="", **options)
    with pytest.raises(ValueError, match=f"--{found}, expected this option only with --objective"):
        resolve_run(config, open_cache(cache))


def test_closed_form_refuses_the_option_that_is_given(cache: str) -> None:
    with pytest.raises(ValueError, match="--optimizer: found lion, expected none: ridge is fitted in closed form"):
        TrainConfig(cache=cache, out="", fusion="ridge", optimizer="lion")


def test_recipe_mixes_only_pairs_that_can_be_mixed(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_cache(cache)

    def mixup_of(**options: Any) -> float | None:
        return resolve_run(TrainConfig(cache=cache, out="", fusion="linear", **options), opened).mixup

    monkeypatch.setitem(cast(dict[str, FusionEntry], FUSIONS), "linear", replace(FUSIONS["linear"], mixes_from=96))
    assert mixup_of() == 0.4
    assert mixup_of(train_fraction=0.9) is None
    assert mixup_of(train_fraction=0.9, mixup=0.4) == 0.4
    assert mixup_of(mixup=0.0) is None
    assert mixup_of(gallery_text="first_caption") is None
    monkeypatch.setattr(EncoderCache, "num_tokens", lambda self, layer: 0)
    assert mixup_of() is None


def test_mixup_of_tokens_refuses_inputs_of_differing_lengths(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_cache(cache)
    monkeypatch.setattr(EncoderCache, "num_tokens", lambda self, layer: 0)
    with pytest.raises(ValueError, match=r"--mixup: found 1.0 of tokens, expected 0, or --fusion .*contrastive"):
        resolve_run(TrainConfig(cache=cache, out="", fusion="linear", mixup=1.0), opened)
    assert resolve_run(TrainConfig(cache=cache, out="", fusion="fusemix"), opened).mixup == 1.0
    with pytest.raises(
        ValueError, match=r"--mixup: found 1\.0 with fromage, expected 0: it reads texts token by token"
    ):
        resolve_run(TrainConfig(cache=cache, out="", fusion="fromage", mixup=1.0), opened)


# Lion


def test_lion_is_its_formula() -> None:
    generator, rate, decay = np.random.default_rng(0), 0.01, 0.1
    weights, momentum = generator.normal(size=(4, 3)), np.zeros((4, 3))
    parameter = torch.nn.Parameter(torch.tensor(weights))
    lion = Lion([{"params": [parameter], "lr": rate, "weight_decay": decay}], rate)
    for _ in range(5):
        gradient = generator.normal(size=(4, 3))
        parameter.grad = torch.tensor(gradient)
        lion.step()
        towards = np.sign(0.9 * momentum + 0.1 * gradient)
        weights = weights * (1 - rate * decay) - rate * towards
        momentum = 0.99 * momentum + 0.01 * gradient
        np.testing.assert_allclose(parameter.detach().numpy(), weights, rtol=1e-12)


def test_lion_moves_by_the_rate_whatever_the_gradient() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    lion = Lion([{"params": [parameter]}], 0.5)
    parameter.grad = torch.tensor([1e-6, -1e6, 0.0])
    lion.step()
    assert parameter.tolist() == [-0.5, 0.5, 0.0]


def test_rate_follows_the_optimiser_unless_it_is_given() -> None:
    def rate(**options: Any) -> float:
        return TrainConfig(cache="", out="", **options).recipe.learning_rate

    assert rate(fusion="linear", optimizer="lion") == pytest.approx(rate(fusion="linear") / 10)
    assert rate(fusion="sail", optimizer="adamw") == pytest.approx(10 * rate(fusion="sail"))
    assert rate(fusion="linear", optimizer="lion", learning_rate=0.5) == 0.5
    resolved = TrainConfig(cache="", out="", fusion="linear", optimizer="lion").resolved()
    assert resolved.recipe == resolved.resolved().recipe


class StoppedError(Exception):
    pass


def test_resumed_run_with_lion_and_mixup_is_the_same(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(
        cache=cache, out=str(tmp_path / "whole"), device="cpu", log=("none",), checkpoint_seconds=0, control_epochs=0,
        fusion="sail", mixup=0.7, epochs=3, batch_size=24,
    )  # fmt: skip
    train(config)
    take, steps = loop._step, []

    def stopping(*given: Any) -> float:
        steps.append(1)
        if len(steps) == 7:
            raise StoppedError
        return take(*given)

    monkeypatch.setattr(loop, "_step", stopping)
    other = replace(config, out=str(tmp_path / "resumed"))
    with pytest.raises(StoppedError):
        train(other)
    train(other)
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed
