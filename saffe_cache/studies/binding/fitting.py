"""Many small FAMs at once, one for each episode, with weights, photos and names of its own; and their baselines.

The weights of a batch of episodes are stacked, and `torch.func.vmap` runs the FAM over the stack: the arithmetic is
that of one FAM after the other (tests/test_binding_fitting.py). On a CPU that helps a small head: a step of `mean`
takes 1.7 ms of an episode instead of 2.9. A step of `attention` is bound by what it reads and writes of 3 million
weights and gains nothing, while a batch waits for the last of its episodes to converge: there a batch is one.

Without dropout: a fit follows from its start alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from saffe_cache.fusion.fam import FusionAlignModule
from saffe_cache.fusion.layers import parameter_groups
from saffe_cache.fusion.losses import info_nce
from saffe_cache.fusion.options import FusionShape
from saffe_cache.retrieval.baselines import fit_class_means
from saffe_cache.studies.binding.config import BATCH_PHOTOS

TEMPERATURE = 0.07
"""Of InfoNCE: CLIP's initial value; fixed, since a support of a few photos cannot determine it."""
READ_AFTER = (1, 2)  # epochs
WEIGHT_DECAY = 0.05
_LEAST_FALL = 0.01
"""Of the loss, in nats: what falls less has not fallen."""
_PATIENCE = 2
"""Epochs without a fall after which a fit has converged."""
_ACCELERATOR_BYTES = 2**33
_CACHE_BYTES = 2**26
"""Of a processor: weights beyond it are read from memory in each step, however many are stacked."""

Weights = dict[str, torch.Tensor]
"""By parameter, [episodes, …]."""


class Support(NamedTuple):
    """What a batch of episodes learns from; the photo at place (i, j) belongs to name i.

    Names are unit vectors [episodes, ways, text_size], states P times float32 [episodes, ways, shots, tokens, d].
    """

    states: Sequence[torch.Tensor]
    names: torch.Tensor


class Reading(NamedTuple):
    """Weights at a moment of the fits: `after` some epochs, or, where that is None, at convergence."""

    after: int | None
    episodes: torch.Tensor
    """int64: whose weights these are, by place in the batch. Those that converge together are read together."""
    weights: Weights
    epoch: int


def make_fams(shape: FusionShape, seeds: Sequence[int], device: str = "cpu") -> tuple[FusionAlignModule, Weights]:
    """A FAM without weights of its own, and the starting weights of one for each seed.

    The weights ask for no gradient of torch's own: it would keep the graphs of `torch.func.grad`, which each gradient
    would then hold with its weights, for ever.
    """
    models = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            models.append(FusionAlignModule(shape))
    weights, _ = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta").eval()
    return skeleton, {name: value.detach().to(device) for name, value in weights.items()}


