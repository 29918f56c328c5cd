"""What the released SAFFE code's attention contributes: the numbers of REFERENCE.md.

    python pipelines/reference.py --cache runs/cifar10/cifar10.zarr --run runs/cifar10/reference-seed0

Takes a finished run of `--fusion reference` on classes and asks, on the test split: how far does the fused vector move
when nothing changes, when the text changes, and when the photo changes; and how good is its candidate accuracy when
each photo is fused with the wrong class's text, still compared with the right one. Seconds on two CPU cores.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.feature_loader import FeatureLoader
from saffe_cache.inputs.pairs import Pairs, select_pairs
from saffe_cache.protocols.searches import ClassProtocol
from saffe_cache.protocols.setting import Setting
from saffe_cache.store.reader import open_cache
from saffe_cache.training.runs import open_run

BATCH = 32
"""Photos that share one drawing of the random matrices: few, so that many drawings enter the means."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--split", default="test")
    options = parser.parse_args()
    cache = open_cache(options.cache)
    spec, model, _ = open_run(options.run, cache)
    inputs = FeatureLoader(cache, spec)
    pairs = select_pairs(cache.table, inputs.gallery, inputs.text, options.split, "classes")
    torch.manual_seed(0)
    for name, value in measure(inputs, model, pairs).items():
        print(f"{name}: {value:.3f}")


@torch.inference_mode()
def measure(inputs: FeatureLoader, model: Fusion, pairs: Pairs) -> dict[str, float]:
    """Mean distances of unit vectors, and accuracies as fractions."""
    search = ClassProtocol(Setting(inputs, pairs)).queries
    queries = model.encode_queries(torch.from_numpy(search.vectors))
    num_classes = len(queries)
    distances: dict[str, list[torch.Tensor]] = {"nothing changed": [], "another text": [], "another photo": []}
    scores: dict[str, list[torch.Tensor]] = {"right text": [], "wrong text": []}

    def fuse(states: list[torch.Tensor], mask: torch.Tensor | None, classes: np.ndarray) -> torch.Tensor:
        return model(states, mask, inputs.texts(search.text_rows[classes]))  # type: ignore[no-any-return]

    for start in range(0, len(pairs), BATCH):
        states, mask = inputs.photos(pairs.rows[start : start + BATCH])
        count = len(states[0])
        own = np.array([pairs.labels[start + i][0] for i in range(count)])
        other = (own + 1) % num_classes
        first = fuse(states, mask, own)
        rolled = [state.roll(1, 0) for state in states]
        for name, second in (
            ("nothing changed", fuse(states, mask, own)),
            ("another text", fuse(states, mask, other)),
            ("another photo", fuse(rolled, mask, own)),
        ):
            distances[name].append((first - second).norm(dim=1))
        for name, shift in (("right text", 0), ("wrong text", 1)):
            columns = [
                (fuse(states, mask, np.full(count, (label + shift) % num_classes)) * queries[label]).sum(dim=1)
                for label in range(num_classes)
            ]
            scores[name].append(torch.stack(columns, dim=1).argmax(dim=1) == torch.from_numpy(own))
    found = {f"distance, {name}": float(torch.cat(values).mean()) for name, values in distances.items()}
    return found | {f"top1, {name}": float(torch.cat(hits).float().mean()) for name, hits in scores.items()}


if __name__ == "__main__":
    main()
