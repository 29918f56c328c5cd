"""Search correction against brute force, and its bank against what an evaluation searches with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn import unit_vectors
from quick_runs import Report, quick_train, report_of, setting_of, value
from sklearn.metrics import average_precision_score
from synthetic_cache import make_cache

from saffe_cache.core.features import IndexKind
from saffe_cache.core.items import Ragged
from saffe_cache.evaluation.config import EvaluateConfig
from saffe_cache.evaluation.evaluate import evaluate
from saffe_cache.inputs.bank import draw_bank
from saffe_cache.inputs.feature_loader import encode_gallery, encode_queries
from saffe_cache.inputs.pairs import training_pairs
from saffe_cache.protocols.searches import ClassProtocol
from saffe_cache.retrieval.correction import CorrectionKind, SearchCorrection
from saffe_cache.retrieval.index import build_index
from saffe_cache.retrieval.ranking import InnerProducts, relevant_ranks, top_k
from saffe_cache.retrieval.scores import Biases, caption_scores, class_scores
from saffe_cache.store.reader import open_cache
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.resolve import resolve_run

KINDS: Sequence[CorrectionKind] = ("nnn", "csls", "inverted_softmax")


def correction(kind: CorrectionKind, **options: float) -> SearchCorrection:
    return SearchCorrection(**({"kind": kind, "k": 10, "strength": 0.5, "temperature": 0.05} | options))  # type: ignore[arg-type]


def corrected_scores(of: SearchCorrection, items: np.ndarray, queries: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """The papers' scores [queries, items], one at a time."""
    found = np.empty((len(queries), len(items)))
    to_items = np.sort(queries.astype(np.float64) @ items.astype(np.float64).T, axis=1)[:, -of.k :].mean(axis=1)
    for j, item in enumerate(items.astype(np.float64)):
        similar = sorted((float(item @ one) for one in bank.astype(np.float64)), reverse=True)
        for i, query in enumerate(queries.astype(np.float64)):
            score = float(item @ query)
            if of.kind == "nnn":
                found[i, j] = score - of.strength * sum(similar[: of.k]) / of.k
            elif of.kind == "csls":
                found[i, j] = 2 * score - sum(similar[: of.k]) / of.k - to_items[i]
            else:
                found[i, j] = math.exp(score / of.temperature) / sum(math.exp(one / of.temperature) for one in similar)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_rankings_equal_those_of_the_papers_formulas(kind: CorrectionKind) -> None:
    items, queries, bank = unit_vectors(40, 8, seed=1), unit_vectors(15, 8, seed=2), unit_vectors(60, 8, seed=3)
    of = correction(kind, strength=0.8, k=7, temperature=0.2)
    bias = of.biases(items, bank)
    expected = corrected_scores(of, items, queries, bank)
    order = top_k(InnerProducts(items, queries, bias), 40)
    np.testing.assert_array_equal(order, np.argsort(-expected, axis=1))
    assert (order != top_k(InnerProducts(items, queries), 40)).any()


def test_csls_is_half_of_nnn_at_full_strength() -> None:
    items, bank = unit_vectors(30, 8, seed=1), unit_vectors(50, 8, seed=2)
    whole = correction("nnn", strength=1.0).biases(items, bank)
    np.testing.assert_allclose(correction("csls").biases(items, bank), whole / 2, atol=2.0**-23)


