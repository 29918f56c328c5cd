"""The metrics against scikit-learn, ranx, a plain trec_eval loop, exact enumeration and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from saffe_cache.retrieval.metrics import (
    average_precision,
    bootstrap_interval,
    chance_average_precision,
    chance_first_rank,
    first_relevant_rank,
    recall_at_k,
)

seeded = settings(derandomize=True, deadline=None, database=None)
rankings = st.lists(st.booleans(), min_size=1, max_size=40).filter(any)


def trec_map(ranking: list[bool], num_relevant: int) -> float:
    """`map` of trec_eval's m_map.c, line by line."""
    found, total = 0, 0.0
    for position, relevant in enumerate(ranking):
        if relevant:
            found += 1
            total += found / (position + 1)
    return total / num_relevant


def ap(ranking: list[bool] | np.ndarray, num_relevant: int | None = None) -> float:
    row = np.asarray(ranking, bool)
    return float(average_precision(row[None], np.array([num_relevant or row.sum()]))[0])


def random_rankings(num_queries: int, num_gallery: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores without ties, and relevance; in the gallery's order."""
    generator = np.random.default_rng(seed)
    scores = generator.permuted(np.tile(np.arange(num_gallery), (num_queries, 1)), axis=1) / num_gallery
    relevance = generator.random((num_queries, num_gallery)) < generator.uniform(0.02, 0.6, (num_queries, 1))
    relevance[np.arange(num_queries), generator.integers(num_gallery, size=num_queries)] = True
    return scores, relevance


def test_average_precision_by_hand() -> None:
    # Manning et al., sec. 8.4: precision 1/1, 2/3, 3/6 at the relevant ranks
    assert ap([True, False, True, False, False, True]) == pytest.approx((1 + 2 / 3 + 3 / 6) / 3)
    assert ap([True, False, True], num_relevant=4) == pytest.approx((1 + 2 / 3) / 4)  # AP@3 with R = 4
    assert ap([False, False], num_relevant=1) == 0


def test_average_precision_equals_scikit_learn() -> None:
    scores, relevance = random_rankings(60, 83, seed=1)
    ranked = np.take_along_axis(relevance, np.argsort(-scores, axis=1), axis=1)
    expected = [average_precision_score(y, s) for y, s in zip(relevance, scores, strict=True)]
    np.testing.assert_allclose(average_precision(ranked, relevance.sum(axis=1)), expected, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 7, 50])
def test_average_precision_equals_trec_eval_also_at_k(k: int) -> None:
    scores, relevance = random_rankings(60, 50, seed=2)
    ranked = np.take_along_axis(relevance, np.argsort(-scores, axis=1), axis=1)
    num_relevant = relevance.sum(axis=1)
    expected = [trec_map(list(row[:k]), int(r)) for row, r in zip(ranked, num_relevant, strict=True)]
    np.testing.assert_allclose(average_precision(ranked[:, :k], num_relevant), expected, rtol=1e-12)


def test_metrics_equal_ranx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # compiling takes half a minute
    ranx = pytest.importorskip("ranx")
    scores, relevance = random_rankings(20, 30, seed=3)
    judged = {f"q{q}": {f"d{d}": 1 for d in np.flatnonzero(row)} for q, row in enumerate(relevance)}
    run = {f"q{q}": {f"d{d}": float(s) for d, s in enumerate(row)} for q, row in enumerate(scores)}
    ranked = np.take_along_axis(relevance, np.argsort(-scores, axis=1), axis=1)
    ranks, num_relevant = first_relevant_rank(ranked), relevance.sum(axis=1)
    expected = ranx.evaluate(ranx.Qrels(judged), ranx.Run(run), ["map", "map@5", "mrr", "hit_rate@5"])
    assert average_precision(ranked, num_relevant).mean() == pytest.approx(expected["map"])
    assert average_precision(ranked[:, :5], num_relevant).mean() == pytest.approx(expected["map@5"])
    assert (1 / ranks).mean() == pytest.approx(expected["mrr"])
    assert recall_at_k(ranks, 5).mean() == pytest.approx(expected["hit_rate@5"])


def test_average_precision_refuses_a_query_without_relevant_items() -> None:
    with pytest.raises(ValueError, match="no relevant item"):
        average_precision(np.zeros((2, 3), bool), np.array([1, 0]))


def test_first_relevant_rank_and_recall() -> None:
    ranked = np.array([[0, 0, 1], [1, 1, 0], [0, 0, 0], [0, 1, 1]], bool)
    ranks = first_relevant_rank(ranked)
    assert ranks.tolist() == [3, 1, 4, 2]
    assert recall_at_k(ranks, 1).tolist() == [0, 1, 0, 0]
    assert recall_at_k(ranks, 3).tolist() == [1, 1, 0, 1]


