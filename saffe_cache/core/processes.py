"""Tasks in several processes of this machine, each in a new one, so that its peak memory is its own."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import partialmethod
from typing import TypeVar

from saffe_cache.core.devices import num_cores

Done = TypeVar("Done")

_MOST_WORKERS = 4
"""Processes of `auto`: each may need 2 GB."""


def choose_workers(requested: int | None, device: str) -> int:
    """Number of processes; by default one for each core, at most 4, and one where they would share a GPU."""
    return requested or (min(_MOST_WORKERS, num_cores()) if device == "cpu" else 1)


def side_by_side(tasks: Mapping[str, Callable[[], Done]], workers: int) -> Iterator[tuple[str, Done]]:
    """Run `workers` tasks at once, begun in their order; yields the name and the result of each as it finishes.

    With one worker there is no other process. Otherwise each has an equal share of the cores for its threads, tasks and
    results are pickled, and where a task raises, the others are ended and its error is raised here.
    """
    if workers == 1:
        yield from ((name, task()) for name, task in tasks.items())
        return
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    context.set_forkserver_preload([name for name in sys.modules if name.startswith("saffe_cache.")])
    threads = max(1, num_cores() // workers)

    def run(task: Callable[[], Done]) -> Done:
        with ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(threads,)) as process:
            return process.submit(task).result()

    with ThreadPoolExecutor(workers) as pool:
        started = {pool.submit(run, task): name for name, task in tasks.items()}
        try:
            for future in as_completed(started):
                yield started[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()  # or this process could not end before their tasks
            raise


def _begin(threads: int) -> None:
    import torch
    from tqdm import tqdm

    torch.set_num_threads(threads)
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign,assignment]
    logging.getLogger("saffe_cache").setLevel(logging.WARNING)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker whose command was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