def episodes_at_once(shape: FusionShape, photos: int, device: str) -> int:
    """As many as the memory is for: weights, gradients and moments, and on an accelerator an episode's photos."""
    model = FusionAlignModule(shape)
    of_weights = 6 * 4 * sum(parameter.numel() for parameter in model.parameters())
    if device == "cpu":
        return max(1, _CACHE_BYTES // of_weights)
    of_photos = 2 * 4 * photos * shape.num_layers * shape.num_tokens * shape.hidden_size
    return max(1, _ACCELERATOR_BYTES // (of_weights + of_photos))


def photo_vectors(skeleton: FusionAlignModule, weights: Weights, states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Unit vectors [episodes, photos, text_size] of P times [episodes, photos, tokens, d]."""

    def of_one(own: Weights, photos: list[torch.Tensor]) -> torch.Tensor:
        vectors: torch.Tensor = functional_call(skeleton, own, (photos,))
        return vectors

    vectors: torch.Tensor = vmap(of_one)(weights, list(states))
    return vectors


def fit(
    skeleton: FusionAlignModule, weights: Weights, support: Support, learning_rate: float, max_epochs: int
) -> Iterator[Reading]:
    """Train on InfoNCE over the episode's names; the weights are changed in place.

    An epoch is one pass over the support, in steps of at most 30 photos, equally many of each name. Readings come
    after 1 and 2 epochs, and for each episode once at its convergence: its loss has not fallen for 2 epochs, or
    `max_epochs` are over. What becomes of an episode does not depend on the others of its batch.
    """
    ways, shots = support.states[0].shape[1:3]
    at_once = max(1, BATCH_PHOTOS // ways)
    steps = [slice(start, start + at_once) for start in range(0, shots, at_once)]
    groups = _groups(skeleton, weights, learning_rate)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)  # one pass over the weights, not twelve
    lowest = torch.full((len(support.names),), math.inf)
    stale = torch.zeros(len(lowest), dtype=torch.int64)
    is_open = torch.ones(len(lowest), dtype=torch.bool)
    everyone = torch.arange(len(lowest))
    for epoch in range(1, max_epochs + 1):
        losses = torch.stack([_step(skeleton, weights, support, step, optimizer) for step in steps]).mean(dim=0)
        if epoch in READ_AFTER:
            yield Reading(epoch, everyone, weights, epoch)
        stale = torch.where(losses < lowest - _LEAST_FALL, 0, stale + 1)
        lowest = torch.minimum(lowest, losses)
        ends = is_open & ((stale >= _PATIENCE) | (epoch == max_epochs))
        if ends.any():
            who = everyone[ends]
            yield Reading(None, who, {name: value[who] for name, value in weights.items()}, epoch)
            is_open &= ~ends
        if not is_open.any():
            break


def _step(
    skeleton: FusionAlignModule, weights: Weights, support: Support, shots: slice, optimizer: torch.optim.Optimizer
) -> torch.Tensor:
    """One update; the losses before it, [episodes]."""
    states = [state[:, :, shots].flatten(1, 2) for state in support.states]
    ways, device = support.names.shape[1], support.names.device
    positives = torch.eye(ways, dtype=torch.bool, device=device).repeat_interleave(states[0].shape[1] // ways, dim=0)
    temperature = torch.tensor(TEMPERATURE, device=device)

    def loss_of_one(own: Weights, photos: list[torch.Tensor], named: torch.Tensor) -> torch.Tensor:
        return info_nce(functional_call(skeleton, own, (photos,)), named, positives, temperature)

    gradients, losses = vmap(grad_and_value(loss_of_one))(weights, states, support.names)
    for name, value in weights.items():
        value.grad = gradients[name]
    optimizer.step()
    return losses.cpu()  # type: ignore[no-any-return]


def _groups(skeleton: FusionAlignModule, weights: Weights, learning_rate: float) -> list[dict[str, object]]:
    """The FAM's own groups for AdamW, of the stacked weights."""
    stacked = {id(parameter): weights[name] for name, parameter in skeleton.named_parameters()}
    groups: list[dict[str, Any]] = parameter_groups(skeleton, learning_rate, WEIGHT_DECAY)
    return [group | {"params": [stacked[id(parameter)] for parameter in group["params"]]} for group in groups]


def fit_ridges(features: torch.Tensor, names: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge regression of each episode's photos to their names: weights [episodes, out, in], biases [episodes, 1, out].

    In its dual form, W = Y' (X X' + strength m I)^-1 X for m photos, X and Y centred: m is far below the width.

    `features` are [episodes, ways, shots, in], `names` unit vectors [episodes, ways, out], and `strength` is a multiple
    of the number of photos.
    """
    ways, shots = features.shape[1:3]
    inputs = features.flatten(1, 2).double()
    targets = names.double().repeat_interleave(shots, dim=1)
    center, target_center = inputs.mean(dim=1, keepdim=True), targets.mean(dim=1, keepdim=True)
    inputs, targets = inputs - center, targets - target_center
    penalty = strength * ways * shots * torch.eye(ways * shots, dtype=inputs.dtype, device=inputs.device)
    solved = torch.linalg.solve(inputs @ inputs.transpose(1, 2) + penalty, targets)
    weight = solved.transpose(1, 2) @ inputs
    bias = target_center - center @ weight.transpose(1, 2)
    return weight.float(), bias.float()


def class_mean_accuracies(support: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Of the nearest class mean by centred cosine, [episodes], from features [episodes, ways, photos, in]."""
    ways, shots = support.shape[1:3]
    labels, nearest = np.repeat(np.arange(ways), shots), []
    for learned, questions in zip(support, queries, strict=True):
        means = fit_class_means(learned.reshape(ways * shots, -1), labels, ways)
        nearest.append(means(questions.reshape(-1, questions.shape[-1])).argmax(axis=1))
    return _share_own(np.array(nearest), ways)


def name_accuracies(vectors: torch.Tensor, names: torch.Tensor) -> np.ndarray:
    """Share of photos whose nearest name by cosine is their own, [episodes].

    `vectors` [episodes, ways * queries, d] are of any length, the photos of a name one after the other; `names` are
    unit vectors [episodes, ways, d].
    """
    nearest = (vectors @ names.transpose(1, 2)).argmax(dim=2)
    return _share_own(nearest.cpu().numpy(), names.shape[1])


def _share_own(nearest: np.ndarray, ways: int) -> np.ndarray:
    """Share of the photos [episodes, ways * queries] whose nearest class is theirs, [episodes]."""
    by_class = nearest.reshape(len(nearest), ways, -1)
    return np.asarray((by_class == np.arange(ways)[:, None]).mean(axis=(1, 2)))
