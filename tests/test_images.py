"""Tests of images of every kind that Pillow opens: upright RGB of their colour, as they are where they are that already."""

import io

import numpy as np
import pytest
from datasets import Image
from image_sources import opened, prepared, write_folders
from PIL import Image as PILImage


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


def encoded(mode, pixel, file_format, **save):
    """An 8 x 8 image of one pixel value."""
    image = PILImage.new(mode, (8, 8), pixel)
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 0, 255])
    return saved(image, file_format, **save)


def saved(image, file_format, **save):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **save)
    return buffer.getvalue()


def decoded(root, folder, images):
    """What becomes of these images, each five times as a class of its own: class -> the prepared image."""
    for name, content in images.items():
        (folder / name).mkdir(parents=True)
        for number in range(5):
            (folder / name / f"{number}.png").write_bytes(content)
    write_folders(folder, ["~"], 5)
    prepared(root, folder, "--fire_classes", "all", count="all")
    data = opened(root)["train"]
    return {data.features["label"].names[row["label"]]: row["image"] for row in data}


COLOURS = {
    "1": (encoded("1", 1, "PNG"), (255, 255, 255)),
    "L": (encoded("L", 77, "PNG"), (77, 77, 77)),
    "P": (encoded("P", 1, "PNG"), (0, 0, 255)),
    "P transparent": (encoded("P", 1, "PNG", transparency=1), (255, 255, 255)),
    "RGBA clear": (encoded("RGBA", (9, 99, 199, 0), "PNG"), (255, 255, 255)),
    "RGBA half": (encoded("RGBA", (255, 0, 0, 128), "PNG"), (255, 127, 127)),
    "LA clear": (encoded("LA", (50, 0), "PNG"), (255, 255, 255)),
    "I;16": (encoded("I;16", 0x8000, "PNG"), (128, 128, 128)),
    "CMYK": (encoded("CMYK", (255, 0, 0, 0), "TIFF"), (0, 255, 255)),
    "CMYK JPEG": (encoded("CMYK", (255, 0, 0, 0), "JPEG"), (0, 255, 255)),
    "I;16 TIFF": (encoded("I;16", 0x4000, "TIFF"), (64, 64, 64)),
    "RGB clear": (encoded("RGB", (9, 99, 199), "PNG", transparency=(9, 99, 199)), (255, 255, 255)),
    "LAB": (encoded("LAB", (255, 128, 128), "TIFF"), (255, 255, 255)),
    "GIF": (encoded("P", 1, "GIF"), (0, 0, 255)),
}


def test_every_mode_becomes_rgb_of_its_colour(tmp_path, root):
    """Transparency goes over white, 16 bits are scaled to 8."""
    images = decoded(root, tmp_path / "source", {name: content for name, (content, _) in COLOURS.items()})
    for name, (_, wanted) in COLOURS.items():
        assert images[name].mode == "RGB", name
        assert np.abs(np.asarray(images[name]).astype(int) - wanted).max() <= 1, name


def test_grey_of_more_than_8_bits_has_one_range_in_the_whole_set(tmp_path, capsys):
    """That of the data: 12 bits in a file of 16 become 8, equal levels in all images alike; fractions and negatives too."""
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for number, (scale, told) in enumerate((
        (lambda values: values, "0 to 4095"), (lambda values: values * 16, "0 to 65535"),
        (lambda values: (values / 4095).astype(np.float32), "0 to 1"),
        (lambda values: (values / 2047.5 - 1).astype(np.float32), "-1 to 1"),
    )):
        half = scale(np.full((64, 64), 2048, dtype=np.uint16))
        files = {"half": saved(PILImage.fromarray(half), "TIFF"), "ramp": saved(PILImage.fromarray(scale(ramp)), "TIFF")}
        images = decoded(tmp_path / f"root{number}", tmp_path / f"source{number}", files)
        shown = np.asarray(images["ramp"])[..., 0]
        assert (shown.min(), shown.max(), len(np.unique(shown))) == (0, 255, 256), told
        assert (np.asarray(images["half"]) == shown[32, 0]).all() and shown[32, 0] in (127, 128), told
        assert f"grey levels {told} of 10 images became 0 to 255" in capsys.readouterr().out


def test_a_turned_photo_is_put_upright_and_rgb_files_are_kept_byte_for_byte(tmp_path, root):
    """EXIF orientation 6: what is stored on the left is shown at the top. A JPEG is not encoded a second time."""
    stored = PILImage.new("RGB", (8, 4), "blue")
    stored.paste("red", (0, 0, 4, 4))
    exif = PILImage.Exif()
    exif[0x0112] = 6
    photo = saved(PILImage.effect_noise((16, 16), 80).convert("RGB"), "JPEG")
    image = decoded(root, tmp_path / "source", {"turned": saved(stored, "PNG", exif=exif), "photo": photo})["turned"]
    assert image.size == (4, 8) and image.getexif().get(0x0112, 1) == 1
    assert image.getpixel((0, 0)) == image.getpixel((3, 3)) == (255, 0, 0)
    assert image.getpixel((0, 4)) == image.getpixel((3, 7)) == (0, 0, 255)
    rows = opened(root)["train"].cast_column("image", Image(decode=False))
    assert photo in {row["image"]["bytes"] for row in rows}
