"""Fusions that decide whether a photo and a text belong together, by two logits for a pair: training and cost too.

After "Feature Alignment Determines Fusion Strategy" (arXiv 2606.01207), sections 3 and 4.3, whose text, parameter
counts and FLOPs do not agree with each other: `config.FUSIONS` names each reading.

`cross` is the simplest that has the paper's 757K. With one vector for each modality there is one key, the softmax over
it is 1, and attention returns the value: the weights of queries and keys within the attention get no gradient, and the
output of `cross` and `cross_equations` does not depend on the modality of the queries (the text, in eq. 2). The others
see that modality only through their residual, where it is added to the other's value: they are a concatenation with
more layers. Only `tokens` attends.

A fusion needs vectors, or hidden states of tokens, of any width, but no weights of the encoder. So an encoder without
queries, keys and values (a CNN) would work: its feature map's places are its tokens.
"""

from __future__ import annotations

import time
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from saffe_cache.fusion.base import counted_flops
from saffe_cache.retrieval.fitting import Fitted, adamw, fit_epochs, update, warmed_cosine
from saffe_cache.studies.matching.config import FUSIONS, MatchConfig, QueryModality
from saffe_cache.studies.matching.examples import Examples, Inputs
from saffe_cache.studies.matching.findings import MatchCost

Of = TypeVar("Of")
HIDDEN, HEAD_HIDDEN, HEADS, DROPOUT = 256, 128, 4, 0.1
_PAIRS, _REPEATS = 256, 6
_JUDGED_AT_ONCE = 512


def make_fusion(name: str, photo_width: int, text_width: int, query_modality: QueryModality = "text") -> nn.Module:
    """With starting weights from torch's generator.

    All take sequences, photos [n, tokens, d] and texts [n, tokens, d], and the texts' mask, bool [n, tokens]; a vector
    is a sequence of one. They return logits [n, 2]: another's text, its own.
    """
    assert name in FUSIONS, name
    if name.startswith("concat"):
        return Concat(photo_width, text_width, name)
    if name == "cross_equations":
        return CrossEquations(photo_width, text_width, query_modality)
    return Cross(photo_width, text_width, name, query_modality)


class Concat(nn.Module):
    """Eq. 1, and the head. For one vector each; the mask is all True."""

    def __init__(self, photo_width: int, text_width: int, name: str) -> None:
        super().__init__()
        self.project = nn.Linear(photo_width + text_width, HIDDEN)
        self.head = _head(HIDDEN if name == "concat_wide" else HEAD_HIDDEN, is_linear=name == "concat_linear")

    def forward(self, photos: torch.Tensor, texts: torch.Tensor, text_mask: torch.Tensor) -> Any:
        return self.head(self.project(torch.cat([photos[:, 0], texts[:, 0]], dim=1)))


