"""The training loop: steps, validation, early stopping, and states that a killed run resumes from.

Every random choice follows from the seed and the step: the order of an epoch from (seed, epoch), dropout
from (seed, step). So a resumed run needs the step, the weights and the optimiser, and then repeats an
uninterrupted one bit for bit on the same device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from saffe_cache.checkpoints import Log, TrainingState, save_state
from saffe_cache.fusion.fam import FusionAlignModule
from saffe_cache.fusion.heads import AttentionHead, summarize
from saffe_cache.objectives import Temperature, info_nce
from saffe_cache.pairs import Pairs, class_vectors, mean_text_vectors, token_tensors
from saffe_cache.retrieval.baselines import LinearMap, fit_ridge
from saffe_cache.retrieval.protocols import caption_scores, class_scores
from saffe_cache.runs import RunSpec, build_fam, encode_gallery, encode_queries, write_tensors
from saffe_cache.store.reader import Cache

_LEAST_BATCH, _LEAST_STEPS = 32, 8
"""Small data: batches are cut so that an epoch has at least 8 steps, but not below 32 photos."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How to optimise; the fields are described in TrainConfig."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup: float
    clip: float
    patience: int
    seed: int
    device: str
    checkpoint_seconds: float
    tensorboard: bool


class Batch(NamedTuple):
    """What one step needs."""

    states: list[torch.Tensor]
    """P times [photos, tokens, d]."""
    mask: torch.Tensor | None
    vectors: torch.Tensor
    """The text encoder's own vectors of the batch's distinct texts, [texts, d]."""
    positives: torch.Tensor
    """bool [photos, texts]."""


