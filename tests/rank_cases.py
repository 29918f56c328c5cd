"""What several ranks do at once, for tests/test_ranks.py: losses, gradients and trainings of many options.

    torchrun --nproc-per-node 2 tests/rank_cases.py CACHES OUT

The same functions, called in one process, make what is expected.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from saffe_cache.core import ranks
from saffe_cache.core.items import Ragged
from saffe_cache.evaluation.evaluate import EvaluateConfig, evaluate
from saffe_cache.inputs import feature_loader
from saffe_cache.inputs.feature_loader import FeatureLoader
from saffe_cache.inputs.pairs import training_pairs, unpaired_inputs
from saffe_cache.retrieval.ranking import InnerProducts, relevant_ranks, top_k
from saffe_cache.store.reader import open_cache
from saffe_cache.training.batches import TrainingData
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.loop import start
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.train import train

CAPTIONS, CLASSES, COMPOSED = "notes.zarr", "classes.zarr", "composed.zarr"

LOSSES: dict[str, dict[str, Any]] = {
    "info_nce": {"fusion": "reuse"},
    "siglip": {"fusion": "linear", "objective": {"siglip": 1.0}},
    "soft_target": {"fusion": "paper", "objective": {"soft_target": 1.0}},
    "pair": {"fusion": "linear", "pooled_text": True, "cache": CLASSES, "objective": {"pair": 1.0}},
    "one_pair": {"fusion": "reuse", "objective": {"info_nce": 1.0, "pair": 1.0}, "pair_photos": 1},
    "matching": {"fusion": "concat", "objective": {"info_nce": 0.5, "matching": 1.0}, "pair_photos": 7},
    "all": {
        "fusion": "albef",
        "gallery_text": "first_caption",
        "text_dropout": 0.4,
        "objective": {"info_nce": 1.0, "siglip": 0.5, "soft_target": 0.1, "pair": 1.0, "matching": 1.0},
    },
    "matched": {"fusion": "paper", "gallery_text": "matched", "query_side": "text"},
    "frozen": {"fusion": "reuse", "freeze_decoder": True, "gallery_text": "first_caption"},
    "classes": {"fusion": "linear", "cache": CLASSES},
    "no_dropout": {"fusion": "two_tower", "dropout": 0.0},
    "mbt": {"fusion": "mbt", "layers": {"image": (1,), "text": (1,)}, "gallery_text": "first_caption"},
    "flamingo": {"fusion": "flamingo", "objective": {"info_nce": 1.0, "pair": 1.0}},
    "unpaired": {
        "fusion": "linear",
        "objective": {"siglip": 1.0, "structure": 1.0, "transport": 1.0},
        "structure_warmup": 0,
        "train_fraction": 0.6,
        "unpaired": "rest",
    },
    "mixup": {"fusion": "linear", "mixup": 1.0},
    "mixed_vectors": {"fusion": "fusemix"},
    "gpo": {"fusion": "gpo"},
    "sail": {"fusion": "sail"},
    "composed": {"fusion": "reuse", "cache": COMPOSED},
    "composed_vectors": {"fusion": "compose", "cache": COMPOSED, "layers": {"image": (2,)}},
}
"""Options of trainings whose first loss and gradient are compared; batches of 33 photos."""

TRAININGS: dict[str, dict[str, Any]] = {
    "captions": {"fusion": "reuse", "control_epochs": 1},
    "streamed": {"fusion": "concat", "residency": "streamed", "objective": {"info_nce": 1.0, "pair": 0.5}},
    "classes": {"fusion": "linear", "cache": CLASSES, "objective": {"siglip": 1.0}},
    "pairs": {"fusion": "linear", "cache": CLASSES, "pooled_text": True, "objective": {"pair": 1.0}},
}

WINDOW_BYTES = 2**14
"""So that a streamed training has several windows."""

REPORTS: dict[str, dict[str, Any]] = {
    "captions": {},
    "streamed-rerank": {"protocol": "rerank", "baselines": "none"},
    "classes": {"baselines": "none"},
    "classes-image": {"protocol": "image", "baselines": "none"},
    "pairs": {"baselines": "none"},
}
"""Evaluations of these trainings."""


def config_of(caches: Path, out: Path, options: dict[str, Any]) -> TrainConfig:
    usual: dict[str, Any] = {"cache": CAPTIONS, "epochs": 3, "batch_size": 33, "control_epochs": 0}
    given = usual | options
    return TrainConfig(out=str(out), log=("none",), device="cpu", **(given | {"cache": str(caches / given["cache"])}))


def gradient(config: TrainConfig) -> dict[str, torch.Tensor]:
    """The first loss of a training, its gradient, and how the generator stands afterwards."""
    cache = open_cache(config.cache)
    spec = resolve_run(config, cache)
    training, validation, _ = training_pairs(spec, cache)
    inputs, unpaired = FeatureLoader(cache, spec), unpaired_inputs(spec, cache)
    data = TrainingData(inputs, training, validation, config.recipe.batch_size, spec.seed, unpaired)
    state = start(config, spec, data)
    torch.manual_seed(1)
    loss = state.loss(next(data.batches(0, 1)))
    loss.backward()
    named = [*state.model.named_parameters(), *state.objective.named_parameters()]
    found = {name: one.grad for name, one in named if one.grad is not None}
    return {**found, "loss": loss.detach(), "drawn": torch.rand(3)}


def divided() -> dict[str, np.ndarray]:
    """Ranks, first results and computed rows, of more blocks than there are ranks."""
    vectors = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    gallery, queries = vectors[:100] / np.linalg.norm(vectors[:100], axis=1, keepdims=True), vectors[100:]
    scores, relevant = InnerProducts(gallery, queries), Ragged.from_rows(np.arange(200)[:, None] % 100)
    blocks = [slice(start, start + 20) for start in range(0, 300, 20)]
    return {
        "ranks": relevant_ranks(scores, relevant, block=9).values,
        "first": top_k(scores, 5, block=9),
        "all": top_k(scores, 100, block=9),
        "rows": ranks.concatenated(blocks, lambda block: vectors[block] * 2),
        "one": ranks.concatenated(blocks[:1], lambda block: vectors[block]),
    }


def report(caches: Path, run: Path, out: Path, options: dict[str, Any]) -> None:
    """Evaluate a run by a protocol."""
    cache = str(caches / TRAININGS[run.name].get("cache", CAPTIONS))
    evaluate(EvaluateConfig(cache=cache, run=str(run), out=str(out), split="dev", device="cpu", **options))


def main(caches: Path, out: Path) -> None:
    feature_loader._WINDOW_BYTES = WINDOW_BYTES
    with ranks.together():
        for name, options in LOSSES.items():
            save_file(gradient(config_of(caches, out, options)), out / f"{name}.{int(not ranks.is_first())}")
        for name, options in TRAININGS.items():
            train(config_of(caches, out / name, options))
        for name, options in REPORTS.items():
            report(caches, out / name.split("-")[0], out / f"{name}.of", options)
        np.savez(out / f"divided.{int(not ranks.is_first())}.npz", **divided())  # type: ignore[arg-type]
        parts = [ranks.shares(count) for count in (0, 1, 7)]
        if ranks.is_first():
            (out / "shares.json").write_text(json.dumps(parts))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
