"""An extraction on a Ray cluster: one actor for each GPU, or for a few cores, takes one range after another.

Everything that lasts is in the cache: the plan (`shared_plan.py`), claims, shards and their records (`workers.py`). The
driver only hands out numbers of ranges and gets counts back; no rows cross Ray's object store. Ray starts an actor
again that died, and repeats its range there; what it had stored is kept. An actor whose node is gone is given up, and
its range goes to another one. Nodes that join the cluster get actors, so a run grows and shrinks with it. If the driver
dies, Ray ends its actors, and the same command, run again, finishes what is left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from tqdm import tqdm

from saffe_cache import __version__
from saffe_cache.core.devices import num_cores
from saffe_cache.core.features import CacheError
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.shared_plan import refuse_objects
from saffe_cache.extraction.workers import Worker

logger = logging.getLogger(__name__)

_CORES = 4
"""Of a worker without a GPU; a node with fewer has one worker."""
_RETRIES = 4
"""Times that Ray repeats a range whose actor died."""
_MOST_DEATHS = 3
"""Times that a range is handed out though the actors that had it died, each `_RETRIES` + 1 times."""
_LOOK_SECONDS = 1.0
"""Between two looks at the nodes, and at how far the actors are."""
_PATIENCE_SECONDS = 30.0
"""After which the driver says that the cluster has no room."""
_SILENT_SECONDS = 300.0
"""After which an actor that answers nothing is given up: perhaps Ray finds no room to start it again."""
_BESIDE = "beside"
"""Ray's name for calls that are answered while an actor encodes."""
_CONNECT_SECONDS = 10.0
_OBJECT_STORE_BYTES = 128 * 2**20
"""Of a cluster of this machine alone; only counts cross it."""


def extract_on_ray(config: ExtractConfig) -> str:
    """Extract with the workers of a Ray cluster; returns the cache's path.

    Raises:
        CacheError: as of `extract`; or a range's workers died again and again.
        ValueError, OSError: as of `extract`; or no cluster answers.
        ImportError: Ray is not installed.
    """
    refuse_objects(config)
    ray = _load_ray()
    with _connected(ray, config.ray_address):
        is_asked = False
        while not is_asked:
            driver = _Driver(ray, config)
            try:
                driver.run()
            finally:
                driver.close()
            is_asked = not driver.found_plan
    return config.cache


def _load_ray() -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ModuleNotFoundError as error:
        raise ImportError(f"--workers-on ray needs the package {error.name}: pip install 'saffe-cache[ray]'.") from None
    return ray


@contextlib.contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """Be a driver of a running cluster, or of one of this machine alone, which ends with this.

    Ray's messages of dead workers go to the standard output, where they are not wanted; the driver has its own. Its
    handler of SIGTERM would end the command with another status.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if address == "local":
        options |= {"num_cpus": num_cores(), "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    else:
        _check_address(address)
    is_main = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            try:
                ray.init(address, **options)
            except (ConnectionError, RuntimeError) as error:
                raise ConnectionError(_no_cluster(address, str(error))) from None
            finally:
                if is_main:
                    signal.signal(signal.SIGTERM, on_sigterm)
            yield
        finally:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Ray itself would try for minutes.

    Raises:
        ConnectionError: nothing answers there.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(_no_cluster(address, str(error))) from None


def _no_cluster(address: str, error: str) -> str:
    what = (error.splitlines() or ["no answer"])[0].rstrip(".")
    return (
        f"--ray-address {address}: found no Ray cluster there ({what}). Start one with `ray start --head`, or omit the "
        "option to use this machine alone."
    )


@dataclass(frozen=True)
class _Begun:
    """What an actor says when it is ready."""

    host: str
    version: str
    left: Mapping[int, int]
    """Number of inputs of each range that is not finished."""
    found_plan: bool
    """Whether the plan was there before."""


@dataclass(frozen=True)
class _Ran:
    """What an actor says of a range."""

    is_finished: bool
    """If not, another process has it."""
    num_encoded: int
    seconds: float


@dataclass(frozen=True)
class _News:
    """What an actor says from time to time."""

    num_encoded: int
    """Since it was asked before."""
    lines: Sequence[tuple[int, str]]
    """Levels and texts of new log lines."""


class _Lines(logging.Handler):
    """Keeps log lines until the driver asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[tuple[int, str]] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append((record.levelno, record.getMessage()))

    def take(self) -> list[tuple[int, str]]:
        return [self._lines.popleft() for _ in range(len(self._lines))]


