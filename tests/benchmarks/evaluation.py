"""Evaluation: exact mAP against four libraries, pair scores against full forward passes, kinds of index against flat.

Vectors are drawn: classes, clusters within them, items within those. All libraries see the same rankings and have to
come to the same mAP. Each gets, within its time, the float32 scores of one matrix product, in the form that it takes
most quickly; what is relevant it is given beforehand. Ours computes its scores itself, in float64. Where a query has
one relevant item, as a caption its photo, its rank is compared with torchmetrics, with a float32 product and a count,
and with the search for the first ten by faiss, which is all that R@10 needs. See bench.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import torch
from average_precision import JUDGES, Captions, Judge, Task, optional_module
from timing import Candidate, Figure, not_installed, take_turns

from saffe_cache.core.features import BlockSpec, BlockWeights, IndexKind
from saffe_cache.fusion.base import Blocks, Texts
from saffe_cache.fusion.fam import ReuseFusion
from saffe_cache.fusion.options import FusionShape
from saffe_cache.protocols.fused_pairs import score_all_pairs
from saffe_cache.retrieval.index import build_index, recall_of_index, save_index
from saffe_cache.retrieval.metrics import average_precision_of_ranks
from saffe_cache.retrieval.ranking import InnerProducts, relevant_ranks

ITEMS, QUERIES, WIDTH, CLASSES, CLUSTERS = 100_000, 1000, 384, 100, 1000
TOKENS, TEXT_TOKENS, TEXTS = 65, 8, 100
SHARE_PHOTOS, FULL_PHOTOS = 16, 4
"""That pair scoring and full forward passes take in a turn."""
FULL_BATCH = 25
"""Pairs of a full forward pass: of 10, 25, 50 and 100 the quickest on a CPU."""
ROUNDS = 3
CAPTIONS, PRODUCTS_AT_ONCE, JUDGED = 5000, 256, 20
"""Queries with one relevant item; of those, at a time, in the product and count, and in a turn of torchmetrics."""


def measure(work: Path) -> list[Figure]:
    task = draw_task(ITEMS, QUERIES)
    task.save(work)
    return [*average_precision(task, work), *ranks_of_one(task, work), *pair_scores(), *indices(task, work)]


def draw_task(items: int, queries: int) -> Task:
    generator = np.random.default_rng(0)

    def normal(count: int) -> np.ndarray:
        return generator.standard_normal((count, WIDTH), dtype=np.float32)

    of_cluster = np.arange(CLUSTERS) % CLASSES
    centers = 0.4 * (normal(CLASSES)[of_cluster] + normal(CLUSTERS))

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        clusters = generator.integers(CLUSTERS, size=count)
        vectors = centers[clusters] + normal(count)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), of_cluster[clusters]

    return Task(*draw(items), *draw(queries))


def average_precision(task: Task, work: Path) -> list[Figure]:
    """Queries per second and peak memory of ours; others judge so many queries a turn that it takes a second or so."""
    precisions = task.precisions()
    judges = {name: make(task) for name, (make, _, _) in JUDGES.items()}

    def turn(judge: Judge, count: int) -> Candidate:
        def judged() -> int:
            some = slice(0, count)
            found, ours = judge(task.queries[some] @ task.gallery.T, some), precisions[some].mean()
            if abs(found - ours) > 1e-5:
                raise AssertionError(f"mAP of the same {count} rankings is {found}, ours {ours}")
            return count

        return judged

    others = {name: turn(judge, JUDGES[name][1]) for name, judge in judges.items() if judge}
    rounds = take_turns({"ours": lambda: len(task.precisions()), **others}, ROUNDS)
    title = f"mAP in {ITEMS:,} items"
    note = "per query; ours takes {} a turn, with scores in float64, {} {} with scores given in float32"
    lines = [rounds.rate("ours", f"{title}: ours, {QUERIES:,} queries", "queries/s")]
    for name, (_, count, least) in JUDGES.items():
        label = f"{title}: ours / {name}"
        of_name = note.format(f"{QUERIES:,}", name, count)
        lines.append(
            rounds.ratio("ours", name, label, at_least=least, note=of_name) if name in others else not_installed(label)
        )
    return [*lines, memory(work, float(precisions.mean()))]


def memory(work: Path, expected: float, name: str = "mAP", queries: int = QUERIES) -> Figure:
    command = [sys.executable, __file__, str(work), name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    if found["value"] != expected:
        raise AssertionError(f"{name} is {found['value']} in another process, {expected} here")
    note = "beside vectors and what is relevant, in a process of its own; target: what float32 scores would take"
    scores = ITEMS * queries * 4 / 1e6
    return Figure(
        name=f"{name} of {queries:,} queries: memory", unit="MB", value=found["mb"], at_most=scores, note=note
    )


def ranks_of_one(task: Task, work: Path) -> list[Figure]:
    """Queries per second whose one relevant item is ranked: exact ranks, and what others do for the same metrics."""
    captions = draw_captions(task)
    folder = work / "captions"
    folder.mkdir()
    captions.save(folder)
    ranks, items = captions.ranks(), captions.items
    retrieval = optional_module("torchmetrics.functional.retrieval")

    def product_and_count() -> int:
        """In float32, whose ties and rounding are left as they are."""
        found = np.empty(CAPTIONS, np.int64)
        for start in range(0, CAPTIONS, PRODUCTS_AT_ONCE):
            some = slice(start, start + PRODUCTS_AT_ONCE)
            scores = captions.queries[some] @ task.gallery.T
            own = scores[np.arange(len(scores)), items[some]]
            found[some] = 1 + (scores > own[:, None]).sum(axis=1)
        if (differing := (found != ranks).mean()) > 0.05:
            raise AssertionError(f"{differing:.1%} of the ranks by float32 products are others")
        return CAPTIONS

    flat = build_index(task.gallery, tuple(map(str, range(ITEMS))), kind="flat")

    def first_ten() -> int:
        found = (np.concatenate(list(flat.rank(captions.queries, 10))) == items[:, None]).any(axis=1)
        if abs(found.mean() - (ranks <= 10).mean()) > 1e-3:
            raise AssertionError(f"R@10 is {found.mean()} by the index, {(ranks <= 10).mean()} by ranks")
        return CAPTIONS

    def judged() -> int:
        for query in range(JUDGED):
            scores = torch.from_numpy(captions.queries[query] @ task.gallery.T)
            target = torch.zeros(ITEMS, dtype=torch.bool)
            target[items[query]] = True
            found = float(retrieval.retrieval_reciprocal_rank(scores, target))
            if abs(found - 1 / ranks[query]) > 0.02:
                raise AssertionError(f"query {query} has the reciprocal rank {found}, ours {1 / ranks[query]}")
        return JUDGED

    others = {"product": product_and_count, "first ten": first_ten} | ({"torchmetrics": judged} if retrieval else {})
    rounds = take_turns({"ours": lambda: len(captions.ranks()), **others}, ROUNDS)
    title = f"one relevant of {ITEMS:,}"
    labels = {
        "torchmetrics": f"{title}: ours / torchmetrics, MRR",
        "product": f"{title}: ours / float32 product and count",
        "first ten": f"{title}: ours / first ten by faiss flat",
    }
    goals = {"torchmetrics": 1.0, "product": None, "first ten": None}
    lines = [rounds.rate("ours", f"{title}: ours, {CAPTIONS:,} queries", "queries/s")]
    for name, label in labels.items():
        is_there = name in others
        lines.append(rounds.ratio("ours", name, label, at_least=goals[name]) if is_there else not_installed(label))
    return [*lines, memory(folder, float((1 / ranks).mean()), "MRR", CAPTIONS)]


def draw_captions(task: Task) -> Captions:
    """Queries near one item each, at distances at which a third or so is found first."""
    generator = np.random.default_rng(1)
    items = generator.choice(ITEMS, CAPTIONS, replace=False)
    noise = generator.standard_normal((CAPTIONS, WIDTH), dtype=np.float32) / WIDTH**0.5
    vectors = task.gallery[items] + generator.uniform(1, 10, (CAPTIONS, 1)).astype(np.float32) * noise
    return Captions(task.gallery, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), items)


class DrawnInputs:
    """In the place of a cache: photos' tokens, and texts of several lengths."""

    device = "cpu"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._photos = torch.randn(SHARE_PHOTOS, TOKENS, WIDTH, generator=generator)
        self._texts = torch.randn(TEXTS, TEXT_TOKENS, WIDTH, generator=generator)
        self._mask = torch.arange(TEXT_TOKENS) < torch.randint(3, TEXT_TOKENS + 1, (TEXTS, 1), generator=generator)
        self.vectors = torch.randn(TEXTS, WIDTH, generator=generator)

    def photos(self, rows: np.ndarray) -> tuple[list[torch.Tensor], None]:
        return [self._photos[torch.from_numpy(rows)]], None

    def texts(self, rows: np.ndarray) -> Texts:
        chosen = torch.from_numpy(rows)
        return Texts((self._texts[chosen],), self._mask[chosen], self.vectors[chosen])


