"""Tasks of mteb and CLIP_benchmark in memory, on drawn scenes: their numbers are saffe_cache's own."""

from __future__ import annotations

import json
import random
import re
import sys
import types
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from quick_runs import quick_train, report_of, value

from data.scenes import COLOURS, captions, plan_scenes, render
from saffe_cache import ExtractConfig, cli, extract, load_result, load_run
from saffe_cache.core.items import Ragged
from saffe_cache.retrieval.metrics import average_precision_of_ranks, first_ranks, recall_at_k
from saffe_cache.retrieval.ranking import InnerProducts, relevant_ranks

mteb = pytest.importorskip("mteb")
clip_benchmark = pytest.importorskip("clip_benchmark")

import datasets  # noqa: E402
from mteb.abstasks import AbsTaskRetrieval, AbsTaskZeroShotClassification  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

from saffe_cache.inference import benchmark_scores, benchmarks  # noqa: E402
from saffe_cache.inference.benchmark_models import MtebModel  # noqa: E402
from saffe_cache.inference.benchmark_scores import measure_clip, run_clip_benchmark, run_mteb  # noqa: E402
from saffe_cache.inference.config import BenchmarkConfig  # noqa: E402

PALETTE = np.array(list(COLOURS.values()), np.float64)
CLASSES = list(COLOURS)
SCENES = plan_scenes("test", 40, splits=("train", "test"), seed=3)
PICTURES = [render(scene, random.Random(row), 56) for row, scene in enumerate(SCENES)]
CAPTIONS = [captions(scene, random.Random(row)) for row, scene in enumerate(SCENES)]
LABELS = [CLASSES.index(scene.objects[0].colour) for scene in SCENES]
TEXTS = [text for texts in CAPTIONS for text in texts]
OWNERS = np.repeat(np.arange(len(SCENES)), [len(texts) for texts in CAPTIONS])


class ColourRun:
    """Stands in for a trained run: pictures and texts are the colours that they show or name, with some noise."""

    media, size, takes_text, fingerprint = ("image",), len(CLASSES), True, "0123456789ab"

    def __init__(self, folder: str = "runs/colours", noise: float = 0.2, **_: Any) -> None:
        self.folder, self.model, self.noise = Path(folder), torch.nn.Linear(2, 2), noise

    def embed_images(self, images: Sequence[Any], **_: Any) -> np.ndarray:
        def colours(image: Any) -> np.ndarray:
            pixels = np.asarray(image.convert("RGB"), np.float64).reshape(-1, 1, 3)
            nearest = ((pixels - PALETTE) ** 2).sum(axis=2)
            return np.bincount(nearest.argmin(axis=1)[nearest.min(axis=1) < 300], minlength=len(PALETTE)) ** 0.5

        return self._noisy([colours(one) for one in images], [one.tobytes() for one in images])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        counts = [[len(re.findall(colour, text)) for colour in CLASSES] for text in texts]
        return self._noisy(counts, [text.encode() for text in texts])

    def embed_pairs(self, images: Sequence[Any], texts: Sequence[str]) -> np.ndarray:
        return unit(self.embed_images(images) + self.embed_texts(texts))

    def _noisy(self, values: Any, inputs: list[bytes]) -> np.ndarray:
        """Noise depends on the input alone, as a model's error does; without it scores would tie."""
        noise = [np.random.default_rng(zlib.crc32(one)).normal(size=self.size) for one in inputs]
        return unit(unit(np.asarray(values, np.float64)) + self.noise * np.array(noise))


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-9)).astype(np.float32)


RUN: Any = ColourRun()


def metadata(name: str, kind: str, category: str, main: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        description="Drawn scenes.",
        dataset={"path": "in/memory", "revision": "1"},
        type=kind,
        category=category,
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main,
        modalities=["text", "image"],
        prompt={"query": "Find it."},
    )


class _InMemory(AbsTaskRetrieval):  # type: ignore[misc]
    queries_from: dict[str, Any]
    corpus_from: dict[str, Any]
    relevant: list[list[int]]

    def load_data(self, **_: Any) -> None:
        queries, corpus = dict(self.queries_from), dict(self.corpus_from)
        queries["id"] = [f"q{row}" for row in range(len(self.relevant))]
        corpus["id"] = [f"d{row}" for row in range(len(next(iter(corpus.values()))))]
        relevant = {f"q{row}": {f"d{one}": 1 for one in own} for row, own in enumerate(self.relevant)}
        split = {"queries": table(queries), "corpus": table(corpus), "relevant_docs": relevant, "top_ranked": None}
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def table(columns: dict[str, Any]) -> datasets.Dataset:
    found = datasets.Dataset.from_dict(columns)
    return found.cast_column("image", datasets.Image()) if "image" in columns else found


