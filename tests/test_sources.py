"""Tests of sources on this machine: the same images from every layout, and a split of the source's own."""

import json
import os
import re
import struct
import unicodedata
import zipfile
import zlib
from collections import Counter
from functools import partial

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hub import FIRE_CLASSES, image_dataset, png
from image_sources import (
    IMAGES,
    LAYOUTS,
    all_identities,
    changed_file,
    one_parquet,
    opened,
    prepared,
    run,
    write_folders,
    write_parquet,
    zip_of,
)
from PIL import Image as PILImage

from common.data.prepare import local_source
from common.data.sources import NO_LABEL, SPLITS
from common.errors import UserError
from common.predict import find_images


def test_every_layout_gives_the_same_data(tmp_path):
    """Folders, zips, tables: the same images with the same labels in the same rows, each of the class its label names."""
    plain = prepared(tmp_path / "plain", write_folders(tmp_path / "images"))
    assert len(all_identities(tmp_path / "plain")) == 40 and plain["classes"] == FIRE_CLASSES[:4]
    for make in LAYOUTS:
        made = prepared(tmp_path / "root" / make.__name__, make(tmp_path / make.__name__))
        assert (made["fingerprint"], made["classes"]) == (plain["fingerprint"], plain["classes"]), make.__name__


def test_classes_that_are_numbers_are_in_order_of_number(tmp_path):
    numbers = [0, 1, 2, 10, 11]
    table = Dataset.from_dict({"image": [png(0, 0)] * 25, "label": numbers * 5})
    for path in (write_folders(tmp_path / "numbers", [*map(str, numbers)], 5), write_parquet(tmp_path / "numbers.parquet", table)):
        source = local_source(path, "")
        assert source.classes == ["0", "1", "2", "10", "11"] and len(source.labels) == 25


def with_links_and_hidden_files(folder, files):
    """Folders a and b, which is a link, with these files each; links that lead back, a FIFO, and what systems put there."""
    elsewhere = folder.with_name(f"{folder.name} elsewhere")
    for path in (folder / "a", elsewhere / "b"):
        path.mkdir(parents=True)
    (folder / "b").symlink_to(elsewhere / "b")
    (elsewhere / "b" / "up").symlink_to(folder)
    for name, content in files.items():
        for place in (folder / "a", folder / "b", folder / ".ipynb_checkpoints", folder / "__MACOSX", folder / "a" / "@eaDir"):
            place.mkdir(exist_ok=True)
            (place / name).write_bytes(content)
        (folder / "a" / f"._{name}").write_bytes(b"Mac OS X")
        os.mkfifo(folder / "a" / f"fifo of {name}")
    return folder


def test_preparation_and_predict_find_the_same_files(tmp_path):
    """Those behind links, each once; none that is hidden or no file on a disk."""
    images = with_links_and_hidden_files(tmp_path / "images", {f"{index}.png": png(0, index) for index in range(5)})
    source = local_source(images, "")
    assert (source.classes, len(source.labels)) == (["a", "b"], 10)
    assert find_images([str(images)]) == [images / label / f"{index}.png" for label in "ab" for index in range(5)]
    one_parquet(tmp_path)
    tables = with_links_and_hidden_files(tmp_path / "tables", {"all.parquet": (tmp_path / "all.parquet").read_bytes()})
    assert len(local_source(tables, "").labels) == 2 * len(IMAGES)


def test_how_many_images_have_no_label_and_files_are_no_images_is_printed(tmp_path, capsys):
    """No value, NaN, -1 or a number that has no name where names are known; endings that no image has, but for hidden files."""
    images = [png(label, index) for label in range(3) for index in range(7)]
    table = Dataset.from_dict({"image": images, "label": [1.0] * 7 + [2.0] * 7 + [None, float("nan")] * 3 + [2.0]})
    assert Counter(local_source(write_parquet(tmp_path / "a.parquet", table), "").labels) == {0: 7, 1: 8, NO_LABEL: 6}
    named = image_dataset(FIRE_CLASSES[:3], 7).data.table
    numbers = [0] * 7 + [1] * 7 + [-1, 3, 4, -1, -1, 9, 9]
    pq.write_table(named.set_column(1, named.schema.field("label"), [numbers]), tmp_path / "b.parquet")
    source = write_folders(tmp_path / "source", ["a", "b"], 7)
    for number, ending in enumerate((".jfif", ".avif", ".JPG", ".webp", ".jp2", ".tga", ".ppm")):
        path = source / "a" / f"{number:02d}.png"
        PILImage.open(path).save(path.with_suffix(ending))
        path.unlink()
    for name in ("._00.png", "notes.txt", "Thumbs.db", "more.txt", "README"):
        (source / "a" / name).write_bytes(b"no image")
    made = run(tmp_path / "root", "--task", f"a={tmp_path / 'b.parquet'}", f"b={source}", "--classes", "a=high,low")
    assert [sum(manifest["images"].values()) for manifest in made.values()] == [14, 14]
    printed = capsys.readouterr().out
    assert "a: 7 images have no label and are left out" in printed
    assert "passed over 4 files that are no images by their endings: 2 .txt, 1 no ending, 1 .db" in printed