class Cross(nn.Module):
    """The tokens of one modality attend to those of the other; the mean of the results goes to the head."""

    def __init__(self, photo_width: int, text_width: int, name: str, query_modality: QueryModality) -> None:
        super().__init__()
        self.query_modality, self.has_residual = query_modality, name != "cross"
        queries, keys = _by_role(photo_width, text_width, query_modality)
        self.query, self.key, self.value = (nn.Linear(width, HIDDEN) for width in (queries, keys, keys))
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)
        self.inner_norm = nn.LayerNorm(HIDDEN) if name == "cross_two_norms" else None
        self.output = nn.Linear(HIDDEN, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = _head(HEAD_HIDDEN, is_linear=name == "cross_residual_linear")

    def forward(self, photos: torch.Tensor, texts: torch.Tensor, text_mask: torch.Tensor) -> Any:
        of_queries, keys = _by_role(photos, texts, self.query_modality)
        from_text = self.query_modality == "text"
        queries = self.query(of_queries)
        ignored = None if from_text or texts.shape[1] == 1 else ~text_mask
        keys, values = self.key(keys), self.value(keys)
        found, _ = self.attention(queries, keys, values, key_padding_mask=ignored, need_weights=False)
        if self.inner_norm is not None:
            queries = found = self.inner_norm(queries + found)
        found = self.output(found)
        found = self.norm(queries + found if self.has_residual else found)
        if not from_text:
            return self.head(found.mean(dim=1))
        weights = text_mask.to(found.dtype)[..., None]
        return self.head((found * weights).sum(dim=1) / weights.sum(dim=1))


class CrossEquations(nn.Module):
    """Eq. 2 and 3: queries, keys and values without biases, one head of attention; the h of "3hd + h" is one bias.

    For one vector each; the mask is all True.
    """

    def __init__(self, photo_width: int, text_width: int, query_modality: QueryModality) -> None:
        super().__init__()
        self.query_modality = query_modality
        queries, keys = _by_role(photo_width, text_width, query_modality)
        self.query, self.key, self.value = (nn.Linear(width, HIDDEN, bias=False) for width in (queries, keys, keys))
        self.bias = nn.Parameter(torch.zeros(HIDDEN))
        self.head = _head(HEAD_HIDDEN)

    def forward(self, photos: torch.Tensor, texts: torch.Tensor, text_mask: torch.Tensor) -> Any:
        queries, keys = _by_role(photos, texts, self.query_modality)
        found = functional.scaled_dot_product_attention(self.query(queries), self.key(keys), self.value(keys))
        return self.head(found[:, 0] + self.bias)


def _by_role(photo: Of, text: Of, query_modality: QueryModality) -> tuple[Of, Of]:
    """What belongs to queries, and what to keys and values."""
    return (text, photo) if query_modality == "text" else (photo, text)


def _head(hidden: int, *, is_linear: bool = False) -> nn.Sequential:
    """The "two-layer MLP classifier", of a fused vector."""
    entry = [] if is_linear else [nn.ReLU(), nn.Dropout(DROPOUT)]
    return nn.Sequential(*entry, nn.Linear(HIDDEN, hidden), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(hidden, 2))


def fit(
    name: str, inputs: Inputs, training: Examples, validation: Examples, config: MatchConfig, seed: int, device: str
) -> tuple[nn.Module, Fitted]:
    """Train on pairs by AdamW with a cosine schedule, as the paper does. The same seed repeats the weights on a device.

    By default the rest differs from the paper (sec. 4.4): batches are of 128 pairs, not 32; seeds are 0, 1, 2, not 42,
    123, 456; there are three parts by photo, not two at random, 80/20; the epoch is the best on the second part, and
    apparently the last there; vectors are of length sqrt(d), and of unit length there where noise is added (eq. 4).
    """
    generator, labels = np.random.default_rng([seed, 4]), torch.from_numpy(training.labels).to(device)
    total, steps = config.epochs * -(-len(training) // config.batch_size), count()
    with torch.random.fork_rng(devices=[] if device == "cpu" else None):
        torch.manual_seed(seed)
        model = make_fusion(name, *inputs.widths, config.query_modality).to(device)
        optimizer = adamw(model.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True)

        def run_epoch(epoch: int) -> float:
            order, summed = generator.permutation(len(training)), torch.zeros((), device=device)
            for start in range(0, len(order), config.batch_size):
                these = order[start : start + config.batch_size]
                batch = inputs.batch(training.photos[these], training.texts[these])
                loss = functional.cross_entropy(model(*(part.to(device) for part in batch)), labels[these])
                update(optimizer, loss, warmed_cosine(next(steps), total))
                summed += loss.detach() * len(these)
            return float(summed) / len(order)

        def accuracy(epoch: int) -> float:
            matches = scores_of(model, inputs, validation, device) > 0
            return float((matches == validation.labels).mean())

        fitted = fit_epochs(model, config.epochs, run_epoch, accuracy, judges_start=False)
    return model, fitted


@torch.inference_mode()
def scores_of(model: nn.Module, inputs: Inputs, examples: Examples, device: str) -> np.ndarray:
    """Log odds of a match, float64 [examples]; above 0 a pair counts as one."""
    model.eval()
    parts = []
    for start in range(0, len(examples), _JUDGED_AT_ONCE):
        these = slice(start, start + _JUDGED_AT_ONCE)
        batch = inputs.batch(examples.photos[these], examples.texts[these])
        logits = model(*(part.to(device) for part in batch)).double().cpu().numpy()
        parts.append(logits[:, 1] - logits[:, 0])
    return np.concatenate(parts)


def measure_cost(
    name: str, widths: tuple[int, int], tokens: tuple[int, int], query_modality: QueryModality = "text"
) -> MatchCost:
    """FLOPs of a pair's forward pass, two for a multiplication and addition; a training step's time over 1,000 pairs.

    The time is CPU time of the fastest of several steps, which other programs hardly affect. `widths` and numbers of
    `tokens` (1 for vectors) are of photos and texts.
    """
    kept: dict[int, int] = {}
    seconds = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_fusion(name, *widths, query_modality).train()
        photos, texts = (torch.randn(_PAIRS, count, width) for count, width in zip(tokens, widths, strict=True))
        mask, labels = torch.ones(_PAIRS, tokens[1], dtype=torch.bool), torch.zeros(_PAIRS, dtype=torch.int64)
        with counted_flops() as counter:
            model(photos[:1], texts[:1], mask[:1])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(photos, texts, mask)
        for _ in range(_REPEATS):  # the first is slow, while threads and memory are set up
            started = time.process_time()
            functional.cross_entropy(model(photos, texts, mask), labels).backward()  # type: ignore[no-untyped-call]
            seconds.append(time.process_time() - started)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return MatchCost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops_per_pair=counter.get_total_flops(),
        seconds_per_1000_pairs=min(seconds) / _PAIRS * 1000,
        kept_bytes_per_pair=sum(kept.values()) / _PAIRS,
    )
