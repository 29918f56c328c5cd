"""The ranks against sorting in float64, their ties, their independence of blocks, and their refusals."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from drawn import unit_vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from saffe_cache.core.items import Ragged
from saffe_cache.retrieval.metrics import average_precision_of_ranks, chance_average_precision
from saffe_cache.retrieval.ranking import ROUNDING, InnerProducts, members, relevant_ranks, top_k

seeded = settings(derandomize=True, deadline=None, database=None)


def some_items(num_queries: int, num_items: int, seed: int) -> Ragged:
    """None to all items of each query, in no order."""
    generator = np.random.default_rng(seed)
    return Ragged.from_rows(
        generator.permutation(num_items)[: generator.integers(num_items)] for _ in range(num_queries)
    )


def sorted_ranks(scores: np.ndarray, relevant: Ragged) -> list[list[int]]:
    orders = np.argsort(-scores, axis=1, kind="stable")
    return [sorted(1 + list(order).index(i) for i in items) for order, items in zip(orders, relevant, strict=True)]


def rows(ragged: Ragged) -> list[list[int]]:
    return [row.tolist() for row in ragged]


@pytest.mark.parametrize("block", [1, 7, 64, 8192])
def test_ranks_equal_sorting_in_float64(block: int) -> None:
    gallery, queries = unit_vectors(90, 16, seed=1), 3 * unit_vectors(30, 16, seed=2)
    relevant = some_items(30, 90, seed=3)
    expected = sorted_ranks(queries.astype(np.float64) @ gallery.astype(np.float64).T, relevant)
    assert rows(relevant_ranks(InnerProducts(gallery, queries), relevant, block=block)) == expected
    assert rows(relevant_ranks(InnerProducts(gallery, queries), relevant, seed=5, block=block)) == expected


def test_ranks_are_those_of_the_whole_order() -> None:
    gallery, queries = unit_vectors(5, 8, seed=1)[np.arange(200) % 5], unit_vectors(12, 8, seed=2)
    relevant = some_items(12, 200, seed=3)
    order = top_k(InnerProducts(gallery, queries), 200, seed=4, block=33)
    expected = [[1 + list(o).index(i) for i in items] for o, items in zip(order, relevant, strict=True)]
    assert rows(relevant_ranks(InnerProducts(gallery, queries), relevant, seed=4)) == [
        sorted(of_query) for of_query in expected
    ]
    np.testing.assert_array_equal(top_k(InnerProducts(gallery, queries), 9, seed=4, block=7), order[:, :9])


@pytest.mark.slow
@pytest.mark.parametrize("width", [3, 64, 512])
def test_equal_vectors_tie_in_whatever_block_they_are(width: int) -> None:
    """BLAS adds in another order at the edge of a block, so that float32 products of equal vectors differ."""
    gallery = unit_vectors(4, width, seed=1)[np.random.default_rng(0).integers(4, size=1000)]
    queries = unit_vectors(130, width, seed=2)
    relevant = Ragged.from_rows(np.arange(0, 1000, 9) for _ in range(130))
    first = relevant_ranks(InnerProducts(gallery, queries), relevant, block=1000)
    for block in (1, 17, 256):
        np.testing.assert_array_equal(
            relevant_ranks(InnerProducts(gallery, queries), relevant, block=block).values, first.values
        )
    scores = InnerProducts(gallery, queries)
    whole = scores[slice(0, 130), slice(0, 1000)]
    np.testing.assert_array_equal(scores[slice(3, 4), slice(5, 6)], whole[3:4, 5:6])
    assert all(len(np.unique(of_query)) <= 4 for of_query in whole)
    directions = queries / np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
    assert np.abs(whole - directions @ gallery.astype(np.float64).T).max() < 0.1 * ROUNDING


@pytest.mark.slow
def test_memory_mapped_gallery_stays_out_of_memory(tmp_path: Path) -> None:
    gallery, queries = unit_vectors(100_000, 32, seed=1), unit_vectors(20, 32, seed=2)
    np.save(tmp_path / "gallery.npy", gallery)
    relevant = Ragged.from_rows(np.random.default_rng(i).choice(100_000, 50, replace=False) for i in range(20))
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    tracemalloc.start()
    found = relevant_ranks(InnerProducts(mapped, queries), relevant, block=1024)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < gallery.nbytes / 2  # two numbers for each item, and a block
    np.testing.assert_array_equal(found.values, relevant_ranks(InnerProducts(gallery, queries), relevant).values)


@pytest.mark.slow
def test_memory_is_bounded_where_queries_and_items_are_many() -> None:
    gallery, queries = unit_vectors(6000, 16, seed=1), unit_vectors(4000, 16, seed=2)
    relevant = Ragged(np.arange(4001), np.arange(4000))
    tracemalloc.start()
    relevant_ranks(InnerProducts(gallery, queries), relevant)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6  # all scores would be 192 MB


@pytest.mark.slow
@pytest.mark.parametrize("width", [4, 96])
def test_ties_favour_no_position(width: int) -> None:
    """All vectors equal: over seeds each item has the mean rank (n + 1) / 2, and AP is that of chance."""
    count, seeds = 41, 600
    constant = np.tile(unit_vectors(1, width, seed=0), (count, 1))
    ranks, precision = np.zeros(count), np.zeros(seeds)
    every, few = Ragged.from_rows([[i] for i in range(count)]), Ragged.from_rows([range(7)])
    for seed in range(seeds):
        ranks += relevant_ranks(InnerProducts(constant, constant), every, seed=seed, block=10).values
        precision[seed] = average_precision_of_ranks(
            relevant_ranks(InnerProducts(constant, constant[:1]), few, seed=seed)
        )[0]
    error = np.sqrt((count**2 - 1) / 12 / seeds)
    assert np.abs(ranks / seeds - (count + 1) / 2).max() < 4.5 * error
    assert abs(np.corrcoef(ranks, np.arange(count))[0, 1]) < 0.5
    assert abs(precision.mean() - chance_average_precision(count, 7)) < 4 * precision.std() / np.sqrt(seeds)


def counted_ranks(scores: InnerProducts, relevant: Ragged, exclude: np.ndarray | None, seed: int) -> list[list[int]]:
    """The rule itself, from exact scores: by the rounded score, then by the place in the drawn order."""
    num_queries, num_items = scores.shape
    exact = scores[slice(0, num_queries), slice(0, num_items)]
    places = np.argsort(np.random.default_rng(seed).permutation(num_items))
    found = []
    for query, items in enumerate(relevant):
        order = np.lexsort((places, np.rint(exact[query] / -ROUNDING)))
        ranked = order if exclude is None else order[order != exclude[query]]
        found.append(sorted(1 + ranked.tolist().index(item) for item in set(items.tolist())))
    return found


def near_ties(num_items: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries, and a gallery of copies of a few vectors that differ from each other by about a rounding or less."""
    generator = np.random.default_rng(seed)
    few = unit_vectors(3, width, seed)[generator.integers(3, size=num_items)]
    steps = 10.0 ** generator.uniform(-9, -4, size=(num_items, 1)) * (generator.random((num_items, 1)) < 0.7)
    gallery = few + steps * generator.normal(size=(num_items, width))
    return gallery / np.linalg.norm(gallery, axis=1, keepdims=True), few[:40] + 0.1 * unit_vectors(40, width, seed + 1)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("targets", [1, 3, 30])