@seeded
@given(rankings)
def test_average_precision_is_a_fraction_and_one_only_for_a_perfect_ranking(ranking: list[bool]) -> None:
    perfect = sorted(ranking, reverse=True)
    assert 0 < ap(ranking) <= 1 + 1e-12
    assert ap(perfect) == pytest.approx(1)
    assert (ap(ranking) > 1 - 1e-9) == (ranking == perfect)


@seeded
@given(rankings, st.data())
def test_average_precision_rises_when_a_relevant_item_moves_up(ranking: list[bool], data: st.DataObject) -> None:
    up = data.draw(st.sampled_from([i for i, relevant in enumerate(ranking) if relevant]))
    to = data.draw(st.integers(0, up))
    moved = list(ranking)
    moved.insert(to, moved.pop(up))
    assert ap(moved) >= ap(ranking) - 1e-12
    assert (ap(moved) > ap(ranking) + 1e-12) != all(ranking[to:up])
    ranks = first_relevant_rank(np.array([moved, ranking]))
    assert ranks[0] <= ranks[1]


@seeded
@given(rankings, st.integers(0, 60), st.integers(1, 40))
def test_average_precision_grows_with_depth_and_is_bounded(ranking: list[bool], unseen: int, k: int) -> None:
    total = sum(ranking) + unseen
    assert ap(ranking[:k], total) <= ap(ranking, total) + 1e-12 <= sum(ranking) / total + 2e-12


def orders(num_gallery: int, num_relevant: int) -> np.ndarray:
    """Every placing of the relevant items, all equally likely in a random order."""
    chosen = list(itertools.combinations(range(num_gallery), num_relevant))
    ranked = np.zeros((len(chosen), num_gallery), bool)
    for row, places in zip(ranked, chosen, strict=True):
        row[list(places)] = True
    return ranked


@seeded
@given(st.integers(1, 9), st.data())
def test_chance_equals_the_mean_over_all_orders(num_gallery: int, data: st.DataObject) -> None:
    num_relevant = data.draw(st.integers(1, num_gallery))
    ranked = orders(num_gallery, num_relevant)
    mean = average_precision(ranked, np.full(len(ranked), num_relevant)).mean()
    assert chance_average_precision(num_gallery, num_relevant) == pytest.approx(mean)
    counts = np.bincount(first_relevant_rank(ranked), minlength=num_gallery + 1)[1:]
    np.testing.assert_allclose(chance_first_rank(num_gallery, num_relevant), counts / len(ranked), atol=1e-12)


@pytest.mark.parametrize(("num_gallery", "num_relevant"), [(100, 1), (150, 12), (40, 39)])
def test_chance_equals_simulation(num_gallery: int, num_relevant: int) -> None:
    generator = np.random.default_rng(num_gallery)
    ranked = np.tile(np.arange(num_gallery) < num_relevant, (4000, 1))
    ranked = generator.permuted(ranked, axis=1)
    values = average_precision(ranked, np.full(len(ranked), num_relevant))
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - chance_average_precision(num_gallery, num_relevant)) < 4 * error
    reciprocal = 1 / first_relevant_rank(ranked)
    expected = (chance_first_rank(num_gallery, num_relevant) / np.arange(1, num_gallery + 1)).sum()
    assert abs(reciprocal.mean() - expected) < 4 * reciprocal.std() / math.sqrt(len(values)) + 1e-12


@seeded
@given(st.integers(1, 300), st.data())
def test_chance_first_rank_is_a_distribution(num_gallery: int, data: st.DataObject) -> None:
    chances = chance_first_rank(num_gallery, data.draw(st.integers(1, num_gallery)))
    assert (chances >= 0).all()
    assert chances.sum() == pytest.approx(1)


def test_bootstrap_interval_has_the_analytic_width() -> None:
    hits = (np.arange(400) < 120).astype(float)
    low, high = bootstrap_interval(hits, np.ones(400), resamples=4000)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - half, abs=0.005)
    assert high == pytest.approx(0.3 + half, abs=0.005)
    assert bootstrap_interval(hits, np.ones(400), seed=1) == bootstrap_interval(hits, np.ones(400), seed=1)


def test_bootstrap_interval_keeps_the_queries_of_a_photo_together() -> None:
    """Five equal captions for each photo tell no more than one: the width is that of photos, not of captions."""
    hits = np.random.default_rng(0).random(200) < 0.5
    one = bootstrap_interval(hits * 1.0, np.ones(200))
    assert bootstrap_interval(hits * 5.0, np.full(200, 5)) == pytest.approx(one)


def test_bootstrap_interval_covers_the_truth() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        low, high = bootstrap_interval(
            (generator.random(100) < 0.4).astype(float), np.ones(100), seed=seed, resamples=300
        )
        covered += low <= 0.4 <= high
    assert covered >= 88  # 95 expected, 2.2 the standard deviation