def test_inverted_softmax_goes_from_the_mean_to_the_maximum() -> None:
    items, bank = unit_vectors(30, 8, seed=1), unit_vectors(50, 8, seed=2)
    similar = items.astype(np.float64) @ bank.astype(np.float64).T
    warm = correction("inverted_softmax", temperature=1000.0).biases(items, bank)
    cold = correction("inverted_softmax", temperature=1e-4).biases(items, bank)
    np.testing.assert_allclose(warm, similar.mean(axis=1), atol=1e-3)
    np.testing.assert_allclose(cold, similar.max(axis=1), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_biases_depend_on_the_vector_alone(kind: CorrectionKind) -> None:
    """Equal vectors tie, whatever stands beside them, and so does the order of the bank."""
    items, bank = unit_vectors(300, 48, seed=1)[np.arange(700) % 300], unit_vectors(90, 48, seed=2)
    of = correction(kind)
    whole = of.biases(items, bank)
    np.testing.assert_array_equal(whole[300:], whole[:400])
    np.testing.assert_array_equal(of.biases(items[17:60], bank[::-1]), whole[17:60])
    assert (whole == np.rint(whole.astype(np.float64) * 2**23) / 2**23).all()


@pytest.mark.parametrize("block", [7, 64, 4096])
def test_corrected_ranks_equal_sorting_in_float64(block: int) -> None:
    items, queries = unit_vectors(500, 16, seed=1), unit_vectors(60, 16, seed=2)
    bias = np.rint(np.random.default_rng(3).uniform(-1.5, 1.5, 500) * 2**23).astype(np.float32) / np.float32(2**23)
    scores = queries.astype(np.float64) @ items.astype(np.float64).T - bias
    relevant = Ragged.from_rows(np.array([one, (7 * one + 3) % 500]) for one in range(60))
    expected = [
        sorted(1 + int((of > of[item]).sum()) for item in own) for of, own in zip(scores, relevant, strict=True)
    ]
    found = relevant_ranks(InnerProducts(items, queries, bias), relevant, block=block)
    assert [of_query.tolist() for of_query in found] == expected
    near = np.abs(InnerProducts(items, queries, bias).approximate(np.arange(60), slice(0, 500)) - scores)
    assert near.max() < InnerProducts(items, queries, bias).error


def test_equal_items_with_other_biases_do_not_tie() -> None:
    items, queries = np.tile(unit_vectors(1, 8, seed=1), (20, 1)), unit_vectors(5, 8, seed=2)
    bias = np.arange(20, dtype=np.float32) / 32
    relevant = Ragged.from_rows([[19 - one] for one in range(5)])
    ranks = relevant_ranks(InnerProducts(items, queries, bias), relevant)
    assert ranks.values.tolist() == [20, 19, 18, 17, 16]


def test_zero_biases_change_no_number() -> None:
    photos, texts, nothing = unit_vectors(50, 8, seed=1), unit_vectors(100, 8, seed=2), np.zeros(100, np.float32)
    owners, biases = np.arange(100) // 2, Biases(nothing[:50], nothing)
    assert caption_scores(photos, texts, owners, biases) == caption_scores(photos, texts, owners)
    labels = Ragged.from_rows([number % 10] for number in range(50))
    of_classes = Biases(nothing[:50], nothing[:10])
    assert class_scores(photos, texts[:10], labels, of_classes) == class_scores(photos, texts[:10], labels)


def test_biases_that_do_not_fit_are_refused() -> None:
    items, queries = unit_vectors(5, 4, seed=1), unit_vectors(2, 4, seed=2)
    with pytest.raises(ValueError, match=r"biases: float32 of shape \(4,\), expected float32 of shape \(5,\)"):
        InnerProducts(items, queries, np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="biases: float64"):
        InnerProducts(items, queries, np.zeros(5))
    for wrong in (np.nan, 2.1):
        with pytest.raises(ValueError, match="not finite or not from -2 to 2"):
            InnerProducts(items, queries, np.full(5, wrong, np.float32))
    with pytest.raises(ValueError, match=r"a bank of 9 queries, k is 10\. Use a smaller k"):
        correction("nnn").biases(items, unit_vectors(9, 4, seed=3))


def test_options_without_effect_or_out_of_range_are_refused() -> None:
    given = {"cache": "c", "run": "r"}
    for options, expected in (
        ({"correction_k": 3}, "--correction-k: found 3, expected this option only with .* nnn or csls"),
        ({"search_correction": "csls", "correction_strength": 0.7}, "only with --search-correction nnn"),
        ({"search_correction": "nnn", "correction_temperature": 0.1}, "only with .* inverted_softmax"),
        ({"search_correction": "nnn", "correction_strength": 2.5}, "at most 2"),
        ({"search_correction": "nnn", "correction_k": 0}, "a number above 0"),
        ({"search_correction": "inverted_softmax", "correction_temperature": 0.0}, "from 0.001 to 10"),
    ):
        with pytest.raises(ValueError, match=expected):
            EvaluateConfig(**given, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Report]:
    """A cache of captions, a run on it, and its report without a correction."""
    folder = tmp_path_factory.mktemp("corrected")
    cache = make_cache(folder / "cache.zarr", {"train": 120, "dev": 20, "test": 60}, signal=0.3)
    run = quick_train(cache, folder / "run", fusion="linear", epochs=3)
    return cache, run, report_of(cache, run, baselines="linear")


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_equals_brute_force_in_both_directions(made: tuple[str, str, Report], kind: CorrectionKind) -> None:
    cache, run, plain = made
    report = report_of(cache, run, search_correction=kind, baselines="linear")
    setting, model = setting_of(cache, run, "captions")
    inputs, pairs, of = setting.inputs, setting.pairs, correction(kind)
    training = training_pairs(setting.spec, setting.cache).training
    bank = draw_bank(of, setting.cache, setting.spec, training, pairs.texts.values)
    photos, of_photos = (encode_gallery(model, inputs, rows) for rows in (pairs.rows, training.rows[bank.photos]))
    texts, of_texts = (encode_queries(model, inputs.text.vectors(rows)) for rows in (pairs.texts.values, bank.texts))
    found = corrected_scores(of, photos, texts, of_texts).argmax(axis=1)
    assert value(report, "recall_at_1") == pytest.approx((found == pairs.owners).mean(), abs=1e-9)
    found = pairs.owners[corrected_scores(of, texts, photos, of_photos).argmax(axis=1)]
    assert value(report, "image_to_text_recall_at_1") == pytest.approx((found == np.arange(60)).mean(), abs=1e-9)
    assert report["search_correction"] == {"kind": kind, "k": 10, "strength": 0.5, "temperature": 0.05}
    assert (report["bank_texts"], report["bank_photos"]) == (240, 120)
    text = " ".join(report["text"].split())
    assert "bank of 240 training texts and 120 training photos" in text
    assert "FAM, uncorrected" in text
    assert report["uncorrected"] == plain["systems"]["fam"]
    assert all(report["systems"][name] != plain["systems"][name] for name in ("fam", "ridge"))
    assert report["status"] == 0
    assert report["out"] == f"{plain['out']}-{kind}"


def test_bank_holds_no_text_of_other_splits(tmp_path: Path) -> None:
    """Classes 10 to 14 are in both splits: their prompts are texts of the test split."""
    cache = open_cache(zero_shot_cache(tmp_path))
    spec = resolve_run(TrainConfig(cache="", out="", validation="heldout"), cache)
    training = training_pairs(spec, cache).training
    texts = cache.table.inputs["text"].texts
    assert texts is not None
    bank = draw_bank(correction("nnn"), cache, spec, training, np.zeros(0, np.int64))
    assert {texts[row] for row in bank.texts} == {f"a class{number}" for number in range(10)}
    assert np.array_equal(bank.photos, np.arange(len(training)))
    reported = bank.texts[:1]
    with pytest.raises(ValueError, match=r"6 of the 15 training texts .* at least 10 others for its bank. Use none"):
        draw_bank(correction("nnn"), cache, spec, training, reported)
    assert len(draw_bank(correction("csls", k=9), cache, spec, training, reported).texts) == 9


def test_drawn_bank_depends_on_content_and_seed(made: tuple[str, str, Report], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saffe_cache.inputs.bank.MOST_BANK_TEXTS", 50)
    monkeypatch.setattr("saffe_cache.inputs.bank.MOST_BANK_PHOTOS", 30)
    setting, _ = setting_of(made[0], made[1], "captions")
    training, nothing = training_pairs(setting.spec, setting.cache).training, np.zeros(0, np.int64)
    first, again, other = (
        draw_bank(correction("nnn"), setting.cache, replace(setting.spec, seed=seed), training, nothing)
        for seed in (0, 0, 1)
    )
    assert (len(first.texts), len(first.photos)) == (50, 30)
    assert np.array_equal(first.texts, again.texts)
    assert not np.array_equal(first.texts, other.texts)
    without = draw_bank(correction("nnn"), setting.cache, setting.spec, training, first.texts[:5])
    assert len(np.intersect1d(without.texts, first.texts)) == 45


def test_class_names_search_and_are_searched_with_correction(tmp_path: Path) -> None:
    cache = zero_shot_cache(tmp_path)
    run = quick_train(cache, tmp_path / "run", fusion="linear", epochs=3, validation="heldout")
    report = report_of(cache, run, search_correction="nnn", baselines="linear")
    setting, model = setting_of(cache, run, "classes")
    training, protocol = training_pairs(setting.spec, setting.cache).training, ClassProtocol(setting)
    of, inputs = correction("nnn"), setting.inputs
    bank = draw_bank(of, setting.cache, setting.spec, training, np.zeros(0, np.int64))
    photos, of_photos = (
        encode_gallery(model, inputs, rows) for rows in (setting.pairs.rows, training.rows[bank.photos])
    )
    classes = encode_queries(model, protocol.queries.vectors)
    of_texts = encode_queries(model, inputs.text.vectors(bank.texts))
    nearest = corrected_scores(of, classes, photos, of_photos).argmax(axis=1)
    assert value(report, "top1") == pytest.approx((nearest == setting.pairs.labels.values).mean(), abs=1e-9)
    scores = corrected_scores(of, photos, classes, of_texts)
    is_own = setting.pairs.labels.values == np.arange(len(classes))[:, None]
    expected = [
        average_precision_score(own, of_class) for own, of_class in zip(is_own, scores, strict=True) if own.any()
    ]
    assert value(report, "map") == pytest.approx(np.mean(expected), abs=1e-9)
    assert (report["bank_texts"], report["status"]) == (10, 0)


def test_protocols_and_runs_without_a_bank_are_refused(made: tuple[str, str, Report], tmp_path: Path) -> None:
    cache, run, _ = made
    with pytest.raises(ValueError, match="--search-correction: found nnn with protocol rerank, expected one in which"):
        evaluate(EvaluateConfig(cache=cache, run=run, protocol="rerank", search_correction="nnn"))
    with pytest.raises(ValueError, match="0 of the 240 training texts"):
        evaluate(EvaluateConfig(cache=cache, run=run, split="train", search_correction="nnn"))


def test_default_correction_is_left_out_where_it_does_not_apply(
    made: tuple[str, str, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saffe_cache.retrieval.correction.DEFAULT_CORRECTION", "nnn")
    cache, run, _ = made
    corrected = report_of(cache, run, out=str(tmp_path / "caption"))
    assert corrected["search_correction"]["kind"] == "nnn"
    plain = report_of(cache, run, out=str(tmp_path / "rerank"), protocol="rerank")
    assert plain["search_correction"] is None
    assert plain["uncorrected"] == {}
    assert report_of(cache, run, out=str(tmp_path / "none"), search_correction="none")["search_correction"] is None


@pytest.mark.parametrize(("kind", "least"), [("flat", 1.0), ("ivf", 0.6), ("hnsw", 0.95), ("ivf_pq", 0.3)])
def test_each_kind_of_index_applies_biases(kind: IndexKind, least: float) -> None:
    items, queries = unit_vectors(10_000, 16, seed=1), 3 * unit_vectors(40, 16, seed=2)
    bias = correction("nnn", strength=1.0).biases(items, unit_vectors(500, 16, seed=3))
    expected = top_k(InnerProducts(items, queries, bias), 10)
    index = build_index(items, tuple(map(str, range(10_000))), kind=kind, biases=bias)
    scores, found = index.nearest(queries, 10)
    assert np.mean([np.isin(*of_query).mean() for of_query in zip(found, expected, strict=True)]) >= least
    without = build_index(items, index.ids, kind=kind)
    assert np.mean(np.isin(found[:, 0], without.nearest(queries, 1)[1])) < 0.9
    plain = index.nearest(queries, 10, corrected=False)[1]
    assert (
        np.mean([np.isin(*both).mean() for both in zip(plain, top_k(InnerProducts(items, queries), 10), strict=True)])
        >= 0.9 * least
    )
    if kind == "flat":
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(scores[0], queries[0] @ items[found[0]].T - 3 * bias[found[0]], atol=1e-5)
    if kind == "ivf_pq":
        assert index.parameters["num_codes"] == 5


def zero_shot_cache(folder: Path) -> str:
    """Training photos have the classes 0 to 14, test photos 10 to 24."""

    def labels(split: str, number: int) -> list[int]:
        return [number % 15 + 10 * (split == "test")]

    return make_cache(folder / "cache.zarr", {"train": 150, "test": 75}, classes=25, labels=labels, signal=0.3)
