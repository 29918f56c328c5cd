"""Copy batches to the device and its results back, while it computes.

On a GPU each direction has its own stream: batch i + 1 is copied to the device and batch i - 1 is copied back while
batch i is computed, and the launching thread waits for neither. On other devices the calls return when they are done.

A batch that does not fit into memory is encoded in halves. How it is split depends only on its shape and the available
memory, not on earlier batches: it is tried as a whole, tried again with nothing else in flight, and then split in the
middle, each half in the same way. Shapes that failed are remembered, which only skips attempts that would fail. A
resumed extraction therefore splits the same batches as an uninterrupted one and produces the same bytes, as long as the
encoder has the same memory. If other programs take memory, numbers may differ by rounding, because a matrix product of
another height may add in another order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saffe_cache.core.devices import is_out_of_memory
from saffe_cache.core.features import CacheError

if TYPE_CHECKING:
    from saffe_cache.encoders.encoder import FrozenEncoder

logger = logging.getLogger(__name__)

Converted = tuple[torch.Tensor, ...]
"""Stored hidden states [batch, tokens, …], and further results of their conversion, [batch, tokens]."""


Converter = Callable[[torch.Tensor], Converted]
"""Converts hidden states [batch, tokens, hidden_size] on their device."""


@dataclass(frozen=True)
class Encoded:
    """The output for one batch, on the CPU."""

    states: Mapping[int, np.ndarray]
    """`hidden_states[i]`, float32 [batch, tokens, hidden_size], or convolutional [batch, positions, channels]."""
    vectors: Mapping[str, np.ndarray]
    """"pooled" and, if the model has a projection, "projected", float32 [batch, d]."""
    lengths: np.ndarray
    """int64 [batch]: number of real tokens; for feature maps, whose size differs by layer, positions of the first."""
    converted: Mapping[int, Converted] = field(default_factory=dict)
    """Hidden states that the device converted; these are not in `states`."""


class Launched:
    """A batch on the device, in the type of the forward pass or of the storage."""

    def __init__(
        self,
        states: Mapping[int, torch.Tensor],
        vectors: Mapping[str, torch.Tensor],
        lengths: np.ndarray,
        event: Any,
        converted: Mapping[int, Converted] | None = None,
    ) -> None:
        self._states, self._vectors, self._lengths, self._event = states, vectors, lengths, event
        self._converted = converted or {}
        parts = [*states.values(), *vectors.values(), *chain.from_iterable(self._converted.values())]
        self.num_bytes = sum(tensor.nbytes for tensor in parts)

    def wait(self) -> None:
        """Wait until the device has finished it; then its inputs may be overwritten."""
        if self._event is not None:
            self._event.synchronize()

    def encoded(self) -> Encoded:
        """Wait, and convert to float32. A float32 pass on a CPU is not copied."""
        self.wait()
        return Encoded(
            {i: values.float().numpy() for i, values in self._states.items()},
            {name: values.float().numpy() for name, values in self._vectors.items()},
            self._lengths,
            self._converted,
        )


class Transfers:
    """Copies between the CPU and one device."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._is_cuda = self._device.type == "cuda"
        if self._is_cuda:
            self._there = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._back = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def to_device(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Copy tensors to the device, converting floating-point ones. They must not change until they are copied."""
        if not self._is_cuda:
            return {name: _moved(value, self._device, dtype) for name, value in tensors.items()}
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._there):
            moved = {name: _moved(value, self._device, dtype) for name, value in tensors.items()}
        computing.wait_stream(self._there)
        for value in moved.values():
            value.record_stream(computing)  # its memory is not reused before the computation has finished
        return moved

    def to_host(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
        """Copy tensors to the CPU; they are valid once the event, if there is one, has happened."""
        if not self._is_cuda:
            return [tensor.to("cpu") for tensor in tensors], None
        self._back.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._back):
            hosted = [_copied_back(tensor) for tensor in tensors]
            for tensor in tensors:
                tensor.record_stream(self._back)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._back)
        return hosted, event

    def free_memory(self) -> None:
        """Wait for all computation, and release memory that only the allocator holds."""
        if self._is_cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    @contextmanager
    def pinned(self, memory: torch.Tensor) -> Iterator[None]:
        """Pin memory so that a GPU can copy it while it computes."""
        if not self._is_cuda:
            yield
            return
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)))
        try:
            yield
        finally:
            torch.cuda.synchronize(self._device)
            runtime.cudaHostUnregister(memory.data_ptr())


class HalvingEncoder:
    """Launches the batches of one encoder, in halves where they do not fit into memory."""

    def __init__(self, encoder: FrozenEncoder) -> None:
        self._encoder = encoder
        self.too_large: list[tuple[int, ...]] = []
        """Shapes that did not fit: the number of inputs, then the shape of one."""

    def launch(self, tensors: Mapping[str, torch.Tensor]) -> list[Launched]:
        """Launch a batch in as many parts as needed, in order.

        Raises:
            CacheError: a single input does not fit into memory.
        """
        shape = tuple(next(iter(tensors.values())).shape)
        if not any(all(a >= b for a, b in zip(shape, failed, strict=True)) for failed in self.too_large):
            launched = self._try(tensors)
            if launched is None:
                self._encoder.transfers.free_memory()
                launched = self._try(tensors)
            if launched is not None:
                return [launched]
            self._remember(shape)
        middle = shape[0] // 2
        return [
            part
            for rows in (slice(middle), slice(middle, None))
            for part in self.launch({name: values[rows] for name, values in tensors.items()})
        ]

    def _try(self, tensors: Mapping[str, torch.Tensor]) -> Launched | None:
        try:
            return self._encoder.launch(tensors)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None  # the error is dropped, and with it the tensors that its traceback holds

    def _remember(self, shape: tuple[int, ...]) -> None:
        if shape[0] == 1:
            raise CacheError(
                f"{self._encoder.fingerprint.key}: a single input of shape {shape[1:]} does not fit into the memory of "
                f"{self._encoder.request.device}. Choose a smaller --image-size or --max-length, or --device cpu."
            )
        self.too_large.append(shape)
        logger.warning(
            "%s: a batch of shape %s does not fit into the memory of %s; batches of this size are encoded in halves.",
            *(self._encoder.fingerprint.key, shape, self._encoder.request.device),
        )


def _moved(value: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)


def _copied_back(tensor: torch.Tensor) -> torch.Tensor:
    hosted = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return hosted.copy_(tensor, non_blocking=True)