class _Actor:
    """A worker in a process of its own. Its encoders are loaded once, by the first method that needs them.

    What a constructor raises, Ray would pass on as text alone.
    """

    def __init__(self, config: ExtractConfig, owner: str, crew: str, folder: str) -> None:
        """`folder`: where the command was started."""
        with contextlib.suppress(OSError):  # paths may well be absolute, or URLs
            os.chdir(folder)
        self._arguments, self._plans, self._seen = (config, owner, crew), False, 0
        self._worker: Worker | None = None
        self._lines = _Lines()
        logging.getLogger("saffe_cache").setLevel(logging.INFO)
        logging.getLogger("saffe_cache").addHandler(self._lines)

    def begin(self, plans: bool) -> _Begun:
        """`plans`: make a plan, if there is none."""
        self._plans = plans
        worker = self._ready()
        self._plans = False
        finished = worker.finished()
        left = {number: count for number, count in enumerate(worker.range_inputs) if number not in finished}
        return _Begun(socket.gethostname(), __version__, left, worker.found_plan)

    def run(self, number: int) -> _Ran:
        worker, started = self._ready(), time.perf_counter()
        if worker.plan is None:  # all was finished while this process started
            return _Ran(True, 0, 0.0)
        done = worker.run(number)
        is_finished = done is not None or number in worker.finished()
        return _Ran(is_finished, done.num_encoded if done else 0, time.perf_counter() - started)

    def finish(self) -> None:
        """Complete the manifests."""
        self._ready().run_all()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()

    def news(self) -> _News:
        """Called beside the other methods."""
        num_encoded = self._worker.num_encoded if self._worker else 0
        before, self._seen = self._seen, num_encoded
        return _News(num_encoded - before, self._lines.take())

    def _ready(self) -> Worker:
        if self._worker is None:
            config, owner, crew = self._arguments
            self._worker = Worker(config, owner, crew=crew, plans=self._plans, shows_progress=False)
        return self._worker


@dataclass(frozen=True)
class _Place:
    """Room for one worker on a node."""

    node: str
    number: int
    num_gpus: float
    num_cpus: int


