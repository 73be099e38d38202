"""Ctrl-C and SIGTERM during a training: they wait for the step under way."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from common.training import distributed


@contextmanager
def stopping(wait: bool) -> Iterator[Callable[[], None]]:
    """With `wait`, Ctrl-C and SIGTERM do nothing in the block until the yielded function is called, which then raises
    KeyboardInterrupt.

    It raises in all processes at once; all of them must call it equally often.
    """
    asked: list[int] = []

    def stop_if_asked() -> None:
        if distributed.any_of(bool(asked)):
            raise KeyboardInterrupt

    before = {}
    if wait and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, _: asked.append(number))
    try:
        yield stop_if_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
