"""Runs tasks of `mteb` or `CLIP_benchmark` on a trained run: the library's own numbers, and each query's share in them.

Both libraries report means alone. mteb's scores of single queries are taken where it computes them, before it averages;
CLIP_benchmark has none, so that they are computed from the vectors that it was given, by saffe_cache's own ranking.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from saffe_cache.core.items import Ragged
from saffe_cache.inference.benchmark_models import ClipBenchmarkModel, MtebModel, OnAnyDevice
from saffe_cache.inference.config import BenchmarkConfig
from saffe_cache.retrieval.metrics import first_ranks, recall_at_k
from saffe_cache.retrieval.ranking import InnerProducts, relevant_ranks

if TYPE_CHECKING:
    from saffe_cache.inference.model import TrainedFusion

logger = logging.getLogger(__name__)

BATCH = 256
"""Inputs of a batch; the run splits it as its extraction did."""
_RECALLS = (1, 5, 10)
_OF_TREC = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P", "hit_rate": "success"}
"""mteb's names of metrics, and those of single queries."""


class Queries(NamedTuple):
    """Scores of single queries."""

    ids: tuple[str, ...]
    units: tuple[str, ...]
    """What is resampled: a query's document if each query has only one, as captions of photos do; else the query."""
    values: Mapping[str, np.ndarray]
    """Each metric's value for each query, float64 [queries]."""


class Scored(NamedTuple):
    """What a library measured on one task."""

    main_metric: str
    values: Mapping[str, float]
    queries: tuple[Queries, ...]
    """Several where some metrics have other queries than others; none where the library's task has no queries."""


def fingerprint(config: BenchmarkConfig, folder: str) -> str:
    """What the numbers of a run depend on; ValueError if it is missing or damaged."""
    return _load(config, folder).fingerprint


def _load(config: BenchmarkConfig, folder: str) -> TrainedFusion:
    from saffe_cache.inference.model import load_run

    return load_run(folder, encoder=config.encoder, device=config.device)


def measure(config: BenchmarkConfig, folder: str) -> dict[str, Scored]:
    """Every task, split and subset on one run."""
    run, found = _load(config, folder), {}
    for name in config.tasks:
        if config.library == "mteb":
            measured = run_mteb(run, name)
        else:
            measured = run_clip_benchmark(run, name, split=config.split, root=Path(config.root))
        for task, scored in measured:
            found[task] = scored
            logger.info("%s, %s: %s %.4f.", folder, task, scored.main_metric, scored.values[scored.main_metric])
    return found


def run_mteb(run: TrainedFusion, name: str) -> Iterator[tuple[str, Scored]]:
    """Run one task of mteb: each of its splits and subsets, and what was measured there."""
    import mteb

    try:
        task = mteb.get_task(name)
    except KeyError as error:
        raise ValueError(
            f"--tasks {name}: mteb has no such task ({str(error.args[0]).removeprefix('KeyError: ')})."
        ) from None
    model = MtebModel(run)
    found = _record(task, model)
    kwargs: Any = {"encode_kwargs": {"batch_size": BATCH, "show_progress_bar": False}, "show_progress_bar": False}
    result = mteb.evaluate(model, task, cache=None, co2_tracker=False, **kwargs)
    main, several_splits = task.metadata.main_score, len(task.eval_splits) > 1
    for split, subsets in result.task_results[0].scores.items():
        for scores in subsets:
            subset = scores["hf_subset"]
            values = {key: float(one) for key, one in scores.items() if _is_number(one) and not key.startswith("nauc")}
            named = " ".join([name, *[split] * several_splits, *[subset] * (subset != "default")])
            yield named, Scored(main, values, tuple(filter(None, [found.get((split, subset))])))


def _record(task: Any, model: MtebModel) -> dict[tuple[str, str], Queries]:
    """Scores of single queries by split and subset, of retrieval and zero-shot tasks; fills while the task runs."""
    found: dict[tuple[str, str], Queries] = {}

    def of_retrieval(scores: Any, qrels: Any, results: Any, **where: str) -> Any:
        found[model.last_encoded] = _retrieved(scores, qrels)
        return average(scores, qrels, results, **where)

    def of_labels(labels: Sequence[int], scores: Any) -> Any:
        found[model.last_encoded] = _classified(scores, labels, "accuracy")
        return average(labels, scores)

    if hasattr(task, "task_specific_scores"):
        average, task.task_specific_scores = task.task_specific_scores, of_retrieval
    elif hasattr(task, "get_candidate_labels") and hasattr(task, "_calculate_scores"):
        average, task._calculate_scores = task._calculate_scores, of_labels
    return found


def _classified(scores: Any, labels: Any, metric: str) -> Queries:
    """Whether each picture's best class is its own."""
    ids = tuple(map(str, range(len(labels))))
    return Queries(ids, ids, {metric: np.asarray(np.asarray(scores).argmax(axis=1) == np.asarray(labels), np.float64)})