def _places(nodes: Sequence[Mapping[str, Any]], gpus_per_worker: float) -> list[_Place]:
    """Room for one worker per `gpus_per_worker` GPUs; for one per few cores where no node has them, or 0 are asked."""
    alive = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}
    uses_gpus = gpus_per_worker > 0 and any(one.get("GPU", 0) >= gpus_per_worker for one in alive.values())
    found = []
    for node, resources in alive.items():
        cores = int(resources.get("CPU", 0))
        count = int(resources.get("GPU", 0) / gpus_per_worker) if uses_gpus else cores and max(1, cores // _CORES)
        gpus = gpus_per_worker if uses_gpus else 0.0
        found += [_Place(node, number, gpus, cores // count) for number in range(count)]
    return found


@dataclass(eq=False)
class _Hired:
    """An actor, as the driver knows it."""

    place: _Place
    name: str
    actor: Any
    heard: float
    """When it said something, by this process's clock."""
    host: str = ""
    """Known once it is ready."""
    number: int | None = None
    """The range that it has."""
    is_idle: bool = False
    asks: dict[Any, str] = field(default_factory=dict)
    """What it was asked and has not answered, by the object that will hold the answer."""
    num_encoded: int = 0
    seconds: float = 0.0


class _Driver:
    """Hires actors, hands out ranges, and shows how far they are."""

    def __init__(self, ray: Any, config: ExtractConfig) -> None:
        self._ray, self._config, self._crew, self._num_hired = ray, config, secrets.token_hex(6), 0
        self._actors = ray.remote(
            max_restarts=-1, max_task_retries=_RETRIES, concurrency_groups={_BESIDE: 1}, max_concurrency=1
        )(_Actor)
        self._hired: dict[_Place, _Hired] = {}
        self._left: dict[int, int] | None = None
        """Number of inputs of each range that is not finished; None before the first actor has planned."""
        self._free: deque[int] = deque()
        self._deaths: Counter[int | str] = Counter()
        """By range; of actors that had none, by node."""
        self._told: set[str] = set()
        self._started, self._is_finished = time.monotonic(), False
        self.found_plan = False
        """Whether it was left by others, who may have known less of the data, or not all encoders."""
        self._bar: tqdm[Any] | None = None

    def run(self) -> None:
        """Until all ranges are finished and the manifests complete."""
        looked = -_LOOK_SECONDS
        while not self._is_finished:
            if time.monotonic() - looked >= _LOOK_SECONDS:
                looked = time.monotonic()
                self._hire(self._ray.nodes())
                self._ask_all()
            self._let_begin()
            self._hand_out()
            asked = [ref for one in self._hired.values() for ref in one.asks]
            if not asked:
                time.sleep(_LOOK_SECONDS)
                continue
            for ref in self._ray.wait(asked, timeout=_LOOK_SECONDS)[0]:
                self._take(ref)

    def close(self) -> None:
        """Say how fast the actors were, and let them leave the cache: the last one removes the file of the lock."""
        if self._bar is not None:
            self._bar.close()
        for one in self._hired.values():
            if one.seconds:
                rate = one.num_encoded / one.seconds
                logger.info("%s, host %s: %d inputs, %.1f per second.", one.name, one.host, one.num_encoded, rate)
        asked = "begin" if self._is_finished else None
        begun = [one for one in self._hired.values() if one.is_idle or asked in one.asks.values()]
        leaving = [one.actor.close.remote() for one in begun]
        if leaving:
            self._ray.wait(leaving, num_returns=len(leaving), timeout=_CONNECT_SECONDS)

    def _hire(self, nodes: Sequence[Mapping[str, Any]]) -> None:
        """An actor for each place that has none. The first one plans, while the others start their processes."""
        config, strategy = self._config, self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        places = _places(nodes, 0.0 if config.device == "cpu" else config.gpus_per_worker)
        for place in places:
            if place in self._hired:
                continue
            name = f"Ray worker {self._num_hired}"
            mine = replace(
                config,
                workers_on=None,
                ray_address=None,
                device="cpu" if config.device == "auto" and not place.num_gpus else config.device,
                workers=config.workers or max(4, place.num_cpus),
                rank=self._num_hired % len(places),
                world_size=len(places),
            )
            actor = self._actors.options(
                num_cpus=place.num_cpus,
                num_gpus=place.num_gpus,
                scheduling_strategy=strategy(place.node, soft=False),
            ).remote(mine, name, self._crew, os.getcwd())
            self._num_hired += 1
            self._hired[place] = _Hired(place, name, actor, time.monotonic())
        if not any(one.host for one in self._hired.values()) and time.monotonic() - self._started > _PATIENCE_SECONDS:
            self._tell(
                logging.INFO,
                f"Waiting for a worker: the cluster has room for {len(places)}, and none of them is ready yet.",
            )

    def _ask_all(self) -> None:
        """Ask for news, and give up those that answer nothing."""
        for one in list(self._hired.values()):
            if "news" not in one.asks.values():
                ask = one.actor.news.options(concurrency_group=_BESIDE, max_task_retries=0)
                one.asks[ask.remote()] = "news"
            if one.host and time.monotonic() - one.heard > _SILENT_SECONDS:
                self._lose(one, f"it was silent for {_SILENT_SECONDS:.0f} s")

    def _let_begin(self) -> None:
        """Let new actors begin: one alone until there is a plan, and none that would find nothing to do."""
        asked = [one for one in self._hired.values() if one.host or "begin" in one.asks.values()]
        new = [one for one in self._hired.values() if one not in asked]
        if not self._left:
            new = new[: not asked]
        for one in new:
            one.asks[one.actor.begin.remote(self._left is None)] = "begin"

    def _hand_out(self) -> None:
        """Give idle actors ranges; when none is left, let one complete the manifests."""
        idle = [one for one in self._hired.values() if one.is_idle]
        for one in idle:
            if self._free:
                one.number, one.is_idle = self._free.popleft(), False
                one.asks[one.actor.run.remote(one.number)] = "run"
        is_finishing = any("finish" in one.asks.values() for one in self._hired.values())
        if self._left == {} and idle and not is_finishing:
            idle[0].asks[idle[0].actor.finish.remote()] = "finish"

    def _take(self, ref: Any) -> None:
        """Take an answer."""
        hired = next(one for one in self._hired.values() if ref in one.asks)
        what = hired.asks.pop(ref)
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            _raise_cause(error, hired)
        except self._ray.exceptions.RayError as error:
            if what != "news":
                self._lose(hired, str(error))
            return
        hired.heard = time.monotonic()
        if what == "begin":
            self._begin(hired, answer)
        elif what == "news":
            self._show(hired, answer)
        elif what == "run":
            self._end_range(hired, answer)
        else:
            self._is_finished = True
            if self._bar is not None:
                self._bar.update((self._bar.total or 0) - self._bar.n)

    def _begin(self, hired: _Hired, begun: _Begun) -> None:
        if begun.version != __version__:
            raise CacheError(
                f"{hired.name}, host {begun.host}: saffe_cache is of version {begun.version} there, of {__version__} "
                "here. Install the same version on all nodes."
            )
        hired.host, hired.is_idle = begun.host, True
        if self._left is None:
            self._left, self.found_plan = dict(begun.left), begun.found_plan
            self._free.extend(self._left)
            self._bar = tqdm(total=sum(self._left.values()), unit=" inputs", desc="Ray")

    def _end_range(self, hired: _Hired, ran: _Ran) -> None:
        assert hired.number is not None
        assert self._left is not None
        hired.num_encoded += ran.num_encoded
        hired.seconds += ran.seconds
        if ran.is_finished:
            self._left.pop(hired.number)
        else:
            self._free.append(hired.number)
            time.sleep(_LOOK_SECONDS / 4)  # another process has it, until it is finished or found dead
        hired.number, hired.is_idle = None, True

    def _show(self, hired: _Hired, news: _News) -> None:
        for level, text in news.lines:
            self._tell(level, text)
        if self._bar is not None and self._left is not None:
            ready = sum(bool(one.host) for one in self._hired.values())
            self._bar.set_postfix_str(f"{len(self._left)} ranges left, workers: {ready}", refresh=False)
            self._bar.update(min(news.num_encoded, sum(self._left.values())))

    def _tell(self, level: int, text: str) -> None:
        """Log what actors have to say, once."""
        if text not in self._told:
            self._told.add(text)
            logger.log(level, "%s", text)

    def _lose(self, hired: _Hired, error: str) -> None:
        """Put an actor's range back. The node gets another actor, if it is still there.

        Raises:
            CacheError: this has happened too often.
        """
        del self._hired[hired.place]
        self._ray.kill(hired.actor, no_restart=True)
        if hired.number is not None:
            self._free.appendleft(hired.number)
        what = (error.strip().splitlines() or ["unknown"])[-1].strip()
        if hired.place.node not in {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}:
            range_ = "" if hired.number is None else f", and another worker takes its range {hired.number}"
            logger.warning("%s: its node, host %s, is gone%s.", hired.name, hired.host or "unknown", range_)
            return
        case: int | str = hired.place.node if hired.number is None else hired.number
        self._deaths[case] += 1
        logger.warning("%s, host %s: it died: %s", hired.name, hired.host or "unknown", what)
        if self._deaths[case] >= _MOST_DEATHS:
            where = f"range {case}" if hired.number is not None else f"the node {case}"
            raise CacheError(
                f"{self._config.cache}: workers of {where} died again and again ({what}), perhaps for lack of memory. "
                "Run the same command again to resume, with a smaller --batch-tokens or fewer --workers."
            )


def _raise_cause(error: Any, hired: _Hired) -> NoReturn:
    """What the actor raised; errors of its host's disk name the host."""
    cause = error.cause
    if isinstance(cause, OSError) and cause.errno is not None:
        raise OSError(cause.errno, cause.strerror, f"host {hired.host}: {cause.filename or 'a file'}") from None
    if isinstance(cause, (OSError, CacheError, ValueError, ImportError, MemoryError)):
        raise cause from None
    raise error
