"""Conversion to each storage type, in one thread on the CPU, against another version of store/dtypes.py.

    git show 2626d97:saffe_cache/store/dtypes.py > former.py        (numpy's, before torch did it)
    python tests/benchmarks/conversion.py former.py

Both also look for what is not finite, as an extraction does. The stored bytes must be equal.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import take_turns

sys.path.insert(0, str(Path(__file__).parents[2]))  # the project

from saffe_cache.store import dtypes

SHAPES = {"ViT-B/16": (10, 197, 768), "DINOv2-S/14": (16, 257, 384)}
"""Photos, tokens and width of a batch of 2,048 tokens or twice that."""
ROUNDS = 100


def main() -> None:
    spec = importlib.util.spec_from_file_location("former", sys.argv[1])
    assert spec
    assert spec.loader
    former: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(former)
    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        values = np.random.default_rng(0).standard_normal(shape, np.float32)
        for dtype in dtypes.STORAGE_DTYPES:
            compare(f"{name}, {dtype}", former, values, dtype)


def compare(name: str, former: Any, values: np.ndarray, dtype: str) -> None:
    def now() -> int:
        stored = dtypes.convert(torch.from_numpy(values), dtype)
        stored.to_numpy(dtype)
        return len(values)

    def before() -> int:
        np.isfinite(values).reshape(len(values), -1).all(axis=1)
        former.to_storage(values, dtype)
        return len(values)

    assert former.to_storage(values, dtype).tobytes() == dtypes.to_storage(values, dtype).tobytes(), name
    rounds = take_turns({"now": now, "before": before}, ROUNDS)
    ratio, rate = rounds.ratio("now", "before", name), rounds.rate("now", name, "photos/s")
    assert ratio.interval
    low, high = ratio.interval
    print(f"{name}: {ratio.value:.2f} [{low:.2f}, {high:.2f}] of the former rate, {rate.value:,.0f} photos/s a layer")


if __name__ == "__main__":
    main()
