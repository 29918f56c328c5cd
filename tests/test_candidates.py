"""Scores of pairs against brute force, and re-ranking against moving the items by hand."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from saffe_cache.core.items import Ragged
from saffe_cache.protocols.fused_pairs import reranked
from saffe_cache.retrieval.ranking import InnerProducts, relevant_ranks, top_k
from saffe_cache.retrieval.scores import Scores, candidate_scores, class_scores, rank_scores, text_scores

seeded = settings(derandomize=True, deadline=None, database=None)


def scored(num_photos: int, num_classes: int, seed: int, several: bool = False) -> tuple[np.ndarray, Ragged]:
    """Scores of photos with classes, higher for their own. The last class has no photo, the last photo no class."""
    generator = np.random.default_rng(seed)
    labels = [
        generator.choice(num_classes - 1, generator.integers(1, 4) if several else 1, replace=False).tolist()
        for _ in range(num_photos - 1)
    ]
    scores = 3 * generator.normal(size=(num_photos, num_classes))
    for photo, of_photo in enumerate(labels):
        scores[photo, of_photo] += 4
    return scores, Ragged.from_rows([*labels, []])


def plain_candidate_metrics(scores: np.ndarray, centred: np.ndarray, labels: Ragged) -> dict[str, float]:
    metrics: dict[str, list[float]] = {"map": [], "map_at_100": [], "top1": [], "top5": []}
    for number in range(scores.shape[1] - 1):
        order = sorted(range(len(scores)), key=lambda photo, c=number: -scores[photo, c])
        hits = [rank for rank, photo in enumerate(order, start=1) if number in labels[photo]]
        for name, depth in (("map", len(scores)), ("map_at_100", 100)):
            terms = [count / rank for count, rank in enumerate(hits, start=1) if rank <= depth]
            metrics[name].append(sum(terms) / min(len(hits), depth))
    for photo, row in enumerate(centred):
        best = sorted(range(len(row)), key=lambda c: -row[c])
        for k in (1, 5):
            metrics[f"top{k}"].append(float(bool(set(best[:k]) & set(labels[photo]))))
    return {name: float(np.mean(values)) for name, values in metrics.items()}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("num_photos", [50, 230])
def test_candidate_scores_equal_brute_force(several: bool, num_photos: int) -> None:
    scores, labels = scored(num_photos, 8, seed=num_photos, several=several)
    prior = np.random.default_rng(0).normal(size=8) * 4
    found, centred = candidate_scores(scores, labels), candidate_scores(scores, labels, prior=prior)
    for result, expected in (
        (found, plain_candidate_metrics(scores, scores, labels)),
        (centred, plain_candidate_metrics(scores, scores - prior, labels)),
    ):
        assert {name: score.value for name, score in result.items()} == pytest.approx(expected)
        for name in ("map", "top1", "top5"):
            interval = result[name].interval
            assert interval
            assert interval[0] <= result[name].value <= interval[1]
    assert centred["map"] == found["map"]
    assert centred["top1"].value < found["top1"].value


def test_prior_of_an_easy_class_is_removed() -> None:
    scores, labels = scored(200, 8, seed=1)
    prior = np.array([0, 0, 30, 0, 0, 0, 0, 0])
    assert candidate_scores(scores + prior, labels)["top1"].value < 0.3
    assert candidate_scores(scores + prior, labels, prior=prior)["top1"] == candidate_scores(scores, labels)["top1"]


def test_candidates_by_cosine_score_as_the_class_protocol() -> None:
    generator = np.random.default_rng(0)
    photos, classes = (unit_rows(generator.normal(size=(n, 12))) for n in (120, 5))
    labels = Ragged.from_rows([[i % 5] for i in range(120)])
    products = photos.astype(np.float64) @ classes.astype(np.float64).T
    found, expected = candidate_scores(products, labels), class_scores(photos, classes, labels)
    assert found == expected
    assert "top5" not in found  # of five classes all are among the first five


def assert_chance(runs: list[Scores], names: list[str]) -> None:
    for name in names:
        values = [run[name].value for run in runs]
        assert abs(np.mean(values) - runs[0][name].chance) < 4.5 * np.std(values) / np.sqrt(len(values)) + 1e-9, name


@pytest.mark.parametrize("copied", [False, True])
def test_noise_and_copies_score_chance(copied: bool) -> None:
    """A model that copies its text scores 1 with every class, but for noise of float32."""
    _, labels = scored(90, 8, seed=2, several=True)
    runs = []
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(size=(90, 8))
        runs.append(candidate_scores(1 + 1e-7 * noise if copied else noise, labels, intervals=False, seed=seed))
    assert_chance(runs, ["map", "map_at_100", "top1", "top5"])


def test_copies_score_chance_in_a_single_run() -> None:
    top1 = candidate_scores(np.ones((900, 2)), Ragged.from_rows([[0]] * 800 + [[1]] * 100))["top1"]
    assert top1.chance == 0.5
    assert top1.interval is not None
    assert top1.interval[0] < 0.5 < top1.interval[1]


def test_candidates_that_do_not_fit_are_refused() -> None:
    scores, labels = scored(20, 8, seed=0)
    with pytest.raises(ValueError, match="scores of 19 items, labels of 20"):
        candidate_scores(scores[1:], labels)
    with pytest.raises(ValueError, match=r"prior of shape \(7,\), expected 8"):
        candidate_scores(scores, labels, prior=np.zeros(7))
    with pytest.raises(ValueError, match="no item has a class"):
        candidate_scores(scores, Ragged.from_rows([[]] * 20))
    with pytest.raises(ValueError, match="expected 0 to 6"):
        candidate_scores(scores[:, :7], Ragged.from_rows([[7]] * 20))
    scores[3, 2] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        candidate_scores(scores, labels)


@seeded
@given(st.data(), st.integers(2, 14), st.integers(0, 5))
def test_reranking_moves_the_first_k_and_nothing_else(data: st.DataObject, num_items: int, seed: int) -> None:
    levels = st.integers(-2, 2)
    first = np.array(data.draw(st.lists(levels, min_size=num_items, max_size=num_items)), np.float64)[None]
    k = data.draw(st.integers(1, num_items))
    second = np.array(data.draw(st.lists(levels, min_size=k, max_size=k)), np.float64)
    items = data.draw(st.sets(st.integers(0, num_items - 1)))
    relevant = Ragged.from_rows([sorted(items)])
    order = top_k(first, num_items, seed=seed)[0].tolist()
    moved = [order[place] for place in sorted(range(k), key=lambda place: -second[place])] + order[k:]
    ranks = relevant_ranks(first, relevant, seed=seed)
    found = reranked(ranks, relevant, np.array([order[:k]]), second[None])
    assert found[0].tolist() == sorted(moved.index(item) + 1 for item in items)


def searched(seed: int) -> tuple[np.ndarray, np.ndarray, Ragged]:
    generator = np.random.default_rng(seed)
    gallery = unit_rows(generator.normal(size=(80, 12)))
    relevant = Ragged.from_rows(generator.choice(80, 3, replace=False) for _ in range(50))
    centers = np.stack([gallery[items].mean(axis=0) for items in relevant])
    return gallery, unit_rows(centers + 0.4 * generator.normal(size=centers.shape)), relevant


def test_reranking_equals_searching_with_both_scores() -> None:
    """The first stage lifts its first k above all others; the second orders them."""
    gallery, queries, relevant = searched(seed=0)
    units, ranks = np.arange(50) // 2, relevant_ranks(InnerProducts(gallery, queries), relevant)
    candidates = top_k(InnerProducts(gallery, queries), 12)
    truth = np.stack([np.isin(row, items) for row, items in zip(candidates, relevant, strict=True)])
    second = truth + np.random.default_rng(1).normal(size=candidates.shape)
    scores = rank_scores(reranked(ranks, relevant, candidates, second), units, 80)
    both = queries.astype(np.float64) @ gallery.astype(np.float64).T
    np.put_along_axis(both, candidates, 100 + second, axis=1)
    expected = relevant_ranks(both, relevant)
    assert scores["mrr"].value == pytest.approx(np.mean([1 / row[0] for row in expected]))
    before = text_scores(gallery, queries, relevant, units)
    assert {name: score.chance for name, score in scores.items()} == {n: s.chance for n, s in before.items()}
    assert rank_scores(reranked(ranks, relevant, candidates, np.zeros((50, 12))), units, 80) == before
    perfect = rank_scores(reranked(ranks, relevant, candidates, truth.astype(float)), units, 80)
    assert perfect["recall_at_1"].value == pytest.approx(truth.any(axis=1).mean())
    assert perfect["map"].value > before["map"].value


def test_noise_at_both_stages_scores_chance() -> None:
    _, queries, relevant = searched(seed=0)
    runs = []
    for seed in range(150):
        generator = np.random.default_rng(seed)
        gallery = unit_rows(generator.normal(size=(80, 12)))
        ranks = relevant_ranks(InnerProducts(gallery, queries), relevant, seed=seed)
        candidates = top_k(InnerProducts(gallery, queries), 20, seed=seed)
        second = generator.normal(size=candidates.shape)
        runs.append(rank_scores(reranked(ranks, relevant, candidates, second), np.arange(50), 80, intervals=False))
    assert_chance(runs, ["map", "mrr", "recall_at_1", "recall_at_5", "recall_at_10"])


def test_candidates_of_another_order_are_refused() -> None:
    gallery, queries, relevant = searched(seed=0)
    constant = np.tile(gallery[:1], (80, 1))
    ranks = relevant_ranks(InnerProducts(constant, queries), relevant, seed=0)
    candidates = top_k(InnerProducts(constant, queries), 20, seed=1)
    with pytest.raises(ValueError, match="not of one order"):
        reranked(ranks, relevant, candidates, np.zeros((50, 20)))
    with pytest.raises(ValueError, match=r"\(50, 19\) for \(50, 20\) candidates"):
        reranked(ranks, relevant, candidates, np.zeros((50, 19)))
