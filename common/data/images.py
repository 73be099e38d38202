"""One image of any kind that Pillow opens, to upright RGB."""

import functools
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from PIL import Image as PILImage
from PIL import ImageCms, ImageOps

MOST_PIXELS = PILImage.MAX_IMAGE_PIXELS  # of an image: with more, Pillow takes its header for damaged or hostile
USUAL_TOPS = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)  # of fractions, and of 8, 10, 12, 14 and 16 bits

Levels = tuple[float, float]  # the lowest and the highest grey level of images of more than 8 bits


class ImageFile(Protocol):
    """A file in a folder or in a zip."""

    def read_bytes(self) -> bytes:
        """All of it."""


Encoded = bytes | ImageFile | None  # an image as a source has it: its content, where its content is, or nothing


class DamagedImage(Exception):
    """An image that cannot be read, or is missing. path: the file it is in, in brackets; nothing if it is in a table."""

    def __init__(self, encoded: Encoded, reason: str):
        super().__init__(reason)
        self.path = "" if isinstance(encoded, bytes | None) else f" ({encoded})"


@functools.cache
def image_endings() -> frozenset[str]:
    """The endings, as `.png`, of the files that the installed Pillow opens."""
    PILImage.init()
    return frozenset(end for end, kind in PILImage.registered_extensions().items() if kind in PILImage.OPEN)


def open_image(encoded: Encoded, known: Sequence[Levels]) -> tuple[PILImage.Image, str]:
    """An image as upright RGB, and a remark on it, if there is one to make.

    known: the grey levels of the data sets that it may be like. One of more than 8 bits is read by the narrowest of these
    that holds its own; by the widest if none does, with a remark; by its own if none are known. Raises DamagedImage.
    """
    with opened_image(encoded) as (_, opened):
        opened.load()
        levels, remark = None, ""
        if is_deep_grey(opened):
            low, high = levels_of(opened)
            fitting = [levels for levels in known if levels[0] <= low and high <= levels[1]]
            levels = min(fitting or known, key=lambda levels: (levels[1] - levels[0]) * (1 if fitting else -1),
                         default=common_levels([(low, high)]))
            if known and not fitting:
                remark = (f"its grey levels, {low:g} to {high:g}, are cut off at those of the images of the tasks, "
                          f"{levels[0]:g} to {levels[1]:g}")
        return to_rgb(ImageOps.exif_transpose(opened), levels), remark


@contextmanager
def opened_image(encoded: Encoded) -> Iterator[tuple[bytes, PILImage.Image]]:
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


def is_deep_grey(image: PILImage.Image) -> bool:
    """Whether it is grey of more than 8 bits, whose levels have no fixed range."""
    return image.mode.startswith(("I", "F"))


def levels_of(image: PILImage.Image) -> Levels:
    values = np.asarray(image)
    values = values[np.isfinite(values)]
    return float(values.min(initial=0)), float(values.max(initial=0))


def common_levels(levels: Sequence[Levels]) -> Levels:
    """The levels that become 0 and 255 in all of these images: 0, or less where one has less, and a usual highest one."""
    lowest, highest = min(low for low, _ in levels), max(high for _, high in levels)
    return min(lowest, 0.0), next((top for top in USUAL_TOPS if highest <= top), highest)


def to_rgb(image: PILImage.Image, levels: Levels | None = None) -> PILImage.Image:
    """Convert any image Pillow opens: transparency over white, grey of more than 8 bits by the levels for 0 and 255."""
    if is_deep_grey(image):
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
