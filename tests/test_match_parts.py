"""Pairs, degraded features, scores, curves and verdicts, each against an independent reference."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.special import j1
from scipy.stats import t as student
from sklearn.metrics import accuracy_score, roc_auc_score

from saffe_cache.core.controls import Control, failed
from saffe_cache.core.items import Ragged
from saffe_cache.inputs.pairs import Pairs
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.studies.matching.baselines import fit_baselines
from saffe_cache.studies.matching.examples import (
    Degradation,
    Examples,
    PairVectors,
    draw_examples,
    draw_judged,
    partial_rotation,
)
from saffe_cache.studies.matching.findings import PowerLaw
from saffe_cache.studies.matching.match import embed_pairs
from saffe_cache.studies.matching.result import PUBLISHED
from saffe_cache.studies.matching.scores import (
    Trials,
    auc_error,
    best_threshold,
    judge,
    judge_controls,
    permuted_error,
    shuffled_error,
)
from saffe_cache.studies.matching.verdict import (
    Features,
    compare_risks,
    find_crossover,
    fit_power_law,
    judge_degradation,
    judge_rule,
    rule_sentences,
)


def tolerance_of(control: Control) -> float:
    assert control.limit is not None
    return control.limit - control.level


def captions(count: int, of_each: int = 3) -> Pairs:
    """Photos 100, 101, …; the first two share a caption."""
    texts = [list(range(of_each * i, of_each * (i + 1))) for i in range(count)]
    texts[1][0] = 0
    rows = np.arange(100, 100 + count)
    return Pairs("captions", tuple(map(str, rows)), rows, Ragged.from_rows(texts), Ragged.from_rows([[]] * count))


def classes(count: int, num_classes: int) -> Pairs:
    labels = [[i % num_classes if i % 3 else 0] for i in range(count)]
    rows = np.arange(count)
    return Pairs("classes", tuple(map(str, rows)), rows, Ragged.from_rows(labels), Ragged.from_rows(labels))


def even_classes(count: int, num_classes: int, prompts: int = 1) -> Pairs:
    labels = [[i % num_classes] for i in range(count)]
    texts = [[prompts * label + i for i in range(prompts)] for [label] in labels]
    rows = np.arange(count)
    return Pairs("classes", tuple(map(str, rows)), rows, Ragged.from_rows(texts), Ragged.from_rows(labels))


def check_fair(drawn: Examples, pairs: Pairs, negatives: int) -> None:
    """Each photo and each text stands in as many of others' pairs as the ratio says, and none of these is its own."""
    own = {(int(row), int(text)) for row, texts in zip(pairs.rows, pairs.texts, strict=True) for text in texts}
    is_own = [pair in own for pair in zip(drawn.photos.tolist(), drawn.texts.tolist(), strict=True)]
    assert np.array_equal(is_own, drawn.labels == 1)
    for side in (drawn.photos, drawn.texts):
        _, of = np.unique(side, return_inverse=True)
        assert np.array_equal(np.bincount(of, drawn.labels == 0), negatives * np.bincount(of, drawn.labels == 1))


