"""Measures of alignment against brute force, scikit-learn and closed forms; and what they must and must not notice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cross_decomposition import CCA
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import NearestNeighbors

from saffe_cache.core.results import Estimate
from saffe_cache.retrieval.baselines import RIDGE_STRENGTHS, LinearMap, Ridge, unit_rows
from saffe_cache.studies.alignment.maps import answers, answers_of_scores, fit_text_mlp, maxsim, normed
from saffe_cache.studies.alignment.measures import (
    canonical_variates,
    centered_gram,
    cka,
    mean_correlation,
    measure_cka,
    measure_mutual_neighbours,
    measure_svcca,
    mutual_neighbours,
    neighbours,
    permutations,
    principal_components,
    u_centered,
    unit_rows_clipped,
)
from saffe_cache.studies.alignment.result import Evidence, advise


def related(n: int, width: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of vectors that show the same hidden ones, each in its own coordinates."""
    generator = np.random.default_rng(seed)
    hidden = generator.normal(size=(n, 6))
    sides = (hidden @ generator.normal(size=(6, width)) + noise * generator.normal(size=(n, width)) for _ in range(2))
    first, second = (side.astype(np.float32) for side in sides)
    return first, second


def rotation(width: int, seed: int = 9) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0].astype(np.float32)


def hsic_by_quadruples(first: np.ndarray, second: np.ndarray) -> float:
    """The U-statistic itself: over all ordered quadruples of distinct photos."""
    k, l, n = first @ first.T, second @ second.T, len(first)  # noqa: E741
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in itertools.permutations(range(n), 4)]
    return float(np.mean(terms))


@settings(max_examples=10, deadline=None)
@given(st.integers(4, 7), st.integers(0, 99))
def test_centred_products_equal_the_u_statistic(n: int, seed: int) -> None:
    first, second = related(n, 5, 0.5, seed)
    product = float((centered_gram(first) * centered_gram(second)).sum()) / (n * (n - 3))
    assert product == pytest.approx(hsic_by_quadruples(first, second), rel=1e-3, abs=1e-3)


def test_part_is_centred_as_if_it_were_all() -> None:
    vectors, chosen = related(12, 5, 0.5)[0], np.array([7, 1, 3, 8, 11])
    part = u_centered(centered_gram(vectors)[chosen[:, None], chosen])
    np.testing.assert_allclose(part, centered_gram(vectors[chosen]), atol=1e-4)


def test_unbiased_cka_of_independent_data_is_near_zero() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 200, 400))
    found = float(cka(centered_gram(first)[None], centered_gram(second)[None])[0, 0])
    centred = [side - side.mean(axis=0) for side in (first, second)]
    grams = [side @ side.T for side in centred]
    biased = (grams[0] * grams[1]).sum() / np.linalg.norm(grams[0]) / np.linalg.norm(grams[1])
    assert abs(found) < 0.02
    assert biased > 0.6


def test_neighbours_equal_scikit_learn() -> None:
    first, second = (unit_rows(side) for side in related(40, 8, 1.0))
    k, shared = 6, 0
    lists = [
        NearestNeighbors(n_neighbors=k, metric="cosine").fit(side).kneighbors(return_distance=False)
        for side in (first, second)
    ]
    for mine, other in zip(*lists, strict=True):
        shared += len(set(mine) & set(other))
    near = [neighbours((side @ side.T)[None], k) for side in (first, second)]
    assert mutual_neighbours(*near)[0, 0] == pytest.approx(shared / 40 / k)


def test_neighbours_of_classes_are_classmates() -> None:
    first, labels = unit_rows(related(30, 8, 1.0)[0]), np.arange(30) % 3
    near = NearestNeighbors(n_neighbors=4, metric="cosine").fit(first).kneighbors(return_distance=False)
    same = labels[:, None] == labels
    grid = measure_mutual_neighbours((first @ first.T)[None], same[None], 4, permutations(30, 200, 0), 2, 0)
    assert grid.value[0][0] == pytest.approx((labels[near] == labels[:, None]).mean())
    assert grid.chance == pytest.approx(9 / 29)
    assert grid.null_mean[0][0] == pytest.approx(9 / 29, abs=0.02)


def test_kernel_intervals_match_spread_over_fresh_photos() -> None:
    """Spread over redrawn data, against what halves of one data set say of it."""
    values, said = [], []
    for seed in range(40):
        sides = [unit_rows(side) for side in related(120, 10, 2.0, seed)]
        generator = np.random.default_rng(0)  # the same true coordinates in each
        maps = generator.normal(size=(2, 6, 10))
        drawn = np.random.default_rng(1000 + seed)
        hidden = drawn.normal(size=(120, 6))
        sides = [unit_rows(hidden @ one + 2 * drawn.normal(size=(120, 10))) for one in maps]
        grams = [centered_gram(side)[None] for side in sides]
        similar = [(side @ side.T)[None] for side in sides]
        orders = permutations(120, 2, 0)
        grids = [
            measure_cka(*grams, [grams[1]], 30, seed),
            measure_mutual_neighbours(*similar, 10, orders, 30, seed),
        ]
        values.append([grid.value[0][0] for grid in grids])
        said.append([(grid.high[0][0] - grid.low[0][0]) / 3.92 for grid in grids])
    ratios = np.mean(said, axis=0) / np.std(values, axis=0, ddof=1)
    assert (ratios > 0.75).all(), ratios
    assert (ratios < 1.7).all(), ratios