@pytest.mark.parametrize("excludes", [False, True])
def test_near_ties_are_ranked_by_exact_scores(targets: int, excludes: bool, kind: type) -> None:
    for seed, width in enumerate((4, 48, 256)):
        gallery, queries = (vectors.astype(kind) for vectors in near_ties(400, width, seed))
        generator = np.random.default_rng(seed)
        drawn = [generator.choice(400, targets + 1, replace=False) for _ in queries]
        relevant, exclude = Ragged.from_rows(row[1:] for row in drawn), np.array([row[0] for row in drawn])
        scores, left_out = InnerProducts(gallery, queries), exclude if excludes else None
        expected = counted_ranks(scores, relevant, left_out, seed)
        for block in (64, 400):
            found = relevant_ranks(scores, relevant, exclude=left_out, seed=seed, block=block)
            assert rows(found) == expected


def test_few_near_ties_among_many_items_are_ranked_exactly() -> None:
    """So few that they are scored one by one: rounded to float32 their order is another."""
    gallery, queries = unit_vectors(3000, 96, seed=1).astype(np.float64), unit_vectors(150, 96, seed=2)
    generator = np.random.default_rng(0)
    for item in range(0, 3000, 30):
        gallery[item + 1 : item + 6] = gallery[item] + 10.0 ** generator.uniform(-8, -5, (5, 1)) * gallery[item + 6]
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    relevant = Ragged.from_rows([[30 * (i % 100) + i % 6, 30 * (i % 99)] for i in range(150)])
    scores = InnerProducts(gallery, queries)
    found = relevant_ranks(scores, relevant, seed=3)
    assert rows(found) == counted_ranks(scores, relevant, None, 3)
    rough = InnerProducts(gallery, queries).approximate(np.arange(150), slice(0, 3000)).astype(np.float64)
    assert rows(relevant_ranks(rough, relevant, seed=3)) != rows(found)


