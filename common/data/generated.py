"""The demo's images: drawn by `common.demo` on all cores, the same for the same seed."""

import importlib
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from types import ModuleType

import numpy as np
from PIL import Image as PILImage

from common.data.images import png
from common.data.sources import NO_SPLIT, Source
from common.data.threads import in_order
from common.tasks import Task

AT_ONCE = 16  # images that one process draws before it hands them over

Job = tuple[Task, int, int, int]  # task, seed, label, number of the image within its class


def demo_source(task: Task, seed: int, per_class: int) -> Source:
    """Generate the images of a documented task."""
    classes = generator(task).CLASS_NAMES
    labels = np.repeat(np.arange(len(classes)), per_class)

    def read(rows: np.ndarray) -> Iterator[bytes]:
        jobs = [(task, seed, int(labels[row]), int(row) % per_class) for row in rows]
        parts = (jobs[start : start + AT_ONCE] for start in range(0, len(jobs), AT_ONCE))
        with ProcessPoolExecutor(initializer=_serve) as pool:
            for images in in_order(pool, _draw, parts):
                yield from images

    return Source(list(classes), labels, read, np.full_like(labels, NO_SPLIT), np.zeros_like(labels))


def generator(task: Task) -> ModuleType:
    """The module that generates a task's images."""
    return importlib.import_module(f"common.demo.{task.demo}")


def _serve() -> None:
    """Leave Ctrl-C to the parent process, and end when that is killed: a pool would wait for its work for ever."""
    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _draw(jobs: list[Job]) -> list[bytes]:
    drawn = []
    for task, seed, label, index in jobs:
        rng = np.random.default_rng([zlib.crc32(task.key.encode()), seed, label, index])
        drawn.append(png(PILImage.fromarray(generator(task).render(label, rng))))
    return drawn
