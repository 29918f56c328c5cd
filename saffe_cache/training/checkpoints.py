"""What a killed run resumes from, and its log."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from saffe_cache.core.atomic_io import append_line, write_whole
from saffe_cache.core.json_schema import made_of
from saffe_cache.core.tensors import write_tensors
from saffe_cache.fusion.base import Fusion
from saffe_cache.training.objective import Objective

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Numbers:
    """Those of a state, beside the tensors."""

    step: int
    best_score: float
    best_epoch: int
    loss_sum: float
    seconds: float


@dataclass(kw_only=True)
class TrainingState:
    """What a resumed run needs."""

    model: Fusion
    objective: Objective
    optimizer: torch.optim.AdamW
    step: int = 0
    best_score: float = -1.0
    best_epoch: int = -1
    """0 stands for the weights before the first step."""
    loss_sum: float = 0.0
    """Over the steps of the running epoch."""
    seconds: float = 0.0


def save_state(out: Path, state: TrainingState) -> None:
    """All that `resume` needs, in one file."""
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    tensors |= {f"objective.{name}": value for name, value in state.objective.state_dict().items()}
    for number, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    numbers = {one.name: getattr(state, one.name) for one in fields(_Numbers)}
    write_tensors(out / "state.safetensors", tensors, {"state": json.dumps(numbers)})


def resume(out: Path, state: TrainingState) -> bool:
    """Continue from the last saved state; False where there is none.

    Raises:
        ValueError: it is damaged, or another run's.
    """
    path = out / "state.safetensors"
    if not path.exists():
        return False
    try:
        _take(path, state)
    except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not this run's state ({error}). Delete it to begin anew.") from None
    logger.info("resuming from step %d", state.step)
    return True


def _take(path: Path, state: TrainingState) -> None:
    with safe_open(path, framework="pt") as file:
        numbers = made_of(_Numbers, json.loads((file.metadata() or {})["state"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — not a dict

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    state.model.load_state_dict(part("model."))
    state.objective.load_state_dict(part("objective."))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in part("optimizer.").items():
        number, moment = name.split(".", 1)
        moments.setdefault(int(number), {})[moment] = value
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
    for name, value in vars(numbers).items():
        setattr(state, name, value)


class Log:
    """log.jsonl, and TensorBoard where it is installed. Lines behind the resumed step are dropped; without one, all."""

    def __init__(self, out: Path, resumed_step: int | None, tensorboard: bool) -> None:
        self._path = out / "log.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        last = -1 if resumed_step is None else resumed_step
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= last]
        write_whole(self._path, "".join(line + "\n" for line in kept).encode())
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=resumed_step or 0)

    def write(self, values: dict[str, Any]) -> None:
        append_line(self._path, json.dumps(values))
        if self._board is not None:
            for name in values.keys() - {"step", "epoch", "seconds"}:
                if values[name] is not None:
                    self._board.add_scalar(name, values[name], values["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
