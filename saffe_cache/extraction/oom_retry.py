"""Forward passes that fit into memory: a batch that does not is encoded in halves.

What becomes of a batch depends on its shape and on the memory there is, on nothing that was encoded before: it is
tried whole, once more with nothing else in flight, and then split in its middle, each half likewise. That one as
large was too large before is remembered for the run, but spares only attempts that would fail. So a resumed extraction
splits the batches that an uninterrupted one splits, and the cache is the same to the last byte, as long as the encoder
has the same memory. Where other programs take of it, the same numbers may differ by rounding: a product of matrices of
another height may add in another order.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from saffe_cache.core.features import CacheError
from saffe_cache.encoders.encoder import FrozenEncoder, Launched

logger = logging.getLogger(__name__)

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "_alloc_failed", "bad_alloc")
"""What RuntimeErrors of CUDA, of CPU allocators and of cuBLAS say of it, in lower case."""


class HalvingEncoder:
    """Launches the batches of one encoder."""

    def __init__(self, encoder: FrozenEncoder) -> None:
        self._encoder = encoder
        self.too_large: list[tuple[int, ...]] = []
        """Shapes that did not fit: inputs first, then what an input is."""

    def launch(self, tensors: Mapping[str, torch.Tensor]) -> list[Launched]:
        """One batch, in as many parts as it takes, in order.

        Raises:
            CacheError: a single input does not fit.
        """
        shape = tuple(next(iter(tensors.values())).shape)
        if not self._is_too_large(shape):
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
            return None  # the error goes, and with it the tensors that its traceback holds

    def _is_too_large(self, shape: tuple[int, ...]) -> bool:
        return any(all(a >= b for a, b in zip(shape, failed, strict=True)) for failed in self.too_large)

    def _remember(self, shape: tuple[int, ...]) -> None:
        if shape[0] == 1:
            raise CacheError(
                f"{self._encoder.fingerprint.key}: a single input of shape {shape[1:]} does not fit into the memory of "
                f"{self._encoder.request.device}. Try a smaller --image-size or --max-length, or --device cpu."
            )
        self.too_large.append(shape)
        logger.warning(
            "%s: a batch of shape %s does not fit into the memory of %s; it and others as large are encoded in halves.",
            *(self._encoder.fingerprint.key, shape, self._encoder.request.device),
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of a device, or of this machine."""
    text = str(error).lower()
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(sign in text for sign in _SIGNS)
