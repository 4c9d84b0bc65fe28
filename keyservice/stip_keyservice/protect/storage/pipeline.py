"""Computing on several threads what one thread takes in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

WORKERS_LIMIT = 64
"""Threads of the widest pipeline."""
AHEAD = 2
"""Results, beyond one a worker, that wait for the thread that takes them."""

T = TypeVar("T")
R = TypeVar("R")


def ordered(compute: Callable[[T], R], tasks: Iterable[T], workers: int) -> Generator[R, None, None]:
    """`compute(task)` of every task, in order, by `workers` threads of one torch thread each.

    At most `workers + AHEAD` results are begun and not yet taken: that bounds the memory. What `compute` raises is
    raised where its result is due, once the threads have ended; tasks not begun by then are dropped.
    """
    waiting: deque[Future[R]] = deque()
    with _single_threaded_torch():
        pool = ThreadPoolExecutor(workers, "protect", initializer=torch.set_num_threads, initargs=(1,))
        try:
            for task in tasks:
                waiting.append(pool.submit(compute, task))
                if len(waiting) == workers + AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """torch's number of threads is the process's for some of its libraries: set back at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
