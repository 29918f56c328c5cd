"""The processes that torchrun starts for one command: who this one is, what each does, and what they tell one another.

All ranks run the same program on the same data. A few loops are divided among them (the photos of a batch, blocks of
photos to encode); what each made is gathered, so that all have the same numbers afterwards and take the same decisions.
Only the first rank writes files and reports. Outside torchrun there is one rank, and everything here does nothing.

Who a process is stands in torchrun's RANK, LOCAL_RANK and WORLD_SIZE. Tensors on a GPU travel by NCCL, others by gloo;
nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch

_MINUTES = 10
"""How long ranks wait for one another before they give up."""
_SIGNS = ("gloo", "nccl", "connection", "socket", "timed out")
"""Parts of RuntimeErrors that mean that another rank is gone, in lower case."""

_Value = TypeVar("_Value")


class RankLostError(OSError):
    """Another rank has ended, or does not answer."""


@dataclass(frozen=True)
class _Group:
    """The ranks of a command, once they have met."""

    rank: int
    size: int


_ALONE = _Group(0, 1)
_group = _ALONE
_reports: Any = None
"""Where the ranks note which of them reports an error; None if they have not met."""
_drawn: Share | None = None


def started() -> tuple[int, int]:
    """The number of this process, from 0, and of how many, as torchrun told them; (0, 1) outside it."""
    known = {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if known else (0, 1)


def size() -> int:
    """How many ranks share the work."""
    return _group.size


def is_first() -> bool:
    """Whether this is the rank that writes and reports."""
    return _group.rank == 0


def on_this_host() -> int:
    """How many of the ranks share this machine's cores and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size())) if size() > 1 else 1


def own_gpu(num_gpus: int) -> str:
    """The GPU of this rank among those of its machine; ValueError if there are fewer than ranks."""
    number = int(os.environ["LOCAL_RANK"]) if size() > 1 else 0
    if number >= num_gpus:
        found = f"{num_gpus} on this machine for {on_this_host()} ranks"
        raise ValueError(f"GPUs: {found}, expected one for each. Give torchrun --nproc-per-node {num_gpus}.")
    return f"cuda:{number}" if size() > 1 else "cuda"


@contextmanager
def together() -> Iterator[None]:
    """Meet the other ranks that torchrun started; they part at the end.

    Raises:
        RankLostError: another rank ended, or did not answer for ten minutes.
    """
    global _group, _reports
    if started()[1] == 1:
        yield
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns where all parameters are used
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    limit = timedelta(minutes=_MINUTES)
    try:
        store, rank, count = next(rendezvous("env://", timeout=limit))
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpu else "gloo", store=store, rank=rank, world_size=count, timeout=limit
        )
        _group, _reports = _Group(rank, count), PrefixStore("saffe", store)
        yield
        distributed.all_reduce(torch.zeros(1))  # the first one may still be writing
        distributed.destroy_process_group()
    except RuntimeError as error:
        what = re.sub(r"^\[[^]]*\] *", "", str(error).strip()).split(". ")[0]  # without gloo's place in its source
        if not isinstance(error, distributed.DistError) and not any(sign in str(error).lower() for sign in _SIGNS):
            raise
        raise RankLostError(
            f"rank {started()[0]} of {started()[1]}: another rank has ended, or did not answer for {_MINUTES} minutes "
            f"({what:.120}). See its own message, and run the same command again to resume."
        ) from None
    finally:
        _group = _ALONE


def may_report() -> bool:
    """Whether this rank tells why the command failed: of several, the first one that asks."""
    try:
        return started()[0] == 0 if _reports is None else bool(_reports.add("count", 1) == 1)
    except RuntimeError:  # torchrun, which keeps the count, is gone
        return started()[0] == 0


@contextmanager
def only_first_is_heard() -> Iterator[None]:
    """All ranks refuse options in the same words: what others print is dropped, and they end after the first."""
    if not started()[0]:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            yield
        except SystemExit:
            time.sleep(5)  # torchrun ends the first one as soon as another ends
            raise


