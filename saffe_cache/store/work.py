"""The work that several processes share: what an extraction has to do, and how far it is.

`work/plan.json` is made once, by whichever process plans the extraction, and lies there until all is done. Everything
else of the plan lies in `work/NAME/`, so that leftovers of another plan mislead nobody: a claim for each range that a
process has begun (`claims/R.G`, see claims.py), and a mark for each finished one (`done/R`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from saffe_cache.core.features import CacheError, Modality, printable, short_hash
from saffe_cache.core.json_schema import made_of
from saffe_cache.store.claims import DEAD_AFTER_SECONDS, Watch, generations, seconds_since
from saffe_cache.store.config import StatusConfig
from saffe_cache.store.layout import ArraySpec
from saffe_cache.store.manifest import read_encoder
from saffe_cache.store.root import existing_root
from saffe_cache.store.storage import Storage, read_attributes

WORK = "work"
PLAN = f"{WORK}/plan.json"
PLANNING = f"{WORK}/planning"
"""The folder of the claim to make the plan."""
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PlannedArray:
    """An array of an encoder that grows."""

    spec: ArraySpec
    rows: int
    """When all is done."""
    is_complete: bool = False
    """Whether it had all its rows when the plan was made."""


@dataclass(frozen=True, kw_only=True)
class PlannedEncoder:
    """What one encoder's group lacks."""

    key: str
    modality: Modality
    start: int
    """The first input that is encoded."""
    num_inputs: int
    block_rows: int
    """Inputs of a block. All blocks are those of one process that encodes everything from `start` on."""
    num_truncated: int = 0
    num_absent: int = 0
    """Wanted inputs from `start` on that were not among the data."""
    arrays: Mapping[str, PlannedArray]
    edges: tuple[int, ...]
    """Range i has the inputs from edge i to edge i + 1, and owns the shards whose first row belongs to one of them."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One range of one encoder."""

    number: int
    encoder: PlannedEncoder
    inputs: range

    @property
    def name(self) -> str:
        return f"{self.number:06}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that several processes do together."""

    name: str
    version: int = _VERSION
    root: str
    """Hash of the root's attributes, which name the item table."""
    options: Mapping[str, Any]
    """Options that decide what is written; all processes must have the same."""
    record: Mapping[str, Any]
    """Config and versions for the manifests' histories."""
    encoders: tuple[PlannedEncoder, ...]

    @property
    def pieces(self) -> list[Piece]:
        found: list[Piece] = []
        for one in self.encoders:
            for first, stop in zip(one.edges, one.edges[1:], strict=False):
                found.append(Piece(number=len(found), encoder=one, inputs=range(first, stop)))
        return found

    @property
    def folder(self) -> str:
        return f"{WORK}/{self.name}"

    @property
    def claims(self) -> str:
        return f"{self.folder}/claims"

    def mark(self, piece: str) -> str:
        """Name of the file that says that a piece is finished."""
        return f"{self.folder}/done/{piece}"

    def finished(self, storage: Storage) -> set[str]:
        """Names of the finished pieces."""
        return {name.rpartition("/")[2] for name in storage.list(f"{self.folder}/done")}


def root_hash(storage: Storage) -> str:
    """Changes with the item table and the encoders."""
    return short_hash(read_attributes(storage, ""))


def create_plan(storage: Storage, plan: Plan) -> bool:
    """Make a plan known; False if there is one already."""
    return storage.create(PLAN, json.dumps(asdict(plan), indent=1).encode())


def read_plan(storage: Storage) -> Plan | None:
    """The plan under way, if there is one.

    Raises CacheError if it is damaged, or of another release.
    """
    if not storage.exists(PLAN):
        return None
    try:
        plan = made_of(Plan, storage.read_json(PLAN))
        if plan.version != _VERSION:
            raise ValueError(f"version {plan.version}, expected {_VERSION}")
    except (TypeError, ValueError) as error:
        raise CacheError(
            f"{storage.root}: {PLAN} is damaged, or of another release ({error}). Run saffe extract without --rank, "
            "which goes on without it."
        ) from None
    except CacheError:
        if storage.exists(PLAN):
            raise
        return None  # it was finished meanwhile
    return plan


@dataclass(frozen=True, kw_only=True)
class RangeState:
    """A range that some process has begun and not finished."""

    number: int
    state: str
    """running, failed or dead."""
    owner: str
    seconds: float
    """Since its last heartbeat."""
    reason: str = ""
    """Why it failed."""

    def __str__(self) -> str:
        reason = f": {self.reason}" if self.reason else ""
        return f"range {self.number}: {self.state}, {self.owner}, last heartbeat {self.seconds:.0f} s ago{reason}"


