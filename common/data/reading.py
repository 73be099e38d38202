"""Reading chosen images of a source on all cores: a few are in memory, the rest is in one temporary file."""

import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, ImageOps
from tqdm import tqdm

from common.data.duplicates import HASH_BYTES, perceptual_hash
from common.data.images import DamagedImage, Encoded, Levels, common_levels, is_deep_grey, levels_of, opened_image, png, to_rgb
from common.data.sources import Source
from common.data.threads import CORES, in_order
from common.errors import UserError
from common.tasks import Task


@dataclass
class Read:
    """An image as encoded upright RGB, with the SHA-256 of that and its perceptual hash (HASH_BYTES,) uint8.

    levels: of an image of more than 8 bits of grey, which is as it was, without a hash, until it is known which levels all
    of these have together.
    """

    content: bytes
    digest: bytes
    hash: np.ndarray | None = None
    levels: Levels | None = None


class Images:
    """Images that were read, by their index in the choice: their contents in a file, what is known of them in memory.

    kept: (N,) bool, False where an image was damaged. digests: SHA-256 of each content. hashes: (N, HASH_BYTES) uint8.
    levels: those that became 0 and 255 in all images of more than 8 bits of grey; None if there are none.
    """

    def __init__(self, count: int, file: BinaryIO):
        self.file = file
        self.kept = np.zeros(count, dtype=bool)
        self.extents = np.zeros((count, 2), dtype=np.int64)  # where the content begins, and how long it is
        self.digests = [b""] * count
        self.hashes = np.zeros((count, HASH_BYTES), dtype=np.uint8)
        self.levels: Levels | None = None

    def add(self, index: int, read: Read) -> None:
        """Keep an image that was read."""
        start = self.file.seek(0, os.SEEK_END)
        self.file.write(read.content)
        self.extents[index], self.digests[index], self.kept[index] = (start, len(read.content)), read.digest, True
        if read.hash is not None:
            self.hashes[index] = read.hash

    def contents(self, indices: np.ndarray) -> Iterator[bytes]:
        """These images, encoded."""
        for start, size in self.extents[indices]:
            self.file.seek(start)
            yield self.file.read(size)


def read_images(source: Source, rows: np.ndarray, file: BinaryIO, task: Task, skip_damaged: bool) -> Images:
    """Read these rows (N,) as RGB into an empty file, and print how fast that was.

    Grey levels of more than 8 bits are brought to 8 in all images alike. Raises UserError, naming the row, if an image is
    damaged, unless these are to be left out.
    """
    images, order = Images(len(rows), file), np.argsort(rows)  # in the order of the source
    started, levels = time.perf_counter(), {}
    with ThreadPoolExecutor(CORES) as pool:
        results = in_order(pool, read_image, source.read(rows[order]))
        bar = tqdm(results, f"{task.name}: preparing", len(rows), unit="image", disable=None)
        for index, read in zip(order, bar, strict=True):
            if isinstance(read, Read):
                images.add(index, read)
                if read.levels:
                    levels[index] = read.levels
            elif not skip_damaged:
                raise UserError(f"the image in row {rows[index]}{read.path} of {task.name} is damaged: {read}; remove or "
                                "replace it, or add --skip_damaged to go on without such images")
        if levels:
            images.levels = common_levels([*levels.values()])
            indices = np.array([*levels])
            results = in_order(pool, partial(read_image, levels=images.levels), images.contents(indices))
            for index, read in zip(indices, results, strict=True):
                images.add(index, read)
            low, high = images.levels
            print(f"{task.name}: grey levels {low:g} to {high:g} of {len(levels):,} images became 0 to 255", flush=True)
    speed = images.kept.sum() / (time.perf_counter() - started)
    print(f"{task.name}: prepared {images.kept.sum():,} images, {speed:.0f} a second", flush=True)
    return images


def read_image(encoded: Encoded, levels: Levels | None = None) -> Read | DamagedImage:
    """Read an image; one that is upright RGB already is kept byte for byte, any other becomes a PNG.

    levels: what becomes 0 and 255 in one of more than 8 bits of grey.
    """
    try:
        with opened_image(encoded) as (content, opened):
            opened.load()
            if is_deep_grey(opened) and levels is None:
                return Read(content, b"", levels=levels_of(opened))
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
            if opened.mode != "RGB" or turned or opened.has_transparency_data:
                opened = to_rgb(ImageOps.exif_transpose(opened), levels)
                content = png(opened)
            return Read(content, hashlib.sha256(content).digest(), perceptual_hash(opened))
    except DamagedImage as error:
        return error