@pytest.mark.parametrize("negatives", [1, 5])
@pytest.mark.parametrize("pairs", [captions(40), classes(60, 8)], ids=["captions", "classes"])
def test_neither_photo_nor_text_is_informative_alone(pairs: Pairs, negatives: int) -> None:
    trained = draw_examples(pairs, 20 * (1 + negatives), negatives, 3)
    assert len(trained) == 20 * (1 + negatives)
    check_fair(trained, pairs, negatives)
    judged = draw_judged(pairs, negatives, 3)
    check_fair(judged, pairs, negatives)
    assert len(np.unique(judged.photos)) == judged.labels.sum()  # each photo once


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("num_classes", "prompts", "negatives", "photos"),
    [(2, 1, 1, 1000), (2, 1, 1, 4096), (2, 3, 1, 1000), (2, 7, 1, 1000), (3, 1, 2, 1000), (6, 1, 5, 1000)],
)
def test_fewest_classes_that_a_ratio_needs_suffice(
    num_classes: int, prompts: int, negatives: int, photos: int, seed: int
) -> None:
    pairs = even_classes(photos, num_classes, prompts)
    most = min(2048, photos * (1 + negatives))
    for count in (most // 4, most):
        drawn = draw_examples(pairs, count, negatives, seed)
        check_fair(drawn, pairs, negatives)
        assert len(drawn) > count - (1 + negatives) * num_classes * prompts
        assert np.array_equal(drawn.texts, draw_examples(pairs, count, negatives, seed).texts)
    judged = draw_judged(pairs, negatives, seed)
    check_fair(judged, pairs, negatives)
    assert len(judged) > 0.7 * photos * (1 + negatives)


def test_impossible_assignments_are_reported() -> None:
    popular = captions(40, of_each=1)
    popular.texts.values[:24] = 0
    cases = ((popular, 1, 17), (even_classes(90, 3), 3, 3), (even_classes(91, 1), 1, 1))
    for pairs, negatives, found in cases:
        words = rf"--negatives: found {negatives}, and the {found} different texts .* Use fewer, or fewer pairs"
        with pytest.raises(ValueError, match=words):
            draw_examples(pairs, len(pairs) * (1 + negatives), negatives, 0)


def test_smaller_scale_lies_within_larger_and_seeds_differ() -> None:
    pairs = captions(40)

    def matches(count: int, seed: int = 0) -> set[tuple[int, int]]:
        drawn = draw_examples(pairs, count, 1, seed)
        own = drawn.labels == 1
        return set(zip(drawn.photos[own].tolist(), drawn.texts[own].tolist(), strict=True))

    assert matches(20) < matches(60)
    assert matches(20) != matches(20, seed=1)
    with pytest.raises(ValueError, match=r"--scales: found 300, expected 2 to 240 pairs"):
        draw_examples(pairs, 300, 1, 0)
    with pytest.raises(ValueError, match=r"--negatives: found 2, and the 2 different texts"):
        draw_judged(classes(12, 2), 2, 0)


def test_shuffling_moves_every_photo_and_keeps_label_counts() -> None:
    drawn = draw_judged(captions(40), 1, 0)
    shuffled = drawn.with_photos_shuffled(1)
    assert not (shuffled.photos == drawn.photos).any()
    assert sorted(shuffled.photos) == sorted(drawn.photos)
    for photo in np.unique(drawn.photos):
        assert len(np.unique(shuffled.photos[drawn.photos == photo])) == 1
    permuted = drawn.with_labels_permuted(1)
    assert permuted.labels.sum() == drawn.labels.sum()
    assert abs(np.corrcoef(permuted.labels, drawn.labels)[0, 1]) < 0.5


def pair_of_spaces(count: int = 300, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Aligned, as the halves of CLIP are."""
    generator = np.random.default_rng(0)
    shared = generator.normal(size=(count, width))
    return unit_rows(shared), unit_rows(shared + 0.7 * generator.normal(size=(count, width)))


def mean_cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float((first * second).sum(axis=1).mean())


def test_rotation_separates_spaces_and_noise_destroys_them() -> None:
    photos, texts = pair_of_spaces()
    photos[1::2] = unit_rows(photos[0::2] + 0.5 * photos[1::2])  # alike, two by two
    within, across = mean_cosine(photos[::2], photos[1::2]), mean_cosine(photos[::2], texts[::2])
    for turn in (0.25, 0.5, 0.75):
        rotated, same = Degradation("rotation", turn).apply(photos, texts, 0)
        assert np.array_equal(same, texts)
        assert np.allclose(rotated @ rotated.T, photos @ photos.T, atol=1e-5)
        now = mean_cosine(rotated[::2], texts[::2])
        assert now < across - 0.05
        across = now
    within_now, across_now = within, mean_cosine(photos[::2], texts[::2])
    for sigma in (0.05, 0.1, 0.3):
        noisy, noisy_texts = Degradation("noise", sigma).apply(photos, texts, 0)
        found = mean_cosine(noisy[::2], noisy[1::2]), mean_cosine(noisy[::2], noisy_texts[::2])
        assert found[0] < within_now - 0.05
        assert found[1] < across_now - 0.05
        within_now, across_now = found


@pytest.mark.parametrize("turn", [0.25, 0.5, 1.0])
def test_rotations_have_the_stated_angle(turn: float) -> None:
    """The planes' angles follow the semicircle law, whose mean cosine is a Bessel function."""
    rotation = partial_rotation(200, turn, np.random.default_rng(0)).astype(float)
    assert np.allclose(rotation @ rotation.T, np.eye(200), atol=1e-5)
    assert np.linalg.det(rotation) == pytest.approx(1, abs=1e-4)
    angle = 3.8317 * turn
    assert np.trace(rotation) / 200 == pytest.approx(2 * j1(angle) / angle, abs=0.01)


@pytest.mark.parametrize("sigma", [0.05, 0.2])
def test_noise_leaves_the_cosine_of_its_formula(sigma: float) -> None:
    photos, texts = pair_of_spaces(2000, 128)
    every = np.arange(len(photos))
    clean = PairVectors(every, every, photos, texts)
    expected = 1 / np.sqrt(1 + sigma**2 * 128)
    noisy = clean.degraded(Degradation("noise", sigma), 0)
    measured = noisy.alignment(clean, Examples(every, every, np.ones_like(every)))
    assert measured["photos_with_clean"] == pytest.approx(expected, abs=0.01)
    factor = measured["matching_pairs"] / (photos * texts).sum(axis=1).mean()
    assert factor == pytest.approx(expected**2, abs=0.02)


def test_scores_and_threshold_agree_with_brute_force() -> None:
    generator = np.random.default_rng(0)
    labels = (np.arange(90) % 3 == 0).astype(int)
    scores = np.round(generator.normal(size=90) + labels, 1)  # with ties
    cuts = [scores.min() - 1, *(scores + 1e-6)]
    best = max(float(((scores > cut) == labels).mean()) for cut in cuts)
    found = judge(scores, labels, best_threshold(scores, labels))
    assert found["accuracy"] == pytest.approx(best)
    assert judge(scores, 1 - labels, best_threshold(scores, 1 - labels))["accuracy"] >= 2 / 3
    called, ones = scores > 0, labels == 1
    true, false, missed = (called & ones).sum(), (called & ~ones).sum(), (~called & ones).sum()
    at_zero = judge(scores, labels)
    assert at_zero["f1"] == pytest.approx(2 * true / (2 * true + false + missed))
    assert at_zero["precision"] == pytest.approx(true / (true + false))
    assert at_zero["recall"] == pytest.approx(true / (true + missed))
    wins = scores[ones][:, None] - scores[~ones][None]
    assert at_zero["auc"] == pytest.approx(((wins > 0) + 0.5 * (wins == 0)).mean())
    assert judge(np.zeros(90), labels)["accuracy"] == pytest.approx(2 / 3)  # the majority class


def test_controls_that_find_something_fail() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([1, 0], 500)
    chance = [float(roc_auc_score(labels, generator.normal(size=1000))) for _ in range(200)]
    assert np.std(chance) == pytest.approx(auc_error(500, 500), rel=0.15)
    error = shuffled_error(500, 500)
    judged = judge_controls([Trials("fair", chance[:3], error, False), Trials("leak", [0.6, 0.61, 0.7], error, False)])
    assert [one.passed for one in judged] == [True, False]
    assert failed(judged) == [f"leak: AUC is 63.67, expected 50.00 ± {100 * tolerance_of(judged[1]):.2f} (chance)"]
    many = judge_controls([Trials(str(i), chance[i : i + 3], error, False) for i in range(190)])
    assert all(one.passed for one in many)


@pytest.mark.parametrize("num_classes", [3, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 10))])
def test_shuffled_photos_of_classes_stay_within_error(num_classes: int) -> None:
    """Also where what is right for a photo's own text is wrong for the other."""
    drawn = draw_judged(even_classes(300, num_classes), 1, 0)
    aucs = []
    for seed in range(300):
        photos = drawn.with_photos_shuffled(seed).photos
        aucs.append(float(roc_auc_score(drawn.labels, photos % num_classes == drawn.texts)))
    assert np.std(aucs) < shuffled_error(int(drawn.labels.sum()), int((drawn.labels == 0).sum()))
    judged = [judge_controls([Trials("", [auc], shuffled_error(300, 300), False)])[0] for auc in aucs]
    assert all(one.passed for one in judged)


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [1, 2, 3])
@pytest.mark.parametrize("num_classes", [2, 4, 10])
def test_order_of_few_classes_is_no_failure(num_classes: int, num_seeds: int) -> None:
    """What was trained on permuted labels puts the pairs of a class and a text in an order that means nothing."""
    drawn = draw_judged(even_classes(400, num_classes), 1, 0)
    generator = np.random.default_rng(0)
    error = permuted_error(400, 400, num_classes)

    def auc() -> float:
        order = generator.normal(size=(num_classes, num_classes))
        within = 0.01 * generator.normal(size=len(drawn))
        return float(roc_auc_score(drawn.labels, order[drawn.photos % num_classes, drawn.texts] + within))

    assert np.std([auc() for _ in range(200)]) == pytest.approx(error, rel=0.15)
    runs = [
        judge_controls([Trials(f"{i}", [auc() for _ in range(num_seeds)], error, True) for i in range(4)])
        for _ in range(50)
    ]
    assert sum(bool(failed(run)) for run in runs) <= 2
    judged = [one.passed is not None for run in runs for one in run]
    assert not any(judged) if num_seeds == 1 or num_classes == 2 else True