def test_svcca_equals_cca_of_components_on_unseen_photos() -> None:
    first, second = related(400, 10, 1.0)
    parts = [principal_components(side[:250], side[250:], 4) for side in (first, second)]
    mine = mean_correlation(*canonical_variates(*parts))[0]
    reduced = [PCA(4).fit(side[:250]).transform(side) for side in (first, second)]
    peer = CCA(n_components=4, max_iter=5000, tol=1e-10).fit(reduced[0][:250], reduced[1][:250])
    variates = peer.transform(reduced[0][250:], reduced[1][250:])
    theirs = [np.corrcoef(variates[0][:, i], variates[1][:, i])[0, 1] for i in range(4)]
    assert mine == pytest.approx(np.mean(theirs), abs=1e-3)


def test_components_stop_at_the_rank() -> None:
    classes = np.random.default_rng(0).normal(size=(5, 30))
    labels = np.arange(60) % 5
    assert principal_components(classes[labels], classes[labels], 20).fitted.shape == (60, 4)


def test_rotation_changes_only_the_plain_cosine() -> None:
    text = unit_rows(related(300, 8, 0.0)[0])
    photo = text + 0.02 * np.random.default_rng(1).normal(size=text.shape).astype(np.float32)
    rows = np.arange(150)

    def measured(photo: np.ndarray) -> dict[str, float]:
        grams = [centered_gram(side)[None] for side in (photo, text)]
        near = [neighbours((side @ side.T)[None], 10) for side in (photo, text)]
        parts = [principal_components(side[150:], side[:150], 5) for side in (photo, text)]
        fit, _ = Ridge(photo[150:]).fit_left_out(text[150:])
        return {
            "cka": float(cka(*grams)[0, 0]),
            "neighbours": float(mutual_neighbours(*near)[0, 0]),
            "svcca": float(mean_correlation(*canonical_variates(*parts))[0]),
            "a_0": answers(photo[:150], text[:150], rows, texts_search=True).recall_at_1,
            "a_lin": answers(fit(photo[:150]), text[:150], rows, texts_search=True).recall_at_1,
        }

    plain, turned = measured(photo), measured(photo @ rotation(8))
    for name in ("cka", "neighbours", "svcca", "a_lin"):
        assert turned[name] == pytest.approx(plain[name], abs=0.01), name
        assert plain[name] > 0.7, name
    assert plain["a_0"] > 0.7
    assert turned["a_0"] < 0.1


def test_shared_structure_is_told_from_none() -> None:
    for shares in (True, False):
        first, second = related(240, 8, 0.5)
        if not shares:
            second = second[np.random.default_rng(5).permutation(240)]
        sides = [unit_rows(side) for side in (first, second)]
        orders = permutations(120, 20, 0)
        judged = [side[:120] for side in sides]
        grams = [centered_gram(side)[None] for side in judged]
        shuffled = [centered_gram(judged[1][order])[None] for order in orders]
        parts = [[principal_components(side[120:], side[:120], 4)] for side in sides]
        grids = [
            measure_cka(*grams, shuffled, 10, 0),
            measure_mutual_neighbours(*((side @ side.T)[None] for side in judged), 10, orders, 10, 0),
            measure_svcca(*parts, 20, 20, 0),
        ]
        for grid, chance in zip(grids, (0, 10 / 119, 0), strict=True):
            assert grid.null_mean[0][0] == pytest.approx(chance, abs=0.05)
            assert (grid.low[0][0] > grid.null_high[0][0]) == shares
        found = answers(
            Ridge(sides[0][120:]).fit_left_out(sides[1][120:])[0](judged[0]),
            judged[1],
            np.arange(120),
            texts_search=True,
        )
        assert (found.recall_at_1 > 2 * np.quantile(found.null(orders), 0.95)) == shares


def test_ridge_equals_scikit_learn_at_least_left_out_error() -> None:
    features, targets = related(40, 12, 2.0)
    errors, peers = [], []
    for strength in RIDGE_STRENGTHS:
        peer = SklearnRidge(alpha=strength * len(features))
        left_out = cross_val_predict(peer, features.astype(np.float64), targets, cv=LeaveOneOut())
        errors.append(((left_out - targets) ** 2).mean() / targets.var(axis=0).mean())
        peers.append(peer.fit(features, targets))
    (fit, error), best = Ridge(features).fit_left_out(targets), int(np.argmin(errors))
    assert fit.strength == RIDGE_STRENGTHS[best]
    assert error == pytest.approx(errors[best], rel=1e-3)
    np.testing.assert_allclose(fit(features), peers[best].predict(features), atol=1e-3)


