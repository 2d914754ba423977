"""Processes that work for this one, and leave when it is gone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def pool(workers: int, begin: Callable[..., None] | None = None, *given: object) -> Iterator[ProcessPoolExecutor]:
    """``begin(*given)`` runs first in each process. They are started afresh: a copy of a program with threads may hang.

    Raises ValueError if one dies.
    """
    try:
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(begin, given)) as running:
            yield running
    except BrokenProcessPool:
        raise ValueError(
            f"one of {workers} worker processes died; most often memory ran out: run again with fewer workers (a script of your "
            "own must also keep its calls below: if __name__ == '__main__')"
        ) from None


def _start(begin: Callable[..., None] | None, given: tuple) -> None:
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # libraries in Rust: one process a core, so one thread each
    Thread(target=_leave_with_parent, daemon=True).start()
    if begin is not None:
        begin(*given)


def _leave_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    parent_process().join()
    os._exit(1)
