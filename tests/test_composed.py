"""Composed queries: metrics by hand and by plain loops, training, controls, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composed_cache import COLOURS, SHAPES, make_composed
from quick_runs import quick_train, report_of, value

from saffe_cache.core.items import Ragged
from saffe_cache.fusion.losses import info_nce_of, query_nce_of
from saffe_cache.inputs.composed import Composed, composed_queries, draw_composed
from saffe_cache.inputs.feature_loader import FeatureLoader, encode_gallery
from saffe_cache.inputs.pairs import Pairs, select_pairs, training_pairs
from saffe_cache.inputs.spec import PairKind
from saffe_cache.protocols.composed import ComposedProtocol
from saffe_cache.protocols.searches import CaptionProtocol
from saffe_cache.protocols.setting import Setting
from saffe_cache.retrieval.composed import ComposedSearch, composed_scores
from saffe_cache.retrieval.scores import Scores
from saffe_cache.store.reader import open_cache
from saffe_cache.training import loop
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.runs import open_run
from saffe_cache.training.train import train

SPLITS = {"train": 100, "dev": 60, "test": 60}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_composed(tmp_path_factory.mktemp("composed") / "cache.zarr", SPLITS, captions=True, members=True)


def search_of(scores: np.ndarray, **changes: Any) -> ComposedSearch:
    """Queries [queries, photos] about photo 0, each of which should find photo 1."""
    count, photos = scores.shape
    none = Ragged.from_rows([[]] * count)
    given = {
        "references": np.zeros(count, np.int64),
        "relevant": Ragged.from_rows([[1]] * count),
        "members": none,
        "groups": np.full(count, -1),
        "labels": Ragged.from_rows([[]] * photos),
    }
    return ComposedSearch(**(given | changes))


def measured(scores: np.ndarray, of: ComposedSearch, **options: Any) -> Scores:
    return composed_scores(lambda queries, photos: scores[np.ix_(queries, photos)], of, **options)


def test_hits_at_ranks_1_and_3_of_two_are_833() -> None:
    """CIRCO's example: AP@5 = (1 + 2/3) / 2."""
    scores = np.array([[0.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]])
    of = search_of(scores, relevant=Ragged.from_rows([[1, 3]]))
    found = measured(scores, of, intervals=False)
    assert found["map_at_5"].value == pytest.approx(5 / 6)
    assert found["map"].value == pytest.approx(5 / 6)
    assert found["recall_at_1"].value == 1


def test_reference_costs_a_rank_only_where_it_is_kept() -> None:
    scores = np.array([[0.9, 0.8, 0.7]])
    removed, kept = (
        measured(scores, search_of(scores, removes_reference=is_removed), intervals=False)
        for is_removed in (True, False)
    )
    assert (removed["map"].value, kept["map"].value) == (1, 0.5)
    assert (removed["recall_at_1"].chance, kept["recall_at_1"].chance) == pytest.approx((1 / 2, 1 / 3))


def test_subset_recall_is_among_the_five_others() -> None:
    """CIRR: photo 6 ranks first, but is no member; the reference is one, and is not ranked."""
    scores = np.array([[0.95, 0.3, 0.5, 0.4, 0.2, 0.1, 0.9]])
    of = search_of(scores, members=Ragged.from_rows([[0, 1, 2, 3, 4, 5]]))
    found = measured(scores, of, intervals=False)
    assert [found[f"subset_recall_at_{k}"].value for k in (1, 2, 3)] == [0, 0, 1]
    assert [found[f"subset_recall_at_{k}"].chance for k in (1, 2, 3)] == pytest.approx([0.2, 0.4, 0.6])
    assert found["recall_at_5"].value == 1
    assert found["recall_at_1"].value == 0


def test_groups_count_alike_whatever_their_size() -> None:
    """FashionIQ: a group of three queries that all fail, and a group of one that succeeds: half, and not a quarter."""
    labels = Ragged.from_rows([[0]] * 30 + [[1]] * 30)
    scores = np.tile(-np.arange(60.0), (4, 1)) / 60
    relevant = Ragged.from_rows([[29], [28], [27], [31]])
    of = search_of(scores, references=np.array([0, 0, 0, 30]), relevant=relevant, groups=np.array([0, 0, 0, 1]))
    found = measured(scores, replace(of, labels=labels), intervals=False)
    assert found["group_mean_recall_at_10"].value == pytest.approx(0.5)
    assert found["group_mean_recall_at_50"].value == pytest.approx(1)
    assert found["group_mean_recall"].value == pytest.approx(0.75)
    assert found["recall_at_10"].value == pytest.approx(0.25)
    assert found["group_mean_recall_at_10"].chance == pytest.approx(10 / 29)