def test_one_class_has_one_name_however_it_is_written(tmp_path):
    """Composed or not, with spaces and no-break spaces around it: by folders, metadata, tables and flags."""
    spellings = ["caf\u00e9", "cafe\u0301", "caf\u00e9 ", "\u00a0caf\u00e9"]
    folders = write_folders(tmp_path / "folders", [*spellings, "tea"], 6)
    rows = [{"file_name": unicodedata.normalize("NFC", f"{name}/{index:02d}.png"), "label": name}
            for name in [*spellings[1:], "tea"] for index in range(6)]
    listed = write_folders(tmp_path / "listed", [*spellings[1:], "tea"], 6)
    (listed / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for source in (folders, listed, write_parquet(tmp_path / "named.parquet", image_dataset([*spellings, "tea"], 6))):
        found = local_source(source, "")
        assert found.classes == ["caf\u00e9", "tea"] and Counter(found.labels)[1] == 6, source
    made = run(tmp_path / "root", "--task", f"e\u0301={folders}", "--classes", "e\u0301=cafe\u0301 ,tea")["\u00e9"]
    assert made["classes"] == prepared(tmp_path / "root", folders, "--fire_classes", "cafe\u0301", "tea", count=6)["classes"]


def test_names_in_zips_as_people_have_them(tmp_path, capsys):
    """UTF-8 without the flag for it, an extra field that has it, code pages, backslashes, ./ in front, a name twice."""
    folder = write_folders(tmp_path / "source", ["hoch", "mäßig"])
    plain = zip_of(tmp_path / "plain.zip", folder)
    paths = [plain, zip_of(tmp_path / "backslashes.zip", folder, lambda name: name.replace("/", "\\")),
             zip_of(tmp_path / "dot.zip", folder, lambda name: f"./{name}")]
    for encoding in ("utf-8", "cp437"):
        raw = "mäßig".encode(encoding)
        same_length = b"m" * len(raw)
        path = zip_of(tmp_path / f"{encoding}.zip", folder, partial(re.sub, "mäßig", same_length.decode()))
        paths.append(changed_file(path, same_length, raw))
    paths.append(tmp_path / "unicode.zip")
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(paths[-1], "w") as other:
        for entry in archive.infolist():
            name = entry.filename.encode()
            renamed = zipfile.ZipInfo(entry.filename.replace("mäßig", "m__ig"))
            renamed.extra = struct.pack("<HHBI", 0x7075, len(name) + 5, 1, zlib.crc32(renamed.filename.encode())) + name
            other.writestr(renamed, archive.read(entry))
        with pytest.warns(UserWarning, match="Duplicate name"):
            other.writestr("hoch/00.png", png(0, 1))
    for path in paths:
        source = local_source(path, "")
        assert (source.classes, len(source.labels)) == (["hoch", "mäßig"], 24), path.name
        guessed = path.stem == "cp437"
        assert ("names are not in UTF-8 and read as code page 437 (mäßig/00.png" in capsys.readouterr().out) == guessed
    assert next(source.read([0])).read_bytes() == png(0, 1)  # the later one of two counts, as when it is unpacked
    path = zip_of(tmp_path / "cp866.zip", folder, partial(re.sub, "mäßig", "mmmm"))
    source = local_source(changed_file(path, b"mmmm", "мера".encode("cp866")), "", "cp866")
    assert source.classes == ["hoch", "мера"] and next(source.read([12])).read_bytes() == png(1, 0)
    flags = ("--task", f"a={path}", "--images_per_class", "6", "--zip_encoding")
    assert run(tmp_path / "root", *flags, "cp866")["a"]["classes"] == ["hoch", "мера"]
    for encoding, message in (("utf-8", "names in utf-8, the --zip_encoding"), ("cp0", "--zip_encoding cp0 is no code page"),
                              ("gbk", "was made with zip")):
        with pytest.raises(UserError, match=message):
            run(tmp_path / ("root" if encoding == "gbk" else "other"), *flags, encoding)


SPLIT_COUNTS = {"train": [6, 8], "partial-train": [6, 8], "val": [2, 1], "test": [3, 4], "extra": [3, 2]}
WRITTEN_TO = {"partial-train": "train", "val": "validation"}


def split_images(*splits):
    """Which images each split has, as (label, index); index // 20 is the number of the split."""
    return {name: [(label, 20 * place + index) for label in range(2) for index in range(SPLIT_COUNTS[name][label])]
            for place, name in enumerate(splits)}


def split_folders(folder, *splits):
    for name, images in split_images(*splits).items():
        for label, index in images:
            (folder / name / f"class {label}").mkdir(parents=True, exist_ok=True)
            (folder / name / f"class {label}" / f"{index}.png").write_bytes(png(label, index))
    return folder


@pytest.mark.parametrize(("splits", "kept", "wanted"), [
    (("train", "val", "test"), ["train", "validation", "test"], (14, 3, 7)),
    (("train", "test"), ["train", "test"], (10, 4, 7)), (("train", "val"), ["train", "validation"], (10, 3, 4)),
    (("partial-train", "test", "extra"), ["train", "test"], (10, 4, 7)), (("train", "extra"), [], (9, 2, 3)),
])
def test_a_split_of_the_source_s_own_is_kept(tmp_path, capsys, splits, kept, wanted):
    """From folders, zips, Parquet files and saved datasets; what is missing is cut from train, by the seed and by class.

    What is beside it under another name is left out, which is printed.
    """
    images, every = split_images(*splits), image_dataset(["class 0", "class 1"], 60)
    tables = DatasetDict({name: every.select([60 * label + index for label, index in own]) for name, own in images.items()})
    tables.save_to_disk(tmp_path / "saved")
    for name, table in tables.items():
        write_parquet(tmp_path / "parquet" / f"{name}-00000-of-00001.parquet", table)
        write_parquet(tmp_path / "parquet folders" / name / "0.parquet", table)
    sources = {"s": tmp_path / "saved", "p": tmp_path / "parquet", "q": tmp_path / "parquet folders"}
    if splits != ("train", "extra"):  # of folders it could be two classes
        folders = split_folders(tmp_path / "folders", *splits)
        sources |= {"f": folders, "z": zip_of(tmp_path / "a.zip", folders)}
    made = run(tmp_path / "root", "--task", *[f"{key}={source}" for key, source in sources.items()])
    for key, manifest in made.items():
        assert (manifest["own_splits"], tuple(manifest["images"][name] for name in SPLITS)) == (kept, wanted), key
        found = {}
        for name, split in opened(tmp_path / "root", key).items():
            corners = [image.getpixel((0, 0)) for image in split["image"]]
            found[name] = {((red - 10) // 20, index) for red, index, _ in corners}
            assert {label for label, _ in found[name]} == {0, 1}
        assert len(set().union(*found.values())) == sum(wanted) and found["train"] <= set(images[splits[0]])
        for name, own in [*images.items()][1:]:
            assert found.get(WRITTEN_TO.get(name, name), set(own)) == set(own)
    assert (capsys.readouterr().out.count("5 images are in no split called train") == len(sources)) == ("extra" in splits)


def test_the_split_flag_decides(tmp_path, capsys):
    """--split random pools what a source has split; the documented tasks always do, unless --split own is given."""
    source = split_folders(tmp_path / "source", "train", "val", "test")
    anew = {"train": 15, "validation": 4, "test": 5}
    assert run(tmp_path / "1", "--task", f"a={source}", "--split", "random")["a"]["images"] == anew
    assert prepared(tmp_path / "2", source, count="all")["images"] == anew
    assert prepared(tmp_path / "3", source, "--split", "own", count="all")["own_splits"] == ["train", "validation", "test"]
    few = run(tmp_path / "4", "--task", f"a={source}", "--images_per_class", "6")["a"]
    assert few["images"] == {"train": 6, "validation": 2, "test": 4}  # 3, 1, 2 of 6, 2, 3; as many of 8, 1, 4
    assert "cut anew" not in capsys.readouterr().out
    run(tmp_path / "6", "--task", f"b={split_folders(tmp_path / 'no train', 'val', 'test')}")
    assert "b: none of its splits is called train" in capsys.readouterr().out
    for path in (source / "test" / "class 1").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="class 'class 1' has 0 images in test, fewer than 1; .*--split random"):
        run(tmp_path / "5", "--task", f"a={source}")