def test_permuted_labels_that_are_found_fail() -> None:
    error = permuted_error(1000, 1000, 1000)
    found = judge_controls(
        [
            Trials("found", [0.69, 0.7, 0.71], error, True),
            Trials("seeds differ", [0.4, 0.6, 0.65], error, True),
            Trials("one seed", [0.7], error, True),
        ]
    )
    assert [one.passed for one in found] == [False, None, None]
    assert [one.limit is None for one in found] == [False, True, True]
    assert [reason.split(":")[0] for reason in failed(found)] == ["found"]
    half = student.ppf(1 - 1e-2 / 6, 2) * 0.01 / np.sqrt(3)
    assert tolerance_of(found[0]) == pytest.approx(half)


def test_ridge_baselines_find_a_map_and_are_cross_fitted() -> None:
    generator = np.random.default_rng(0)
    photos = unit_rows(generator.normal(size=(700, 30)))
    turned = photos @ np.linalg.qr(generator.normal(size=(30, 30)))[0]
    texts = unit_rows(turned + 0.5 * generator.normal(size=(700, 30)) / np.sqrt(30))
    rows = np.arange(700)
    vectors = PairVectors(rows, rows, photos, texts.astype(np.float32))

    def part(start: int, stop: int) -> Examples:
        own = np.arange(start, stop)
        labels = np.repeat([1, 0], len(own))
        return Examples(np.tile(own, 2), np.concatenate([own, np.roll(own, 1)]), labels)

    training, validation, test = part(0, 400), part(400, 500), part(500, 700)
    found = fit_baselines(vectors, training, validation)
    accuracy = {
        name: accuracy_score(test.labels, baseline.scores(test) > baseline.threshold)
        for name, baseline in found.items()
    }
    assert 0.4 < accuracy["cosine"] < 0.6
    assert min(accuracy["ridge_cosine"], accuracy["ridge_products"]) > 0.9
    noise = PairVectors(rows, rows, photos, unit_rows(generator.normal(size=(700, 30))))
    blind = fit_baselines(noise, training, validation)["ridge_products"]
    assert blind.scores(training).std() < 50
    assert accuracy_score(test.labels, blind.scores(test) > blind.threshold) < 0.6
    narrow = PairVectors(rows, rows, photos, noise.texts[:, :20])
    assert set(fit_baselines(narrow, training, validation)) == {"ridge_cosine", "ridge_products"}


