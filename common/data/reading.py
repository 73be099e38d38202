"""Reading chosen images of a source on all cores: a few are in memory, the rest is in one temporary file."""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import BinaryIO, TypeVar

import numpy as np
from tqdm import tqdm

from common.data.images import HASH_BYTES, DamagedImage, Encoded, read_image
from common.data.sources import Source
from common.errors import UserError
from common.tasks import Task

CORES = os.cpu_count() or 1
AHEAD = 4 * CORES  # results that may wait for their turn

In, Out = TypeVar("In"), TypeVar("Out")


def in_order(pool: Executor, function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """As `pool.map`, but items are taken only as fast as results are used, so that few of both are in memory."""
    waiting: deque = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) == AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Images:
    """Images that were read, by their place in the choice: their contents in a file, what is known of them in memory.

    kept: (N,) bool, False where an image was damaged. digests: SHA-256 of each content. hashes: (N, HASH_BYTES) uint8.
    """

    def __init__(self, count: int, file: BinaryIO):
        self.file = file
        self.kept = np.zeros(count, dtype=bool)
        self.extents = np.zeros((count, 2), dtype=np.int64)  # where the content begins, and how long it is
        self.digests = [b""] * count
        self.hashes = np.zeros((count, HASH_BYTES), dtype=np.uint8)

    def contents(self, places: np.ndarray) -> Iterator[bytes]:
        """These images, encoded."""
        for start, size in self.extents[places]:
            self.file.seek(start)
            yield self.file.read(size)


def read_images(source: Source, rows: np.ndarray, file: BinaryIO, task: Task, skip_damaged: bool) -> Images:
    """Read these rows (N,) as RGB into an empty file, and tell how fast that was.

    Raises UserError, naming the row, if an image is damaged, unless these are to be left out.
    """
    images, order = Images(len(rows), file), np.argsort(rows)  # in the order of the source
    started = time.perf_counter()
    with ThreadPoolExecutor(CORES) as pool:
        results = in_order(pool, _converted, source.read(rows[order]))
        bar = tqdm(results, f"{task.name}: preparing", len(rows), unit="image", disable=None)
        for place, result in zip(order, bar, strict=True):
            if isinstance(result, DamagedImage):
                if not skip_damaged:
                    raise UserError(f"{result.at(rows[place], task.name)}; remove or replace it, or add --skip_damaged to "
                                    "go on without such images")
                continue
            content, images.digests[place], images.hashes[place] = result
            images.extents[place] = file.tell(), len(content)
            images.kept[place] = True
            file.write(content)
    speed = images.kept.sum() / (time.perf_counter() - started)
    print(f"{task.name}: prepared {images.kept.sum():,} images, {speed:.0f} a second", flush=True)
    return images


def _converted(encoded: Encoded) -> tuple[bytes, bytes, np.ndarray] | DamagedImage:
    """An image as RGB, its SHA-256 and its perceptual hash; or why there are none."""
    try:
        content, hashed = read_image(encoded)
    except DamagedImage as error:
        return error
    return content, hashlib.sha256(content).digest(), hashed
