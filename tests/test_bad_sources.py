"""Tests of sources that cannot be used: one line says what is wrong with each, and nothing is written."""

import struct
import zlib

import pytest
from datasets import Dataset, Image
from hub import FIRE_CLASSES, image_dataset, png
from image_sources import changed_file, metadata_csv, one_parquet, prepared, saved_dataset, write_folders, write_parquet, zipped

from common.errors import UserError


def with_file(folder, name, content=b"x"):
    """One more file in a folder, or another in place of one."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def bomb(side):
    """A few bytes that say they are an image of so many pixels a side."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">II", zlib.crc32(header), 9) + b"IDAT"


def unpacking_to(path, size):
    """A zip whose first file says that it unpacks to so many bytes."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\1\2") + 24, size)
    path.write_bytes(content)
    return path


def changed_row(folder, image):
    """A Parquet file with another image in row 17."""
    dataset = image_dataset(FIRE_CLASSES, 12).cast_column("image", Image(decode=False))
    columns = {"image": [*dataset["image"][:17], image, *dataset["image"][18:]], "label": dataset["label"]}
    return write_parquet(folder / "rows.parquet", Dataset.from_dict(columns, features=dataset.features))


def renamed(folder, name):
    """Class folders, of which one has its images under other names."""
    for path in list((write_folders(folder) / "low").iterdir()):
        target = path.parent / name.format(path.stem)
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    return folder


def table(folder, **columns):
    return write_parquet(folder / "table.parquet", Dataset.from_dict(columns))


LOW = "low/03.png"
BAD_SOURCES = {
    "nowhere": (lambda f: f / "nowhere", "nowhere does not exist"),
    "no images": (lambda f: with_file(f, "low/a.txt"), r"neither subfolders with images nor .*; its files end in \.txt"),
    "one class": (lambda f: write_folders(f, ["high"]), "needs two or more different classes"),
    "cut image": (lambda f: with_file(write_folders(f), LOW, png(1, 3)[:50]), r"low/03\.png\) of fire risk is damaged"),
    "empty image": (lambda f: with_file(write_folders(f), LOW, b""), r"low/03\.png\) of fire risk is damaged: it is empty"),
    "bomb": (lambda f: with_file(write_folders(f), LOW, bomb(10**4)), r"low/03\.png\) .*: it has 100,000,000 pixels.*--skip_dam"),
    "by case": (lambda f: write_folders(f, [*FIRE_CLASSES, "Low"]), "classes 'Low' and 'low', which differ only by case"),
    "several": (lambda f: write_folders(write_folders(f / "first").with_name("second")).parent,
                r"classes in several folders \(first, second\); give one"),
    "images in splits": (lambda f: with_file(write_folders(f, ["train", "test"]), "metadata.csv", b"file_name,text\na,b\n"),
                         r"24 images are not directly in a class folder \(.*, and no metadata.csv .* columns file_name and"),
    "deeper": (lambda f: renamed(f, "set1/{}.png"),
               r"12 images are not directly in a class folder \(low/set1/.*no metadata.csv or .*; move or remove"),
    "endings": (lambda f: renamed(f, "{}.heic"), r"the folder low has no images, only files such as low/.*\.heic; convert"),
    "unlisted": (lambda f: with_file(metadata_csv(f), "images/new.png"), r"1 images are not listed \(images/new.png\)"),
    "gone": (lambda f: (metadata_csv(f) / "images/0_00.png").unlink() or f, r"1 images are missing \(images/0_00.png\)"),
    "two labels": (lambda f: with_file(metadata_csv(f), "images/metadata.csv", b"file_name,label\n0_00.png,low\n"),
                   r"metadata.csv, images/0_00.png cannot be read as one label .*it is '.*' here and '.*' elsewhere"),
    "several labels": (lambda f: with_file(with_file(f, "images/0.png"), "metadata.jsonl", (
        b'{"file_name": "images/0.png", "label": ["cat", "pet"]}\n')),
        r"metadata.jsonl, images/0.png cannot be read as .*a label is \['cat', 'pet'\], not the name of one class"),
    "no JSON": (lambda f: with_file(write_folders(f), "metadata.jsonl"), r"metadata.jsonl cannot be read as a table"),
    "parquet and images": (lambda f: one_parquet(write_folders(f)).parent, "holds Parquet files .* and images .*give a folder"),
    "no zip": (lambda f: with_file(f, "a.zip", b"PK\3\4") / "a.zip", "cannot be read as Parquet or a zip"),
    "bomb in zip": (lambda f: unpacking_to(zipped(f), 4 * 10**9), r"source\.zip holds .*\.png of 4 GB, too large for an image"),
    "damaged in zip": (lambda f: changed_file(zipped(f), png(1, 3), png(1, 3)[:-5] + bytes(5)),
                       r"source\.zip/low/03\.png\) of fire risk is damaged: Bad CRC"),
    "encrypted": (lambda f: changed_file(zipped(f), b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1"),
                  r"source\.zip/high/.*\.png\) .*is encrypted, password required"),
    "two configurations": (lambda f: [one_parquet(f / name / "train") for name in "ab"][0].parents[2],
                           r"has splits in several folders \(a, b\); give one"),
    "two addresses": (lambda f: saved_dataset(f / "a::b"), "a::b cannot be read as a saved dataset"),
    "half saved": (lambda f: [path.write_bytes(path.read_bytes()[:5000]) for path in saved_dataset(f).glob("*.arrow")] and f,
                   "cannot be read as a saved dataset"),
    "cut row": (lambda f: changed_row(f, {"bytes": png(1, 5)[:50], "path": None}), "row 17 of fire risk is damaged"),
    "empty row": (lambda f: changed_row(f, None), "row 17 of fire risk is damaged: it is empty"),
    "other names": (lambda f: write_parquet(one_parquet(f).with_name("b.parquet"), image_dataset(FIRE_CLASSES[::-1], 5)).parent,
                    "b.parquet has other columns or classes"),
    "other columns": (lambda f: table(f, text=["a"], label=[0]), "no columns 'image' and 'label' but text, label"),
    "numbers": (lambda f: table(f, image=[1, 2], label=[0, 1]), "does not hold images"),
    "lists": (lambda f: table(f, image=[png(0, 0)] * 2, label=[[0], [1]]), "does not hold images or class labels"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest lifts what the code says of it
@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_source_that_cannot_be_used_is_refused(tmp_path, name):
    """In one line that says what is wrong with it, and nothing is written."""
    make, message = BAD_SOURCES[name]
    source = make(tmp_path / "source")
    with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
        prepared(tmp_path / "root", source, *(["--fire_classes", "all"] if name == "cut row" else []), count="all")
    assert list((tmp_path / "root").rglob("*")) == []
