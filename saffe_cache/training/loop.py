"""The training loop: steps, validation, early stopping, and checkpoints.

Every random choice follows from the seed and the step: the order of an epoch from (seed, epoch), dropout from
(seed, step). So a resumed run needs only the step, the weights and the optimiser, and equals an uninterrupted run bit
for bit on the same device.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from saffe_cache.core import ranks
from saffe_cache.core.atomic_io import append_line, make_folder, remove_partial_files, write_whole
from saffe_cache.core.devices import choose_dtype, kept_memory
from saffe_cache.core.json_schema import made_of
from saffe_cache.core.options import refuse
from saffe_cache.core.tensors import write_tensors
from saffe_cache.fusion.base import Fusion
from saffe_cache.fusion.layers import Dropout, parameter_groups
from saffe_cache.fusion.losses import Batch
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.retrieval.fitting import update, warmed_cosine
from saffe_cache.training.batches import TrainingData
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.loggers import Loggers
from saffe_cache.training.objective import Objective
from saffe_cache.training.optimizers import make_optimizer
from saffe_cache.training.runs import MODEL, STATE, build_fusion

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Numbers:
    """The numbers of a state; the rest are tensors."""

    step: int = 0
    best_score: float = -1.0
    best_epoch: int = -1
    """0 means the weights before the first step."""
    loss_sum: float = 0.0
    """Sum of the losses of the current epoch's steps."""
    seconds: float = 0.0


@dataclass(kw_only=True)
class TrainingState(_Numbers):
    """Everything that a resumed run needs."""

    model: Fusion
    objective: Objective
    optimizer: torch.optim.Optimizer

    @cached_property
    def loss(self) -> nn.Module:
        """The loss of a batch, as a module that takes it. Ranks have equal weights from here on."""
        loss = _Loss(self.model, self.objective)
        if ranks.size() == 1:
            return loss
        if any(isinstance(one, nn.Dropout) and not isinstance(one, Dropout) for one in self.model.modules()):
            refuse("fusion", "one that draws dropout of its own", "saffe_cache.fusion.layers.Dropout, or one process")
        if any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in self.model.modules()):
            refuse("fusion", "one with a batch norm, which sees one rank's texts alone", "another one, or one process")
        return DistributedDataParallel(loss, find_unused_parameters=True)


class _Loss(nn.Module):
    """One module of the model and the objective, as DistributedDataParallel averages the gradients of one module."""

    def __init__(self, model: Fusion, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.objective(self.model, batch)  # type: ignore[no-any-return]


def save_state(out: Path, state: TrainingState) -> None:
    """Write everything that `resume` needs into one file."""
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    tensors |= {f"objective.{name}": value for name, value in state.objective.state_dict().items()}
    for number, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    numbers = {one.name: getattr(state, one.name) for one in fields(_Numbers)}
    write_tensors(out / STATE, tensors, {"state": json.dumps(numbers)})


def resume(out: Path, state: TrainingState) -> bool:
    """Load the last saved state; False if there is none.

    Raises:
        ValueError: it is damaged or belongs to another run.
    """
    path = out / STATE
    data = ranks.from_first(lambda: path.read_bytes() if path.exists() else b"")
    if not data and not ranks.agreed(path.exists):
        return False
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        _take(json.loads(header["__metadata__"]["state"]), tensors, state)
    except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not this run's state ({error}). Delete it to start again.") from None
    logger.info("resuming from step %d", state.step)
    return True


def _take(numbers: Any, tensors: Mapping[str, torch.Tensor], state: TrainingState) -> None:
    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    vars(state).update(vars(made_of(_Numbers, numbers)))
    state.model.load_state_dict(part("model."))
    state.objective.load_state_dict(part("objective."))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in part("optimizer.").items():
        number, moment = name.split(".", 1)
        moments.setdefault(int(number), {})[moment] = value
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})


class Log:
    """log.jsonl, and other loggers. Lines after the resumed step are dropped; without one, all."""

    def __init__(self, out: Path, resumed_step: int | None, loggers: Loggers) -> None:
        self._path, self._loggers = out / "log.jsonl", loggers
        if not ranks.is_first():
            return
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        last = -1 if resumed_step is None else resumed_step
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= last]
        write_whole(self._path, "".join(line + "\n" for line in kept).encode())

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        if not ranks.is_first():
            return
        append_line(self._path, json.dumps({"step": step, **values}))
        self._loggers.log(step, values)


def start(config: TrainConfig, spec: RunSpec, data: TrainingData, *, resumes: bool = False) -> TrainingState:
    """The model before the first step; an attention head starts as the late fusion with the best validation score, and
    a fusion in closed form is fitted.

    `resumes`: skip that, since a checkpoint replaces the weights.
    """
    torch.manual_seed(config.seed)
    model = build_fusion(spec, data.inputs.cache).to(config.device)
    model.freeze_unused(null_only=not spec.fuses_text)
    if config.start == "ridge" and model.linear_start is not None and not resumes:
        data.start.set(model, model.linear_start)
    started = time.perf_counter()
    if config.entry.sees_photos_first and not resumes:
        model.prepare(data.summaries)
    if config.entry.is_closed_form and not resumes:
        model.fit(data.training_vectors(model))
    seconds = time.perf_counter() - started
    objective = Objective(spec, data.inputs.texts, is_composed=spec.pairs == "composed")
    objective.fit(lambda: data.training_vectors(model))  # a checkpoint has the numbers, not the shapes
    objective.to(config.device)
    rates = config.recipe.learning_rate, config.recipe.weight_decay
    groups = [*parameter_groups(model, *rates), *parameter_groups(objective, *rates)] or [{"params": []}]
    optimizer = make_optimizer(config.recipe.optimizer, groups, config.recipe.learning_rate)
    return TrainingState(model=model, objective=objective, optimizer=optimizer, seconds=seconds)


