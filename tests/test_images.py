"""Tests of images of every kind that Pillow opens: upright RGB of their colour, as they are where they are that already."""

import io

import numpy as np
from datasets import Image
from image_sources import opened, prepared, write_folders
from PIL import Image as PILImage

from common.data.images import open_image
from common.files import read_json

COLOURS = [  # mode, pixel, file format, whether that pixel is transparent, and what is to be seen of it
    ("1", 1, "PNG", False, (255, 255, 255)),
    ("L", 77, "PNG", False, (77, 77, 77)),
    ("P", 1, "PNG", False, (0, 0, 255)),
    ("P", 1, "PNG", True, (255, 255, 255)),
    ("P", 1, "GIF", False, (0, 0, 255)),
    ("RGBA", (255, 0, 0, 128), "PNG", False, (255, 127, 127)),
    ("LA", (50, 0), "PNG", False, (255, 255, 255)),
    ("I;16", 0x8000, "PNG", False, (128, 128, 128)),
    ("I;16", 0x4000, "TIFF", False, (64, 64, 64)),
    ("CMYK", (255, 0, 0, 0), "TIFF", False, (0, 255, 255)),
    ("CMYK", (255, 0, 0, 0), "JPEG", False, (0, 255, 255)),
    ("RGB", (9, 99, 199), "PNG", True, (255, 255, 255)),
    ("LAB", (255, 128, 128), "TIFF", False, (255, 255, 255)),
]


def saved(image, file_format, **save):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **save)
    return buffer.getvalue()


def decoded(top, images):
    """What becomes of these images, each five times as a class of its own: class -> the prepared image."""
    for name, content in images.items():
        (top / "source" / name).mkdir(parents=True)
        for number in range(5):
            (top / "source" / name / f"{number}.png").write_bytes(content)
    write_folders(top / "source", ["~"], 5)
    prepared(top, top / "source", "--fire_classes", "all", count="all")
    data = opened(top)["train"]
    return {data.features["label"].names[row["label"]]: row["image"] for row in data}


def test_every_image_becomes_upright_rgb_of_its_colour_and_rgb_files_are_kept_byte_for_byte(tmp_path):
    """Transparency goes over white, 16 bits are scaled to 8; a JPEG is not encoded a second time."""
    files = {}
    for number, (mode, pixel, file_format, clear, _) in enumerate(COLOURS):
        image = PILImage.new(mode, (8, 8), pixel)
        if mode == "P":
            image.putpalette([255, 0, 0, 0, 0, 255])
        files[str(number)] = saved(image, file_format, **{"transparency": pixel} if clear else {})
    stored = PILImage.new("RGB", (8, 4), "blue")
    stored.paste("red", (0, 0, 4, 4))
    exif = PILImage.Exif()
    exif[0x0112] = 6  # what is stored on the left is shown at the top
    files["turned"] = saved(stored, "PNG", exif=exif)
    files["photo"] = saved(PILImage.effect_noise((16, 16), 80).convert("RGB"), "JPEG")
    images = decoded(tmp_path, files)
    for number, (*kind, wanted) in enumerate(COLOURS):
        image = images[str(number)]
        assert image.mode == "RGB" and np.abs(np.asarray(image).astype(int) - wanted).max() <= 1, kind
    assert images["turned"].size == (4, 8) and images["turned"].getexif().get(0x0112, 1) == 1
    shown = np.asarray(images["turned"])
    assert (shown[:4] == (255, 0, 0)).all() and (shown[4:] == (0, 0, 255)).all()
    rows = opened(tmp_path)["train"].cast_column("image", Image(decode=False))
    assert files["photo"] in {row["image"]["bytes"] for row in rows}


def test_grey_of_more_than_8_bits_has_one_range_in_the_whole_set(tmp_path, capsys):
    """That of the data: 12 bits in a file of 16 become 8, equal levels in all images alike; fractions and negatives too.

    Who knows the range, as `predict` does, reads any one image as it is in the set.
    """
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for scale, told in ((lambda values: values, "0 to 4095"), (lambda values: values * 16, "0 to 65535"),
                        (lambda values: values.astype(np.int32) * 100, "0 to 409500"),
                        (lambda values: (values / 2047.5 - 1).astype(np.float32), "-1 to 1")):
        levels = {"half": scale(np.full((64, 64), 2048, dtype=np.uint16)), "ramp": scale(ramp), "dark": scale(ramp // 9)}
        files = {name: saved(PILImage.fromarray(image), "TIFF") for name, image in levels.items()}
        images = decoded(tmp_path / told, files)
        known = read_json(tmp_path / told / "fire_dataset" / "manifest.json", "")["grey_levels"]
        for name, content in files.items():
            image, remark = open_image(content, [known])
            assert (np.asarray(image) == np.asarray(images[name])).all() and not remark, (told, name)
        shown = np.asarray(images["ramp"])[..., 0]
        assert (shown.min(), shown.max(), len(np.unique(shown))) == (0, 255, 256), told
        assert (np.asarray(images["half"]) == shown[32, 0]).all() and shown[32, 0] in (127, 128), told
        assert f"grey levels {told} of 15 images became 0 to 255" in capsys.readouterr().out


def test_an_image_of_several_possible_levels_is_read_by_the_narrowest_that_hold_it():
    """By the widest if none do, which is told; by its own if none are known."""
    for value, known, wanted, told in ((900, [(0, 65535), (0, 4095)], 56, False), (5000, [(0, 4095), (0, 65535)], 19, False),
                                       (5000, [(0, 1023), (0, 4095)], 255, True), (900, [], 224, False)):
        image, remark = open_image(saved(PILImage.new("I;16", (4, 4), value), "PNG"), known)
        assert (image.getpixel((0, 0))[0], bool(remark)) == (wanted, told), (value, known)
