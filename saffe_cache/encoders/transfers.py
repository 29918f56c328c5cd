"""Batches to the device, and what it computed back, beside its computing.

On a GPU each direction has a stream of its own: batch i + 1 goes there and batch i - 1 comes back while batch i is
computed, and the thread that launches them waits for none of it. On other devices the calls return when all is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch


class Transfers:
    """The two ways between the CPU and one device."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._is_cuda = self._device.type == "cuda"
        if self._is_cuda:
            self._there = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._back = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def to_device(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors on the device, floating-point ones in a type. They must stay as they are until it has them."""
        if not self._is_cuda:
            return {name: _moved(value, self._device, dtype) for name, value in tensors.items()}
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._there):
            moved = {name: _moved(value, self._device, dtype) for name, value in tensors.items()}
        computing.wait_stream(self._there)
        for value in moved.values():
            value.record_stream(computing)  # its memory is not reused before the computing is through with it
        return moved

    def to_host(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
        """The tensors on the CPU; they hold their numbers once the event, if there is one, has happened."""
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
        """Wait until nothing is computed any more, and give back what only the allocator holds."""
        if self._is_cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    @contextmanager
    def pinned(self, memory: torch.Tensor) -> Iterator[None]:
        """Lock memory in its place, so that a GPU reads it beside its computing."""
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


def _moved(value: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)


def _copied_back(tensor: torch.Tensor) -> torch.Tensor:
    hosted = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return hosted.copy_(tensor, non_blocking=True)