def pair_scores() -> list[Figure]:
    """Pairs per second where each photo meets all texts, and as full forward passes of a photo with a text."""
    model, inputs = draw_fam(), DrawnInputs()
    search: Any = SimpleNamespace(text_rows=np.arange(TEXTS), vectors=inputs.vectors.numpy())

    def ours(photos: int = SHARE_PHOTOS) -> np.ndarray:
        return score_all_pairs(model, inputs, np.arange(photos), search).cosine  # type: ignore[arg-type]

    @torch.inference_mode()
    def full(photos: int = FULL_PHOTOS) -> np.ndarray:
        """A batch holds one photo, again and again, beside some of the texts."""
        found, queries = np.empty((photos, TEXTS), np.float32), model.encode_queries(inputs.vectors)
        for photo, batch in product(range(photos), np.split(np.arange(TEXTS), TEXTS // FULL_BATCH)):
            vectors = model(inputs.photos(np.full(FULL_BATCH, photo))[0], None, inputs.texts(batch))
            found[photo, batch] = (vectors * queries[batch]).sum(dim=1)
        return found

    expected, found = full(), ours(FULL_PHOTOS)
    if np.abs(found - expected).max() > 1e-5 or expected.std(axis=1).min() < 1e-3:
        raise AssertionError("pair scores are not those of full forward passes, or texts make no difference")
    rounds = take_turns({"ours": lambda: ours().size, "full": lambda: full().size}, ROUNDS)
    rate = rounds.rate("ours", "reuse: photos scored with each of 100 texts", "pairs/s")
    assert rate.value is not None
    note = (
        f"one layer, {TOKENS} tokens of {WIDTH}; 10,000 photos x 100 texts take {1e6 / rate.value:,.0f} s at this rate"
    )
    return [rate, rounds.ratio("ours", "full", "reuse: pairs / full forward passes", at_least=1.1, note=note)]


def draw_fam() -> ReuseFusion:
    """`reuse` over one layer of two encoders, with open gates, as a training leaves it."""
    torch.manual_seed(0)
    shape = FusionShape(
        fusion="reuse",
        head="attention",
        num_layers=1,
        hidden_size=WIDTH,
        num_tokens=TOKENS,
        text_hidden_size=WIDTH,
        text_size=WIDTH,
        pooled_text=True,
    )
    model = ReuseFusion(shape, Blocks([draw_block(0, norm_first=True)], [draw_block(1, norm_first=False)])).eval()
    with torch.no_grad():
        for decoder in model.decoders:
            decoder.gate.fill_(0.5)
        model.head.mlp[-1].weight.normal_(std=0.05)
    return model


def draw_block(seed: int, *, norm_first: bool) -> BlockWeights:
    generator = np.random.default_rng(seed)
    tensors = {}
    sides = dict.fromkeys(("query", "key", "value", "output"), (WIDTH, WIDTH))
    for role, shape in {**sides, "mlp_in": (4 * WIDTH, WIDTH), "mlp_out": (WIDTH, 4 * WIDTH)}.items():
        tensors[f"{role}_weight"] = generator.normal(size=shape).astype(np.float32) / np.sqrt(
            shape[1], dtype=np.float32
        )
        tensors[f"{role}_bias"] = np.zeros(shape[0], np.float32)
    for norm in ("attention_norm", "mlp_norm"):
        tensors[f"{norm}_weight"], tensors[f"{norm}_bias"] = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    return BlockWeights(
        BlockSpec(num_attention_heads=6, norm_first=norm_first, activation="gelu", layer_norm_eps=1e-6), tensors
    )


LEAST_RECALL = {"ivf": 0.95, "ivf_pq": 0.5, "hnsw": 0.95}


def indices(task: Task, work: Path) -> list[Figure]:
    """What each kind of index finds of flat's results, how quickly, and its size."""
    ids = tuple(map(str, range(ITEMS)))
    built = {kind: build_index(task.gallery, ids, kind=kind) for kind in get_args(IndexKind)}
    queries = task.queries[:256]

    def search(kind: IndexKind) -> Candidate:
        return lambda: sum(map(len, built[kind].rank(queries, 10)))

    rounds = take_turns({kind: search(kind) for kind in built}, ROUNDS)
    lines = [rounds.rate("flat", "index flat: first 10", "queries/s")]
    note = f"{ITEMS:,} vectors of {WIDTH} in {CLUSTERS:,} clusters, noise within them"
    for kind, least in LEAST_RECALL.items():
        index = built[kind]
        recall, size = recall_of_index(index, built["flat"], queries, 10), save_index(index, work) / ITEMS
        found = f"{note}; {', '.join(f'{name} {value}' for name, value in index.parameters.items())}"
        lines += [
            Figure(name=f"index {kind}: of flat's first 10", unit="found", value=recall, at_least=least, note=found),
            rounds.ratio(kind, "flat", f"index {kind} / flat, queries/s", at_least=3.0),
            Figure(name=f"index {kind}: a vector", unit="bytes", value=size),
        ]
    return lines


def peak(folder: Path, metric: str) -> dict[str, float]:
    """Peak memory of a metric, less what vectors and relevant items take."""

    def megabytes(field: str) -> float:
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024

    kind = Task if metric == "mAP" else Captions
    task = kind(*(np.load(folder / f"{name}.npy") for name in kind.__annotations__))
    relevant, before = task.relevant, megabytes("VmRSS")
    ranks = relevant_ranks(InnerProducts(task.gallery, task.queries), relevant)
    value = average_precision_of_ranks(ranks).mean() if metric == "mAP" else (1 / ranks.values).mean()
    return {"mb": megabytes("VmHWM") - before, "value": float(value)}


if __name__ == "__main__":
    print(json.dumps(peak(Path(sys.argv[1]), sys.argv[2])))