@dataclass(frozen=True, kw_only=True)
class EncoderState:
    """How far one encoder is."""

    key: str
    finished_inputs: int
    num_inputs: int
    done: int = 0
    """Finished ranges."""
    free: int = 0
    """Ranges that no process has begun."""
    begun: tuple[RangeState, ...] = ()

    def __str__(self) -> str:
        counts = Counter(one.state for one in self.begun)
        ranges = f"{self.done} done, " + "".join(f"{counts[name]} {name}, " for name in ("running", "failed", "dead"))
        lines = [f"{self.key}: {self.finished_inputs} of {self.num_inputs} inputs finished"]
        if self.done + self.free + len(self.begun):
            lines.append(f"  ranges: {ranges}{self.free} free")
        return "\n".join([*lines, *(f"  {one}" for one in self.begun)])


@dataclass(frozen=True, kw_only=True)
class CacheState:
    """How far the extraction into a cache is."""

    cache: str
    is_planned: bool
    """Whether several processes share a plan that is not finished."""
    planner: str = ""
    """Who makes a plan now."""
    encoders: Sequence[EncoderState]
    as_json: bool = field(default=False, repr=False)

    @property
    def exit_status(self) -> int:
        return 0

    def __str__(self) -> str:
        if self.as_json:
            return json.dumps({name: value for name, value in asdict(self).items() if name != "as_json"}, indent=1)
        head = "an extraction by several processes is unfinished" if self.is_planned else "no shared work"
        planner = f"; {self.planner} makes the plan" if self.planner else ""
        lines = "\n".join([f"{self.cache}: {head}{planner}", *map(str, self.encoders)])
        return "\n".join(map(printable, lines.split("\n")))


def cache_status(config: StatusConfig) -> CacheState:
    """How far the extraction into a cache is, by encoder and range.

    Raises:
        CacheError: there is no cache, and nobody plans one.
    """
    storage = Storage(config.cache)
    planner = ""
    for piece, generation in generations(storage, PLANNING).items():
        holder, silent = Watch(storage).look(f"{PLANNING}/{piece}.{generation}")
        if holder and silent < DEAD_AFTER_SECONDS and seconds_since(holder) < DEAD_AFTER_SECONDS:
            planner = str(holder)
    plan = read_plan(storage)
    planned = {one.key: one for one in plan.encoders} if plan else {}
    keys = existing_root(storage).encoders if not planner or storage.exists("zarr.json") else ()
    return CacheState(
        cache=config.cache,
        is_planned=plan is not None,
        planner=planner,
        encoders=[_encoder_state(storage, key, plan, planned.get(key)) for key in keys],
        as_json=config.json,
    )


def _encoder_state(storage: Storage, key: str, plan: Plan | None, planned: PlannedEncoder | None) -> EncoderState:
    manifest = read_encoder(storage, key)
    if plan is None or planned is None:
        return EncoderState(key=key, finished_inputs=manifest.finished_rows, num_inputs=manifest.finished_rows)
    finished, taken = plan.finished(storage), generations(storage, plan.claims)
    pieces = [piece for piece in plan.pieces if piece.encoder.key == key]
    begun = [piece for piece in pieces if piece.name in taken and piece.name not in finished]
    done = [piece for piece in pieces if piece.name in finished]
    states = [_range_state(storage, piece, f"{plan.claims}/{piece.name}.{taken[piece.name]}") for piece in begun]
    return EncoderState(
        key=key,
        finished_inputs=planned.start
        + sum(max(0, piece.inputs.stop - max(piece.inputs.start, planned.start)) for piece in done),
        num_inputs=planned.num_inputs,
        done=len(done),
        free=len(pieces) - len(done) - len(begun),
        begun=tuple(states),
    )


def _range_state(storage: Storage, piece: Piece, claim: str) -> RangeState:
    holder, _ = Watch(storage).look(claim)
    if holder is None:
        return RangeState(
            number=piece.number, state="dead", owner="unknown", seconds=0.0, reason="its claim is damaged"
        )
    seconds = seconds_since(holder)
    state = "failed" if holder.failed else "dead" if holder.has_ended or seconds > DEAD_AFTER_SECONDS else "running"
    return RangeState(
        number=piece.number, state=state, owner=str(holder), seconds=round(seconds, 1), reason=holder.failed or ""
    )
