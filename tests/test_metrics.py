"""The metrics against trec_eval, ranx, scikit-learn, a plain loop, exact enumeration and simulation.

The references break ties each in its own way: trec_eval by the document's name, ranx by the order in which its
sort leaves them, and scikit-learn not at all (it takes tied items at once, so that a tie of everything has the
prevalence as its precision). Where scores tie, trec_eval and ranx are therefore told the order that was drawn,
in the names or as infinitesimal differences; scikit-learn is compared on scores without ties.
"""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from saffe_cache.core.items import Ragged
from saffe_cache.retrieval.metrics import (
    RandomOrder,
    average_precision_of_ranks,
    bootstrap_interval,
    chance_average_precision,
    chance_first_rank,
    first_ranks,
    paired_bootstrap,
    recall_at_k,
    seed_interval,
)
from saffe_cache.retrieval.ranking import relevant_ranks, top_k

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


def ranks_of(ranked: np.ndarray) -> Ragged:
    """Ranks of the relevant items of bool [queries, items], best first."""
    return Ragged.from_rows(np.flatnonzero(row) + 1 for row in ranked)


def ap(ranking: list[bool] | np.ndarray, depth: int | None = None) -> float:
    return float(average_precision_of_ranks(ranks_of(np.asarray(ranking, bool)[None]), depth)[0])


