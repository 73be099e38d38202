"""One image of any kind Pillow opens: to upright RGB, and to the few bits that near-duplicates share."""

import functools
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import ExifTags, ImageCms, ImageOps
from PIL import Image as PILImage
from scipy.fft import dctn

HASH_SIDE = 16  # of the square of low frequencies that make up the hash
BITS_BYTES = HASH_SIDE**2 // 8
HASH_BYTES = BITS_BYTES + 3
FLAT = 2  # grey levels by which a wave has to stand out: the noise of an evenly coloured image does not

MOST_PIXELS = PILImage.MAX_IMAGE_PIXELS  # of an image: with more, Pillow takes its header for damaged or hostile


class ImageFile(Protocol):
    """A file in a folder or in a zip: `pathlib.Path` or `zipfile.Path`."""

    def read_bytes(self) -> bytes:
        """All of it."""


Encoded = bytes | ImageFile | None  # an image as a source has it: its content, where its content is, or nothing


class DamagedImage(Exception):
    """An image that cannot be read, or is not there."""

    def __init__(self, encoded: Encoded, reason: str):
        super().__init__(reason)
        self.missing = encoded is None
        self.path = "" if isinstance(encoded, bytes | None) else f" ({encoded})"

    def at(self, row: int, of: str) -> str:
        """What is wrong, and in which row of what."""
        if self.missing:
            return f"there is no image in row {row} of {of}"
        return f"the image in row {row}{self.path} of {of} is damaged: {self}"


USUAL_TOPS = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)  # of fractions, and of 8, 10, 12, 14 and 16 bits

Levels = tuple[float, float]  # the lowest and the highest grey level of images of more than 8 bits


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


@functools.cache
def image_endings() -> frozenset[str]:
    """The endings, as `.png`, of the files that the installed Pillow opens."""
    PILImage.init()
    return frozenset(end for end, kind in PILImage.registered_extensions().items() if kind in PILImage.OPEN)


def read_image(encoded: Encoded, levels: Levels | None = None) -> Read:
    """Read an image; one that is upright RGB already is kept byte for byte, any other becomes a PNG.

    levels: what becomes 0 and 255 in one of more than 8 bits of grey. Raises DamagedImage.
    """
    with _opened(encoded) as (content, opened):
        deep = re.search(";16[BLN]", str(opened.tile))  # how its pixels are stored
        opened.load()
        if opened.mode.startswith(("I", "F")):
            if levels is None:
                return Read(content, levels=_levels(opened))
            deep = None
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
        kept = opened.mode == "RGB" and not turned and not opened.has_transparency_data
        rgb = opened if kept else to_rgb(ImageOps.exif_transpose(opened), levels)
        brightest = max(high for _, high in rgb.getextrema()) if deep else None
        return Read(content if kept else png(rgb), perceptual_hash(rgb), brightest=brightest)


def open_image(encoded: Encoded) -> PILImage.Image:
    """An image as upright RGB, grey of more than 8 bits by its own levels. Raises DamagedImage."""
    with _opened(encoded) as (_, opened):
        opened.load()
        deep = opened.mode.startswith(("I", "F"))
        return to_rgb(ImageOps.exif_transpose(opened), common_levels([_levels(opened)]) if deep else None)


@contextmanager
def _opened(encoded: Encoded) -> Iterator[tuple[bytes, PILImage.Image]]:
    """The content of an image, and what Pillow opens of it. Raises DamagedImage, whatever goes wrong in the block."""
    try:
        content = encoded if isinstance(encoded, bytes | None) else encoded.read_bytes()
        if not content:
            raise DamagedImage(encoded, "it is empty")
        with PILImage.open(io.BytesIO(content)) as opened:
            if (pixels := opened.width * opened.height) > MOST_PIXELS:
                raise DamagedImage(encoded, f"it has {pixels:,} pixels, more than {MOST_PIXELS:,}")
            yield content, opened
    except DamagedImage:
        raise
    except PILImage.UnidentifiedImageError as error:
        raise DamagedImage(encoded, "Pillow knows no such format") from error
    except Exception as error:  # decoders of damaged files raise whatever comes up, AttributeError and KeyError too
        raise DamagedImage(encoded, str(error) or type(error).__name__) from error


def _levels(image: PILImage.Image) -> Levels:
    values = np.asarray(image)
    values = values[np.isfinite(values)]
    return float(values.min(initial=0)), float(values.max(initial=0))


def common_levels(levels: Sequence[Levels]) -> Levels:
    """The levels that become 0 and 255 in all of these images: 0, or less where one has less, and a usual highest one."""
    lowest, highest = min(low for low, _ in levels), max(high for _, high in levels)
    return min(lowest, 0.0), next((top for top in USUAL_TOPS if highest <= top), highest)


def to_rgb(image: PILImage.Image, levels: Levels | None = None) -> PILImage.Image:
    """Convert any image Pillow opens: transparency over white, grey of more than 8 bits by the levels for 0 and 255."""
    if image.mode.startswith(("I", "F")):
        low, high = levels
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        return PILImage.fromarray(((values - low) / (high - low) * 255).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def png(image: PILImage.Image) -> bytes:
    """The image as a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def perceptual_hash(image: PILImage.Image) -> np.ndarray:
    """What re-encoding, resizing and small changes leave nearly as it is: (HASH_BYTES,) uint8.

    Which of the lowest frequencies of the grey image are positive, the mean left out (after pHash: Zauner 2010,
    "Implementation and benchmarking of perceptual image hash functions"), and then the mean colour. The bits of the
    columns 0, 2, 4 ... come first: mirroring leaves these waves as they are and changes the sign of all others.
    """
    grey = np.asarray(image.convert("L").resize((4 * HASH_SIDE, 4 * HASH_SIDE), PILImage.Resampling.BOX), dtype=np.float32)
    waves = dctn(grey, norm="ortho")[:HASH_SIDE, :HASH_SIDE]
    waves[0, 0] = 0
    bits = np.packbits(np.stack([waves[:, ::2], waves[:, 1::2]]) > FLAT)
    colour = np.asarray(image.resize((1, 1), PILImage.Resampling.BOX)).ravel()
    return np.concatenate([bits, colour])
