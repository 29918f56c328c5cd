"""Fitting small modules by AdamW: one update, one schedule, one loop over epochs that keeps the best weights.

Training of fusions (training/loop.py) uses the update and the schedule; its loop also resumes, and trains several runs
side by side. Few-shot episodes (studies/binding) stack the weights of many modules and get their gradients by vmap.

And the baseline that a fusion of tokens has to beat: an MLP of two layers on pooled features, trained like the fusion.
With paired texts it is the concatenation baseline: the MLP sees both and corrects the text's vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from saffe_cache.core.items import Ragged
from saffe_cache.fusion.layers import Learning, identity_linear, parameter_groups, zero_linear
from saffe_cache.fusion.losses import Temperature, distinct_positives, info_nce

INNER_SIZE = 1024
DROPOUTS = (0.2, 0.5)
"""Tried in turn; `judge` picks one."""
LEARNING_RATE = 1e-3
"""Peak of a one-cycle schedule."""
WEIGHT_DECAY = 0.05
BATCH_SIZE = 512
"""Most photos in a batch, each with all its texts."""
ROWS_AT_ONCE = 1024
"""Rows that a fit is applied to at once: 4 MB of inner activations."""
PATIENCE = 4
"""Stop after this many epochs without a better score."""


def adamw(parameters: Iterable[Any], learning_rate: float, **options: Any) -> torch.optim.AdamW:
    """An optimiser whose groups remember their peak learning rate; parameters or groups as torch takes them."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, **options)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