def test_ranks_of_captions_and_of_classes() -> None:
    scores = np.array([[0.9, 0.8, 0.1], [0.5, 0.8, 0.2], [0.4, 0.3, 0.1]], np.float32)
    captions = answers_of_scores(scores, np.arange(3), texts_search=True)
    assert captions.ranks.tolist() == [1, 1.5, 2.5]  # text 1 ties with photo 0, text 2 with photo 0
    classes = answers_of_scores(scores[[0, 1, 2, 2]], np.array([0, 0, 2, 0]), texts_search=False)
    assert classes.ranks.tolist() == [1, 2, 3, 1]
    assert classes.recall_at_1 == 0.5
    assert classes.null_of_deals([np.array([1, 0, 2])]).tolist() == [0.25]
    assert classes.null([np.array([3, 2, 1, 0])]).tolist() == [0.75]


@pytest.mark.slow
def test_mlp_finds_what_a_linear_map_cannot() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(700, 4)).astype(np.float32)
    labels = ((features[:, 0] > 0) ^ (features[:, 1] > 0)).astype(np.int64)
    texts = np.eye(2, 6, dtype=np.float32)
    fit, _ = Ridge(features[200:]).fit_left_out(texts[labels[200:]])
    linear = answers(fit(features[:200]), texts, labels[:200], texts_search=False)
    fitted = fit_text_mlp(features[200:], labels[200:], texts, 0, texts_search=False)
    mlp = answers(fitted.gallery(features[:200]), fitted.queries(texts), labels[:200], texts_search=False)
    assert linear.recall_at_1 < 0.6
    assert mlp.recall_at_1 > 0.8


def test_maxsim_is_mean_of_largest_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    photos = normed(torch.randn(3, 4, 6, generator=generator))
    texts = [normed(torch.randn(length, 5, generator=generator)) for length in (2, 1, 3)]
    shapes = ((5, 6), (5,), (5,))
    weight, bias, mean = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in shapes)
    ridge = LinearMap(weight, bias, 1.0)
    scores = maxsim(photos.split(2), texts, ridge, mean)
    for photo, text in itertools.product(range(3), range(3)):
        best = []
        for word in texts[text].numpy() - mean:
            mapped = ridge(photos[photo].numpy()) - mean
            best.append(max(word @ one / np.linalg.norm(word) / np.linalg.norm(one) for one in mapped))
        assert scores[photo, text] == pytest.approx(np.mean(best), abs=1e-5)


def test_clipping_limits_one_large_channel() -> None:
    vectors = np.random.default_rng(0).normal(size=(20, 40))
    vectors[:, 3] = 100
    assert np.abs(unit_rows(vectors)[:, 3]).min() > 0.99
    assert np.abs(unit_rows_clipped(vectors)[:, 3]).max() < 0.6


def gap(mean: float, low: float, high: float) -> Estimate:
    return Estimate(value=mean, low=low, high=high)


def evidence(**changes: object) -> Evidence:
    """Where a ridge regression finds all there is."""
    none, tokens = gap(0.0, -0.02, 0.02), gap(-0.01, -0.03, 0.01)
    usual = {
        "a_0": 0.0, "without_map": gap(-0.1, -0.12, -0.08), "a_lin": 0.2, "a_mlp": 0.2, "mlp_gain": none,
        "null": 0.01, "a_tok": 0.19, "token_gain": tokens,
    }  # fmt: skip
    return Evidence(**(usual | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "alone"),
    [
        ({}, "linear"),
        ({"a_0": None, "without_map": None}, "linear"),
        ({"a_0": 0.15, "without_map": gap(0.05, 0.02, 0.08)}, "no FAM"),
        ({"a_0": 0.11, "without_map": gap(0.01, -0.02, 0.04)}, "linear"),
        ({"a_mlp": 0.3, "mlp_gain": gap(0.1, 0.07, 0.13), "a_tok": 0.3, "token_gain": gap(0.1, 0.07, 0.13)}, "linear"),
        ({"a_lin": 0.01, "a_mlp": 0.005}, "no FAM"),
    ],
)
def test_rule_decides_only_beyond_noise(changes: dict[str, object], alone: str) -> None:
    found = advise(evidence(**changes), has_paired_texts=True)
    assert [one.fusion for one in found] == [alone, "no FAM" if "a_lin" in changes else "concat"]
    assert [one.fusion for one in advise(evidence(**changes), has_paired_texts=False)] == [alone]
