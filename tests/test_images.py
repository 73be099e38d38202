"""Tests of images of every kind that Pillow opens: upright RGB of their colour, as they are where they are that already."""

import io

import numpy as np
import pytest
from PIL import Image as PILImage

from common.data.images import open_image
from common.data.reading import read_image, read_images
from common.data.sources import NO_SPLIT, Source
from common.tasks import DOCUMENTED

COLOURS = [  # mode, pixel, file format, whether that pixel is transparent, and what is to be seen of it
    ("1", 1, "PNG", False, (255, 255, 255)),
    ("L", 77, "PNG", False, (77, 77, 77)),
    ("P", 1, "PNG", False, (0, 0, 255)),
    ("P", 1, "PNG", True, (255, 255, 255)),
    ("P", 1, "GIF", False, (0, 0, 255)),
    ("RGBA", (255, 0, 0, 128), "PNG", False, (255, 127, 127)),
    ("LA", (50, 0), "PNG", False, (255, 255, 255)),
    ("CMYK", (255, 0, 0, 0), "TIFF", False, (0, 255, 255)),
    ("CMYK", (255, 0, 0, 0), "JPEG", False, (0, 255, 255)),
    ("RGB", (9, 99, 199), "PNG", True, (255, 255, 255)),
    ("LAB", (255, 128, 128), "TIFF", False, (255, 255, 255)),
]


def encoded(image, file_format, **how):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **how)
    return buffer.getvalue()


def decoded(content):
    return PILImage.open(io.BytesIO(content))


@pytest.mark.parametrize(("mode", "pixel", "file_format", "clear", "wanted"), COLOURS)
def test_every_image_becomes_rgb_of_its_colour(mode, pixel, file_format, clear, wanted):
    """Transparency goes over white."""
    image = PILImage.new(mode, (8, 8), pixel)
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 0, 255])
    made = decoded(read_image(encoded(image, file_format, **{"transparency": pixel} if clear else {})).content)
    assert made.mode == "RGB" and np.abs(np.asarray(made).astype(int) - wanted).max() <= 1


def test_images_are_turned_upright_and_rgb_files_are_kept_byte_for_byte():
    stored, exif = PILImage.new("RGB", (8, 4), "blue"), PILImage.Exif()
    stored.paste("red", (0, 0, 4, 4))
    exif[0x0112] = 6  # what is stored on the left is to be at the top
    made = decoded(read_image(encoded(stored, "PNG", exif=exif)).content)
    pixels = np.asarray(made)
    assert made.size == (4, 8) and made.getexif().get(0x0112, 1) == 1
    assert (pixels[:4] == (255, 0, 0)).all() and (pixels[4:] == (0, 0, 255)).all()
    photo = encoded(PILImage.effect_noise((16, 16), 80).convert("RGB"), "JPEG")
    assert read_image(photo).content == photo


RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


@pytest.mark.parametrize(("scale", "levels"), [
    (lambda values: values, (0, 4095)), (lambda values: values * 16, (0, 65535)),
    (lambda values: values.astype(np.int32) * 100, (0, 409500)),
    (lambda values: (values / 2047.5 - 1).astype(np.float32), (-1, 1))])
def test_grey_of_more_than_8_bits_has_one_range_in_the_whole_set(tmp_path, scale, levels):
    """That of the data: 12 bits in a file of 16 become 8, equal levels in all images alike; fractions and negatives too.

    Whoever knows the range, as `predict` does, reads any one image as it is in the set.
    """
    files = [encoded(PILImage.fromarray(scale(values)), "TIFF") for values in (np.full_like(RAMP, 2048), RAMP, RAMP // 9)]
    none = np.full(len(files), NO_SPLIT)
    source = Source(["a"], np.zeros(len(files)), lambda rows: (files[row] for row in rows), none, none)
    with (tmp_path / "images").open("w+b") as file:
        images = read_images(source, np.arange(len(files)), file, DOCUMENTED[0], skip_damaged=False)
        half, ramp, dark = (np.asarray(decoded(content)) for content in images.contents(np.arange(len(files))))
    assert images.levels == pytest.approx(levels)
    assert (ramp.min(), ramp.max(), len(np.unique(ramp))) == (0, 255, 256)
    assert (half == ramp[32, 0]).all() and ramp[32, 0, 0] in (127, 128)
    for content, wanted in zip(files, (half, ramp, dark), strict=True):
        image, remark = open_image(content, [images.levels])
        assert (np.asarray(image) == wanted).all() and not remark


@pytest.mark.parametrize(("value", "known", "wanted", "remarked"), [
    (900, [(0, 65535), (0, 4095)], 56, False), (5000, [(0, 4095), (0, 65535)], 19, False),
    (5000, [(0, 1023), (0, 4095)], 255, True), (900, [], 224, False)])
def test_an_image_of_several_possible_levels_is_read_by_the_narrowest_that_hold_it(value, known, wanted, remarked):
    """By the widest if none do, with a remark; by its own if none are known."""
    image, remark = open_image(encoded(PILImage.new("I;16", (4, 4), value), "PNG"), known)
    assert (image.getpixel((0, 0))[0], bool(remark)) == (wanted, remarked)