def update(
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
    rate: float,
    clipped: Sequence[nn.Parameter] = (),
    largest_norm: float = math.inf,
) -> None:
    """One step downhill with an optimiser from `adamw`, at the fraction `rate` of its peak learning rates.

    The gradient of the `clipped` parameters together is scaled down where it is longer than `largest_norm`.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if clipped:
        clip_gradient(clipped, largest_norm)
    optimizer.step()


def clip_gradient(parameters: Sequence[nn.Parameter], largest_norm: float) -> None:
    """`clip_grad_norm_`, but gradients that are short enough are left alone instead of multiplied by one."""
    norm = nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    if not norm <= largest_norm:
        nn.utils.clip_grads_with_norm_(parameters, largest_norm, norm)


def batch_size(most: int, num_samples: int) -> int:
    """For small data, batches shrink so that an epoch has at least 8 steps, but not below 32 samples."""
    return min(most, max(32, num_samples // 8), num_samples)


def warmed_cosine(step: int, total: int, rising: int = 0, floor: float = 0.0) -> float:
    """Fraction of the peak learning rate of an update, from 0 to below `total`.

    A linear rise over `rising` updates, of which the last is at the peak, then a cosine down to `floor`.
    """
    if step < rising:
        return (step + 1) / rising
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising))) / 2


@dataclass(frozen=True)
class Fitted:
    """How a module was fitted; it has the best weights."""

    best_epoch: int
    """0 is before the first update."""
    best_score: float
    scores: tuple[float, ...]
    """After each epoch that was judged, in order."""
    losses: tuple[float, ...]
    """Of each epoch."""


def fit_epochs(
    model: nn.Module,
    epochs: int,
    run_epoch: Callable[[int], float],
    judge: Callable[[int], float],
    *,
    judges_start: bool = True,
    patience: int | None = None,
) -> Fitted:
    """Run epochs, and leave the model with its best weights, in evaluation mode.

    Args:
        run_epoch: updates the model in an epoch, counted from 1; returns the loss.
        judge: a validation score after an epoch, of which higher is better. Of equal ones the first counts.
        judges_start: whether the start, epoch 0, is judged too and may be the best.
        patience: stop after this many epochs without a better score; None never stops early.
    """
    best_epoch, best_score, weights = 0, -math.inf, deepcopy(model.state_dict())
    scores, losses = [], []
    for epoch in range(0 if judges_start else 1, epochs + 1):
        if epoch:
            model.train()
            losses.append(run_epoch(epoch))
        scores.append(judge(epoch))
        if scores[-1] > best_score:
            best_epoch, best_score, weights = epoch, scores[-1], deepcopy(model.state_dict())
        if patience is not None and epoch - best_epoch >= patience:
            break
    model.load_state_dict(weights)
    model.eval()
    return Fitted(best_epoch, best_score, tuple(scores), tuple(losses))


class _Mlp(nn.Module):
    """Gallery side and query side, before they are made unit vectors."""

    learning: ClassVar = dict.fromkeys(("text_map", "paired_map"), Learning(decays=False))
    center: torch.Tensor
    scale: torch.Tensor

    def __init__(self, features: torch.Tensor, size: int, dropout: float, takes_text: bool) -> None:
        """`features` [n, in], of which mean and scale are kept; `size` of the text vectors."""
        super().__init__()
        self.register_buffer("center", features.mean(dim=0))
        self.register_buffer("scale", features.std(dim=0, correction=0) + 1e-6)
        inner = nn.Linear(features.shape[1] + size * takes_text, INNER_SIZE)
        last = (zero_linear if takes_text else nn.Linear)(INNER_SIZE, size)
        self.mlp = nn.Sequential(nn.Dropout(dropout), inner, nn.GELU(), nn.Dropout(dropout), last)
        self.text_map = identity_linear(size)
        self.paired_map = identity_linear(size) if takes_text else None

    def forward(self, features: torch.Tensor, paired_texts: torch.Tensor | None) -> torch.Tensor:
        inputs = (features - self.center) / self.scale
        if self.paired_map is None or paired_texts is None:
            return self.mlp(inputs)  # type: ignore[no-any-return]
        scaled = paired_texts * paired_texts.shape[1] ** 0.5  # as large as the standardised features
        return self.paired_map(paired_texts) + self.mlp(torch.cat([inputs, scaled], dim=1))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class MlpFit:
    """A trained MLP; during training, `judge` sees it after each epoch."""

    model: _Mlp
    dropout: float
    epoch: int
    """The epoch after which it had these weights; 0 is before the first step."""

    def gallery(self, features: np.ndarray, paired_texts: np.ndarray | None = None) -> np.ndarray:
        """Unit vectors, float32 [n, d], of features [n, in] and, where fitted with it, unit text vectors [n, d]."""
        if (paired_texts is None) != (self.model.paired_map is None):
            given, expected = ("no", "one") if paired_texts is None else ("a", "none")
            raise ValueError(f"MLP: {given} paired text is given, it was fitted with {expected}. Give the same.")
        return self._run(self.model, features, paired_texts)

    def queries(self, vectors: np.ndarray) -> np.ndarray:
        """Unit vectors, float32 [m, d], of unit text vectors [m, d]."""
        return self._run(self.model.text_map, vectors)

    @torch.inference_mode()
    def _run(self, part: nn.Module, *inputs: np.ndarray | None) -> np.ndarray:
        """Unit vectors of a part of the model, a block of rows at a time."""
        self.model.eval()
        assert inputs[0] is not None
        blocks = [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(inputs[0]), ROWS_AT_ONCE)]
        found = [part(*(None if of is None else _tensor(of[block]) for of in inputs)) for block in blocks]
        return np.concatenate([functional.normalize(vectors, dim=1).numpy() for vectors in found])


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))


def fit_mlp(
    features: np.ndarray,
    texts: np.ndarray,
    positives: Ragged,
    judge: Callable[[MlpFit], float],
    *,
    paired_texts: np.ndarray | None = None,
    epochs: int = 15,
    dropouts: Sequence[float] = DROPOUTS,
    seed: int = 0,
) -> MlpFit:
    """Train with InfoNCE over photos and all their texts; `judge` (higher is better) picks dropout and epoch.

    The query side is a linear map that starts as the identity. With `paired_texts` the gallery's vector is

        unit(B t + mlp([standardised x; sqrt(d) t])),  B = I and mlp = 0 at the start,

    so that epoch 0, which is judged too, is the text alone.

    `features` are [n, in], `texts` unit vectors of the distinct texts [m, d], `positives` the rows of each photo's
    texts, at least one. `paired_texts` are unit vectors of the text that is paired with each photo in the gallery,
    [n, d]; it should not be among the photo's own positives.
    """
    data = _Data(_tensor(features), _tensor(texts), positives, None if paired_texts is None else _tensor(paired_texts))
    return max((_train(data, judge, dropout, epochs, seed) for dropout in dropouts), key=lambda scored: scored[0])[1]


@dataclass(frozen=True)
class _Data:
    features: torch.Tensor
    texts: torch.Tensor
    positives: Ragged
    paired_texts: torch.Tensor | None

    @property
    def batch_size(self) -> int:
        return batch_size(BATCH_SIZE, len(self.features))

    def batches(self, generator: np.random.Generator) -> list[np.ndarray]:
        """Photos of whole batches, in random order; a short last batch has its turn in another epoch."""
        order, size = generator.permutation(len(self.features)), self.batch_size
        return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]

    def loss(self, model: _Mlp, temperature: Temperature, chosen: np.ndarray) -> torch.Tensor:
        distinct, _, positives = distinct_positives(self.positives.take(chosen))
        gallery = model(self.features[chosen], None if self.paired_texts is None else self.paired_texts[chosen])
        queries = model.text_map(self.texts[distinct])
        gallery, queries = functional.normalize(gallery, dim=1), functional.normalize(queries, dim=1)
        return info_nce(gallery, queries, torch.from_numpy(positives), temperature())


def _train(
    data: _Data, judge: Callable[[MlpFit], float], dropout: float, epochs: int, seed: int
) -> tuple[float, MlpFit]:
    """The best score and its fit."""
    generator = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _Mlp(data.features, data.texts.shape[1], dropout, data.paired_texts is not None)
        temperature = Temperature()
        groups = [*parameter_groups(model, LEARNING_RATE, WEIGHT_DECAY), {"params": temperature.parameters()}]
        optimizer = adamw(groups, LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98))
        total, steps = epochs * (len(data.features) // data.batch_size), count()

        def run_epoch(epoch: int) -> float:
            total_loss, batches = 0.0, data.batches(generator)
            for chosen in batches:
                loss = data.loss(model, temperature, chosen)
                update(optimizer, loss, _one_cycle(next(steps), total))
                total_loss += float(loss.detach())
            return total_loss / len(batches)

        fitted = fit_epochs(
            model, epochs, run_epoch, lambda epoch: judge(MlpFit(model, dropout, epoch)), patience=PATIENCE
        )
    return fitted.best_score, MlpFit(model, dropout, fitted.best_epoch)


def _one_cycle(step: int, total: int) -> float:
    """Fraction of the peak learning rate, as torch's OneCycleLR: a cosine up in a tenth of the steps, and one down."""
    top, last = 0.1 * total - 1, total - 1
    start, end, part = (1 / 25, 1.0, step / top) if step <= top else (1.0, 1 / 250_000, (step - top) / (last - top))
    return end + (start - end) / 2 * (1 + math.cos(math.pi * part))
