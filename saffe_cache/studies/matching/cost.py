"""What a fusion costs: parameters, FLOPs by torch's counter, time of a training step, memory kept for its gradient."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch.nn import functional

from saffe_cache.fusion.flops import counted_flops
from saffe_cache.studies.matching.fusions import Asks, make_fusion

_PAIRS, _REPEATS = 256, 6


def measure_cost(
    name: str, widths: tuple[int, int], tokens: tuple[int, int], asks: Asks = "text"
) -> Mapping[str, float]:
    """FLOPs of a pair's forward pass, two a multiplication and addition; a training step's time over 1,000 pairs.

    The time is the processor's, of the quickest of several steps: other programs hardly change it.

    Args:
        name: of the fusion.
        widths: of photos and texts.
        tokens: how many of each; 1 for vectors.
        asks: which modality asks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_fusion(name, *widths, asks).train()
        batch = [torch.randn(_PAIRS, count, width) for count, width in zip(tokens, widths, strict=True)]
        mask = torch.ones(_PAIRS, tokens[1], dtype=torch.bool)
        with counted_flops() as counter:
            model(batch[0][:1], batch[1][:1], mask[:1])
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(*batch, mask)
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        labels = torch.zeros(_PAIRS, dtype=torch.int64)
        seconds = []
        for _ in range(_REPEATS):  # the first of them is slow, as threads and memory are made ready
            started = time.process_time()
            functional.cross_entropy(model(*batch, mask), labels).backward()  # type: ignore[no-untyped-call]
            seconds.append(time.process_time() - started)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_pair": counter.get_total_flops(),
        "seconds_per_1000_pairs": min(seconds) / _PAIRS * 1000,
        "kept_bytes_per_pair": sum(kept.values()) / _PAIRS,
    }