def shares(count: int) -> list[int]:
    """How many of `count` rows each rank has: in order, and as equal as they can be."""
    edges = [count * rank // size() for rank in range(size() + 1)]
    return [stop - start for start, stop in pairwise(edges)]


@dataclass(frozen=True)
class Share:
    """Which rows of a batch this rank has."""

    total: int
    own: slice | torch.Tensor
    """Or their positions, int64, ascending. A rank that has none computes the first row too, in vain: no module has to
    work without rows."""
    counts: Sequence[int]
    """Of each rank."""
    owners: torch.Tensor | None = None
    """int64 [total]: the rank that has each row; None if the ranks have theirs one after another."""

    @property
    def start(self) -> int:
        """The first own row, where the ranks have theirs one after another."""
        return sum(self.counts[: _group.rank])

    @classmethod
    def of(cls, count: int) -> Share:
        """Equal shares, one after another."""
        counts, rank = shares(count), _group.rank
        start = sum(counts[:rank])
        own = slice(start, start + counts[rank]) if counts[rank] or not count else slice(0, 1)
        return cls(count, own, counts)

    @property
    def num_own(self) -> int:
        return self.counts[_group.rank]

    def owning(self, rows: torch.Tensor) -> Share:
        """The same for things that belong to some of these rows, int64 [things]: each is where its row is."""
        if size() == 1:
            return Share.of(len(rows))
        import torch

        owners = torch.repeat_interleave(torch.tensor(self.counts)).to(rows.device)[rows]
        counts = owners.bincount(minlength=size()).tolist()
        own = (owners == _group.rank).nonzero().squeeze(1)
        return Share(len(rows), own if len(own) else own.new_zeros(1), counts, owners)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """All rows [total, ...] from each rank's own.

        The gradient reaches the own rows alone, multiplied by the number of ranks. It is right if all ranks compute the
        same from the result, and the gradients of parameters are averaged over ranks, as DistributedDataParallel does.
        """
        if size() == 1:
            return values
        import torch

        values = values[: self.num_own]
        parts = _all_parts(values.detach(), self.counts)
        mine = values.view_as(values)  # in its place, for the gradient
        if mine.requires_grad:
            mine.register_hook(lambda gradient: gradient * size())  # type: ignore[no-untyped-call]
        parts[_group.rank] = mine
        rows = torch.cat(parts)
        return rows if self.owners is None else rows[self.owners.argsort(stable=True).argsort()]

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Modules that draw at random for their rows draw for all, and take their own: the same as one process."""
        global _drawn
        before, _drawn = _drawn, self if size() > 1 else None
        try:
            yield
        finally:
            _drawn = before


def drawn_rows() -> Share | None:
    """The rows that a module computes now, if others compute more of the same batch."""
    return _drawn


def _all_parts(values: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    """Every rank's rows; shorter ones travel with rows of zeros."""
    import torch
    from torch import distributed

    most = max(counts)
    padded = values.new_zeros(most, *values.shape[1:])
    padded[: len(values)] = values
    found = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(found, padded)
    return [part[:count] for part, count in zip(found, counts, strict=True)]


def concatenated(blocks: Sequence[slice], compute: Callable[[slice], np.ndarray]) -> np.ndarray:
    """What is computed of blocks of rows, one after another; each rank computes some of the blocks, and all get all."""
    import numpy as np

    if size() == 1:
        return np.concatenate([compute(block) for block in blocks])
    import torch

    edges = [0, *np.cumsum(shares(len(blocks)))]
    of_ranks = [blocks[start:stop] for start, stop in pairwise(edges)]
    counts = [sum(block.stop - block.start for block in of_rank) for of_rank in of_ranks]
    # a rank without a block computes the first one in vain, for the shape and type of a row
    found = [compute(block) for block in of_ranks[_group.rank] or blocks[:1]]
    own = np.concatenate(found)[: counts[_group.rank]]
    return np.concatenate([part.numpy() for part in _all_parts(torch.from_numpy(own), counts)])


def own_part(things: Sequence[_Value]) -> Sequence[_Value]:
    """Those that this rank takes on: equal shares, one after another."""
    counts = shares(len(things))
    start = sum(counts[: _group.rank])
    return things[start : start + counts[_group.rank]]


def from_all(own: np.ndarray) -> list[np.ndarray]:
    """The arrays of all ranks, which are of one shape."""
    if size() == 1:
        return [own]
    import torch

    return [part.numpy() for part in _all_parts(torch.from_numpy(own), [len(own)] * size())]


def from_first(make: Callable[[], bytes]) -> bytes:
    """What the first rank makes, on all; the others do not call `make`."""
    if size() == 1:
        return make()
    import torch
    from torch import distributed

    data = make() if is_first() else b""
    length = torch.tensor([len(data)])
    distributed.broadcast(length, 0)
    content = torch.empty(int(length), dtype=torch.uint8)
    if is_first() and data:
        content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    distributed.broadcast(content, 0)
    return content.numpy().tobytes()


def agreed(make: Callable[[], _Value]) -> _Value:
    """A JSON value that the first rank makes, on all: what is true of its files, or was decided by its clock."""
    if size() == 1:
        return make()
    value: _Value = json.loads(from_first(lambda: json.dumps(make()).encode()))
    return value
