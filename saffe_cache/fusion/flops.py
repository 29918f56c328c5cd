"""How many operations a computation takes, by torch's counter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Counts what runs within: products of matrices, two FLOPs a multiplication and addition.

    Attention is computed plainly meanwhile, since torch counts nothing of its quick kernels on a CPU.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter
