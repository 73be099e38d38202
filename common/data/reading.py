"""Reading chosen images of a source on all cores: a few are in memory, the rest is in one temporary file."""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, ImageOps
from tqdm import tqdm

from common.data.hashes import HASH_BYTES, perceptual_hash
from common.data.images import DamagedImage, Encoded, Levels, common_levels, levels_of, opened_image, png, to_rgb
from common.data.sources import Source
from common.data.threads import CORES, in_order
from common.errors import UserError
from common.tasks import Task


@dataclass
class Read:
    """An image as encoded upright RGB, and its perceptual hash (HASH_BYTES,) uint8.

    levels: of an image of more than 8 bits of grey, which is as it was, without a hash, until it is known which levels all
    of these have together. brightest: of one of more than 8 bits a channel, of which Pillow keeps 8, the highest level.
    """

    content: bytes
    hash: np.ndarray | None = None
    levels: Levels | None = None
    brightest: int | None = None


class Images:
    """Images that were read, by their place in the choice: their contents in a file, what is known of them in memory.

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
            common = images.levels = common_levels([*levels.values()])
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


def read_image(encoded: Encoded, levels: Levels | None = None) -> Read:
    """Read an image; one that is upright RGB already is kept byte for byte, any other becomes a PNG.

    levels: what becomes 0 and 255 in one of more than 8 bits of grey. Raises DamagedImage.
    """
    with opened_image(encoded) as (content, opened):
        deep = re.search(";16[BLN]", str(opened.tile))  # how its pixels are stored
        opened.load()
        if opened.mode.startswith(("I", "F")):
            if levels is None:
                return Read(content, levels=levels_of(opened))
            deep = None
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
        kept = opened.mode == "RGB" and not turned and not opened.has_transparency_data
        rgb = opened if kept else to_rgb(ImageOps.exif_transpose(opened), levels)
        brightest = max(high for _, high in rgb.getextrema()) if deep else None
        return Read(content if kept else png(rgb), perceptual_hash(rgb), brightest=brightest)
