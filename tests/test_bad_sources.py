"""Tests of sources that cannot be used: one line says what is wrong with each, and nothing is written."""

import struct
import zlib

import pytest
from datasets import Dataset, Image
from hub import FIRE_CLASSES, image_dataset, png
from image_sources import (
    PER_CLASS,
    changed_file,
    left_in,
    metadata_csv,
    one_parquet,
    prepared,
    saved_dataset,
    write_folders,
    write_parquet,
    zipped,
)

from common.errors import UserError


def with_image(folder, content):
    (write_folders(folder) / "low" / "03.png").write_bytes(content)
    return folder


def bomb(folder, side):
    """A tiny file that says it is an image of so many pixels a side."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13)
    return with_image(folder, start + header + struct.pack(">II", zlib.crc32(header), 9) + b"IDAT")


def replaced(folder, make):
    (write_folders(folder) / "low" / "03.png").unlink()
    make(folder / "low" / "03.png")
    return folder


def changed_row(folder, image):
    """A Parquet file with another image in row 17."""
    dataset = image_dataset(FIRE_CLASSES, PER_CLASS).cast_column("image", Image(decode=False))
    columns = {"image": [*dataset["image"][:17], image, *dataset["image"][18:]], "label": dataset["label"]}
    return write_parquet(folder / "rows.parquet", Dataset.from_dict(columns, features=dataset.features))


def with_files(folder, **contents):
    """More files in a folder; the file's name ends behind the last _."""
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def deeper(folder):
    """Class folders, of which one has its images one folder deeper."""
    (write_folders(folder) / "low").rename(folder / "set1")
    (folder / "low").mkdir()
    (folder / "set1").rename(folder / "low" / "set1")
    return folder


def other_endings(folder):
    """Class folders, of which one has files that Pillow does not open."""
    for path in list((write_folders(folder) / "low").iterdir()):
        path.rename(path.with_suffix(".heic"))
    return folder


def several(folder, *names):
    for name in names:
        write_folders(folder / name)
    return folder


def table(folder, **columns):
    return write_parquet(folder / "table.parquet", Dataset.from_dict(columns))


def cut(path, end):
    path.write_bytes(path.read_bytes()[:end])
    return path


ENTRY = b"PK\1\2\x14\3\x14\0"  # how an entry of a zip's directory begins; flags and compression follow
SIZES = [struct.pack("<IHH", size, len("high/00.png"), 0) for size in (len(png(0, 0)), 3 * 10**9)]
BAD_SOURCES = {
    "nowhere": (lambda f: f / "nowhere", "nowhere does not exist"),
    "empty": (lambda f: f.mkdir() or f, "neither subfolders with images nor Parquet"),
    "no images": (lambda f: with_files(f, low__a_txt=b"x"), r"neither subfolders .*; its files end in \.txt"),
    "one class": (lambda f: write_folders(f, ["high"]), "needs two or more different classes"),
    "cut image": (lambda f: with_image(f, png(1, 3)[:50]), r"low/03\.png\) of fire risk is damaged"),
    "empty image": (lambda f: with_image(f, b""), r"low/03\.png\) of fire risk is damaged: it is empty"),
    "link": (lambda f: replaced(f, lambda path: path.symlink_to("gone")), r"low/03\.png\) of .* damaged: .*No such file"),
    "bomb": (lambda f: bomb(f, 10_000), r"low/03\.png\) .*damaged: it has 100,000,000 pixels.*; remove or .*--skip_damaged"),
    "by case": (lambda f: write_folders(f, [*FIRE_CLASSES, "Low"]), "classes 'Low' and 'low', which differ only by case"),
    "several": (lambda f: several(f, "first", "second"), r"classes in several folders \(first, second\); give one"),
    "images in splits": (lambda f: with_files(write_folders(f, ["train", "test"]), metadata_csv=b"file_name,text\na,b\n"),
                         r"24 images are not directly in a class folder \(.*, and metadata.csv has no columns file_name and"),
    "deeper": (deeper, r"12 images are not directly in a class folder \(low/set1/.*no metadata.csv or .*; move or remove"),
    "beside": (lambda f: with_files(write_folders(f), over_png=png(0, 0)), r"1 images are not .* class folder \(over.png\)"),
    "endings": (other_endings, r"the folder low has no images, only 12 files that end in \.heic; convert"),
    "unlisted": (lambda f: with_files(metadata_csv(f), images__new_png=png(0, 0)), r"leaves out 1 images \(images/new.png\)"),
    "gone": (lambda f: (metadata_csv(f) / "images/0_00.png").unlink() or f, r"lists 1 images .* not there \(images/0_00.png\)"),
    "no JSON": (lambda f: with_files(write_folders(f), metadata_jsonl=b"x"), r"metadata.jsonl cannot be read as a table"),
    "parquet and images": (lambda f: one_parquet(write_folders(f)).parent, "holds Parquet files .* and images .*give a folder"),
    "no zip": (lambda f: with_files(f, a_zip=b"PK\3\4") / "a.zip", "cannot be read as Parquet or a zip"),
    "damaged in zip": (lambda f: changed_file(zipped(f), png(1, 3), png(1, 3)[:-5] + bytes(5)),
                       r"source\.zip/low/03\.png\) of fire risk is damaged: Bad CRC"),
    "encrypted": (lambda f: changed_file(zipped(f), ENTRY + b"\0\0", ENTRY + b"\1\0"), "encrypted; unpack it"),
    "Deflate64": (lambda f: changed_file(zipped(f), ENTRY + b"\0\0\0\0", ENTRY + b"\0\0\x09\0"), "compressed in a way that"),
    "zip bomb": (lambda f: changed_file(zipped(f), *SIZES), r"high/.*\.png of 3 GB, too large"),
    "half saved": (lambda f: cut(next(saved_dataset(f).glob("*.arrow")), 5000).parent, "cannot be read as a saved dataset"),
    "cut row": (lambda f: changed_row(f, {"bytes": png(1, 5)[:50], "path": None}), "row 17 of fire risk is damaged"),
    "empty row": (lambda f: changed_row(f, None), "no image in row 17 of fire risk"),
    "other names": (lambda f: write_parquet(one_parquet(f).with_name("b.parquet"), image_dataset(FIRE_CLASSES[::-1], 5)).parent,
                    "b.parquet has other columns or classes"),
    "other columns": (lambda f: table(f, text=["a"], label=[0]), "no columns 'image' and 'label' but text, label"),
    "numbers": (lambda f: table(f, image=[1, 2], label=[0, 1]), "does not hold images"),
    "lists": (lambda f: table(f, image=[png(0, 0)] * 2, label=[[0], [1]]), "does not hold images or class labels"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest lifts what the code says of it
def test_a_source_that_cannot_be_used_is_refused(tmp_path):
    root = tmp_path / "root"
    for number, (name, (make, message)) in enumerate(BAD_SOURCES.items()):
        (tmp_path / str(number)).mkdir()
        classes = ["--fire_classes", "low", "moderate"] if name == "cut row" else []
        with pytest.raises(UserError, match=message) as refusal:
            prepared(root, make(tmp_path / str(number) / "source"), *classes, count="all")
        assert "\n" not in str(refusal.value) and left_in(root) == [], name