@pytest.mark.parametrize("excludes", [False, True])
def test_equal_items_and_equal_queries_are_ranked_by_the_rule(excludes: bool) -> None:
    some, generator = unit_vectors(90, 12, seed=1), np.random.default_rng(0)
    half = np.concatenate([np.repeat(some[:1], 50, axis=0), some[:40]])
    drawn = [generator.choice(90, 1 + number % 12, replace=False) for number in range(1, 91)]
    relevant, exclude = Ragged.from_rows(row[1:] for row in drawn), np.array([row[0] for row in drawn])
    for gallery, queries in ((half, some), (some, np.repeat(some[:1], 90, axis=0)), (half, half)):
        scores, left_out = InnerProducts(gallery, queries), exclude if excludes else None
        found = relevant_ranks(scores, relevant, exclude=left_out, seed=5, block=25)
        assert rows(found) == counted_ranks(scores, relevant, left_out, 5)


@seeded
@given(st.integers(0, 10**6), st.integers(1, 700), st.sampled_from([np.float16, np.float32, np.float64]))
def test_float32_products_are_within_their_bound(seed: int, width: int, kind: type) -> None:
    gallery, queries = unit_vectors(40, width, seed), unit_vectors(9, width, seed + 1)
    gallery[:20] = np.abs(gallery[:20])  # nothing cancels, where errors are largest
    queries[:5] = np.abs(queries[:5])
    scores = InnerProducts(gallery.astype(kind), 3 * queries.astype(kind))
    found = scores.approximate(np.arange(9), slice(0, 40)).astype(np.float64)
    assert np.abs(found - scores[slice(0, 9), slice(0, 40)]).max() <= scores.error


def test_scores_within_the_rounding_tie_and_others_do_not() -> None:
    near, far = np.array([[0.5, 0.5 + 0.2e-6, 0.5 - 0.2e-6]]), np.array([[0.5, 0.5 + 2e-6, 0.5 - 2e-6]])
    one = Ragged.from_rows([[0]])
    assert {relevant_ranks(near, one, seed=seed).values[0] for seed in range(40)} == {1, 2, 3}
    assert {relevant_ranks(far, one, seed=seed).values[0] for seed in range(40)} == {2}


@seeded
@given(st.data(), st.integers(1, 12), st.integers(1, 5), st.integers(0, 9), st.integers(1, 13))
def test_ranks_of_any_scores(data: st.DataObject, num_items: int, num_queries: int, seed: int, block: int) -> None:
    """With few levels, so that most scores tie: against counting, with the drawn order made visible by top_k."""
    levels = st.lists(st.integers(-3, 3), min_size=num_items, max_size=num_items)
    scores = np.array([data.draw(levels) for _ in range(num_queries)], np.float64)
    places = np.argsort(top_k(np.zeros((1, num_items)), num_items, seed=seed)[0])
    subsets = st.lists(st.integers(0, num_items - 1), max_size=2 * num_items)
    relevant = Ragged.from_rows([np.array(data.draw(subsets), np.int64) for _ in range(num_queries)])
    found = relevant_ranks(scores, relevant, seed=seed, block=block)
    for of_query, row, items in zip(found, scores, relevant, strict=True):
        expected = [
            1 + sum((-row[other], places[other]) < (-row[item], places[item]) for other in range(num_items))
            for item in set(items.tolist())
        ]
        assert of_query.tolist() == sorted(expected)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_inputs_of_any_float_type_are_left_as_they_are(kind: type) -> None:
    gallery, queries = unit_vectors(30, 8, seed=1).astype(kind), unit_vectors(9, 8, seed=2).astype(kind)
    before = gallery.copy(), queries.copy()
    relevant = some_items(9, 30, seed=3)
    expected = sorted_ranks(queries.astype(np.float64) @ gallery.astype(np.float64).T, relevant)
    assert rows(relevant_ranks(InnerProducts(gallery, queries), relevant)) == expected
    np.testing.assert_array_equal(gallery, before[0])
    np.testing.assert_array_equal(queries, before[1])
    scores = queries.astype(np.float64) @ gallery.astype(np.float64).T
    kept = scores.copy()
    assert rows(relevant_ranks(scores, relevant)) == expected
    np.testing.assert_array_equal(scores, kept)


