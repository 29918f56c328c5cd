"""saffe caption: what it trains, what it measures and against what, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from captioning_cases import PHOTO_TOKENS, captioned_cache, model_of, projector_of, source_of
from tiny_models import NUM_LAYERS

from saffe_cache.core.controls import failed
from saffe_cache.core.features import CacheError
from saffe_cache.core.results import Estimate, exit_status
from saffe_cache.inputs.pairs import Pairs, select_pairs, split_pairs
from saffe_cache.inputs.spec import SplitOptions
from saffe_cache.store.reader import open_cache
from saffe_cache.studies.captioning import caption as verb
from saffe_cache.studies.captioning.caption import Measuring, caption, count_cost, judge_controls
from saffe_cache.studies.captioning.captions import Measured, caption_losses, fit_projector, shuffled_batches
from saffe_cache.studies.captioning.config import CaptionConfig
from saffe_cache.studies.captioning.result import CAPTIONS, SYSTEMS, CaptionResult

Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Models) -> str:
    return captioned_cache(tmp_path_factory.mktemp("captions"), tiny_model)


def parts_of(cache: str, seed: int = 0) -> tuple[Pairs, Pairs, Pairs]:
    found = open_cache(cache)
    encoders = found.encoder("image"), found.encoder("text")
    reported = select_pairs(found.table, *encoders, "dev", "captions")
    splits = SplitOptions(validation="heldout", validation_fraction=0.25)
    training, validation, _ = split_pairs(found, encoders, "captions", splits, seed, reported=reported)
    return training, validation, reported


def measuring_of(cache: str, layer: int = 1) -> Measuring:
    return Measuring(source_of(cache, layer), projector_of(), parts_of(cache)[2], seed=0)


def test_no_photo_is_in_two_parts(cache: str) -> None:
    training, validation, reported = parts_of(cache)
    assert (len(training), len(validation), len(reported)) == (9, 3, 6)
    assert not {*training.rows} & {*validation.rows} | {*training.rows, *validation.rows} & {*reported.rows}


def test_projector_learns_and_best_epoch_is_kept(cache: str) -> None:
    training, validation, _ = parts_of(cache)
    config = config_of(cache, Path("unused"), epochs=6, learning_rate=0.02, weight_decay=0.0, seed=1)
    source = source_of(cache, 1)
    model = source.model
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    projector, found = fit_projector(source, training, validation, config)
    assert fit_projector(source, training, validation, config)[1].log == found.log
    log = found.log
    assert log[-1].training < log[1].training - 0.1  # type: ignore[operator]
    losses = [one.validation for one in log]
    assert losses[found.best_epoch] == min(losses)
    with torch.no_grad():
        captions = source.captions(validation.texts.values[validation.texts.offsets[:-1]])
        photos = projector(source.photo_tokens(validation.rows))
        again = caption_losses(model, captions, photos).sum() / captions.is_target.sum()
    assert float(again) == pytest.approx(min(losses), abs=1e-5)
    assert all(torch.equal(value, frozen[name]) for name, value in model.state_dict().items())


def test_batches_hold_each_text_once_with_little_padding() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 40, 1003)
    batches = shuffled_batches(lengths, 32, generator)
    assert sorted(np.concatenate(batches)) == list(range(1003))
    assert max(map(len, batches)) == 32
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.15 * lengths.sum()
    means = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.5, "batches come in the order of their lengths"


def test_losses_equal_transformers_and_a_plain_loop(cache: str, tiny_model: Models) -> None:
    """The plain model by its own loss, the unigram by counting, photos one by one."""
    measuring, training = measuring_of(cache), parts_of(cache)[0]
    report = measuring.measure(training, 3)
    found = report.losses
    source, pairs = measuring.source, measuring.pairs
    gpt2 = transformers.GPT2LMHeadModel.from_pretrained(tiny_model("gpt2")).eval()
    texts = open_cache(cache).table.inputs["text"].texts
    assert texts is not None
    ids = {row: source.tokens.encode([texts[row]])[0] for row in {*pairs.texts.values, *training.texts.values}}
    counts = dict.fromkeys(range(42), 1)
    for row in training.texts.values:
        for token in ids[row][1:]:
            counts[token] += 1
    totals = {"plain_model": 0.0, "unigram": 0.0, "photo": 0.0, "photos_shuffled": 0.0}
    said = sum(len(ids[row]) - 1 for row in pairs.texts.values)
    for number in range(len(pairs)):
        for row in pairs.texts[number]:
            tokens = torch.tensor([ids[row]])
            with torch.no_grad():
                totals["plain_model"] += float(gpt2(tokens, labels=tokens).loss) * (len(ids[row]) - 1)
                for name, photo in (("photo", number), ("photos_shuffled", measuring.other[number])):
                    projected = measuring.projector(source.photo_tokens(pairs.rows[[photo]]))
                    captions = source.captions(np.array([row]))
                    totals[name] += float(caption_losses(source.model, captions, projected))
            totals["unigram"] -= sum(np.log(counts[token] / sum(counts.values())) for token in ids[row][1:])
    for name, total in totals.items():
        assert found[name].value == pytest.approx(total / said, abs=1e-4), name
        assert found[name].low < found[name].value < found[name].high  # type: ignore[operator]
        if name != "photo":
            difference = found["photo"].value - found[name].value
            assert report.differences[name].value == pytest.approx(difference, abs=1e-6)
    assert set(report.losses) == {*report.differences, "photo"} == set(SYSTEMS)
    assert sorted(measuring.other) == list(range(len(pairs)))
    assert (measuring.other != np.arange(len(pairs))).all()


def test_prompt_tokens_are_not_counted(tmp_path: Path, tiny_model: Models) -> None:
    source = source_of(captioned_cache(tmp_path, tiny_model, train=2, prompt="word7 word8 {}"), 1)
    captions = source.captions(np.array([0, 1]))
    ids, mask = source.token_ids(np.array([0, 1]))
    assert ids[:, :3].tolist() == [[41, 7, 8]] * 2
    assert captions.is_target.sum(dim=1).tolist() == (mask.sum(dim=1) - 3).tolist()
    assert captions.targets[0][captions.is_target[0]].tolist() == ids[0, 3 : mask[0].sum()].tolist()
    source.tokens.start.append(9)  # as where a prompt runs into the text
    with pytest.raises(CacheError, match=r"begins with the tokens \[41, 7, 8, \d+\], expected \[41, 7, 8, 9\]"):
        source.captions(np.array([0]))


@pytest.mark.slow
def test_own_captions_are_found_with_knowledge_or_by_chance(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring = measuring_of(cache)
    owner = dict(
        zip(measuring.pairs.texts.values[measuring.pairs.texts.offsets[:-1]], measuring.pairs.rows, strict=True)
    )

    def knows(texts: np.ndarray, photos: np.ndarray | None = None) -> Measured:
        if photos is None:
            return Measured(np.full(len(texts), 3.0), texts)
        right = np.array([owner[text] == photo for text, photo in zip(texts, photos, strict=True)])
        return Measured(np.where(right, 1.0, 2.0), np.ones(len(texts)))

    monkeypatch.setattr(measuring, "losses", knows)
    found = measuring.own_captions(4)
    assert {name: one.value for name, one in found.items()} == {
        "photo, by loss": 1.0,
        "photo, by gain": 1.0,
        "photos_shuffled, by loss": 0.0,
        "photos_shuffled, by gain": 0.0,
    }
    generator = np.random.default_rng(0)

    def guesses(texts: np.ndarray, photos: np.ndarray | None = None) -> Measured:
        return knows(texts) if photos is None else Measured(generator.random(len(texts)), np.ones(len(texts)))

    monkeypatch.setattr(measuring, "losses", guesses)
    values = [measuring.own_captions(4)["photo, by gain"].value for _ in range(30)]
    assert np.mean(values) == pytest.approx(0.2, abs=0.1)


def test_control_above_chance_fails() -> None:
    values = {"photos_shuffled, by gain": 0.2, "photo, by gain": 0.9}
    own = {name: Estimate(value=value, low=0.0, high=1.0) for name, value in values.items()}
    assert failed(judge_controls(own, 9, 50)) == []
    [failure] = failed(judge_controls(own, 9, 500))
    assert failure == "photos_shuffled, by gain: own caption found is 20.00, expected at most 14.02 (chance)"


def test_flops_follow_the_formula(cache: str) -> None:
    """F(L) of a layer: 8 L d² of the attention's maps, 4 L d f of the MLP, 4 L² d of the attention (method D)."""

    def of_layer(length: int) -> int:
        return 8 * length * 32 * 32 + 4 * length * 32 * 48 + 4 * length**2 * 32

    counts = {"batch": 2, "tokens": 7, "photo_tokens": PHOTO_TOKENS}
    for layer in range(NUM_LAYERS):
        found = count_cost(model_of(cache, layer), projector_of(), **counts)
        layers = layer * of_layer(7) + (NUM_LAYERS - layer) * of_layer(7 + PHOTO_TOKENS)
        rest = 2 * PHOTO_TOKENS * 32 * 32 + 2 * 7 * 32 * 42
        assert found.whole_pass_flops == pytest.approx(2 * (layers + rest), rel=0.02)
        upper = (NUM_LAYERS - layer) * of_layer(7 + PHOTO_TOKENS) + rest
        assert 1.8 < found.training_step_flops / (2 * upper) < 2.6