class ScenesT2I(_InMemory):
    """Captions search pictures."""

    metadata = metadata("ScenesT2I", "Any2AnyRetrieval", "t2i", "ndcg_at_10")
    queries_from, corpus_from, relevant = {"text": TEXTS}, {"image": PICTURES}, [[int(one)] for one in OWNERS]


class ScenesI2T(_InMemory):
    """Pictures search captions, of which each has several."""

    metadata = metadata("ScenesI2T", "Any2AnyRetrieval", "i2t", "map_at_1000")
    queries_from, corpus_from = {"image": PICTURES}, {"text": TEXTS}
    relevant: ClassVar = [np.flatnonzero(row == OWNERS).tolist() for row in range(len(SCENES))]


class ScenesT2IT(_InMemory):
    """Captions search pictures that have a text."""

    metadata = metadata("ScenesT2IT", "Any2AnyRetrieval", "t2it", "hit_rate_at_5")
    queries_from, relevant = {"text": TEXTS}, [[int(one)] for one in OWNERS]
    corpus_from: ClassVar = {"image": PICTURES, "text": [texts[0] for texts in CAPTIONS]}


class ScenesZeroShot(AbsTaskZeroShotClassification):  # type: ignore[misc]
    """The colour of a scene's first object."""

    metadata = metadata("ScenesZeroShot", "ZeroShotClassification", "i2t", "accuracy").model_copy(
        update={"modalities": ["image", "text"]}
    )

    def load_data(self, **_: Any) -> None:
        self.dataset = {"test": table({"image": PICTURES, "label": LABELS})}
        self.data_loaded = True

    def get_candidate_labels(self) -> list[str]:
        return [f"a {name} shape" for name in CLASSES]


TASKS = {one.metadata.name: one for one in (ScenesT2I, ScenesI2T, ScenesT2IT, ScenesZeroShot)}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, task in TASKS.items():
        monkeypatch.setitem(sys.modules["mteb.get_tasks"]._TASKS_REGISTRY, name, task)


def own_metrics(gallery: np.ndarray, queries: np.ndarray, relevant: list[list[int]]) -> dict[str, float]:
    ranks = relevant_ranks(InnerProducts(gallery, queries), Ragged.from_rows(relevant))
    first = first_ranks(ranks)
    gains = [(1 / np.log2(1 + of_query[of_query <= 10])).sum() for of_query in ranks]
    ideal = [(1 / np.log2(1 + np.arange(1, 1 + min(10, len(of_query))))).sum() for of_query in ranks]
    return {
        "ndcg_at_10": float(np.mean(np.divide(gains, ideal))),
        "map_at_1000": float(average_precision_of_ranks(ranks).mean()),
        **{f"hit_rate_at_{k}": float(recall_at_k(first, k).mean()) for k in (1, 5, 10)},
    }


VECTORS = {"text": RUN.embed_texts(TEXTS), "image": RUN.embed_images(PICTURES)}
RETRIEVAL = {
    "ScenesT2I": (VECTORS["image"], VECTORS["text"]),
    "ScenesI2T": (VECTORS["text"], VECTORS["image"]),
    "ScenesT2IT": (RUN.embed_pairs(PICTURES, [texts[0] for texts in CAPTIONS]), VECTORS["text"]),
}


@pytest.mark.parametrize("name", RETRIEVAL)
def test_mteb_retrieval_scores_equal_our_own(name: str) -> None:
    [(found, scored)] = run_mteb(RUN, name)
    expected = own_metrics(*RETRIEVAL[name], TASKS[name].relevant)
    assert found == name
    assert 0.1 < expected["ndcg_at_10"] < 0.99
    assert {metric: scored.values[metric] for metric in expected} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", RETRIEVAL)
def test_mteb_queries_average_to_its_scores(name: str) -> None:
    [(_, scored)] = run_mteb(RUN, name)
    [queries] = scored.queries
    assert {"ndcg_at_10", "map_at_10", "recall_at_5", "precision_at_5", "hit_rate_at_1"} <= queries.values.keys()
    for metric, values in queries.values.items():
        assert values.mean() == pytest.approx(scored.values[metric], abs=1e-4), metric
    num_units = len(SCENES)  # captions of one picture are drawn together
    assert len(set(queries.units)) == num_units


def test_mteb_accuracy_equals_our_own() -> None:
    [(_, scored)] = run_mteb(RUN, "ScenesZeroShot")
    prompts = RUN.embed_texts([f"a {name} shape" for name in CLASSES])
    hits = (VECTORS["image"] @ prompts.T).argmax(axis=1) == LABELS
    assert 0.2 < hits.mean() < 0.99
    assert scored.values["accuracy"] == pytest.approx(hits.mean(), abs=1e-4)
    np.testing.assert_array_equal(scored.queries[0].values["accuracy"], hits)


def test_mteb_without_an_index_gives_the_same_numbers() -> None:
    """Its EncoderProtocol alone, where mteb compares all vectors itself."""
    model = MtebModel(RUN)

    class Encoder:
        mteb_model_meta, encode = model.mteb_model_meta, model.encode
        similarity, similarity_pairwise = model.similarity, model.similarity_pairwise

    [result] = mteb.evaluate(Encoder(), mteb.get_task("ScenesT2I"), cache=None, co2_tracker=False).task_results
    [(_, scored)] = run_mteb(RUN, "ScenesT2I")
    assert result.scores["test"][0]["ndcg_at_10"] == pytest.approx(scored.values["ndcg_at_10"], abs=1e-6)


def test_mteb_reranks_candidates_with_the_same_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    load_data = ScenesT2I.load_data

    def with_candidates(self: Any, **_: Any) -> None:
        load_data(self)
        listed = {f"q{row}": [f"d{(own + step) % len(SCENES)}" for step in (3, 0, 7)] for row, own in enumerate(OWNERS)}
        self.dataset["default"]["test"]["top_ranked"] = listed

    monkeypatch.setattr(ScenesT2I, "load_data", with_candidates)
    [(_, scored)] = run_mteb(RUN, "ScenesT2I")
    scores = VECTORS["text"] @ VECTORS["image"].T
    rows = np.arange(len(TEXTS))
    own, others = scores[rows, OWNERS], [scores[rows, (OWNERS + step) % len(SCENES)] for step in (3, 7)]
    expected = (own > np.maximum(*others)).mean()
    assert scored.values["hit_rate_at_1"] == pytest.approx(expected, abs=1e-4)


def test_picture_with_text_is_refused_where_no_text_enters() -> None:
    class WithoutText(ColourRun):
        def embed_pairs(self, images: Sequence[Any], texts: Sequence[str]) -> np.ndarray:
            raise ValueError("embed_pairs: no text enters the fusion linear. Use embed_images.")

    with pytest.raises(ValueError, match="no text enters"):
        list(run_mteb(WithoutText(), "ScenesT2IT"))


def test_sounds_reach_the_run_as_waveforms() -> None:
    """Stereo as the mean of its channels."""
    given: list[Any] = []

    class Sounds(ColourRun):
        media = ("audio",)

        def embed_audio(self, sounds: Sequence[Any]) -> np.ndarray:
            given.extend(sounds)
            return np.eye(len(sounds), self.size, dtype=np.float32)

    stereo = np.array([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]])
    batches = [{"audio": [{"array": stereo, "sampling_rate": 8000}, {"array": [0.1, 0.2], "sampling_rate": 16000}]}]
    model = MtebModel(Sounds())  # type: ignore[arg-type]
    assert model.encode(batches).shape == (2, len(CLASSES))
    assert model.mteb_model_meta.modalities == ["text", "audio"]
    assert [one["sampling_rate"] for one in given] == [8000, 16000]
    np.testing.assert_allclose(given[0]["array"], [0.5, 0.5, 0.5])
    np.testing.assert_allclose(given[1]["array"], [0.1, 0.2])


def test_unknown_mteb_task_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="--tasks ScenesT2J: mteb has no such task") as caught:
        list(run_mteb(RUN, "ScenesT2J"))
    assert "\n" not in str(caught.value)