def random_rankings(num_queries: int, num_gallery: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores without ties, and relevance; in the gallery's order."""
    generator = np.random.default_rng(seed)
    scores = generator.permuted(np.tile(np.arange(num_gallery), (num_queries, 1)), axis=1) / num_gallery
    relevance = generator.random((num_queries, num_gallery)) < generator.uniform(0.02, 0.6, (num_queries, 1))
    relevance[np.arange(num_queries), generator.integers(num_gallery, size=num_queries)] = True
    return scores, relevance


def relevant_items(relevance: np.ndarray) -> Ragged:
    return Ragged.from_rows(np.flatnonzero(row) for row in relevance)


def test_average_precision_by_hand() -> None:
    # Manning et al., sec. 8.4: precision 1/1, 2/3, 3/6 at the relevant ranks
    assert ap([True, False, True, False, False, True]) == pytest.approx((1 + 2 / 3 + 3 / 6) / 3)
    assert ap([True, False, True, False, True, True], depth=3) == pytest.approx((1 + 2 / 3) / 3)  # min(R, k) = 3
    assert ap([False, False, True], depth=2) == 0


def test_average_precision_equals_scikit_learn() -> None:
    scores, relevance = random_rankings(60, 83, seed=1)
    found = average_precision_of_ranks(relevant_ranks(scores, relevant_items(relevance)))
    expected = [average_precision_score(y, s) for y, s in zip(relevance, scores, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 7, 50])
def test_average_precision_equals_a_plain_loop_also_at_k(k: int) -> None:
    scores, relevance = random_rankings(60, 50, seed=2)
    ranked = np.take_along_axis(relevance, np.argsort(-scores, axis=1), axis=1)
    expected = [trec_map(list(row[:k]), min(int(row.sum()), k)) for row in ranked]
    np.testing.assert_allclose(average_precision_of_ranks(ranks_of(ranked), k), expected, rtol=1e-12)


@pytest.mark.parametrize("levels", [3, 8, 1000])
def test_metrics_equal_trec_eval_also_with_ties(levels: int) -> None:
    """trec_eval puts the later name first where scores tie; names say here which place was drawn."""
    scores, relevance = random_rankings(25, 60, seed=levels)
    scores = np.floor(scores * levels)
    names = [f"{60 - place:03d}" for place in np.argsort(top_k(np.zeros((1, 60)), 60, seed=7)[0])]
    judged = {f"q{q}": {names[d]: 1 for d in np.flatnonzero(row)} for q, row in enumerate(relevance)}
    run = {f"q{q}": dict(zip(names, map(float, row), strict=True)) for q, row in enumerate(scores)}
    expected = pytrec_eval.RelevanceEvaluator(judged, {"map", "recip_rank", "success"}).evaluate(run)
    ranks = relevant_ranks(scores, relevant_items(relevance), seed=7)
    for query, values in enumerate(zip(average_precision_of_ranks(ranks), first_ranks(ranks), strict=True)):
        of_query = expected[f"q{query}"]
        assert values[0] == pytest.approx(of_query["map"], abs=1e-12)
        assert 1 / values[1] == pytest.approx(of_query["recip_rank"], abs=1e-12)
        for k in (1, 5, 10):
            assert float(values[1] <= k) == of_query[f"success_{k}"]


@pytest.mark.parametrize("levels", [3, 1000])
def test_metrics_equal_ranx_also_with_ties(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if "numba" not in sys.modules:  # a half-disabled one fails
        monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # compiling takes half a minute
    ranx = pytest.importorskip("ranx")
    scores, relevance = random_rankings(20, 30, seed=3)
    scores = np.floor(scores * levels)
    told = scores - 1e-9 * np.argsort(top_k(np.zeros((1, 30)), 30, seed=7)[0])
    judged = {f"q{q}": {f"d{d}": 1 for d in np.flatnonzero(row)} for q, row in enumerate(relevance)}
    run = {f"q{q}": {f"d{d}": float(s) for d, s in enumerate(row)} for q, row in enumerate(told)}
    ranks = relevant_ranks(scores, relevant_items(relevance), seed=7)
    expected = ranx.evaluate(ranx.Qrels(judged), ranx.Run(run), ["map", "mrr", "hit_rate@5"])
    assert average_precision_of_ranks(ranks).mean() == pytest.approx(expected["map"])
    assert (1 / first_ranks(ranks)).mean() == pytest.approx(expected["mrr"])
    assert recall_at_k(first_ranks(ranks), 5).mean() == pytest.approx(expected["hit_rate@5"])


def test_random_tie_breaking_gives_expected_average_precision() -> None:
    """Two groups of tied items; every order within each is enumerated."""
    scores = np.array([2, 1, 2, 1, 1, 2, 1])
    relevant = np.array([1, 1, 0, 0, 1, 0, 0], bool)
    orders_of = [itertools.permutations(np.flatnonzero(scores == level)) for level in (2, 1)]
    expected = np.mean([ap(relevant[[*best, *rest]]) for best, rest in itertools.product(*orders_of)])
    rows = relevant_items(relevant[None])
    values = [average_precision_of_ranks(relevant_ranks(scores[None], rows, seed=s))[0] for s in range(4000)]
    assert abs(np.mean(values) - expected) < 4 * np.std(values) / math.sqrt(len(values))


def test_average_precision_needs_a_relevant_item() -> None:
    for metric in (average_precision_of_ranks, first_ranks):
        with pytest.raises(ValueError, match="no relevant item"):
            metric(Ragged.from_rows([[1, 2], []]))


def test_first_ranks_and_recall() -> None:
    ranks = first_ranks(ranks_of(np.array([[0, 0, 1], [1, 1, 0], [0, 1, 1]], bool)))
    assert ranks.tolist() == [3, 1, 2]
    assert recall_at_k(ranks, 1).tolist() == [0, 1, 0]
    assert recall_at_k(ranks, 3).tolist() == [1, 1, 1]


@seeded
@given(rankings)
def test_average_precision_is_one_only_for_perfect_rankings(ranking: list[bool]) -> None:
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
    ranks = first_ranks(ranks_of(np.array([moved, ranking])))
    assert ranks[0] <= ranks[1]


@seeded
@given(rankings, st.integers(1, 60))
def test_average_precision_at_k_is_one_where_the_top_is_full(ranking: list[bool], k: int) -> None:
    perfect = sorted(ranking, reverse=True)
    assert 0 <= ap(ranking, k) <= 1 + 1e-12
    assert ap(perfect, k) == pytest.approx(1)
    assert ap(ranking, len(ranking)) == ap(ranking)
    assert ap(ranking, k) * min(sum(ranking), k) <= ap(ranking) * sum(ranking) + 1e-12


@seeded
@given(rankings, st.integers(1, 60))
def test_average_precision_is_mean_precision_at_relevant_ranks(ranking: list[bool], k: int) -> None:
    """The definition, in three lines."""
    top = ranking[:k]
    precisions = [sum(top[: rank + 1]) / (rank + 1) for rank in range(len(top)) if top[rank]]
    assert ap(ranking, k) == pytest.approx(sum(precisions) / min(sum(ranking), k))


@seeded
@given(st.data(), st.integers(1, 12), st.booleans(), st.integers(0, 9))
def test_metrics_do_not_depend_on_the_order_of_the_items(
    data: st.DataObject, num_items: int, ties: bool, seed: int
) -> None:
    """Of items whose scores differ; where they tie, what is drawn lies between the best and the worst order."""
    values = st.lists(st.integers(0, 3 if ties else 999), min_size=num_items, max_size=num_items, unique=not ties)
    scores = np.array(data.draw(values), float)
    relevant = np.array(data.draw(st.lists(st.booleans(), min_size=num_items, max_size=num_items).filter(any)))
    order = np.array(data.draw(st.permutations(range(num_items))))
    found = [
        average_precision_of_ranks(relevant_ranks(one[None], relevant_items(of[None]), seed=seed))[0]
        for one, of in ((scores, relevant), (scores[order], relevant[order]))
    ]
    best, worst = (ap(relevant[np.lexsort((sign * relevant, -scores))]) for sign in (-1, 1))
    assert all(worst - 1e-12 <= value <= best + 1e-12 for value in found)
    assert ties or found[0] == found[1] == pytest.approx(best) == pytest.approx(worst)


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
    ranks, depth = ranks_of(ranked), data.draw(st.integers(1, num_gallery + 2))
    mean, at_depth = average_precision_of_ranks(ranks).mean(), average_precision_of_ranks(ranks, depth).mean()
    assert chance_average_precision(num_gallery, num_relevant) == pytest.approx(mean)
    assert chance_average_precision(num_gallery, num_relevant, depth) == pytest.approx(at_depth)
    counts = np.bincount(first_ranks(ranks), minlength=num_gallery + 1)[1:]
    np.testing.assert_allclose(chance_first_rank(num_gallery, num_relevant), counts / len(ranked), atol=1e-12)


@pytest.mark.parametrize(("num_gallery", "num_relevant"), [(100, 1), (150, 12), (40, 39)])
def test_chance_equals_simulation(num_gallery: int, num_relevant: int) -> None:
    generator = np.random.default_rng(num_gallery)
    ranked = np.tile(np.arange(num_gallery) < num_relevant, (4000, 1))
    ranked = generator.permuted(ranked, axis=1)
    values = average_precision_of_ranks(ranks_of(ranked))
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - chance_average_precision(num_gallery, num_relevant)) < 4 * error
    reciprocal = 1 / first_ranks(ranks_of(ranked))
    expected = (chance_first_rank(num_gallery, num_relevant) / np.arange(1, num_gallery + 1)).sum()
    assert abs(reciprocal.mean() - expected) < 4 * reciprocal.std() / math.sqrt(len(values)) + 1e-12


@seeded
@given(st.integers(1, 300), st.data())
def test_chance_first_rank_is_a_distribution(num_gallery: int, data: st.DataObject) -> None:
    chances = chance_first_rank(num_gallery, data.draw(st.integers(1, num_gallery)))
    assert (chances >= 0).all()
    assert chances.sum() == pytest.approx(1)


def test_mean_chances_weigh_each_query_alike() -> None:
    sizes = np.array([3, 1, 3, 8])
    expected = np.mean([chance_average_precision(20, int(size), 5) for size in sizes])
    assert RandomOrder(20, sizes).average_precision(5) == pytest.approx(expected)
    first = np.mean([chance_first_rank(20, int(size)) for size in sizes], axis=0)
    np.testing.assert_allclose(RandomOrder(20, sizes).first_rank, first)


def test_bootstrap_interval_has_the_analytic_width() -> None:
    hits = (np.arange(400) < 120).astype(float)
    low, high = bootstrap_interval(hits, np.ones(400), resamples=4000)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - half, abs=0.005)
    assert high == pytest.approx(0.3 + half, abs=0.005)
    assert bootstrap_interval(hits, np.ones(400), seed=1) == bootstrap_interval(hits, np.ones(400), seed=1)


