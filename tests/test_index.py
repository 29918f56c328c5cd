"""The index against brute force, its kinds, its ties, its refusals, and its two files."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from drawn import unit_vectors

from saffe_cache.core.features import IndexKind
from saffe_cache.retrieval.index import (
    RetrievalIndex,
    _empty_index,
    build_index,
    load_index,
    recall_of_index,
    require_size,
    save_index,
)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"item{i}" for i in range(count))


def clustered(count: int, width: int, seed: int) -> np.ndarray:
    """Unit vectors around 40 centers, which depend on the width alone."""
    generator = np.random.default_rng(seed)
    centers = 2 * np.random.default_rng(0).normal(size=(40, width))
    vectors = centers[generator.integers(40, size=count)] + generator.normal(size=(count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@functools.cache
def built(kind: IndexKind, seed: int = 0) -> RetrievalIndex:
    return build_index(clustered(10_000, 16, seed=1), names(10_000), seed, kind)


APPROXIMATE: tuple[IndexKind, ...] = ("ivf", "ivf_pq", "hnsw")


def ranking(vectors: np.ndarray, queries: np.ndarray, k: int | None = None, seed: int = 0) -> np.ndarray:
    return np.concatenate(list(build_index(vectors, names(len(vectors)), seed).rank(queries, k)))


@pytest.mark.parametrize("k", [None, 1, 7, 90])
@pytest.mark.parametrize("seed", [0, 1])
def test_ranking_equals_brute_force(k: int | None, seed: int) -> None:
    gallery, queries = unit_vectors(90, 16, seed=1), unit_vectors(30, 16, seed=2) * 3
    expected = np.argsort(-(queries.astype(np.float64) @ gallery.astype(np.float64).T), axis=1)[:, :k]
    np.testing.assert_array_equal(ranking(gallery, queries, k, seed), expected)


def test_blocks_of_queries_come_in_order() -> None:
    gallery, queries = unit_vectors(20, 8, seed=1), unit_vectors(11, 8, seed=2)
    index = build_index(gallery, names(20))
    blocks = list(index.rank(queries, 3, block=4))
    assert [block.shape for block in blocks] == [(4, 3), (4, 3), (3, 3)]
    np.testing.assert_array_equal(np.concatenate(blocks), ranking(gallery, queries, 3))


def test_positions_and_ids_are_in_the_given_order() -> None:
    """Rows of FAISS are in another order; nobody outside has to know."""
    gallery = unit_vectors(50, 8, seed=3)
    index = build_index(gallery, names(50), seed=5)
    assert index.ids == names(50)
    assert [index.ids[position] for position in np.concatenate(list(index.rank(gallery, 1)))[:, 0]] == list(names(50))
    assert sorted(index.order) == list(range(50)) != list(index.order)


def test_search_names_the_best_items_with_their_scores() -> None:
    gallery, queries = unit_vectors(90, 16, seed=1), unit_vectors(30, 16, seed=2)
    scores, ids = build_index(gallery, names(90), seed=3).search(queries, 7, block=4)
    exact = queries.astype(np.float64) @ gallery.astype(np.float64).T
    expected = np.argsort(-exact, axis=1)[:, :7]
    assert ids.tolist() == [[f"item{item}" for item in row] for row in expected]
    np.testing.assert_allclose(scores, np.take_along_axis(exact, expected, axis=1), atol=1e-6)


def test_search_for_more_than_there_are_returns_all() -> None:
    index = build_index(unit_vectors(5, 4, seed=0), names(5))
    scores, ids = index.search(unit_vectors(2, 4, seed=1), 9)
    assert scores.shape == ids.shape == (2, 5)
    assert [sorted(row) for row in ids] == [list(names(5))] * 2
    assert index.search(np.zeros((0, 4)), 3)[1].shape == (0, 3)
    with pytest.raises(ValueError, match=r"k=0 .* Use 1 to 5"):
        index.search(unit_vectors(2, 4, seed=1), 0)


@pytest.mark.parametrize("width", [4, 96])
def test_ties_favour_no_position(width: int) -> None:
    """All vectors equal: over seeds, each input position has the mean rank (n + 1) / 2."""
    count, seeds = 41, 600
    constant = np.tile(unit_vectors(1, width, seed=0), (count, 1))
    ranks = np.zeros(count)
    for seed in range(seeds):
        ranks[ranking(constant, constant[:1], seed=seed)[0]] += np.arange(1, count + 1)
    error = np.sqrt((count**2 - 1) / 12 / seeds)
    assert np.abs(ranks / seeds - (count + 1) / 2).max() < 4.5 * error
    assert abs(np.corrcoef(ranks, np.arange(count))[0, 1]) < 0.5


def test_ties_among_two_groups_keep_the_better_group_first() -> None:
    better, worse = np.array([[1, 0]] * 5, np.float32), np.array([[0, 1]] * 9, np.float32)
    found = ranking(np.concatenate([worse, better]), better[:1])[0]
    assert set(found[:5]) == set(range(9, 14))
    assert list(found[5:]) != sorted(found[5:])


@pytest.mark.parametrize("k", [0, -1, 6])
def test_k_outside_the_gallery_is_refused_at_once(k: int) -> None:
    index = build_index(unit_vectors(5, 4, seed=0), names(5))
    with pytest.raises(ValueError, match=rf"k={k} exceeds the gallery \(5 items\)\. Use 1 to 5"):
        index.rank(unit_vectors(2, 4, seed=1), k)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_queries_that_are_not_finite_are_refused(value: float) -> None:
    """FAISS would answer them with row -1, which is the last item."""
    queries = unit_vectors(3, 4, seed=1)
    queries[1, 2] = value
    with pytest.raises(ValueError, match="queries: row 1 is not finite"):
        build_index(unit_vectors(5, 4, seed=0), names(5)).rank(queries)


def test_queries_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"queries: shape \(2, 3\), the index has vectors of width 4"):
        build_index(unit_vectors(5, 4, seed=0), names(5)).rank(unit_vectors(2, 3, seed=1))


@pytest.mark.parametrize(("scale", "length"), [(1.5, "1.5"), (0.0, "0"), (np.nan, "nan"), (np.inf, "inf")])
def test_vectors_not_of_unit_length_are_refused(scale: float, length: str) -> None:
    vectors = unit_vectors(5, 4, seed=0)
    vectors[3] *= scale
    with pytest.raises(ValueError, match=rf"the vector of item3 has length {length}, expected 1\. Normalise"):
        build_index(vectors, names(5))


def test_wrong_number_of_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="5 vectors, 4 ids"):
        build_index(unit_vectors(5, 4, seed=0), names(4))


def test_saved_index_reads_back(tmp_path: Path) -> None:
    gallery, queries = unit_vectors(30, 8, seed=0), unit_vectors(9, 8, seed=1)
    ids = (*names(28), "train/Größe \udcff.jpg", "b\nc")  # a file name that is no UTF-8 has such a surrogate
    index = build_index(gallery, ids, seed=4)
    save_index(index, tmp_path)
    read = load_index(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.faiss", "index_ids.json"]
    assert read.ids == index.ids
    np.testing.assert_array_equal(read.order, index.order)
    np.testing.assert_array_equal(next(read.rank(queries)), next(index.rank(queries)))


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        save_index(build_index(unit_vectors(30, 8, seed), names(30)), tmp_path / name)
    (tmp_path / "one" / "index.faiss").replace(tmp_path / "other" / "index.faiss")
    with pytest.raises(ValueError, match=r"other: index\.faiss is not the file that index_ids\.json describes"):
        load_index(tmp_path / "other")


def test_damaged_index_is_refused(tmp_path: Path) -> None:
    save_index(build_index(unit_vectors(30, 8, 0), names(30)), tmp_path)
    path = tmp_path / "index.faiss"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="Evaluate again"):
        load_index(tmp_path)
    assert len(json.loads((tmp_path / "index_ids.json").read_text())["ids"]) == 30


@pytest.mark.parametrize(("kind", "least"), [("flat", 1), ("ivf", 0.95), ("ivf_pq", 0.4), ("hnsw", 0.95)])
def test_each_kind_finds_what_brute_force_finds(kind: IndexKind, least: float) -> None:
    gallery, queries = clustered(10_000, 16, seed=1), clustered(50, 16, seed=2)
    expected = np.argsort(-(queries.astype(np.float64) @ gallery.astype(np.float64).T), axis=1)[:, :10]
    found = np.concatenate(list(built(kind).rank(queries, 10, block=7)))
    share = np.mean([len(set(of_query) & set(best)) / 10 for of_query, best in zip(found, expected, strict=True)])
    assert share >= least
    assert recall_of_index(built(kind), built("flat"), queries, 10) == pytest.approx(share)


def test_an_index_that_finds_too_few_says_so() -> None:
    """FAISS fills up with -1, which must not become the last item."""
    index = build_index(clustered(700, 8, seed=1), names(700), kind="ivf")
    found = next(index.rank(clustered(5, 8, seed=2)))
    for of_query in found:
        count = int((of_query >= 0).sum())
        assert 0 < count < 700
        assert (of_query[count:] == -1).all()
        assert len(set(of_query[:count])) == count
    scores, ids = index.search(clustered(5, 8, seed=2), 700)
    assert [[one is None for one in row] for row in ids] == (found < 0).tolist()
    assert (np.isneginf(scores) == (found < 0)).all()
    recall = recall_of_index(index, build_index(clustered(700, 8, seed=1), names(700)), clustered(5, 8, seed=2), 700)
    assert recall == pytest.approx((found >= 0).mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ivf", "ivf_pq"])
def test_clusters_follow_from_the_seed_alone(kind: IndexKind, tmp_path: Path) -> None:
    indices = {"first": built(kind), "again": built.__wrapped__(kind), "other": built(kind, seed=1)}
    for name, index in indices.items():
        (tmp_path / name).mkdir()
        save_index(index, tmp_path / name)
    first, again, other = ((tmp_path / name / "index.faiss").read_bytes() for name in indices)
    assert first == again
    assert first != other


@pytest.mark.parametrize(("kind", "least"), [("ivf", 624), ("ivf_pq", 9984)])
def test_a_gallery_too_small_for_the_kind_is_refused(
    kind: IndexKind, least: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=rf"index {kind}: {least - 1} vectors, .* from {least} or more\. Use flat"):
        build_index(unit_vectors(least - 1, 4, seed=0), names(least - 1), kind=kind)
    build_index(unit_vectors(least, 4, seed=0), names(least), kind=kind)
    assert "WARNING" not in "".join(capfd.readouterr())  # of FAISS, where clusters have too few vectors
    require_size("hnsw", 1)
    assert list(next(build_index(unit_vectors(1, 4, seed=0), names(1), kind="hnsw").rank(np.ones((1, 4))))) == [0]


@pytest.mark.parametrize(("width", "num_codes"), [(384, 96), (512, 128), (30, 6), (13, 1), (3, 1)])
def test_codes_divide_the_width(width: int, num_codes: int) -> None:
    parameters = RetrievalIndex(_empty_index("ivf_pq", 100_000, width, seed=0), (), np.zeros(0)).parameters
    assert parameters == {"nlist": 632, "nprobe": 39, "num_codes": num_codes}


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_saved_index_of_any_kind_reads_back(kind: IndexKind, tmp_path: Path) -> None:
    """What decides how much is found is in the file."""
    queries, index = clustered(9, 16, seed=2), built(kind)
    assert save_index(index, tmp_path) == (tmp_path / "index.faiss").stat().st_size
    read = load_index(tmp_path)
    assert read.parameters == index.parameters != {}
    np.testing.assert_array_equal(next(read.rank(queries, 20)), next(index.rank(queries, 20)))
