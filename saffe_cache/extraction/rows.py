"""What the encoder made of one block of inputs, as rows of the arrays that lack them, in their storage types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from saffe_cache.core.features import CacheError
from saffe_cache.encoders.encoder import Encoded, Launched
from saffe_cache.extraction.loading import Batch
from saffe_cache.extraction.planning import Job
from saffe_cache.store.dtypes import Stored, as_tensor, convert, to_storage
from saffe_cache.store.layout import ArraySpec
from saffe_cache.store.writer import Portion


class PortionMaker:
    """Takes the batches of a job in order, and gives a portion at the end of each block."""

    def __init__(self, job: Job, specs: Mapping[str, ArraySpec]) -> None:
        """`specs`: the arrays that rows are made for."""
        self._job, self._specs = job, specs
        self._rows: BlockRows | None = None

    def take(self, batch: Batch, parts: Sequence[Launched]) -> Portion | None:
        """
        Raises:
            CacheError: a finite number does not fit into the storage type.
        """
        if self._rows is None:
            self._rows = BlockRows(self._job, batch.block, self._specs)
        self._rows.invalid.update(batch.unreadable)
        done = 0
        for part in parts:
            encoded = part.encoded()
            self._rows.put(batch.inputs[done : done + len(encoded.lengths)], encoded)
            done += len(encoded.lengths)
        if not batch.ends_block:
            return None
        portion, self._rows = self._rows.to_portion(), None
        return portion


class BlockRows:
    """Batches of a block are put here in any order; what no batch brings becomes rows of NaN."""

    def __init__(self, job: Job, block: range, specs: Mapping[str, ArraySpec]) -> None:
        """`specs`: the arrays that lack rows."""
        self._job, self._block, self._specs = job, block, specs
        self._first = {name: job.first_row(name, block.start) for name in specs}
        self._stored: dict[str, np.ndarray] = {}
        self._lacking = set(block)
        self.invalid: dict[int, str] = {}

    def put(self, inputs: Sequence[int], encoded: Encoded) -> None:
        """Place a batch: one row of `encoded` for each input. Inputs with non-finite numbers are noted as invalid.

        Raises:
            CacheError: a finite number does not fit into the storage type.
        """
        owners = np.asarray(inputs)
        for name in self._specs:
            if self._job.is_flat(name):
                lengths = encoded.lengths
                self._put(name, self._rows(name, encoded), np.repeat(owners, lengths), _counted(lengths))
            else:
                self._put(name, self._rows(name, encoded), owners)
        self._lacking -= set(inputs)

    def _rows(self, name: str, encoded: Encoded) -> Stored:
        """What a batch brings to one array, converted here unless the device has done so; without padding."""
        converted = {f"hidden_states/{i}": Stored(*parts) for i, parts in encoded.converted.items()}
        stored = converted.get(name)
        states = {f"hidden_states/{i}": states for i, states in encoded.states.items()}
        values = stored.rows if stored else as_tensor((states | dict(encoded.vectors))[name])
        if not self._job.is_flat(name):
            return stored or convert(values, self._specs[name].dtype)
        is_real = torch.arange(values.shape[1]) < torch.from_numpy(encoded.lengths)[:, None]
        return stored.select(is_real) if stored else convert(values[is_real], self._specs[name].dtype)

    def to_portion(self) -> Portion:
        """All rows of the block."""
        if self._lacking:
            assert self._job.offsets is None, "a text can always be read"
            lacking = np.array(sorted(self._lacking))
            for name, spec in self._specs.items():
                nothing = to_storage(np.full((1, *spec.row_shape), np.nan, np.float32), spec.dtype)
                self._room(name)[self._places(name, lacking)] = nothing
        return Portion({name: (self._first[name], self._stored[name]) for name in self._specs}, self.invalid)

    def _put(self, name: str, rows: Stored, owners: np.ndarray, within: np.ndarray | int = 0) -> None:
        """Rows of one array: the input that each belongs to, and its place among the rows of that input."""
        is_finite = rows.is_finite.reshape(len(owners), -1).all(dim=1).numpy()
        for owner in np.unique(owners[~is_finite]):
            self.invalid.setdefault(int(owner), f"{name} is not finite")
        stored = self._checked(name, rows, owners)
        if not self._job.is_flat(name) and np.array_equal(owners, self._block):
            # the whole block, in order; copied only where it is a part of something larger, which would be kept with it
            self._stored[name] = np.ascontiguousarray(stored)
        else:
            self._room(name)[self._places(name, owners, within)] = stored

    def _checked(self, name: str, rows: Stored, owners: np.ndarray) -> np.ndarray:
        try:
            return rows.to_numpy(self._specs[name].dtype)
        except OverflowError as error:
            worst = int(rows.lost.reshape(len(owners), -1).amax(dim=1).argmax())
            raise CacheError(
                f"{self._job.manifest.key}: {name} of input {owners[worst]}: {error}. "
                "Extract into a new cache with --storage bfloat16 or float32."
            ) from None

    def _room(self, name: str) -> np.ndarray:
        if name not in self._stored:
            spec = self._specs[name]
            self._stored[name] = np.empty((self._num_rows(name), *spec.stored_shape), spec.numpy_dtype)
        return self._stored[name]

    def _num_rows(self, name: str) -> int:
        return self._job.first_row(name, self._block.stop) - self._first[name]

    def _places(self, name: str, owners: np.ndarray, within: np.ndarray | int = 0) -> np.ndarray:
        """Where rows of inputs stand in the block's rows of an array."""
        firsts = owners
        if self._job.is_flat(name):
            assert self._job.offsets is not None
            firsts = self._job.offsets[owners]
        return np.asarray(firsts - self._first[name] + within)


def _counted(lengths: np.ndarray) -> np.ndarray:
    """0 … n - 1 for each length n, one after the other."""
    counted: np.ndarray = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return counted
