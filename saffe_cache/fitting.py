"""The training loop: steps, validation, early stopping, and states that a killed run resumes from.

Every random choice follows from the seed and the step: the order of an epoch from (seed, epoch), dropout
from (seed, step). So a resumed run needs the step, the weights and the optimiser, and then repeats an
uninterrupted one bit for bit on the same device.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from saffe_cache.fusion.fam import FusionAlignModule
from saffe_cache.fusion.heads import AttentionHead, summarize
from saffe_cache.objectives import Temperature, info_nce
from saffe_cache.pairs import Pairs, class_vectors, mean_text_vectors, token_tensors
from saffe_cache.retrieval.baselines import fit_ridge
from saffe_cache.retrieval.protocols import caption_scores, class_scores
from saffe_cache.runs import RunSpec, build_fam, encode_gallery, encode_queries, write_tensors
from saffe_cache.store.reader import Cache, EncoderCache

logger = logging.getLogger(__name__)


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


@dataclass(kw_only=True)
class TrainingState:
    """What a resumed run needs."""

    model: FusionAlignModule
    temperature: Temperature
    optimizer: torch.optim.AdamW
    step: int = 0
    best_score: float = -1.0
    best_epoch: int = -1
    seconds: float = 0.0


def start(options: FitOptions, spec: RunSpec, cache: Cache, pairs: Pairs) -> TrainingState:
    """The model before the first step; the attention head's linear path starts as the ridge regression."""
    device = options.device
    torch.manual_seed(options.seed)
    model = build_fam(spec, cache).to(device)
    if isinstance(model.head, AttentionHead):
        gallery, text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
        features = _decoded_summaries(model, gallery, pairs.rows, spec.gallery_layers, device)
        fit = fit_ridge(features, mean_text_vectors(pairs, text), judge=lambda fit: 0.0, strengths=(0.1,))
        model.head.start_linear(torch.from_numpy(fit.weight), torch.from_numpy(fit.bias))
    temperature = Temperature().to(device)
    groups = model.parameter_groups(options.learning_rate, options.weight_decay)
    groups.append({"params": list(temperature.parameters()), "lr": 1.5 * options.learning_rate, "weight_decay": 0.0})
    for group in groups:
        group["peak"] = group["lr"]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    return TrainingState(model=model, temperature=temperature, optimizer=optimizer)


@torch.inference_mode()
def _decoded_summaries(
    model: FusionAlignModule, encoder: EncoderCache, rows: np.ndarray, layers: tuple[int, ...], device: str
) -> np.ndarray:
    """What the head's linear path will see before any training."""
    parts = []
    for start in range(0, len(rows), 256):
        states, mask = token_tensors(encoder, rows[start : start + 256], layers, device)
        parts.append(summarize(model.decode(states, mask), mask).cpu().numpy())
    return np.concatenate(parts)


class TrainingData:
    """Batches of the training pairs, and the validation score."""

    def __init__(self, spec: RunSpec, cache: Cache, pairs: Pairs, validation: Pairs, options: FitOptions) -> None:
        self._spec, self._pairs, self._validation = spec, pairs, validation
        self._gallery, self._text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
        self._table = cache.table
        self._device = options.device
        self._batch_size = min(options.batch_size, len(pairs))
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


def fit(options: FitOptions, state: TrainingState, data: TrainingData, out: Path) -> None:
    """Steps, validation at the end of each epoch, and states to resume from on the way."""
    total = options.epochs * data.steps_per_epoch
    log = _Log(out, state.step, options.tensorboard)
    progress = tqdm(total=total, initial=state.step, unit=" steps", desc=str(out))
    before, started = state.seconds, time.perf_counter()
    saved, losses = started, []
    for batch in data.batches(state.step, total):
        if _has_stopped(options, state, data):
            break
        losses.append(_step(options, state, batch, total))
        state.step += 1
        progress.update()
        state.seconds = before + time.perf_counter() - started
        if state.step % data.steps_per_epoch == 0:
            _finish_epoch(options, state, data, log, out, float(np.mean(losses)))
            losses = []
        if time.perf_counter() - saved > options.checkpoint_seconds:
            _save_state(out, state)
            saved = time.perf_counter()
    progress.close()
    log.close()


def _has_stopped(options: FitOptions, state: TrainingState, data: TrainingData) -> bool:
    """Early stopping: no better validation score for `patience` epochs."""
    return state.best_epoch >= 0 and state.step // data.steps_per_epoch - 1 - state.best_epoch >= options.patience


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


def _finish_epoch(
    options: FitOptions, state: TrainingState, data: TrainingData, log: _Log, out: Path, loss: float
) -> None:
    epoch = state.step // data.steps_per_epoch - 1
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


class _Log:
    """log.jsonl, and TensorBoard where it is installed. Lines behind a resumed step are dropped."""

    def __init__(self, out: Path, step: int, tensorboard: bool) -> None:
        self._path = out / "log.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        self._path.write_text("".join(line + "\n" for line in kept))
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step)

    def write(self, values: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        if self._board is not None:
            for name in ("loss", "validation_score", "temperature", "learning_rate"):
                self._board.add_scalar(name, values[name], values["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _save_state(out: Path, state: TrainingState) -> None:
    """All that `_resume` needs, in one file."""
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    tensors |= {f"temperature.{name}": value for name, value in state.temperature.state_dict().items()}
    for number, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    numbers = {name: getattr(state, name) for name in ("step", "best_score", "best_epoch", "seconds")}
    write_tensors(out / "state.safetensors", tensors, {"state": json.dumps(numbers)})


def resume(out: Path, state: TrainingState) -> None:
    """Continue from the last saved state, if there is one."""
    path = out / "state.safetensors"
    if not path.exists():
        return
    with safe_open(path, framework="pt") as file:
        numbers = json.loads(file.metadata()["state"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — not a dict

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    state.model.load_state_dict(part("model."))
    state.temperature.load_state_dict(part("temperature."))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in part("optimizer.").items():
        number, moment = name.split(".", 1)
        moments.setdefault(int(number), {})[moment] = value
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
    for name, value in numbers.items():
        setattr(state, name, value)
    logger.info("resuming from step %d", state.step)