def test_excluded_item_is_not_ranked() -> None:
    vectors, generator = unit_vectors(40, 6, seed=1), np.random.default_rng(0)
    exclude = generator.permutation(40)
    relevant = Ragged.from_rows(np.setdiff1d(generator.choice(40, 9), exclude[i]) for i in range(40))
    found = relevant_ranks(InnerProducts(vectors, vectors), relevant, exclude=exclude, block=11)
    for query in range(40):
        kept = np.delete(np.arange(40), exclude[query])
        scores = vectors[query].astype(np.float64) @ vectors[kept].astype(np.float64).T
        places = np.searchsorted(kept, relevant[query])
        assert [found[query].tolist()] == sorted_ranks(scores[None], Ragged.from_rows([places]))


def test_members_are_the_photos_of_each_class() -> None:
    found = members(Ragged.from_rows([[2, 0], [], [2, 2], [0]]), 4)
    assert rows(found) == [[0, 3], [], [0, 2], []]
    assert rows(members(Ragged.from_rows([]), 2)) == [[], []]
    with pytest.raises(ValueError, match="labels: 0 to 4, expected 0 to 3"):
        members(Ragged.from_rows([[0], [4]]), 4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    queries, gallery = unit_vectors(3, 4, seed=1), unit_vectors(5, 4, seed=0)
    queries[1, 2] = value
    with pytest.raises(ValueError, match="queries: row 1 is not finite"):
        InnerProducts(gallery, queries)
    scores = np.zeros((2, 5))
    scores[1, 3] = value
    with pytest.raises(ValueError, match="scores: one is not finite"):
        relevant_ranks(scores, Ragged.from_rows([[0], [1]]))


@pytest.mark.parametrize(("scale", "length"), [(1.5, "1.5"), (0.0, "0"), (np.nan, "nan"), (np.inf, "inf")])
def test_vectors_not_of_unit_length_are_refused(scale: float, length: str) -> None:
    vectors = unit_vectors(5, 4, seed=0)
    vectors[3] *= scale
    with pytest.raises(ValueError, match=rf"the vector of row 3 has length {length}, expected 1\. Normalise"):
        relevant_ranks(InnerProducts(vectors, vectors[:1]), Ragged.from_rows([[0]]), block=2)


def test_zero_query_ranks_at_random() -> None:
    gallery, one = unit_vectors(9, 4, seed=0), Ragged.from_rows([[4]])
    found = {relevant_ranks(InnerProducts(gallery, np.zeros((1, 4))), one, seed=seed).values[0] for seed in range(200)}
    assert found == set(range(1, 10))


def test_what_does_not_fit_is_refused() -> None:
    vectors = unit_vectors(5, 4, seed=0)
    with pytest.raises(ValueError, match=r"queries: shape \(5, 3\), the gallery has vectors of width 4"):
        InnerProducts(vectors, vectors[:, :3])
    with pytest.raises(ValueError, match="1 rows for 5 queries"):
        relevant_ranks(InnerProducts(vectors, vectors), Ragged.from_rows([[0]]))
    with pytest.raises(ValueError, match="item 5, the gallery has 5 items"):
        relevant_ranks(InnerProducts(vectors, vectors[:1]), Ragged.from_rows([[1, 5]]))
    with pytest.raises(ValueError, match="excluded item is among them"):
        relevant_ranks(InnerProducts(vectors, vectors[:1]), Ragged.from_rows([[1, 2]]), exclude=np.array([2]))
    with pytest.raises(ValueError, match=r"beyond .*scale the scores"):
        relevant_ranks(np.full((1, 5), 1e20), Ragged.from_rows([[1]]))
    for k in (0, 6):
        with pytest.raises(ValueError, match=rf"k={k} exceeds the gallery \(5 items\)\. Use 1 to 5"):
            top_k(InnerProducts(vectors, vectors), k)