def test_power_laws_and_their_crossover_are_recovered() -> None:
    sizes = (1000, 2000, 4000, 8000, 16000)

    def errors(a: float, b: float, c: float) -> dict[int, list[float]]:
        return {size: [a * (size / 1000) ** -b + c + shift for shift in (-1e-4, 0, 1e-4)] for size in sizes}

    first, second = (0.2, 0.3, 0.1), (0.3, 0.8, 0.1)
    assert tuple(vars(fit_power_law(errors(*first))).values()) == pytest.approx(first, abs=5e-3)
    meeting = 1000 * (0.3 / 0.2) ** (1 / (0.8 - 0.3))  # where both terms are equal
    assert find_crossover(*(PowerLaw(a=a, b=b, c=c) for a, b, c in (first, second)), 1000, 16000) == pytest.approx(
        meeting, rel=1e-4
    )
    found = compare_risks(errors(*first), errors(*second), ("a", "b"))
    assert found.low <= found.crossover <= found.high  # type: ignore[operator]
    assert found.crossover == pytest.approx(meeting, rel=0.02)
    assert found.share == 1
    apart = compare_risks(errors(*first), errors(0.2, 0.3, 0.2), ("a", "b"))
    assert apart.crossover is None
    assert apart.sentence == "a and b: no crossover within 1000 to 16000 pairs (0% of resampled seeds have one)"
    single = compare_risks(
        *({size: of[:1] for size, of in errors(*law).items()} for law in (first, second)), ("a", "b")
    )
    assert single.crossover == pytest.approx(meeting, rel=0.02)
    assert single.sentence.endswith("pairs (one seed)")
    assert (single.low, single.high, single.share) == (None, None, None)
    few = {size: errors(*first)[size] for size in sizes[:2]}
    assert "three parameters need three sizes, found 2" in compare_risks(few, few, ("a", "b")).sentence


