"""details.npz: the numbers of single queries, against result.json, counts by hand and scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from quick_runs import Report, quick_train, report_of
from sklearn.metrics import confusion_matrix, precision_recall_curve
from synthetic_cache import make_cache

from saffe_cache.evaluation import single_queries
from saffe_cache.evaluation.details import NAME, RECALLS, Details, read_details
from saffe_cache.evaluation.single_queries import interpolated_precision
from saffe_cache.inputs.feature_loader import FeatureLoader, encode_gallery, encode_queries
from saffe_cache.inputs.pairs import class_vectors
from saffe_cache.store.reader import open_cache
from saffe_cache.training.runs import open_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("captions")
    cache = make_cache(folder / "cache.zarr", {"train": 120, "dev": 20, "test": 40})
    return cache, quick_train(cache, folder / "run", fusion="linear", epochs=2)


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("classes")
    cache = make_cache(folder / "cache.zarr", {"train": 140, "test": 60}, classes=6, signal=0.3)
    return cache, quick_train(cache, folder / "run", fusion="linear", epochs=2)


def evaluated(made: tuple[str, str], out: Path, **options: object) -> tuple[Report, Details]:
    report = report_of(*made, baselines="all", out=str(out), **options)
    return report, read_details(out)


@pytest.mark.parametrize(
    ("kind", "protocol"),
    [
        ("captioned", "caption"),
        pytest.param("captioned", "rerank", marks=pytest.mark.slow),
        ("classified", "class"),
        pytest.param("classified", "candidate", marks=pytest.mark.slow),
        pytest.param("classified", "image", marks=pytest.mark.slow),
        pytest.param("classified", "rerank", marks=pytest.mark.slow),
    ],
)
def test_means_of_the_queries_are_the_reported_numbers(
    kind: str, protocol: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    report, found = evaluated(request.getfixturevalue(kind), tmp_path, protocol=protocol, rerank_k=8)
    assert set(found.systems) == set(report["systems"])
    for name, system in found.systems.items():
        assert system.metric.mean() == report["systems"][name][found.main_metric]["value"]
        # precision at the first rank, of those that are shown: all, as there are few
        is_first = system.is_relevant[:, 0].mean()
        if protocol in ("caption", "image"):
            assert is_first == pytest.approx(report["systems"][name]["recall_at_1"]["value"])
        if system.classes is not None:
            assert np.trace(system.classes.confusion) / 60 == pytest.approx(report["systems"][name]["top1"]["value"])
    assert (protocol in ("class", "candidate")) == (found.systems["fam"].classes is not None)


@pytest.mark.slow
def test_first_photos_are_those_of_largest_products(captioned: tuple[str, str], tmp_path: Path) -> None:
    _, found = evaluated(captioned, tmp_path)
    cache = open_cache(captioned[0])
    spec, model, _ = open_run(captioned[1], cache)
    table, items = cache.table, cache.table.in_split("test")
    photos = encode_gallery(model, FeatureLoader(cache, spec), table.rows["image"][items])
    rows = np.concatenate([table.captions[int(item)] for item in items])
    queries = encode_queries(model, cache.encoders[spec.text_key].vectors(rows))
    texts = table.inputs["text"].texts
    assert texts is not None
    owners = np.repeat([table.ids[item] for item in items], 2)
    for query in range(len(rows)):
        nearest = [table.ids[items[place]] for place in np.argsort(-(photos @ queries[query]))[:10]]
        shown = found.systems["fam"].first[query]
        assert [found.photo_ids[place] for place in shown] == nearest
        assert found.systems["fam"].is_relevant[query].tolist() == [one == owners[query] for one in nearest]
        assert found.texts[query] == texts[rows[query]]
        assert found.photo_ids[found.answers[query]] == owners[query]
    item = table.ids.index(found.photo_ids[0])
    assert (found.photo_hashes[0] == table.inputs["image"].content_hash[table.rows["image"][item]]).all()


def test_curves_and_confusion_are_those_of_scikit_learn(classified: tuple[str, str], tmp_path: Path) -> None:
    _, found = evaluated(classified, tmp_path)
    cache = open_cache(classified[0])
    spec, model, _ = open_run(classified[1], cache)
    items = cache.table.in_split("test")
    labels = np.array([cache.table.labels[int(item)][0] for item in items])
    photos = encode_gallery(model, FeatureLoader(cache, spec), cache.table.rows["image"][items])
    classes = encode_queries(model, class_vectors(cache.table, cache.encoders[spec.text_key]))
    scores = photos @ classes.T
    of_fam = found.systems["fam"].classes
    assert of_fam is not None
    assert (of_fam.confusion == confusion_matrix(labels, scores.argmax(axis=1))).all()
    for number in range(6):
        precision, recall, _ = precision_recall_curve(labels == number, scores[:, number])
        highest = [precision[:-1][recall[:-1] >= wanted - 1e-9].max() for wanted in RECALLS]
        assert of_fam.precision[number] == pytest.approx(highest, abs=1e-6)
    assert found.query_classes == found.class_names == tuple(cache.table.class_names)


def test_interpolated_precision_by_hand() -> None:
    curve = interpolated_precision(np.array([1, 3, 4]))
    assert curve[[0, 33, 34, 66, 67, 100]] == pytest.approx([1, 1, 3 / 4, 3 / 4, 3 / 4, 3 / 4])


@pytest.mark.slow
def test_queries_that_are_shown_are_few_and_the_same_again(
    captioned: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single_queries, "MOST_QUERIES", 7)
    _, first = evaluated(captioned, tmp_path / "a")
    _, second = evaluated(captioned, tmp_path / "b")
    assert len(first.shown) == len(first.texts) == 7
    assert first.shown.tolist() == second.shown.tolist() == sorted(first.shown.tolist())
    assert len(first.systems["fam"].metric) == 80
    assert (tmp_path / "a" / NAME).read_bytes() == (tmp_path / "b" / NAME).read_bytes()


def test_a_damaged_file_is_refused(captioned: tuple[str, str], tmp_path: Path) -> None:
    evaluated(captioned, tmp_path)
    path = tmp_path / NAME
    with np.load(path) as arrays:
        good = dict(arrays)
    for change in ({"version": np.array(9)}, {"0.first": good["0.first"] + 1000}, {"answers": good["answers"][1:]}):
        np.savez(path, **{**good, **change})
        with pytest.raises(ValueError, match=r"details\.npz: damaged or of another version .* Evaluate again"):
            read_details(tmp_path)
    np.savez(path, **{name: values for name, values in good.items() if name != "shown"})
    with pytest.raises(ValueError, match="shown"):
        read_details(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        read_details(tmp_path)
