"""The processor and the accelerator that a command runs on."""

from __future__ import annotations

import os


def choose_device(device: str) -> str:
    """ "auto" takes a GPU where there is one."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: torch cannot use it ({str(error).splitlines()[0]}). Try auto.") from None
    return device


def num_cores() -> int:
    """Of the processor: those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads() -> int:
    """Threads that torch computes with."""
    import torch

    return torch.get_num_threads()