class Scenes(torch.utils.data.Dataset[Any]):
    """A dataset of CLIP_benchmark."""

    classes, templates = CLASSES, ["a {c} shape", "a photo of a {c} thing", "{c}"]

    def __init__(self, labels: Sequence[Any]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(PICTURES)

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        return PICTURES[row], self.labels[row]


def test_clip_benchmark_recall_equals_our_own() -> None:
    scored = measure_clip(RUN, Scenes(CAPTIONS), "zeroshot_retrieval")
    for task, side in (("ScenesT2I", "image"), ("ScenesI2T", "text")):
        expected = own_metrics(*RETRIEVAL[task], TASKS[task].relevant)
        for k in (1, 5, 10):
            metric = f"{side}_retrieval_recall@{k}"
            assert scored.values[metric] == pytest.approx(expected[f"hit_rate_at_{k}"], abs=1e-4)
    for queries in scored.queries:
        for metric, values in queries.values.items():
            assert values.mean() == pytest.approx(scored.values[metric], abs=1e-4)
        assert len(set(queries.units)) == len(SCENES)


def test_clip_benchmark_accuracy_averages_the_prompts() -> None:
    scored = measure_clip(RUN, Scenes(LABELS), "zeroshot_classification")
    prompts = [RUN.embed_texts([one.format(c=name) for one in Scenes.templates]).mean(axis=0) for name in CLASSES]
    order = np.argsort(-(VECTORS["image"] @ unit(np.array(prompts)).T), axis=1)
    hits = order == np.array(LABELS)[:, None]
    recalls = [hits[np.array(LABELS) == label, 0].mean() for label in sorted(set(LABELS))]
    expected = {"acc1": hits[:, 0].mean(), "acc5": hits[:, :5].sum(axis=1).mean()}
    assert scored.values == pytest.approx(expected | {"mean_per_class_recall": np.mean(recalls)}, abs=1e-4)
    np.testing.assert_array_equal(scored.queries[0].values["acc1"], hits[:, 0])


def test_clip_benchmark_several_classes_have_average_precision() -> None:
    labels = np.array([[name in {one.colour for one in scene.objects} for name in CLASSES] for scene in SCENES])
    scored = measure_clip(RUN, Scenes([row.astype(np.int64) for row in labels]), "zeroshot_classification")
    prompts = [RUN.embed_texts([one.format(c=name) for one in Scenes.templates]).mean(axis=0) for name in CLASSES]
    relevant = Ragged.from_rows(np.flatnonzero(column) for column in labels.T)
    ranks = relevant_ranks(InnerProducts(VECTORS["image"], np.array(prompts)), relevant)
    assert scored.values["mean_average_precision"] == pytest.approx(average_precision_of_ranks(ranks).mean(), abs=1e-4)
    assert not scored.queries


@pytest.fixture
def two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders clear and noisy."""
    noises = {"clear": 0.1, "noisy": 0.5}
    monkeypatch.setattr(benchmark_scores, "_load", lambda _, folder: ColourRun(folder, noises[folder]))


@pytest.mark.slow
@pytest.mark.usefixtures("two_runs")
def test_command_compares_two_runs(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    config = BenchmarkConfig(run="clear", against="noisy", tasks=("ScenesT2I", "ScenesZeroShot"), out=out)
    assert benchmarks.benchmark(config) == out
    result = load_result(out)
    assert isinstance(result, benchmarks.BenchmarkResult)
    assert list(result.tasks) == ["ScenesT2I", "ScenesZeroShot"]
    scores = result.tasks["ScenesT2I"]
    main = {name: of["ndcg_at_10"] for name, of in scores.systems.items()}
    assert scores.num_queries["ndcg_at_10"] == len(TEXTS)
    for estimate in main.values():
        assert estimate.low < estimate.value < estimate.high  # type: ignore[operator]
    difference = scores.differences["ndcg_at_10"]
    assert difference.value == pytest.approx(main["fam"].value - main["against"].value, abs=1e-4)
    assert difference.sign == 1
    frame = result.to_frame()
    assert set(frame.system) == {"fam", "against", "fam minus against"}
    text = (tmp_path / "out" / "report.txt").read_text()
    assert f"ScenesT2I: ndcg_at_10, {len(TEXTS)} queries" in text
    assert "The run minus noisy, by paired bootstrap over queries: ndcg_at_10 +" in text
    lines = [json.loads(line) for line in (tmp_path / "out" / "queries.jsonl").read_text().splitlines()]
    own = [line["ndcg_at_10"] for line in lines if (line["task"], line["system"]) == ("ScenesT2I", "fam")]
    assert np.mean(own) == pytest.approx(main["fam"].value, abs=1e-4)


@pytest.mark.usefixtures("two_runs")
def test_queries_that_do_not_explain_a_number_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where mteb would average otherwise than it says."""
    monkeypatch.setattr(ScenesZeroShot, "_calculate_scores", lambda *_: {"accuracy": 0.123})
    out = str(tmp_path / "out")
    benchmarks.benchmark(BenchmarkConfig(run="clear", tasks=("ScenesZeroShot",), out=out))
    result = load_result(out)
    assert isinstance(result, benchmarks.BenchmarkResult)
    assert result.tasks["ScenesZeroShot"].systems["fam"]["accuracy"].low is None
    assert "accuracy has no interval" in result.warnings[0]


@pytest.mark.usefixtures("two_runs")
def test_numbers_of_a_run_that_was_trained_again_are_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = BenchmarkConfig(run="clear", tasks=("ScenesZeroShot",), out=str(tmp_path / "out"))
    benchmarks.benchmark(config)
    assert benchmarks.benchmark(config) == config.out  # finished
    monkeypatch.setattr(ColourRun, "fingerprint", "of another run")
    with pytest.raises(ValueError, match=r"holds another result \(fam: '0123456789ab' there, 'of another run' now"):
        benchmarks.benchmark(config)


def test_library_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise benchmarks.PackageNotFoundError(name)

    monkeypatch.setattr(benchmarks, "version", absent)
    with pytest.raises(ImportError, match=r"needs mteb: pip install 'saffe-cache\[benchmarks\]'"):
        benchmarks.benchmark(BenchmarkConfig(run="clear", tasks=("ScenesT2I",), out=str(tmp_path / "out")))


def pseudo(text: str) -> str:
    """A caption in the words that the tiny text encoder knows."""
    return " ".join(f"word{zlib.crc32(word.encode()) % 40}" for word in text.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> tuple[str, dict[str, float]]:
    """A run on drawn scenes, and what evaluation says of its test split."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for split, count in (("train", 60), ("test", len(SCENES))):
        (folder / split).mkdir()
        lines = []
        for row, scene in enumerate(plan_scenes(split, count, splits=("train", "test"), seed=3)):
            render(scene, random.Random(row), 56).save(folder / split / f"{row:03}.png")
            texts = [pseudo(text) for text in captions(scene, random.Random(row))]
            lines.append(json.dumps({"file_name": f"{row:03}.png", "captions": texts}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    encoders = {"image": str(tiny_model("dinov2")), "text": str(tiny_model("bert"))}
    cache = extract(
        ExtractConfig(data=str(folder), cache=str(folder / "scenes.zarr"), encoder=encoders, storage="float32")
    )
    run = quick_train(cache, folder / "run", fusion="linear", epochs=3, batch_size=16)
    report = report_of(cache, run)
    return run, {f"hit_rate_at_{k}": value(report, f"recall_at_{k}") for k in (1, 5, 10)}


@pytest.mark.slow
def test_command_gives_the_numbers_of_evaluation(
    trained: tuple[str, dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real run, its encoders and its test split as a task of mteb."""
    run, expected = trained
    assert expected["hit_rate_at_10"] > 0.1
    monkeypatch.setattr(ScenesT2I, "queries_from", {"text": [pseudo(text) for text in TEXTS]})
    status = cli.main(["benchmark", run, "--tasks", "ScenesT2I", "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert status == 0
    result = load_result(tmp_path / "out")
    assert isinstance(result, benchmarks.BenchmarkResult)
    found = {metric: result.tasks["ScenesT2I"].systems["fam"][metric].value for metric in expected}
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_trained_run_has_the_metadata_that_mteb_stores(trained: tuple[str, dict[str, float]]) -> None:
    meta = MtebModel(load_run(trained[0], device="cpu")).mteb_model_meta
    assert (meta.name, meta.modalities, meta.similarity_fn_name.value) == (
        "saffe_cache/run",
        ["text", "image"],
        "cosine",
    )


def test_clip_benchmark_datasets_are_built_by_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its builder, which needs torchvision, is stood in for."""
    monkeypatch.setitem(sys.modules, "clip_benchmark.datasets.builder", None)
    with pytest.raises(ImportError, match=r"saffe benchmark needs clip_benchmark.datasets.builder: pip install"):
        list(run_clip_benchmark(RUN, "wds/scenes", split="test", root=tmp_path))
    asked = []

    def build_dataset(name: str, **options: Any) -> Scenes:
        asked.append((name, options))
        return Scenes(LABELS)

    tasks = {"scenes": "zeroshot_classification", "crepe": "image_caption_selection"}
    builder = types.SimpleNamespace(build_dataset=build_dataset, get_dataset_default_task=tasks.__getitem__)
    monkeypatch.setitem(sys.modules, "clip_benchmark.datasets.builder", builder)
    [(name, scored)] = run_clip_benchmark(RUN, "wds/scenes", split="test", root=tmp_path)
    options = {"root": str(tmp_path / "scenes"), "split": "test", "transform": None, "task": "zeroshot_classification"}
    assert asked == [("wds/scenes", options)]
    assert (name, scored.main_metric) == ("wds/scenes", "acc1")
    with pytest.raises(ValueError, match="--tasks crepe: found image_caption_selection, expected zero-shot"):
        list(run_clip_benchmark(RUN, "crepe", split="test", root=tmp_path))