def _retrieved(scores: Mapping[str, Mapping[str, float]], relevant: Mapping[str, Mapping[str, int]]) -> Queries:
    """mteb's scores of single queries under its own names of metrics."""
    ids = tuple(scores)
    documents = [[one for one, score in relevant[query].items() if score > 0] for query in ids]
    have_one = all(len(listed) == 1 for listed in documents)
    names = {f"{ours}_at_": f"{theirs}_" for ours, theirs in _OF_TREC.items()}
    values = {
        name + key.removeprefix(theirs): np.array([scores[query][key] for query in ids])
        for key in scores[ids[0]]
        for name, theirs in names.items()
        if key.startswith(theirs)
    }
    return Queries(ids, tuple(listed[0] for listed in documents) if have_one else ids, values)


def run_clip_benchmark(run: TrainedFusion, name: str, *, split: str, root: Path) -> Iterator[tuple[str, Scored]]:
    """Run CLIP_benchmark's zero-shot retrieval or classification on a dataset, whichever it is meant for."""
    try:
        from clip_benchmark.datasets.builder import build_dataset, get_dataset_default_task
    except ModuleNotFoundError as error:
        raise ImportError(f"saffe benchmark needs {error.name}: pip install 'saffe-cache[benchmarks]'.") from None
    short = name.removeprefix("wds/")
    task, folder = get_dataset_default_task(short), root / short.replace("/", "-")
    if task not in ("zeroshot_retrieval", "zeroshot_classification"):
        raise ValueError(f"--tasks {name}: found {task}, expected zero-shot retrieval or classification. Leave it out.")
    yield name, measure_clip(run, build_dataset(name, root=str(folder), split=split, transform=None, task=task), task)


def measure_clip(run: TrainedFusion, dataset: Any, task: str) -> Scored:
    """The library's numbers on a dataset of (picture, captions) or (picture, class), and those of single queries.

    `dataset` has `classes` and `templates` for zeroshot_classification.
    """
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    model, batches = ClipBenchmarkModel(run), _Batches(dataset)
    if task == "zeroshot_retrieval":
        ks = [k for k in _RECALLS if not hasattr(dataset, "__len__") or k <= len(dataset)]
        values = zeroshot_retrieval.evaluate(model, batches, OnAnyDevice, "cpu", amp=False, recall_k_list=ks)
        return Scored("image_retrieval_recall@1", values, _recalls(model, batches.labels, ks))
    classifier = zeroshot_classification.zero_shot_classifier(
        model, OnAnyDevice, dataset.classes, dataset.templates, "cpu", amp=False
    )
    scores, labels = zeroshot_classification.run_classification(model, classifier, batches, "cpu", amp=False)
    if labels.ndim == 2:  # several classes to a picture
        precision = zeroshot_classification.average_precision_per_class(scores, labels)
        return Scored("mean_average_precision", {"mean_average_precision": float(precision.mean())}, ())
    return _accuracies(scores.numpy(), labels.numpy())


def _accuracies(scores: np.ndarray, labels: np.ndarray) -> Scored:
    """CLIP_benchmark's metrics of its scores [pictures, classes]; its own last step fails with NumPy 2.4."""
    queries = _classified(scores, labels, "acc1")
    hits = queries.values["acc1"]
    values = {
        "acc1": hits.mean(),
        "mean_per_class_recall": np.mean([hits[labels == one].mean() for one in set(labels)]),
    }
    if scores.shape[1] >= 5:
        values["acc5"] = (np.argsort(-scores, axis=1)[:, :5] == labels[:, None]).any(axis=1).mean()
    return Scored("acc1", {name: float(value) for name, value in values.items()}, (queries,))


class _Batches:
    """A data loader of a dataset, with all its labels when it has been read."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.labels: list[Any] = []

    def __iter__(self) -> Iterator[tuple[OnAnyDevice, Any]]:
        for items in torch.utils.data.DataLoader(self.dataset, batch_size=BATCH, collate_fn=list):
            labels = [label for _, label in items]
            self.labels += labels
            is_class = not isinstance(labels[0], (list, tuple))
            yield (
                OnAnyDevice(picture for picture, _ in items),
                torch.as_tensor(np.array(labels)) if is_class else labels,
            )


def _recalls(model: ClipBenchmarkModel, captions: Sequence[Sequence[str]], ks: Sequence[int]) -> tuple[Queries, ...]:
    """Recall of captions that search pictures, and of pictures that search captions, by saffe_cache's own ranking."""
    pictures, texts = np.concatenate(model.images), np.concatenate(model.texts)
    owners = np.repeat(np.arange(len(captions)), [len(one) for one in captions])
    own_texts = Ragged.from_rows(np.flatnonzero(owners == row) for row in range(len(pictures)))
    sides = {
        "image": (InnerProducts(pictures, texts), Ragged.from_rows(owners[:, None]), owners),
        "text": (InnerProducts(texts, pictures), own_texts, np.arange(len(pictures))),
    }
    found = []
    for side, (scores, relevant, units) in sides.items():
        first = first_ranks(relevant_ranks(scores, relevant))
        ids = tuple(map(str, range(len(units))))
        values = {f"{side}_retrieval_recall@{k}": recall_at_k(first, k) for k in ks}
        found.append(Queries(ids, tuple(map(str, units)), values))
    return tuple(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)