def test_rule_is_judged_by_intervals_paired_by_seed() -> None:
    accuracies = {
        "concat": {100: [0.8, 0.9, 0.85], 200: [0.8, 0.8, 0.8]},
        "cross": {100: [0.7, 0.8, 0.76], 200: [0.9, 0.7, 0.8]},
    }
    judged = judge_rule(Features(True), accuracies, ["cross"])
    assert [(one.size, one.holds) for one in judged] == [(100, True), (200, None)]
    differences = np.array([0.1, 0.1, 0.09])
    half = 4.303 * differences.std(ddof=1) / np.sqrt(3)
    assert judged[0].lead.low == pytest.approx(differences.mean() - half)
    assert [one.holds for one in judge_rule(Features(False), accuracies, ["cross"])] == [False, None]
    [sentence] = rule_sentences(Features(False), judge_rule(Features(False), accuracies, ["cross"]))
    assert "that cross-attention wins at any size, fails at 100, is undecided at 200 pairs against cross" in sentence
    single = judge_rule(Features(True), {"concat": {100: [0.9]}, "cross": {100: [0.1]}}, ["cross"])
    assert (single[0].holds, single[0].lead.low) == (None, None)
    assert rule_sentences(Features(True), single)[0].endswith("by training pairs: 100: +80.0 (one seed)")
    leads = {"clean": [0.0, 0.01], "noise 0.1": [0.02, 0.03], "noise 0.2": [-0.02, 0.03]}
    found = judge_degradation(leads, "noise", "cross", 200)
    assert (found.grown, found.fallen) == (("noise 0.1",), ())
    assert vars(found.changes["noise 0.2"]) == pytest.approx({"value": 0.0, "low": -0.254, "high": 0.254}, abs=1e-3)
    assert "over cross grows at 1 and falls at 0 of 2 levels; it is +0.5 points on clean features" in found.sentence
    single = judge_degradation({level: values[:1] for level, values in leads.items()}, "noise", "cross", 200)
    assert (single.grown, single.fallen) == ((), ())
    assert single.sentence == (
        "with noise concat's lead over cross is not judged by one seed; it is +0.0 points on clean features and "
        "changes by noise 0.1: +2.0 (one seed); noise 0.2: -2.0 (one seed)"
    )


def test_neighbours_on_plane_are_neighbours_in_space() -> None:
    generator = np.random.default_rng(0)
    photos = unit_rows(np.repeat(np.eye(8, dtype=np.float32), 4, axis=0) + 0.3 * generator.normal(size=(32, 8)))
    near = embed_pairs(photos, unit_rows(photos + 0.01 * generator.normal(size=photos.shape)), 0)
    far = embed_pairs(photos, unit_rows(generator.normal(size=photos.shape)), 0)
    assert near.own_is_nearest > 0.5 > far.own_is_nearest
    assert np.array(near.photos).shape == (32, 2)


def test_published_tables_are_complete() -> None:
    found = {
        (table, system, value): accuracy
        for table, (_, values, systems) in PUBLISHED.items()
        for system, accuracies in systems.items()
        for value, accuracy in zip(values, accuracies, strict=True)
    }
    assert len(found) == 20
    assert found[1, "cross", 8192] == 84.4
    assert found[2, "concat", 0.1] == 86.2
    for system in ("concat", "cross"):
        falling = [found[2, system, sigma] for sigma in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)]
        assert all(after <= before for before, after in pairwise(falling))