def test_queries_that_are_left_out_are_named_with_the_reason(path: str, caplog: pytest.LogCaptureFixture) -> None:
    table = open_cache(path).table
    queries, photos = table.queries_in("dev"), table.in_split("dev")
    places = np.full(len(table), -1)
    places[photos] = np.arange(len(photos))
    lost, texts = table.references[queries[0]], table.captions.take(queries[-1:]).values
    places[lost] = -1
    found, others = composed_queries(
        table, "dev", places, table.labels.take(photos), lambda rows: ~np.isin(rows, texts)
    )
    assert len(found) + others == len(queries)
    assert others > 0
    assert found.ids[0] != table.ids[int(queries[0])]
    lines = caplog.text
    assert f"split dev: left out of {len(queries)} composed queries: " in lines
    assert f"without a readable reference photo (the first is {table.ids[int(queries[0])]})" in lines
    assert "without a readable text (the first is " in lines


def plain(scores: np.ndarray, of: ComposedSearch) -> dict[str, float]:
    """The same metrics by sorting, one query at a time; scores have no ties."""
    values: dict[str, list[float]] = {}
    for query, row in enumerate(scores):
        group, relevant = of.groups[query], set(of.relevant[query].tolist())
        ranked = [
            photo
            for photo in np.argsort(-row).tolist()
            if not (of.removes_reference and photo == of.references[query]) and (group < 0 or group in of.labels[photo])
        ]
        hits = [rank for rank, photo in enumerate(ranked, 1) if photo in relevant]
        for name, depth in (("map", len(ranked)), ("map_at_5", 5), ("map_at_25", 25)):
            found = [(place + 1) / rank for place, rank in enumerate(hits) if rank <= depth]
            values.setdefault(name, []).append(sum(found) / min(len(relevant), depth))
        for k in (1, 10, 50):
            values.setdefault(f"recall_at_{k}", []).append(float(hits[0] <= k))
        others = [photo for photo in ranked if photo in of.members[query] and photo != of.references[query]]
        if relevant & set(others):
            values.setdefault("subset_recall_at_2", []).append(float(bool(relevant & set(others[:2]))))
    means = {name: float(np.mean(each)) for name, each in values.items()}
    by_group = [np.mean(np.array(values["recall_at_10"])[of.groups == group]) for group in np.unique(of.groups)]
    return means | {"group_mean_recall_at_10": float(np.mean(by_group))}


def random_search(generator: np.random.Generator, *, removed: bool) -> tuple[np.ndarray, ComposedSearch]:
    photos, count = 80, 40
    labels = np.arange(photos) % 3
    references, groups = generator.integers(photos, size=count), generator.integers(3, size=count)
    relevant = [
        generator.choice([p for p in np.flatnonzero(labels == g) if p != r], generator.integers(1, 8), replace=False)
        for g, r in zip(groups, references, strict=True)
    ]
    members = [
        [] if number % 4 == 0 else np.unique([references[number], of[0], *generator.integers(photos, size=4)])
        for number, of in enumerate(relevant)
    ]
    of = ComposedSearch(
        references,
        Ragged.from_rows(relevant),
        Ragged.from_rows(members),
        groups,
        Ragged.from_rows(labels[:, None]),
        removed,
    )
    return generator.permuted(np.linspace(-1, 1, count * photos)).reshape(count, photos), of


@pytest.mark.parametrize("removed", [True, False])
def test_metrics_equal_those_of_plain_loops(removed: bool) -> None:
    scores, of = random_search(np.random.default_rng(1), removed=removed)
    found = measured(scores, of)
    for name, expected in plain(scores, of).items():
        if name != "subset_recall_at_2":  # its members may be of other groups
            assert found[name].value == pytest.approx(expected), name
        low, high = found[name].interval or (0, 0)
        assert low <= found[name].value <= high
        assert low < high or name == "group_mean_recall_at_50" or expected == 1
    whole = replace(of, groups=np.full(len(of), -1))
    expected = plain(scores, whole)["subset_recall_at_2"]
    assert measured(scores, whole)["subset_recall_at_2"].value == pytest.approx(expected)


def test_chance_is_the_mean_over_random_orders() -> None:
    generator = np.random.default_rng(2)
    scores, of = random_search(generator, removed=True)
    runs = [measured(generator.permuted(scores, axis=1), of, intervals=False) for _ in range(25)]
    for name in runs[0]:
        values = [run[name].value for run in runs]
        error = np.std(values, ddof=1) / len(values) ** 0.5
        assert abs(np.mean(values) - runs[0][name].chance) <= 4 * error + 1e-9, name


