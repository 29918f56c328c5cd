"""What a fusion costs where it is used: FLOPs of fusing one photo of the gallery, counted by torch."""

from __future__ import annotations

import numpy as np
import torch

from saffe_cache.fusion.base import Fusion
from saffe_cache.fusion.flops import counted_flops
from saffe_cache.protocols.measuring import Protocol, Setting

_BATCH = 8


@torch.enable_grad()
def fusing_flops(model: Fusion, setting: Setting, protocol: Protocol) -> int:
    """FLOPs of f(photo, what lies beside it), two a multiplication and addition: mean over the gallery's first photos.

    The encoders are not in it, but blocks of theirs that the fusion runs are. A text beside a photo is its own, or with
    candidates a class's, padded to the longest of the batch; re-ranking's is that of its first stage, the photo alone.
    With gradients, without which torch's counter fails on parameters that a module is called with.
    """
    pairs, inputs = setting.pairs, setting.inputs
    beside = pairs.beside
    if protocol.name == "candidate":
        assert protocol.search is not None
        beside = np.resize(protocol.search.text_rows, len(pairs))
    states, mask = inputs.photos(pairs.rows[:_BATCH])
    texts = None if beside is None else inputs.texts(beside[:_BATCH])
    with counted_flops() as counter:
        model(states, mask, texts)
    return round(int(counter.get_total_flops()) / len(states[0]))


def flops_in_words(flops: int | None) -> str:
    """For people; a dash where an earlier release did not count them."""
    if flops is None:
        return "–"
    size, unit = next(((size, unit) for size, unit in ((1e9, "G"), (1e6, "M")) if flops >= size), (1e3, "K"))
    return f"{flops / size:.2f} {unit}"
