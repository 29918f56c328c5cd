"""What sees every validation besides log.jsonl: TensorBoard, Weights & Biases, trackio, and callbacks of your own.

A logger gets each step once and in order, also if the run is killed and resumed: loggers.json in the run's folder holds
the last step that was passed on, and an id by which services continue the same run. A logger that fails is dropped with
a warning; the training goes on. A package is imported when a run uses it.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from saffe_cache.core.json_schema import made_of
from saffe_cache.core.outputs import read_json, write_json
from saffe_cache.training.result import TrainResult

logger = logging.getLogger(__name__)

STATE = "loggers.json"
_PROJECT = "saffe_cache"
"""Of services that ask for one; their own variables WANDB_PROJECT and TRACKIO_PROJECT take precedence."""


class Logger(Protocol):
    """What a training calls; any object with these methods is a callback of `saffe_cache.train`."""

    def start(self, config: Mapping[str, Any], name: str) -> None:
        """A training starts, or resumes.

        Args:
            config: the options as JSON values; `resolved` are the encoders, layers and defaults filled in.
            name: of the run's folder.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """After a validation: `epoch`, `loss` (not before the first step), `validation_score`, `learning_rate`,
        `seconds` of training so far, and the objective's learned scalars."""

    def finish(self, result: TrainResult | None) -> None:
        """The training is over; None if it was interrupted."""


class _TensorBoard:
    def __init__(self, out: Path, run_id: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"))

    def start(self, config: Mapping[str, Any], name: str) -> None:
        pass

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name in values.keys() - {"epoch", "seconds"}:
            self._writer.add_scalar(name, values[name], step)
        self._writer.flush()

    def finish(self, result: TrainResult | None) -> None:
        self._writer.close()


class _Wandb:
    """Weights & Biases; its variables (WANDB_MODE=offline, WANDB_ENTITY, ...) apply."""

    def __init__(self, out: Path, run_id: str) -> None:
        import wandb

        self._wandb, self._out, self._id = wandb, out, run_id

    def start(self, config: Mapping[str, Any], name: str) -> None:
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=name,
            id=self._id,
            resume="allow",
            dir=str(self._out),
            config=dict(config),
            reinit="create_new",  # several runs may be trained side by side
            settings=self._wandb.Settings(console="off"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, result: TrainResult | None) -> None:
        if result is not None:
            self._run.summary.update(_summary(result))
        self._run.finish(exit_code=int(result is None))


class _Trackio:
    """trackio, on this machine or in a Space; its variables (TRACKIO_DIR, TRACKIO_SPACE_ID, ...) apply."""

    def __init__(self, out: Path, run_id: str) -> None:
        import trackio

        self._trackio, self._id = trackio, run_id

    def start(self, config: Mapping[str, Any], name: str) -> None:
        self._run = self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=f"{name}-{self._id}",  # it resumes by name
            config=dict(config),
            resume="allow",
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, result: TrainResult | None) -> None:
        self._run.finish()


def _summary(result: TrainResult) -> dict[str, float | str]:
    names = ("best_epoch", "best_validation_score", "validation_score", "trainable_parameters", "steps", "seconds")
    return {name: getattr(result, name) for name in names}


_MADE_BY: Mapping[str, Callable[[Path, str], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
_EXTRAS = {"tensorboard": "logging", "wandb": "wandb", "trackio": "trackio"}


def required(names: Sequence[str]) -> list[str]:
    """The loggers that --log names, without `none`; `auto` is TensorBoard if it is installed.

    Raises:
        ImportError: the package of one that is named is not installed.
    """
    found = []
    for name in names:
        package = "tensorboard" if name == "auto" else name
        if name == "none" or (name == "auto" and find_spec(package) is None):
            continue
        if find_spec(package) is None:
            raise ImportError(
                f"--log {name}: the package {name} is not installed: pip install 'saffe-cache[{_EXTRAS[name]}]'."
            )
        found.append(package)
    return list(dict.fromkeys(found))


@dataclass(kw_only=True)
class _State:
    """What loggers.json holds."""

    id: str
    step: int = -1
    """The last one that was passed on."""


class Loggers:
    """All loggers of one run, none of which can stop it."""

    def __init__(self, out: Path, names: Sequence[str] = (), callbacks: Sequence[Logger] = ()) -> None:
        self._path, self._state = out / STATE, _State(id=uuid.uuid4().hex[:12])
        self._loggers: dict[str, Logger] = {}
        if (names or callbacks) and self._path.exists():
            try:
                self._state = made_of(_State, read_json(self._path))
            except (TypeError, ValueError) as error:
                logger.warning("%s is damaged (%s). Loggers start a new run.", self._path, error)
        for name in names:
            self._guarded(name, self._make, name, out)
        self._loggers |= {f"{type(one).__name__}, callback {n}": one for n, one in enumerate(callbacks, start=1)}

    def _make(self, name: str, out: Path) -> None:
        self._loggers[name] = _MADE_BY[name](out, self._state.id)

    def start(self, config: Mapping[str, Any], name: str) -> None:
        for key, one in list(self._loggers.items()):
            self._guarded(key, one.start, config, name)

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Pass a step on, unless it was logged before the run was resumed."""
        if not self._loggers or step <= self._state.step:
            return
        known = {name: value for name, value in values.items() if value is not None}
        for key, one in list(self._loggers.items()):
            self._guarded(key, one.log, step, known)
        self._state.step = step
        write_json(self._path, asdict(self._state))

    def finish(self, result: TrainResult | None) -> None:
        for key, one in list(self._loggers.items()):
            self._guarded(key, one.finish, result)
        self._loggers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """What has not finished by then was interrupted."""
        self.finish(None)

    def _guarded(self, name: str, call: Callable[..., object], *arguments: object) -> None:
        try:
            call(*arguments)
        except Exception as error:  # of any kind: a service must not cost a training
            self._loggers.pop(name, None)
            logger.warning("Logger %s failed (%s: %s). Training goes on without it.", name, type(error).__name__, error)
