"""Reading chosen images of a source on all cores: a few are in memory, the rest is in one temporary file."""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import BinaryIO, TypeVar

import numpy as np
from tqdm import tqdm

from common.data.images import HASH_BYTES, DamagedImage, Encoded, Levels, Read, common_levels, read_image
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

    def put(self, place: int, read: Read, digest: bytes) -> None:
        """Keep an image that was read."""
        start = self.file.seek(0, os.SEEK_END)
        self.file.write(read.content)
        self.extents[place], self.digests[place], self.kept[place] = (start, len(read.content)), digest, True
        if read.hash is not None:
            self.hashes[place] = read.hash

    def contents(self, places: np.ndarray) -> Iterator[bytes]:
        """These images, encoded."""
        for start, size in self.extents[places]:
            self.file.seek(start)
            yield self.file.read(size)


def read_images(source: Source, rows: np.ndarray, file: BinaryIO, task: Task, skip_damaged: bool) -> Images:
    """Read these rows (N,) as RGB into an empty file, and tell how fast that was and what was lost.

    Grey levels of more than 8 bits are brought to 8 in all images alike. Raises UserError, naming the row, if an image is
    damaged, unless these are to be left out.
    """
    images, order = Images(len(rows), file), np.argsort(rows)  # in the order of the source
    started = time.perf_counter()
    levels, brightest = {}, []
    with ThreadPoolExecutor(CORES) as pool:
        results = in_order(pool, _converted, source.read(rows[order]))
        bar = tqdm(results, f"{task.name}: preparing", len(rows), unit="image", disable=None)
        for place, result in zip(order, bar, strict=True):
            if isinstance(result, DamagedImage):
                if not skip_damaged:
                    raise UserError(f"{result.at(rows[place], task.name)}; remove or replace it, or add --skip_damaged to "
                                    "go on without such images")
                continue
            images.put(place, *result)
            if (read := result[0]).levels:
                levels[place] = read.levels
            if read.brightest is not None:
                brightest.append(read.brightest)
        if levels:
            common = common_levels([*levels.values()])
            places = np.array([*levels])
            results = in_order(pool, partial(_converted, levels=common), images.contents(places))
            for place, result in zip(places, results, strict=True):
                images.put(place, *result)
            print(f"{task.name}: grey levels {common[0]:g} to {common[1]:g} of {len(levels):,} images became 0 to 255",
                  flush=True)
    if brightest:
        print(f"{task.name}: {len(brightest):,} images have 16 bits a channel, of which the upper 8 are kept; in these, the "
              f"brightest level is {max(brightest)} of 255", flush=True)
    speed = images.kept.sum() / (time.perf_counter() - started)
    print(f"{task.name}: prepared {images.kept.sum():,} images, {speed:.0f} a second", flush=True)
    return images


def _converted(encoded: Encoded, levels: Levels | None = None) -> tuple[Read, bytes] | DamagedImage:
    """An image as RGB and its SHA-256; or why there is none."""
    try:
        read = read_image(encoded, levels)
    except DamagedImage as error:
        return error
    return read, hashlib.sha256(read.content).digest()