def test_photos_without_a_query_are_negatives_alone() -> None:
    """The loss is the mean over rows and columns that have a positive; here one of three photos has none."""
    scores = torch.tensor([[0.5, 0.1], [0.2, 0.4], [0.3, 0.3]])
    positives = torch.tensor([[True, False], [False, True], [False, False]])
    loss = info_nce_of(scores, positives, torch.tensor(1.0))
    rows = -scores[:2].log_softmax(1).diagonal().mean()
    columns = -scores.T.log_softmax(1)[:, :2].diagonal().mean()
    assert float(query_nce_of(scores, positives, torch.tensor(1.0))) == pytest.approx(float(columns))
    assert float(loss) == pytest.approx(float(rows + columns) / 2)


def pairs_of(path: str, split: str = "train", kind: PairKind = "composed") -> Pairs:
    cache = open_cache(path)
    encoders = {encoder.manifest.modality: encoder for encoder in cache.encoders.values()}
    return select_pairs(cache.table, encoders["image"], encoders["text"], split, kind)


def codes(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Shape and colour of each photo, from its id."""
    numbers = np.array([int(name.split("/")[1]) for name in pairs.ids])
    return numbers % SHAPES, numbers // SHAPES % COLOURS


def composed_in(pairs: Pairs) -> Composed:
    assert pairs.composed is not None
    return pairs.composed


def test_taken_pairs_keep_queries_whose_photos_stay(path: str) -> None:
    pairs = pairs_of(path)
    assert len(composed_in(pairs)) == len(pairs) == 100
    half = pairs.take(np.arange(99, 49, -1))
    shapes, colours = codes(half)
    of = composed_in(half)
    asked = [int(half_text[-1]) for half_text in (texts_of(path)[row] for row in of.first_texts)]
    assert 0 < len(of) < 100
    for query, colour in enumerate(asked):
        fitting = (shapes == shapes[of.references[query]]) & (colours == colour)
        assert set(of.targets[query]) == set(np.flatnonzero(fitting))


def texts_of(path: str) -> Any:
    return open_cache(path).table.inputs["text"].texts


def test_permuted_targets_stay_in_the_group(path: str) -> None:
    pairs = pairs_of(path)
    shapes, of = codes(pairs)[0], composed_in(pairs)
    found = replace(of, groups=shapes[of.references]).permuted(np.random.default_rng(0))
    assert np.array_equal(shapes[found.targets.values], found.groups[found.targets.owners])
    assert not np.array_equal(found.targets.values, of.targets.values)


def test_batch_has_references_targets_and_all_positives(path: str) -> None:
    of = composed_in(pairs_of(path))
    drawn = draw_composed(of, np.array([3, 50, 51]), np.random.default_rng(0))
    assert drawn.photos.tolist() == sorted(set(drawn.photos))
    for query, number in enumerate([3, 50, 51]):
        assert drawn.photos[drawn.references[query]] == of.references[number]
        assert drawn.text_rows[drawn.texts[query]] in of.texts[number]
        found = drawn.photos[drawn.positives[:, query]]
        assert len(found)
        assert set(found) == set(of.targets[number]) & set(drawn.photos)


def config_for(cache: str, out: Path, **changes: Any) -> TrainConfig:
    quick: dict[str, Any] = {"epochs": 2, "batch_size": 32, "control_epochs": 0, "log": ("none",), "device": "cpu"}
    return TrainConfig(cache=cache, out=str(out), **({"fusion": "late"} | quick | changes))


def test_parts_share_no_photo_and_all_have_queries(path: str, tmp_path: Path) -> None:
    options = {"validation": "heldout", "validation_fraction": 0.2, "train_fraction": 0.7}
    cache = open_cache(path)
    parts = training_pairs(resolve_run(config_for(path, tmp_path, **options), cache), cache)
    assert not set(parts.training.rows) & set(parts.validation.rows)
    assert (len(parts.training), len(parts.validation)) == (56, 20)
    assert len(composed_in(parts.validation)) >= 10  # whole queries are held out
    permuted = parts.training.permuted(0)
    of, own = composed_in(permuted), composed_in(parts.training)
    assert not np.array_equal(of.targets.values, own.targets.values)
    assert all(reference not in targets for reference, targets in zip(of.references, of.targets, strict=True))


def test_run_learns_to_compose_and_its_controls_pass(path: str, tmp_path: Path) -> None:
    run = quick_train(path, tmp_path / "run", fusion="reuse", epochs=5, batch_size=32, layers={"image": (1,)})
    report = report_of(path, run)
    assert report["protocol"] == "composed"
    assert report["failures"] == []
    alone = [report["systems"][name]["map"]["value"] for name in ("composed_image_ridge", "composed_text_ridge")]
    assert value(report, "map") > max(alone)
    assert {"map_at_50", "recall_at_50", "subset_recall_at_3"} <= report["systems"]["fam"].keys()
    assert report["status"] == 0
    cache = open_cache(path)
    spec, model, _ = open_run(run, cache)
    setting = Setting(FeatureLoader(cache, spec), pairs_of(path, "test"))
    kept = ComposedProtocol(setting, "kept")
    assert "is ranked too" in kept.described
    assert "is not ranked" in report["definition"]
    scores = kept.measure(model, setting.honest())
    assert scores["recall_at_1"].value <= value(report, "recall_at_1")
    captions = CaptionProtocol(replace(setting, pairs=pairs_of(path, "test", "captions")))
    assert captions.measure(model, captions.setting.honest())["mrr"].value > 0.1  # the same index answers texts


def test_own_scores_of_a_fusion_rank_the_gallery(path: str, tmp_path: Path) -> None:
    run = quick_train(path, tmp_path / "run", fusion="artemis", epochs=1, layers={"image": (2,)})
    cache = open_cache(path)
    spec, model, _ = open_run(run, cache)
    setting = Setting(FeatureLoader(cache, spec), pairs_of(path, "test"))
    protocol = ComposedProtocol(setting)
    queries, gallery = (
        torch.from_numpy(of)
        for of in (setting.queries(model, protocol.queries), setting.gallery(model, setting.honest()))
    )
    answers = protocol.search(model, setting.honest())
    np.testing.assert_allclose(answers.matrix(), model.similarities(queries, gallery).detach().numpy().T, atol=1e-6)
    report = report_of(path, run)
    assert report["index"] is None  # which holds vectors for inner products
    assert value(report, "map") == pytest.approx(protocol.score(answers)["map"].value)


def test_queries_made_of_gallery_vectors_are_those_of_tokens(path: str, tmp_path: Path) -> None:
    run = quick_train(path, tmp_path / "run", fusion="compose", epochs=1, layers={"image": (2,)}, control_epochs=0)
    cache = open_cache(path)
    spec, model, _ = open_run(run, cache)
    assert model.composes_vectors
    setting = Setting(FeatureLoader(cache, spec), pairs_of(path, "test"))
    queries = ComposedProtocol(setting).queries
    assert queries.references is not None
    rows = setting.pairs.rows[queries.references]
    expected = encode_gallery(model, setting.inputs, rows, queries.text_rows)
    np.testing.assert_allclose(setting.queries(model, queries), expected, atol=1e-5)


def test_resumed_composed_run_equals_an_uninterrupted_one(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"fusion": "concat", "layers": {"image": (2,)}, "control_epochs": 1}
    train(config_for(path, tmp_path / "whole", **given))
    config, step, left = config_for(path, tmp_path / "killed", checkpoint_seconds=0.0, **given), loop._step, [4]

    def dying_step(*arguments: Any) -> float:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return step(*arguments)

    monkeypatch.setattr(loop, "_step", dying_step)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(loop, "_step", step)
    train(config)
    for part in (".", "permuted"):
        whole, killed = (tmp_path / name / part / "model.safetensors" for name in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gallery_text": "first_caption"}, "gallery_text|gallery-text"),
        ({"objective": {"soft_target": 1.0}}, "objective"),
        ({"fusion": "ridge", "epochs": None, "batch_size": None}, "closed forms"),
        ({"fusion": "linear", "pooled_text": False}, "without --pooled-text"),
        ({"mixup": 0.5}, "mixup"),
        ({"residency": "streamed"}, "streamed with --pairs composed"),
    ],
)
def test_options_that_exclude_composed_queries_are_refused(
    path: str, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        train(config_for(path, tmp_path, **changes))


def test_texts_search_the_index_of_a_run_without_captions(path: str, tmp_path: Path) -> None:
    """Baselines of such a search have nothing to be fitted on, and are refused."""
    bare = make_composed(tmp_path / "bare.zarr", {"train": 40, "dev": 40}, groups=True)
    train(config_for(bare, tmp_path / "run", epochs=0, layers={"image": (2,)}))
    options = {"protocol": "class", "split": "dev", "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="has a text of its own"):
        report_of(bare, str(tmp_path / "run"), baselines="linear", **options)
    assert report_of(bare, str(tmp_path / "run"), **options)["protocol"] == "class"


def test_run_of_captions_is_not_measured_on_composed_queries(path: str, tmp_path: Path) -> None:
    train(config_for(path, tmp_path / "run", fusion="linear", pairs="captions", epochs=0, layers={"image": (2,)}))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["pairs"] == "captions"
    with pytest.raises(ValueError, match="has not learned to compose"):
        report_of(path, str(tmp_path / "run"), protocol="composed")