class Training:
    """A training run in its folder, which resumes from its last checkpoint."""

    def __init__(self, config: TrainConfig, spec: RunSpec, data: TrainingData, out: Path, loggers: Loggers) -> None:
        if ranks.is_first():
            make_folder(out)
            remove_partial_files(out)
        self._config, self._data, self._out = config, data, out
        self.num_steps = config.recipe.epochs * data.steps_per_epoch
        self.state = start(config, spec, data, resumes=ranks.agreed((out / STATE).exists))
        resumed = resume(out, self.state)
        self._log = Log(out, self.state.step if resumed else None, loggers)
        self._saved = time.perf_counter()
        if self.state.best_epoch < 0:
            _finish_epoch(self.state, data, self._log, out, None)

    @property
    def is_over(self) -> bool:
        """Whether all steps are done, or validation has not improved for `patience` epochs."""
        epoch = self.state.step // self._data.steps_per_epoch
        return self.state.step >= self.num_steps or epoch - self.state.best_epoch >= self._config.recipe.patience

    def take(self, batch: Batch, waited: float) -> None:
        """Do one step, and validate at the end of an epoch. `waited`: seconds spent waiting for the batch."""
        state, per_epoch, started = self.state, self._data.steps_per_epoch, time.perf_counter()
        state.loss_sum += _step(self._config, state, batch, self.num_steps)
        state.step += 1
        state.seconds += waited + time.perf_counter() - started
        if state.step % per_epoch == 0:
            started = time.perf_counter()
            _finish_epoch(state, self._data, self._log, self._out, state.loss_sum / per_epoch)
            state.loss_sum = 0.0
            state.seconds += time.perf_counter() - started
        if time.perf_counter() - self._saved > self._config.checkpoint_seconds:
            self.close()
            self._saved = time.perf_counter()

    def close(self) -> None:
        if ranks.is_first():
            save_state(self._out, self.state)

    def complete(self) -> None:
        """Add what is fitted beside the best weights, and save them with it."""
        spec = self._data.inputs.spec
        if not self._config.entry.adds_kernels or spec.fuses_text:
            return
        path, model, started = self._out / MODEL, self.state.model, time.perf_counter()
        model.load_state_dict(load(ranks.from_first(path.read_bytes)))
        self.state.best_score = self._data.start.add_kernels(model.eval())  # type: ignore[arg-type]
        if ranks.is_first():
            write_tensors(path, model.state_dict())
        self.state.seconds += time.perf_counter() - started


@kept_memory()
def fit(trainings: Sequence[Training], data: TrainingData, name: str) -> None:
    """Train side by side on the same batches, each read once. A resumed run that is ahead waits for the others."""
    first = min((training.state.step for training in trainings if not training.is_over), default=0)
    total = max((training.num_steps for training in trainings if not training.is_over), default=0)
    requested = time.perf_counter()
    with tqdm(total=total, initial=first, unit=" steps", desc=name, disable=not ranks.is_first()) as progress:
        for step, batch in enumerate(data.batches(first, total), first):
            able = [training for training in trainings if training.state.step == step and not training.is_over]
            waited = time.perf_counter() - requested
            for training in able:
                training.take(batch, waited / len(able))
            progress.update()
            if all(training.is_over for training in trainings):
                break
            requested = time.perf_counter()
        for training in trainings:
            training.close()
    for training in trainings:
        training.complete()


def _step(config: TrainConfig, state: TrainingState, batch: Batch, total: int) -> float:
    """One update of the weights; returns the loss."""
    torch.manual_seed(config.seed * 1_000_003 + state.step)
    rate = warmed_cosine(state.step, total, max(1, int(config.recipe.warmup * total)), floor=0.02)
    state.model.train()
    device = batch.vectors.device.type
    with torch.autocast(device, torch.bfloat16, enabled=choose_dtype(config.dtype, device) == "bfloat16"):
        loss = state.loss(batch)
    update(state.optimizer, loss, rate, tuple(state.model.parameters()), config.clip)
    return float(loss.detach())


def _finish_epoch(state: TrainingState, data: TrainingData, log: Log, out: Path, loss: float | None) -> None:
    """Validate, and save the weights if they are the best so far. Epoch 0 is before the first step."""
    epoch = state.step // data.steps_per_epoch
    score = data.validate(state.model)
    if score > state.best_score:
        state.best_score, state.best_epoch = score, epoch
        if ranks.is_first():
            write_tensors(out / MODEL, state.model.state_dict())
    values = {"epoch": epoch, "loss": loss, "validation_score": score, **state.objective.scalars()}
    rate = state.optimizer.param_groups[0]["lr"]
    log.write(state.step, {**values, "learning_rate": rate, "seconds": round(state.seconds, 2)})
