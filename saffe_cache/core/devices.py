"""The processor, the memory and the accelerator that a command runs on, on every operating system."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from saffe_cache.core import ranks


def choose_device(device: str) -> str:
    """ "auto" takes a GPU where there is one; of several ranks, each takes its own."""
    import torch

    if device in ("auto", "cuda") and torch.cuda.is_available():
        return ranks.own_gpu(torch.cuda.device_count())
    if device == "auto":
        return "cpu"
    if ranks.size() > 1 and device.startswith("cuda:"):
        raise ValueError(f"--device {device}: found one GPU for {ranks.size()} ranks, expected one each. Give auto.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: torch cannot use it ({str(error).splitlines()[0]}). Try auto.") from None
    return device


def choose_dtype(dtype: str, device: str) -> str:
    """ "auto" is float32 on a CPU, so that numbers do not depend on its make, and bfloat16 on a GPU."""
    return dtype if dtype != "auto" else "float32" if device == "cpu" else "bfloat16"


def is_fast_with_bfloat16(device: str) -> bool:
    """Whether it multiplies bfloat16 matrices faster than float32 ones: a GPU, or AVX-512 BF16 or AMX of a CPU."""
    import torch

    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # of torch 2.10 and later
    return device != "cpu" or bool(able.get("avx512_bf16") or able.get("amx_bf16"))


_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def num_cores() -> int:
    """Processor cores that this process may use: by its affinity, and by the quota of a container or job."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota())))


def _quota() -> float:
    """Cores' worth of time that cgroups, of version 1 or 2, grant this process; infinite without a limit."""
    found = [math.inf]
    for line in _OWN_CGROUPS.read_text().splitlines() if _OWN_CGROUPS.exists() else ():
        _, controllers, own = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        path = PurePosixPath(own.lstrip("/"))
        for group in (path, *path.parents):  # a limit holds for all groups below; a container sees its own as the root
            folder = _CGROUPS / ("cpu" if controllers else "") / group
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            numbers = [
                word for name in names if (folder / name).exists() for word in (folder / name).read_text().split()
            ]
            if len(numbers) == 2 and numbers[0] not in ("max", "-1"):
                found.append(int(numbers[0]) / int(numbers[1]))
    return min(found)


def set_up_threads() -> None:
    """Set OpenMP's environment for this process and those it starts, unless torch, which reads it once, is loaded.

    torch's threads sleep where they wait for one another. Their default is to spin, which gains little on idle cores;
    beside another busy process they spend most of their time on it, and steps take several times as long. They are as
    many as the cores that this process may use, also under a quota, which OpenMP does not see. Their number does not
    depend on the load, since another number rounds differently. What the user has set stays.
    """
    if "torch" in sys.modules:
        return
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("OMP_NUM_THREADS", str(num_cores()))


def available_memory() -> int:
    """Free memory in bytes, this rank's part if ranks share the machine.

    2 GiB where the system does not report it (macOS and Windows do not).
    """
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks.on_this_host()
    except (AttributeError, OSError, ValueError):
        return 2 * 2**30


def peak_memory_mb() -> int:
    """Largest resident memory of this process so far, in MiB; 0 where the system does not report it (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**20 if sys.platform == "darwin" else peak / 2**10)  # bytes on macOS, KiB elsewhere


_OOM_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "_alloc_failed", "bad_alloc")
"""Parts of RuntimeErrors from CUDA, CPU allocators and cuBLAS, in lower case."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means that the memory of a device or of this machine is exhausted."""
    import torch

    text = str(error).lower()
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(sign in text for sign in _OOM_SIGNS)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers for them (malloc.h)."""
_USUAL = {_TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25}
"""Where glibc's own adaptation ends."""
_KEPT = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_THRESHOLD: 2**30}


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let glibc keep what is freed, for the whole process; afterwards it goes back to the system.

    Every step needs arrays of the same sizes. Those above 32 MB glibc returns at once and requests again: the system
    then clears and maps each page, which took a quarter of a step of `paper`. Elsewhere nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    for option, number in _KEPT.items():
        mallopt(option, number)
    try:
        yield
    finally:
        for option, number in _USUAL.items():
            mallopt(option, number)
        ctypes.CDLL(None).malloc_trim(0)
