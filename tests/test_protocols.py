"""The protocols over vectors against loops over all pairs, and what they say of models that know nothing."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import unit_rows

from saffe_cache.core.items import Ragged
from saffe_cache.retrieval.scores import Scores, caption_scores, class_scores, drawn_queries, image_scores, text_scores


def captioned(num_photos: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photos, captions near them, and whose they are: one to six for each photo, in no order."""
    generator = np.random.default_rng(seed)
    photos = unit_rows(generator.normal(size=(num_photos, 12)))
    owners = np.repeat(np.arange(num_photos), generator.integers(1, 7, num_photos))
    generator.shuffle(owners)
    return photos, unit_rows(photos[owners] + noise * generator.normal(size=(len(owners), 12))), owners


def classed(
    num_photos: int, num_classes: int, noise: float, seed: int, several: bool = False
) -> tuple[np.ndarray, np.ndarray, Ragged]:
    """Photos, classes near them, and their labels. The last class has no photo."""
    generator = np.random.default_rng(seed)
    classes = unit_rows(generator.normal(size=(num_classes, 12)))
    labels = [
        generator.choice(num_classes - 1, generator.integers(1, 4) if several else 1, replace=False).tolist()
        for _ in range(num_photos)
    ]
    centers = np.stack([classes[of_one].mean(axis=0) for of_one in labels])
    return unit_rows(centers + noise * generator.normal(size=centers.shape)), classes, Ragged.from_rows(labels)


def ranked(query: np.ndarray, gallery: np.ndarray) -> list[int]:
    scores = [float(np.dot(query.astype(np.float64), item.astype(np.float64))) for item in gallery]
    return sorted(range(len(gallery)), key=lambda item: -scores[item])


def plain_rank_metrics(ranks: list[int]) -> dict[str, float]:
    metrics = {f"recall_at_{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)}
    middle = sorted(ranks)
    half = len(ranks) // 2
    median = middle[half] if len(ranks) % 2 else (middle[half - 1] + middle[half]) / 2
    return metrics | {"mrr": sum(1 / rank for rank in ranks) / len(ranks), "median_rank": median}


def plain_average_precision(order: list[int], relevant: set[int], k: int) -> float:
    hits = [rank for rank, item in enumerate(order, start=1) if item in relevant]
    terms = [count / rank for count, rank in enumerate(hits, start=1) if rank <= k]
    return sum(terms) / min(len(relevant), k)


def assert_values(scores: Scores, expected: dict[str, float]) -> None:
    assert {name: scores[name].value for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(("num_photos", "noise"), [(30, 0.3), (70, 1.0), (3, 2.0)])
def test_caption_scores_equal_brute_force(num_photos: int, noise: float) -> None:
    photos, captions, owners = captioned(num_photos, noise, seed=num_photos)
    to_photo = [ranked(caption, photos).index(owner) + 1 for caption, owner in zip(captions, owners, strict=True)]
    to_caption = [
        next(rank for rank, found in enumerate(ranked(photo, captions), start=1) if owners[found] == number)
        for number, photo in enumerate(photos)
    ]
    expected = plain_rank_metrics(to_photo)
    expected |= {f"image_to_text_{name}": value for name, value in plain_rank_metrics(to_caption).items()}
    assert_values(caption_scores(photos, captions, owners), expected)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("num_photos", [40, 130])
def test_class_scores_equal_brute_force(several: bool, num_photos: int) -> None:
    photos, classes, labels = classed(num_photos, 7, 0.4, seed=num_photos, several=several)
    relevant = [{photo for photo in range(num_photos) if number in labels[photo]} for number in range(7)]
    assert not relevant[6]
    depth = min(100, num_photos)
    values: dict[int, list[float]] = {num_photos: [], depth: []}
    for number in range(6):
        order = ranked(classes[number], photos)
        for k, of_depth in values.items():
            of_depth.append(plain_average_precision(order, relevant[number], k))
    top1 = np.mean([ranked(photo, classes)[0] in labels[i] for i, photo in enumerate(photos)])
    expected = {"map": np.mean(values[num_photos]), "map_at_100": np.mean(values[depth]), "top1": float(top1)}
    assert_values(class_scores(photos, classes, labels), expected)


def test_map_at_k_is_divided_by_the_smaller_of_relevant_and_k() -> None:
    """150 of 200 photos are relevant and rank first: mAP@100 is 1, not 100/150."""
    photos = unit_rows(np.array([[1, i / 1000] for i in range(150)] + [[-1, i / 1000] for i in range(50)]))
    labels = Ragged.from_rows([[0]] * 150 + [[]] * 50)
    scores = class_scores(photos, np.array([[1, 0]], np.float32), labels)
    assert scores["map_at_100"].value == pytest.approx(1)
    assert scores["map"].value == pytest.approx(1)


def test_perfect_models_score_one() -> None:
    photos, _, owners = captioned(40, 0, seed=0)
    scores = caption_scores(photos, photos[owners], owners)
    assert all(score.value == 1 for score in scores.values())
    photos, classes, labels = classed(60, 5, 0, seed=0)
    assert_values(class_scores(photos, classes, labels), {"map": 1, "map_at_100": 1, "top1": 1})


def over_seeds(scores: list[Scores]) -> dict[str, tuple[float, float, float]]:
    """Mean, its standard error, and the chance that the protocol states."""
    return {
        name: (
            float(np.mean([one[name].value for one in scores])),
            float(np.std([one[name].value for one in scores]) / np.sqrt(len(scores))),
            scores[0][name].chance,
        )
        for name in scores[0]
    }


def assert_chance(scores: list[Scores]) -> None:
    for name, (value, error, chance) in over_seeds(scores).items():
        if name.endswith("median_rank"):
            assert value == pytest.approx(chance, rel=0.15), name
        else:
            assert abs(value - chance) < 4.5 * error + 1e-9, name


@pytest.mark.parametrize(
    "collapsed", ["both", *(pytest.param(name, marks=pytest.mark.slow) for name in ("photos", "texts"))]
)
def test_collapsed_vectors_score_chance(collapsed: str) -> None:
    """No metric rewards a model whose vectors are all equal, whatever the order of the data."""
    constant = unit_rows(np.ones((1, 12)))
    photos, captions, owners = captioned(40, 0.3, seed=1)
    owners = np.sort(owners)  # an order that a tie rule could profit from
    class_photos, classes, _ = classed(120, 6, 0.3, seed=1)
    unbalanced = Ragged.from_rows([[0]] * 70 + [[1]] * 30 + [[2]] * 20)  # class 0 is the one that argmax favours
    caption_runs, class_runs = [], []
    for seed in range(150):
        generator = np.random.default_rng(seed)
        one_photos = generator.permutation(photos) if collapsed == "texts" else np.tile(constant, (len(photos), 1))
        one_texts = generator.permutation(captions) if collapsed == "photos" else np.tile(constant, (len(captions), 1))
        caption_runs.append(caption_scores(one_photos, one_texts, owners, intervals=False, seed=seed))
        one_photos = generator.permutation(class_photos) if collapsed == "texts" else np.tile(constant, (120, 1))
        one_texts = generator.permutation(classes) if collapsed == "photos" else np.tile(constant, (6, 1))
        class_runs.append(class_scores(one_photos, one_texts, unbalanced, intervals=False, seed=seed))
    assert_chance(caption_runs)
    assert_chance(class_runs)


def test_chance_of_map_at_k_with_more_relevant_photos_than_k() -> None:
    constant, classes = np.tile(unit_rows(np.ones((1, 8))), (220, 1)), unit_rows(np.eye(2, 8))
    labels = Ragged.from_rows([[0]] * 150 + [[1]] * 70)
    runs = [class_scores(constant, classes, labels, intervals=False, seed=seed) for seed in range(300)]
    assert_chance([{"map_at_100": run["map_at_100"]} for run in runs])


def test_collapsed_photos_score_chance_in_a_single_run() -> None:
    constant = np.tile(unit_rows(np.ones((1, 64))), (900, 1))
    labels = Ragged.from_rows([[0]] * 800 + [[1]] * 100)
    classes = np.tile(constant[:1], (2, 1))
    top1 = class_scores(constant, classes, labels)["top1"]
    assert top1.chance == 0.5
    assert top1.interval is not None
    assert top1.interval[0] < 0.5 < top1.interval[1]


def test_shuffled_photos_score_chance() -> None:
    photos, captions, owners = captioned(60, 0.2, seed=2)
    class_photos, classes, _ = classed(150, 6, 0.2, seed=2)
    labels = Ragged.from_rows([[i % 6] for i in range(150)])
    caption_runs, class_runs = [], []
    for seed in range(120):
        generator = np.random.default_rng(seed)
        caption_runs.append(caption_scores(generator.permutation(photos), captions, owners, intervals=False))
        class_runs.append(class_scores(generator.permutation(class_photos), classes, labels, intervals=False))
    assert caption_scores(photos, captions, owners, intervals=False)["mrr"].value > 0.8
    assert_chance([{name: run[name] for name in run if not name.startswith("image_to_text")} for run in caption_runs])
    assert_chance(class_runs)
    # captions of one photo lie together, so that the first k of a wrong place hold fewer photos than k
    value, _, chance = over_seeds(caption_runs)["image_to_text_recall_at_10"]
    assert value < chance


def test_chance_of_captions_is_exact_for_a_tiny_gallery() -> None:
    """Three photos with 1, 1 and 2 captions: every order of the four captions is equally likely."""
    vectors = unit_rows(np.random.default_rng(0).normal(size=(4, 8)))
    scores = caption_scores(vectors[:3], vectors, np.array([0, 1, 2, 2]), intervals=False)
    assert scores["recall_at_1"].chance == pytest.approx(1 / 3)
    assert scores["mrr"].chance == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert scores["median_rank"].chance == 2
    assert scores["image_to_text_recall_at_1"].chance == pytest.approx((1 / 4 + 1 / 4 + 1 / 2) / 3)
    assert scores["recall_at_10"].chance == pytest.approx(1)


@pytest.mark.parametrize("noise", [0.1, 0.6, 3.0])
def test_intervals_hold_the_value(noise: float) -> None:
    photos, classes, labels = classed(200, 20, noise, seed=3, several=True)
    captions = captioned(80, noise, seed=3)
    found = 0
    for score in (class_scores(photos, classes, labels) | caption_scores(*captions)).values():
        if score.interval is not None:
            assert score.interval[0] <= score.value <= score.interval[1]
            found += 1
    assert found >= 10  # mAP, top-1, and R@1, R@5, R@10 and MRR both ways


@pytest.mark.slow
def test_interval_of_map_is_centred_and_covers_the_truth() -> None:
    """Few photos a class, where copies of a drawn photo would raise every resample."""
    runs = [class_scores(*classed(150, 16, 0.8, seed), seed=seed)["map"] for seed in range(25)]
    truth = np.mean([class_scores(*classed(150, 16, 0.8, s), intervals=False)["map"].value for s in range(100, 400)])
    middles = np.mean([sum(run.interval or ()) / 2 - run.value for run in runs])
    widths = np.mean([np.ptp(run.interval or ()) for run in runs])
    assert abs(middles) < 0.1 * widths
    # the classes are drawn anew each time, which adds to what resampling photos can know of
    assert sum(run.interval[0] <= truth <= run.interval[1] for run in runs if run.interval) >= 15


def test_seed_settles_everything() -> None:
    inputs = classed(60, 5, 0.5, seed=4)
    first, again, other = (class_scores(*inputs, seed=seed)["map"] for seed in (1, 1, 2))
    assert first == again
    assert first.value == other.value
    assert first.interval != other.interval


def test_classes_without_any_photo_are_refused() -> None:
    vectors = unit_rows(np.random.default_rng(0).normal(size=(5, 4)))
    with pytest.raises(ValueError, match="no item"):
        class_scores(vectors, vectors, Ragged.from_rows([[]] * 5))


def described(num_items: int, num_texts: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray, Ragged]:
    """A gallery, texts near the mean of the one to five items that they describe, and which those are."""
    generator = np.random.default_rng(seed)
    gallery = unit_rows(generator.normal(size=(num_items, 12)))
    relevant = [generator.choice(num_items, generator.integers(1, 6), replace=False) for _ in range(num_texts)]
    centers = np.stack([gallery[items].mean(axis=0) for items in relevant])
    return gallery, unit_rows(centers + noise * generator.normal(size=centers.shape)), Ragged.from_rows(relevant)


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_text_scores_equal_brute_force(noise: float) -> None:
    gallery, texts, relevant = described(60, 45, noise, seed=1)
    orders = [ranked(text, gallery) for text in texts]
    precisions = [plain_average_precision(o, set(r.tolist()), 60) for o, r in zip(orders, relevant, strict=True)]
    ranks = [min(o.index(item) for item in r) + 1 for o, r in zip(orders, relevant, strict=True)]
    scores = text_scores(gallery, texts, relevant, np.arange(45) // 3)
    assert_values(scores, plain_rank_metrics(ranks) | {"map": float(np.mean(precisions))})
    np.testing.assert_allclose(scores["map"].values, precisions)
    np.testing.assert_allclose(scores["mrr"].values, 1 / np.array(ranks))


def test_text_scores_of_one_relevant_item_are_those_of_captions() -> None:
    photos, captions, owners = captioned(50, 0.8, seed=2)
    scores = text_scores(photos, captions, Ragged.from_rows(owners[:, None]), owners)
    expected = caption_scores(photos, captions, owners)
    assert scores["map"].value == pytest.approx(scores["mrr"].value)
    assert scores["map"].chance == pytest.approx(scores["mrr"].chance)
    assert scores["map"].interval == pytest.approx(scores["mrr"].interval)
    assert {name: expected[name] for name in scores if name != "map"} == {n: s for n, s in scores.items() if n != "map"}


def test_text_queries_without_a_relevant_item_are_refused() -> None:
    vectors = unit_rows(np.random.default_rng(0).normal(size=(5, 4)))
    with pytest.raises(ValueError, match="no relevant item"):
        text_scores(vectors, vectors[:2], Ragged.from_rows([[1], []]), np.arange(2))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("num_photos", [40, 160])
def test_image_scores_equal_brute_force(several: bool, num_photos: int) -> None:
    photos, _, labels = classed(num_photos, 9, 0.4, seed=num_photos, several=several)
    labels = Ragged.from_rows([*list(labels)[:-2], [8], []])  # one that is alone in its class, and one without
    values: dict[str, list[float]] = {"map": [], "map_at_100": [], "recall_at_1": []}
    for photo in range(num_photos):
        others = [other for other in ranked(photos[photo], photos) if other != photo]
        relevant = {other for other in others if set(labels[other]) & set(labels[photo])}
        if not relevant:
            assert photo >= num_photos - 2
            continue
        values["map"].append(plain_average_precision(others, relevant, num_photos))
        values["map_at_100"].append(plain_average_precision(others, relevant, 100))
        values["recall_at_1"].append(float(others[0] in relevant))
    scores = image_scores(photos, labels)
    for name, expected in values.items():
        np.testing.assert_allclose(scores[name].values, expected)
        interval = scores[name].interval
        assert interval
        assert interval[0] <= scores[name].value <= interval[1]


def test_photos_that_share_no_class_are_refused() -> None:
    vectors = unit_rows(np.random.default_rng(0).normal(size=(3, 4)))
    for labels in ([[0], [1], [2]], [[], [], []]):
        with pytest.raises(ValueError, match="no two items share a class"):
            image_scores(vectors, Ragged.from_rows(labels))


@pytest.mark.parametrize("collapsed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_noise_scores_chance_in_texts_and_images(collapsed: bool) -> None:
    _, _, relevant = described(60, 40, 0, seed=3)
    _, _, labels = classed(120, 6, 0, seed=3, several=True)
    text_runs, image_runs = [], []
    for seed in range(150):
        generator = np.random.default_rng(seed)
        gallery, texts, photos = (unit_rows(generator.normal(size=(n, 12))) for n in (60, 40, 120))
        if collapsed:
            gallery, photos = np.tile(gallery[:1], (60, 1)), np.tile(photos[:1], (120, 1))
        text_runs.append(text_scores(gallery, texts, relevant, np.arange(40), intervals=False, seed=seed))
        image_runs.append(image_scores(photos, labels, intervals=False, seed=seed))
    assert_chance(text_runs)
    assert_chance(image_runs)


def test_few_queries_search_the_whole_gallery() -> None:
    photos, captions, owners = captioned(120, 1.5, seed=4)
    every = caption_scores(photos, captions, owners, seed=2)
    few = caption_scores(photos, captions, owners, seed=2, most=50)
    for name, count in (("mrr", len(captions)), ("image_to_text_mrr", len(photos))):
        chosen = drawn_queries(count, 50, 2)
        np.testing.assert_array_equal(few[name].of_queries, every[name].of_queries[chosen])
        assert few[name].value == few[name].of_queries.mean()
        assert few[name].chance == pytest.approx(every[name].chance, rel=0.2)
    assert few["mrr"].interval is not None
    assert every["mrr"].interval is not None
    assert np.ptp(few["mrr"].interval) > np.ptp(every["mrr"].interval)
    assert caption_scores(photos, captions, owners, seed=2, most=len(captions)) == every
    forwards = caption_scores(photos, captions, owners, seed=2, photos_search=False)
    assert forwards == {name: score for name, score in every.items() if not name.startswith("image_to_text")}


@pytest.mark.slow
def test_interval_of_noise_holds_chance_as_often_as_it_says() -> None:
    """The queries of the text protocol are independent here, and so 95 in 100 intervals hold chance."""
    held = {"map": 0, "recall_at_5": 0, "mrr": 0}
    for seed in range(60):
        generator = np.random.default_rng(seed)
        gallery, texts = unit_rows(generator.normal(size=(80, 24))), unit_rows(generator.normal(size=(200, 24)))
        relevant = Ragged.from_rows(generator.choice(80, 3, replace=False) for _ in range(200))
        scores = text_scores(gallery, texts, relevant, np.arange(200), seed=seed)
        for name in held:
            low, high = scores[name].interval or (1, 0)
            held[name] += low <= scores[name].chance <= high
    assert min(held.values()) >= 50  # 57 expected, 1.7 the standard deviation


def test_values_are_those_of_each_query() -> None:
    photos, classes, labels = classed(90, 7, 0.4, seed=1, several=True)
    scores = class_scores(photos, classes, labels) | caption_scores(*captioned(30, 0.5, seed=1))
    for name, score in scores.items():
        if name.endswith("median_rank"):
            assert score.values is None
        else:
            assert score.value == pytest.approx(np.mean(score.values))
    assert len(scores["map"].values) == 6  # the last class has no photo
    assert len(scores["top1"].values) == 90
    assert "values" not in repr(scores["map"])


def test_large_rankings_have_no_map_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = classed(60, 5, 0.5, seed=4)
    whole = class_scores(*inputs)
    monkeypatch.setattr("saffe_cache.retrieval.scores._MOST_ORDERED", 299)
    without = class_scores(*inputs)
    assert without["map"].interval is None
    assert without["map"].value == whole["map"].value
    assert without["top1"] == whole["top1"]