def config_of(cache: str, out: Path, **options: Any) -> CaptionConfig:
    quick = {"layer": 1, "grid": 2, "held_out": 0.25, "others": 3, "epochs": 2, "batch_size": 4, "max_tokens": 6}
    return CaptionConfig(cache=cache, out=str(out), device="cpu", **(quick | options))


def test_run_is_reported_and_resumes(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(cache, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(verb, "greedy_captions", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            caption(config)
    monkeypatch.setattr(verb.captions, "fit_projector", lambda *_: pytest.fail("it is trained already"))
    out = Path(caption(config))
    result = CaptionResult.load(out)
    assert (result.layer, result.num_layers, result.photo_tokens, result.photos) == (1, NUM_LAYERS, 5, 6)
    assert result.cost.trainable_parameters == 32 * 32 + 3 * 32
    assert set(result.measured.losses) == {"photo", "photos_shuffled", "no_photo", "plain_model", "unigram"}
    assert result.chance == 0.25
    assert set(result.seconds) == {"training", "measurements", "captions", "scores"}
    captions = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert len(captions) == 6
    assert all(len(one["own"]) == 3 and len(one["caption"].split()) <= 6 for one in captions)
    assert [vars(one) | {"own": list(one.own)} for one in result.examples] == captions[:5]
    assert "plain_model" in (out / "report.txt").read_text()
    assert result.scores is not None
    assert set(result.scores.cider) == set(CAPTIONS)
    assert all(0 <= one.value <= 10 for one in result.scores.cider.values())
    assert "CIDEr-D of captions against people's" in (out / "report.txt").read_text()
    rows = result.to_frame().set_index(["system", "metric"])
    assert rows.loc[("photo", "loss"), "value"] == result.measured.losses["photo"].value
    assert rows.loc[("photo", "own caption by gain"), "chance"] == 0.25
    assert rows.loc[("photo", "CIDEr-D"), "chance"] == result.scores.cider["people_shuffled"].value
    assert exit_status(out) == (3 if result.failures else 0)
    written = (out / "result.json").read_bytes()
    caption(config)
    assert (out / "result.json").read_bytes() == written
    with pytest.raises(ValueError, match=r"holds another result.*layer: 1 there, 2 now"):
        caption(replace(config, layer=2))


def test_several_layers_are_compared_in_one_table(cache: str, tmp_path: Path) -> None:
    results = {
        f"run {layer}": CaptionResult.load(caption(config_of(cache, tmp_path / str(layer), layer=layer, epochs=1)))
        for layer in (2, 0)
    }
    assert CaptionResult.compare({"alone": results["run 0"]}) == []
    [section] = CaptionResult.compare(results)
    assert [row.head.note for row in section.tables[0].rows] == ["run 0", "run 2"]
    assert f"{results['run 2'].measured.losses['photo'].value:.3f}" in section.to_text()


def test_seeds_are_compared_on_the_same_photos(cache: str, tmp_path: Path) -> None:
    """Three of six, drawn."""
    outs = (
        caption(config_of(cache, tmp_path / str(seed), report_photos=3, others=2, epochs=1, seed=seed))
        for seed in range(4)
    )
    drawn = {tuple(json.loads(line)["id"] for line in (Path(out) / "captions.jsonl").open()) for out in outs}
    assert [len(ids) for ids in drawn] == [3]


def test_options_that_do_not_fit_are_refused(cache: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--layer: found 3, expected 0 to 2"):
        caption(config_of(cache, tmp_path, layer=3))
    with pytest.raises(ValueError, match="--others: found 6, expected fewer than 6"):
        caption(config_of(cache, tmp_path, others=6))
    with pytest.raises(ValueError, match="--max-tokens: found 197, expected at most 196"):
        caption(config_of(cache, tmp_path, max_tokens=197))
    with pytest.raises(CacheError, match="0 language models named 'bert'; it holds text-tiny-gpt2"):
        caption(config_of(cache, tmp_path, encoder={"text": "bert"}))
    with pytest.raises(ValueError, match="--split: found train, expected another split"):
        config_of(cache, tmp_path, split="train")