class TrainingData:
    """Batches of the training pairs, and the validation score."""

    def __init__(self, spec: RunSpec, cache: Cache, pairs: Pairs, validation: Pairs, options: FitOptions) -> None:
        self._spec, self._pairs, self._validation = spec, pairs, validation
        self._gallery, self._text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
        self._table = cache.table
        self._device = options.device
        self._batch_size = min(options.batch_size, max(_LEAST_BATCH, len(pairs) // _LEAST_STEPS), len(pairs))
        self._seed = options.seed

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches; the photos of a short last one have their turn in another epoch."""
        return len(self._pairs) // self._batch_size

    def batches(self, step: int, stop: int) -> Iterator[Batch]:
        """The batches of steps `step` to `stop`, read one ahead."""
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[Batch] | None = None
            for number in range(step, stop):
                batch = ahead.result() if ahead else self._read(number)
                ahead = pool.submit(self._read, number + 1) if number + 1 < stop else None
                yield batch

    def _read(self, step: int) -> Batch:
        epoch, within = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._pairs))
        chosen = np.sort(order[within * self._batch_size : (within + 1) * self._batch_size])
        states, mask = token_tensors(self._gallery, self._pairs.rows[chosen], self._spec.gallery_layers, self._device)
        texts = [self._pairs.texts[int(i)] for i in chosen]
        distinct, columns = np.unique(np.concatenate(texts), return_inverse=True)
        positives = np.zeros((len(chosen), len(distinct)), bool)
        positives[np.repeat(np.arange(len(chosen)), [len(of_one) for of_one in texts]), columns] = True
        vectors = torch.from_numpy(self._text.vectors(distinct)).to(self._device)
        return Batch(states, mask, vectors, torch.from_numpy(positives).to(self._device))

    @torch.inference_mode()
    def summaries(self, model: FusionAlignModule) -> np.ndarray:
        """What the linear path of the model's head sees of the training photos before any training."""
        parts = []
        for start in range(0, len(self._pairs), 256):
            rows = self._pairs.rows[start : start + 256]
            states, mask = token_tensors(self._gallery, rows, self._spec.gallery_layers, self._device)
            parts.append(summarize(model.decode(states, mask), mask).cpu().numpy())
        return np.concatenate(parts)

    def text_means(self) -> np.ndarray:
        """Mean of the unit vectors of each training photo's texts."""
        return mean_text_vectors(self._pairs, self._text)

    def validate(self, model: FusionAlignModule) -> float:
        """MRR of captions searching photos, or mAP of classes searching photos, with null text."""
        pairs = self._validation
        photos = encode_gallery(model, self._gallery, pairs.rows, self._spec.gallery_layers, self._device)
        if pairs.kind == "classes":
            queries = encode_queries(model, class_vectors(self._table, self._text), self._device)
            return class_scores(photos, queries, pairs.labels, intervals=False)["map"].value
        owners = np.repeat(np.arange(len(pairs)), np.diff(pairs.texts.offsets))
        queries = encode_queries(model, self._text.vectors(pairs.texts.values), self._device)
        return caption_scores(photos, queries, owners, intervals=False)["mrr"].value


def start(options: FitOptions, spec: RunSpec, cache: Cache, data: TrainingData) -> TrainingState:
    """The model before the first step; with the attention head it is the ridge regression, as validation likes it."""
    torch.manual_seed(options.seed)
    model = build_fam(spec, cache).to(options.device)
    model.freeze_text_path()
    head = model.head
    if isinstance(head, AttentionHead):

        def judge(fit: LinearMap) -> float:
            head.start_linear(torch.from_numpy(fit.weight), torch.from_numpy(fit.bias))
            return data.validate(model.eval())

        best = fit_ridge(data.summaries(model), data.text_means(), judge)
        head.start_linear(torch.from_numpy(best.weight), torch.from_numpy(best.bias))
    temperature = Temperature().to(options.device)
    groups = model.parameter_groups(options.learning_rate, options.weight_decay)
    groups.append({"params": list(temperature.parameters()), "lr": 1.5 * options.learning_rate, "weight_decay": 0.0})
    for group in groups:
        group["peak"] = group["lr"]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    return TrainingState(model=model, temperature=temperature, optimizer=optimizer)


def fit(options: FitOptions, state: TrainingState, data: TrainingData, out: Path) -> None:
    """Steps, validation at the end of each epoch, and states to resume from on the way."""
    total = options.epochs * data.steps_per_epoch
    log = Log(out, state.step, options.tensorboard)
    progress = tqdm(total=total, initial=state.step, unit=" steps", desc=str(out))
    before, started = state.seconds, time.perf_counter()
    saved = started
    if state.best_epoch < 0:
        _finish_epoch(state, data, log, out, None)
    for batch in data.batches(state.step, total):
        if _has_stopped(options, state, data):
            break
        state.loss_sum += _step(options, state, batch, total)
        state.step += 1
        progress.update()
        state.seconds = before + time.perf_counter() - started
        if state.step % data.steps_per_epoch == 0:
            _finish_epoch(state, data, log, out, state.loss_sum / data.steps_per_epoch)
            state.loss_sum = 0.0
        if time.perf_counter() - saved > options.checkpoint_seconds:
            save_state(out, state)
            saved = time.perf_counter()
    progress.close()
    log.close()


def _has_stopped(options: FitOptions, state: TrainingState, data: TrainingData) -> bool:
    """Early stopping: no better validation score for `patience` epochs."""
    return state.step // data.steps_per_epoch - state.best_epoch >= options.patience


def _step(options: FitOptions, state: TrainingState, batch: Batch, total: int) -> float:
    """One update of the weights; returns the loss."""
    torch.manual_seed(options.seed * 1_000_003 + state.step)
    rate = _schedule(state.step, total, options.warmup)
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    state.model.train()
    device = batch.vectors.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        photos = state.model(batch.states, batch.mask)
        queries = state.model.encode_queries(batch.vectors)
    loss = info_nce(photos.float(), queries.float(), batch.positives, state.temperature())
    state.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), options.clip)
    state.optimizer.step()
    return float(loss.detach())


def _schedule(step: int, total: int, warmup: float) -> float:
    """Linear warm-up, then a cosine down to 2 %."""
    rising = max(1, int(warmup * total))
    if step < rising:
        return (step + 1) / rising
    return 0.02 + 0.98 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising))) / 2


def _finish_epoch(state: TrainingState, data: TrainingData, log: Log, out: Path, loss: float | None) -> None:
    """Validate, and keep the weights where they are the best so far. Epoch 0 is before the first step."""
    epoch = state.step // data.steps_per_epoch
    score = data.validate(state.model.eval())
    if score > state.best_score:
        state.best_score, state.best_epoch = score, epoch
        write_tensors(out / "model.safetensors", state.model.state_dict())
    values = {
        "loss": loss,
        "validation_score": score,
        "temperature": float(state.temperature().detach()),
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "seconds": round(state.seconds, 2),
    }
    log.write({"step": state.step, "epoch": epoch, **values})