def test_bootstrap_draws_the_queries_of_a_photo_together() -> None:
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


def compared(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two systems that find the same queries hard, and the photos of the queries: 1 to 6 for each of 80."""
    generator = np.random.default_rng(seed)
    units = np.repeat(np.arange(80) * 7, generator.integers(1, 7, 80))  # units need not be 0, 1, …
    generator.shuffle(units)
    hardness = generator.normal(size=600)[units]
    first, second = hardness + 0.2 + 0.3 * generator.normal(size=(2, len(units)))
    return first, second - 0.1, units


def test_paired_bootstrap_equals_drawing_the_queries_of_photos() -> None:
    first, second, units = compared(seed=0)
    mean, low, high = paired_bootstrap(first - second, units, resamples=4000)
    generator = np.random.default_rng(1)
    photos, draws = np.unique(units), []
    for _ in range(4000):
        drawn = np.concatenate([np.flatnonzero(units == photo) for photo in generator.choice(photos, len(photos))])
        draws.append(first[drawn].mean() - second[drawn].mean())
    assert mean == pytest.approx(first.mean() - second.mean())
    assert (low, high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=0.1 * np.ptp(draws) / 4)


def test_paired_bootstrap_is_narrower_than_separate_intervals() -> None:
    first, second, units = compared(seed=0)
    widths = [np.ptp(paired_bootstrap(values, units)[1:]) for values in (first, second, first - second)]
    assert widths[2] < 0.5 * min(widths[:2])


def test_paired_bootstrap_covers_the_truth() -> None:
    covered = 0
    for seed in range(100):
        first, second, units = compared(seed)
        _, low, high = paired_bootstrap(first - second, units, seed=seed, resamples=300)
        covered += low <= 0.1 <= high
    assert covered >= 88  # 95 expected, 2.2 the standard deviation


def test_paired_bootstrap_of_equal_systems_is_zero() -> None:
    assert paired_bootstrap(np.zeros(9), np.arange(9) // 2) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"\(9,\) differences, \(8,\) units"):
        paired_bootstrap(np.zeros(9), np.arange(8))


def test_interval_over_seeds_is_students() -> None:
    from scipy import stats  # which scikit-learn brings

    generator = np.random.default_rng(0)
    for count in range(2, 32):
        values = generator.normal(size=count).tolist()
        mean, low, high = seed_interval(values)
        expected = stats.t.interval(0.95, count - 1, np.mean(values), stats.sem(values))
        assert mean == pytest.approx(np.mean(values))
        assert (low - mean, high - mean) == pytest.approx(np.array(expected) - mean, rel=1e-3)
    assert seed_interval([0.25]) == (0.25, 0.25, 0.25)
