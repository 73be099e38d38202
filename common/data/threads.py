"""Work on all cores whose results come in order, a few ahead of whoever uses them."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import TypeVar

CORES = os.cpu_count() or 1
AHEAD = 4 * CORES  # results that may wait for their turn

In, Out = TypeVar("In"), TypeVar("Out")


def in_order(pool: Executor, function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """As `pool.map`, but items are taken only as fast as results are used, so that few of both are in memory.

    Where it ends early, by an error or because no more results are wanted, what has not begun is left undone.
    """
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
