"""Tests of Data_Preparation.py: images arrive from every source as they are labelled, or one line says why they do not."""

import io
import json
import math
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_from_disk
from hub import (
    FIRE_CLASSES,
    FIRE_RISK,
    GAME_CLASSES,
    GAMEPLAY_IMAGES,
    colour,
    dataset_repo,
    image_dataset,
    noisy_png,
    png,
    serve,
)
from PIL import Image as PILImage
from pipeline import hashes

from common.cli.flags import PreparationConfig
from common.cli.parser import parse
from common.data.generated import generator
from common.data.hub import CONNECTIONS, DIGEST_BYTES
from common.data.prepare import prepare
from common.errors import UserError
from common.tasks import DOCUMENTED

pytest_plugins = ["warm_process"]

PROJECT = Path(__file__).parents[1]
SCRIPT = "Data_Preparation.py"
FIRE = DOCUMENTED[0]
CLASSES = {"fire": FIRE_CLASSES, "game": GAME_CLASSES}
PER_CLASS = 12  # images of each class in every source
SPLITS = ["train", "validation", "test"]

every_task = pytest.mark.parametrize("key", CLASSES)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What is read from Parquet is not cached outside the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def repos():
    """Both datasets as the Hub has them."""
    return {FIRE_RISK: dataset_repo(FIRE_CLASSES, PER_CLASS, 3), GAMEPLAY_IMAGES: dataset_repo(GAME_CLASSES, PER_CLASS, 2)}


@pytest.fixture(scope="session")
def from_hub(tmp_path_factory, repos, warm_process):
    """Root folder of data prepared from the Hub, 10 images a class."""
    root = tmp_path_factory.mktemp("from_hub") / "root"
    with serve(repos, warm_process.port):
        outcome = warm_process.run(SCRIPT, "--root", root, "--images_per_class", 10)
    assert (outcome.status, outcome.errors) == (0, "")
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder with one subfolder of images a class."""
    return write_folders(tmp_path_factory.mktemp("images") / "FireRisk")


@pytest.fixture
def root(tmp_path):
    """Where data are prepared; it is not there yet."""
    return tmp_path / "root"


def write_folders(folder, classes=FIRE_CLASSES, per_class=PER_CLASS):
    """Write a subfolder of PNG files a class; return the folder."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            (folder / name / f"{index:02d}.png").write_bytes(png(label, index))
    return folder


def write_parquet(path, dataset):
    """Write a dataset as one Parquet file; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(path)
    return path


def prepared(root, source, *flags, count=10):
    """Prepare fire risk from a local source in this process; return the manifest."""
    argv = ["--root", str(root), "--fire_source", str(source), "--images_per_class", str(count), *flags]
    return prepare(FIRE, parse(PreparationConfig, argv))


def opened(root, key="fire"):
    """The prepared data, opened as any user of `datasets` would."""
    return load_from_disk(str(root / f"{key}_dataset"))


def identities(split, classes=FIRE_CLASSES):
    """Which source image every row is, by its colour; each must be of the class its label names."""
    known = {colour(label, index): (label, index) for label in range(len(classes)) for index in range(PER_CLASS)}
    found = [known[image.getpixel((0, 0))] for image in split["image"]]
    names = split.features["label"].names
    assert [classes[label] for label, _ in found] == [names[label] for label in split["label"]]
    return found


def all_identities(root):
    """Which source images all splits hold together."""
    return [identity for split in opened(root).values() for identity in identities(split)]


def decoded(root):
    """Label -> the prepared images of it."""
    rows = [row for split in opened(root).values() for row in split]
    return {label: [row["image"] for row in rows if row["label"] == label] for label in {row["label"] for row in rows}}


def left_in(folder):
    """Everything in a folder, hidden files too; nothing if there is no folder."""
    return list(folder.rglob("*"))


# ---- from the Hub ----


@every_task
def test_images_from_the_hub_are_of_their_class(from_hub, key):
    """Every prepared image is a source image of the class its label names."""
    for split in opened(from_hub, key).values():
        identities(split, CLASSES[key])


@every_task
def test_the_first_four_labels_are_the_classes(from_hub, key):
    """Class names are the source's own, in its order."""
    for split in opened(from_hub, key).values():
        assert split.features["label"].names == CLASSES[key][:4]


@every_task
def test_columns_are_an_image_and_a_class_label(from_hub, key):
    """Plain `datasets` opens three splits that decode to RGB images of the source's size."""
    data = opened(from_hub, key)
    assert list(data) == SPLITS
    for split in data.values():
        assert split.column_names == ["image", "label"]
        assert split.features["image"] == Image() and isinstance(split.features["label"], ClassLabel)
        assert {(image.mode, image.size) for image in split["image"]} == {("RGB", (8, 8))}


@every_task
def test_splits_are_disjoint(from_hub, key):
    """No source image is in two splits, or twice in one."""
    found = [image for split in opened(from_hub, key).values() for image in identities(split, CLASSES[key])]
    assert len(found) == len(set(found)) == 40


@every_task
def test_every_class_is_cut_60_20_20(from_hub, key):
    """Stratified exactly."""
    counts = [Counter(split["label"]) for split in opened(from_hub, key).values()]
    assert counts == [dict.fromkeys(range(4), count) for count in (6, 2, 2)]


@every_task
def test_rows_are_shuffled(from_hub, key):
    """The source is sorted by label; the splits are not."""
    labels = list(opened(from_hub, key)["train"]["label"])
    assert labels not in (sorted(labels), sorted(labels, reverse=True))


def test_the_hub_and_a_local_copy_give_the_same_data(from_hub, images, root):
    """Where the images come from makes no difference to what is prepared."""
    manifest = json.loads((from_hub / "fire_dataset/manifest.json").read_text())
    assert prepared(root, images)["fingerprint"] == manifest["fingerprint"]


def test_finished_data_are_not_fetched_again(hub, from_hub, warm_process):
    """A second run asks the Hub for nothing and changes nothing."""
    before = hashes(from_hub)
    assert warm_process.run(SCRIPT, "--root", from_hub, "--images_per_class", 10).status == 0
    assert hub.requests == [] and hashes(from_hub) == before


def test_what_was_fetched_once_is_not_fetched_again(hub, repos, warm_process, tmp_path):
    """Data that are made anew, or for another root, come from what the first run fetched."""
    hub.repos = repos
    assert warm_process.run(SCRIPT, "--root", tmp_path / "first", "--images_per_class", 10).status == 0
    before = hub.parquet_bytes
    again = warm_process.run(SCRIPT, "--root", tmp_path / "second", "--images_per_class", 10)
    assert again.status == 0 and before == hub.parquet_bytes > 0
    assert again.output.count(": fetched 0 of ") == 2 and "were here from before" in again.output


def test_faults_that_pass_do_no_harm(hub, from_hub, repos, warm_process, root):
    """After two server errors and a download that broke off the data are the same."""
    hub.repos, hub.server_errors = repos, 2
    hub.cuts["data/train-00001-of-00003.parquet"] = 1
    assert warm_process.run(SCRIPT, "--root", root, "--images_per_class", 10).status == 0
    assert hub.server_errors == sum(hub.cuts.values()) == 0
    assert hashes(root) == hashes(from_hub)


def test_class_names_are_in_the_files_too(hub, from_hub, repos, warm_process, root):
    """A dataset without a card is read by what its Parquet files say."""
    hub.repos = {name: {path: content for path, content in repo.items() if path != "README.md"}
                 for name, repo in repos.items()}
    assert warm_process.run(SCRIPT, "--root", root, "--images_per_class", 10).status == 0
    assert hashes(root) == hashes(from_hub)


@pytest.mark.parametrize("fault", ["unknown", "gated", "server errors", "broken off", "damaged", "closed"])
def test_a_hub_that_fails_is_one_line_with_the_way_out(repos, warm_process, request, root, fault):
    """Exit status 2, one line that names --demo and --fire_source, and nothing written."""
    if fault != "closed":
        hub = request.getfixturevalue("hub")
        hub.repos = {} if fault == "unknown" else dict(repos)
        hub.gated = {FIRE_RISK} if fault == "gated" else set()
        hub.server_errors = 10**6 if fault == "server errors" else 0
        if fault == "broken off":
            hub.cuts = Counter(dict.fromkeys(repos[FIRE_RISK], 10**6))
        if fault == "damaged":
            hub.repos[FIRE_RISK] = {path: content[:-30] for path, content in repos[FIRE_RISK].items()}
    outcome = warm_process.run(SCRIPT, "--root", root)
    assert outcome.status == 2 and len(outcome.errors.splitlines()) == 1, outcome.errors
    assert all(part in outcome.errors for part in ("blanchon/FireRisk", "--demo", "--fire_source"))
    assert left_in(root) == []


# ---- no more than is needed ----

FIRE_RISK_COUNTS = [126, 214, 172, 359, 62, 435, 38]  # FireRisk's 6296, 10705, 8617, 17959, 3081, 21757, 1916, by 50
CHOSEN = 20  # of each class, as 1,000 there


@pytest.fixture(scope="module")
def fire_risk(request):
    """FireRisk in small: 24 files, sorted by label, in row groups of as many rows as the parameter says."""
    return dataset_repo(FIRE_CLASSES, FIRE_RISK_COUNTS, 24, getattr(request, "param", 10), noisy_png)


@pytest.fixture
def fetch(hub, warm_process, fire_risk, tmp_path):
    """Prepare fire risk from the hub, and the other task from here; arguments go to the process."""
    hub.repos = {FIRE_RISK: fire_risk}
    games = write_folders(tmp_path / "games", per_class=CHOSEN)
    return lambda root, **how: warm_process.run(
        SCRIPT, "--root", root, "--game_source", games, "--images_per_class", CHOSEN, **how)


def row_groups(repo):
    """Of every row group of a repository: the images in it, by name, and its bytes."""
    for path, content in repo.items():
        if path.endswith(".parquet"):
            file = pq.ParquetFile(io.BytesIO(content))
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                size = sum(group.column(column).total_compressed_size for column in range(group.num_columns))
                yield {row["path"] for row in file.read_row_group(number)["image"].to_pylist()}, size


def noisy_identities(root):
    """Which images of FireRisk in small were taken, by name; each must be of the class its label names."""
    found = []
    for split in opened(root).values():
        for image, label in zip(split["image"], split["label"], strict=True):
            index = image.getpixel((0, 0))[1] + 256 * image.getpixel((0, 1))[0]
            assert image.getpixel((0, 0)) == colour(label, index % 256)
            found.append(f"{label}_{index}.png")
    return found


@pytest.mark.parametrize("fire_risk", [10, None], indirect=True, ids=["groups of 10 rows", "one group a file"])
def test_only_the_row_groups_that_hold_chosen_rows_are_fetched(hub, fetch, fire_risk, root):
    """The right rows; at most 1.3 times the bytes of their row groups, and 35 % of the dataset; the line tells the truth."""
    outcome = fetch(root)
    assert (outcome.status, outcome.errors) == (0, "")
    taken = noisy_identities(root)
    assert Counter(name[0] for name in taken) == dict.fromkeys("0123", CHOSEN) and len(set(taken)) == 4 * CHOSEN
    total = sum(len(content) for path, content in fire_risk.items() if path.endswith(".parquet"))
    assert hub.parquet_bytes <= 1.3 * sum(size for names, size in row_groups(fire_risk) if names & set(taken))
    assert hub.parquet_bytes <= 0.35 * total
    assert f": fetched {hub.parquet_bytes:,} of {total:,} bytes" in outcome.output


def test_an_interrupted_fetch_goes_on(hub, fetch, fire_risk, warm_process, tmp_path):
    """Killed, then given up on by the Hub: what had arrived is not fetched again, and the data are the same."""
    assert fetch(tmp_path / "whole").status == 0
    whole = hub.parquet_bytes
    hub.served.clear()
    shutil.rmtree(warm_process.cache)
    assert fetch(tmp_path / "root", kill_at=("os.replace", 50)).status == -signal.SIGKILL
    assert 0 < hub.parquet_bytes < whole
    hub.most_bytes = hub.parquet_bytes + 1
    outcome = fetch(tmp_path / "root")
    assert outcome.status == 2 and len(outcome.errors.splitlines()) == 1 and "run the same command again" in outcome.errors
    hub.most_bytes = math.inf
    assert fetch(tmp_path / "root").status == 0
    assert whole <= hub.parquet_bytes <= whole + 2 * CONNECTIONS * max(size for _, size in row_groups(fire_risk))
    assert hashes(tmp_path / "root") == hashes(tmp_path / "whole")


def test_a_damaged_piece_is_fetched_anew(hub, fetch, warm_process, tmp_path):
    """And nothing else: its checksum tells, whether it ends early or has other bytes."""
    assert fetch(tmp_path / "first").status == 0
    pieces = sorted(path for path in (warm_process.cache / "assets").rglob("*-*") if path.is_file())
    cut, other = pieces[0], max(pieces, key=lambda path: path.stat().st_size)
    sizes = [path.stat().st_size - DIGEST_BYTES for path in (cut, other)]
    cut.write_bytes(cut.read_bytes()[:-1])
    other.write_bytes(bytes(other.stat().st_size))
    hub.served.clear()
    assert fetch(tmp_path / "second").status == 0 and hashes(tmp_path / "second") == hashes(tmp_path / "first")
    assert hub.parquet_bytes == sum(sizes)


# ---- from this machine ----


def wrapped_folders(folder):
    """A download that is wrapped in one more folder."""
    return write_folders(folder / "FireRisk").parent


def parquet_folder(folder):
    """Several Parquet files, as the Hub keeps them."""
    for path, content in dataset_repo(FIRE_CLASSES, PER_CLASS, 3).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def one_parquet(folder):
    """A single Parquet file."""
    return write_parquet(folder / "all.parquet", image_dataset(FIRE_CLASSES, PER_CLASS))


def parquet_without_metadata(folder):
    """A Parquet file that others wrote: image bytes and class names, nothing that `datasets` knows by itself."""
    rows = [(png(label, index), name) for label, name in enumerate(FIRE_CLASSES) for index in range(PER_CLASS)]
    features = Features({"image": Value("binary"), "label": Value("string")})
    table = Dataset.from_dict({"image": [row[0] for row in rows], "label": [row[1] for row in rows]}, features=features)
    return write_parquet(folder / "bare.parquet", table)


def zipped(folder):
    """A zip of class folders, uncompressed."""
    write_folders(folder)
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for image in folder.rglob("*.png"):
            archive.write(image, image.relative_to(folder))
    return path


def zipped_on_a_mac(folder):
    """A zip of a folder of class folders, with what macOS adds."""
    path = Path(shutil.make_archive(folder, "zip", write_folders(folder / "FireRisk").parent))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/FireRisk/high/._00.png", b"Mac OS X")
        archive.writestr("FireRisk/.DS_Store", b"Mac OS X")
    return path


def saved_dataset(folder):
    """What `Dataset.save_to_disk` writes."""
    image_dataset(FIRE_CLASSES, PER_CLASS).save_to_disk(folder)
    return folder


def saved_dict(folder):
    """What `DatasetDict.save_to_disk` writes; all splits are used."""
    dataset = image_dataset(FIRE_CLASSES, PER_CLASS)
    DatasetDict({"train": dataset.select(range(50)), "test": dataset.select(range(50, len(dataset)))}).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("make", [
    write_folders, wrapped_folders, parquet_folder, one_parquet, parquet_without_metadata, zipped, zipped_on_a_mac,
    saved_dataset, saved_dict,
])
def test_every_layout_gives_the_same_data(images, make, tmp_path):
    """Folders, zips, Parquet files, saved datasets: the same images with the same labels in the same rows."""
    manifest = prepared(tmp_path / "made", make(tmp_path / "source"))
    assert manifest["fingerprint"] == prepared(tmp_path / "plain", images)["fingerprint"]
    assert manifest["classes"] == FIRE_CLASSES[:4]


def test_local_images_are_of_their_class(images, root):
    """Every prepared image is a source image of the class its label names, none twice."""
    prepared(root, images)
    found = all_identities(root)
    assert len(found) == len(set(found)) == 40


def test_prepared_data_need_no_source(tmp_path, root):
    """The images are inside; the source may go."""
    prepared(root, write_folders(tmp_path / "source"))
    shutil.rmtree(tmp_path / "source")
    assert len(all_identities(root)) == 40


def test_hidden_files_are_no_images(tmp_path, root):
    """What macOS leaves beside every file on a foreign disk is passed over."""
    source = write_folders(tmp_path / "source")
    (source / "high" / "._00.png").write_bytes(b"Mac OS X")
    prepared(root, source, count="all")
    assert len(all_identities(root)) == 4 * PER_CLASS


def test_spaces_and_other_alphabets(tmp_path):
    """In the source's path, the class names and the root alike."""
    source = write_folders(tmp_path / "Luftbilder – 火災 2024", ["sehr hoch", "mäßig", "低い", "non brûlable"])
    root = tmp_path / "Größe & Wörter"
    classes = prepared(root, source)["classes"]
    assert sorted(classes) == sorted(path.name for path in source.iterdir())
    assert opened(root)["train"].features["label"].names == classes


def test_a_zip_is_read_in_place(tmp_path, root):
    """Nothing is unpacked, so a path that leads out of the zip leads nowhere."""
    path = zipped(tmp_path / "source")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../outside.png", png(0, 0))
        archive.writestr("../../high/outside.png", png(0, 0))
        archive.writestr("/high/outside.png", png(0, 0))
    prepared(root, path, count="all")
    assert len(all_identities(root)) == 4 * PER_CLASS
    assert list(tmp_path.rglob("outside.png")) == []


def test_demo_takes_a_local_source(images, root):
    """--demo with --fire_source reads the source: each default of the demo can be overridden."""
    assert prepared(root, images, "--demo")["source"] == str(images)
    assert len(all_identities(root)) == 40


def test_replaced_parquet_is_read_anew(tmp_path, root):
    """--overwrite takes what the file holds now, not what it held before."""
    source = one_parquet(tmp_path)
    prepared(root, source)
    write_parquet(source, image_dataset(FIRE_CLASSES, 10))
    prepared(root, source, "--overwrite", count="all")
    assert len(all_identities(root)) == 40


# ---- what is chosen ----


def test_classes_are_taken_in_the_given_order(images, root):
    """--fire_classes is the label order."""
    wanted = ["water", "low", "very_high"]
    assert prepared(root, images, "--fire_classes", *wanted)["classes"] == wanted
    assert opened(root)["test"].features["label"].names == wanted
    assert {FIRE_CLASSES[label] for label, _ in all_identities(root)} == set(wanted)


def test_all_takes_every_image(tmp_path, root):
    """--images_per_class all, whatever number each class has, each cut 60/20/20."""
    source = write_folders(tmp_path / "source")
    for index in (10, 11):
        (source / "low" / f"{index}.png").unlink()
    prepared(root, source, count="all")
    assert Counter(label for label, _ in all_identities(root)) == {0: 12, 1: 10, 2: 12, 3: 12}
    assert [Counter(split["label"])[1] for split in opened(root).values()] == [6, 2, 2]


def test_a_number_takes_so_many_of_each_class(images, root):
    """--images_per_class 5."""
    prepared(root, images, count=5)
    assert Counter(label for label, _ in all_identities(root)) == dict.fromkeys(range(4), 5)


def test_a_seed_gives_the_same_files(images, tmp_path):
    """Two runs write the same bytes."""
    for name in ("first", "second"):
        prepared(tmp_path / name, images, "--seed", "7")
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")


def test_another_seed_chooses_and_splits_otherwise(images, tmp_path):
    """The choice of images, the splits and the fingerprint follow the seed."""
    found = {seed: prepared(tmp_path / seed, images, "--seed", seed)["fingerprint"] for seed in ("1", "2")}
    assert found["1"] != found["2"]
    assert set(all_identities(tmp_path / "1")) != set(all_identities(tmp_path / "2"))


# ---- images of every kind ----


def encoded(mode, pixel, file_format, **save):
    """An 8 x 8 image of one pixel value."""
    image = PILImage.new(mode, (8, 8), pixel)
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 0, 255])
    buffer = io.BytesIO()
    image.save(buffer, file_format, **save)
    return buffer.getvalue()


@pytest.mark.parametrize("content, wanted", [
    (encoded("1", 1, "PNG"), (255, 255, 255)),
    (encoded("L", 77, "PNG"), (77, 77, 77)),
    (encoded("P", 1, "PNG"), (0, 0, 255)),
    (encoded("P", 1, "PNG", transparency=1), (255, 255, 255)),
    (encoded("RGBA", (9, 99, 199, 255), "PNG"), (9, 99, 199)),
    (encoded("RGBA", (9, 99, 199, 0), "PNG"), (255, 255, 255)),
    (encoded("RGBA", (255, 0, 0, 128), "PNG"), (255, 127, 127)),
    (encoded("LA", (50, 255), "PNG"), (50, 50, 50)),
    (encoded("LA", (50, 0), "PNG"), (255, 255, 255)),
    (encoded("I;16", 0x8000, "PNG"), (128, 128, 128)),
    (encoded("I", 0xFFFF, "TIFF"), (255, 255, 255)),
    (encoded("CMYK", (255, 0, 0, 0), "TIFF"), (0, 255, 255)),
    (encoded("CMYK", (255, 0, 0, 0), "JPEG"), (0, 255, 255)),
    (encoded("I;16", 0x4000, "TIFF"), (64, 64, 64)),
    (encoded("I;16B", 0x4000, "TIFF"), (64, 64, 64)),
    (encoded("F", 0.5, "TIFF"), (127, 127, 127)),
    (encoded("RGB", (9, 99, 199), "PNG", transparency=(9, 99, 199)), (255, 255, 255)),
    (encoded("RGB", (9, 99, 199), "PNG", transparency=(9, 99, 198)), (9, 99, 199)),
    (encoded("LAB", (255, 128, 128), "TIFF"), (255, 255, 255)),
    (encoded("P", 1, "GIF"), (0, 0, 255)),
], ids=["1", "L", "P", "P transparent", "RGBA opaque", "RGBA clear", "RGBA half", "LA opaque", "LA clear", "I;16", "I", "CMYK",
        "CMYK JPEG", "I;16 TIFF", "I;16B", "F", "RGB clear", "RGB opaque", "LAB", "GIF"])
def test_every_mode_becomes_rgb_of_its_colour(tmp_path, root, content, wanted):
    """Transparency goes over white, 16 bits are scaled to 8."""
    source = write_folders(tmp_path / "source", ["plain", "special"], per_class=5)
    for path in (source / "special").iterdir():
        path.write_bytes(content)
    prepared(root, source, count="all")
    for image in decoded(root)[1]:
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - wanted).max() <= 1


def test_a_turned_photo_is_put_upright(tmp_path, root):
    """EXIF orientation 6: what is stored on the left is shown at the top."""
    source = write_folders(tmp_path / "source", ["plain", "turned"], per_class=5)
    stored = PILImage.new("RGB", (8, 4), "blue")
    stored.paste("red", (0, 0, 4, 4))
    exif = PILImage.Exif()
    exif[0x0112] = 6
    for path in (source / "turned").iterdir():
        stored.save(path, exif=exif)
    prepared(root, source, count="all")
    for image in decoded(root)[1]:
        assert image.size == (4, 8) and image.getexif().get(0x0112, 1) == 1
        assert image.getpixel((0, 0)) == image.getpixel((3, 3)) == (255, 0, 0)
        assert image.getpixel((0, 4)) == image.getpixel((3, 7)) == (0, 0, 255)


def test_rgb_files_are_kept_byte_for_byte(tmp_path, root):
    """A JPEG is not encoded a second time."""
    source = write_folders(tmp_path / "source", ["plain", "photo"], per_class=5)
    buffer = io.BytesIO()
    PILImage.effect_noise((16, 16), 80).convert("RGB").save(buffer, "JPEG")
    for path in list((source / "photo").iterdir()):
        path.with_suffix(".JPG").write_bytes(buffer.getvalue())
        path.unlink()
    prepared(root, source, "--fire_classes", "plain", "photo", count="all")
    rows = opened(root)["train"].cast_column("image", Image(decode=False))
    assert {row["image"]["bytes"] for row in rows if row["label"] == 1} == {buffer.getvalue()}


# ---- sources that cannot be used ----


def nowhere(folder):
    """A folder that does not exist."""
    return folder / "nowhere"


def empty(folder):
    """A folder without anything."""
    folder.mkdir()
    return folder


def no_images(folder):
    """Class folders that hold text."""
    for name in FIRE_CLASSES:
        (folder / name).mkdir(parents=True)
        (folder / name / "notes.txt").write_text("no image")
    return folder


def one_class(folder):
    """Images of a single class."""
    return write_folders(folder, ["high"])


def cut_image(folder):
    """An image file that ends early."""
    (write_folders(folder) / "low" / "03.png").write_bytes(png(1, 3)[:50])
    return folder


def text_as_image(folder):
    """A file that only has the name of an image."""
    (write_folders(folder) / "low" / "03.png").write_text("no image")
    return folder


def changed_row(folder, row, image):
    """One row of a Parquet file with another image."""
    dataset = image_dataset(FIRE_CLASSES, PER_CLASS).cast_column("image", Image(decode=False))
    images = [*dataset["image"]]
    images[row] = image
    return write_parquet(folder / "rows.parquet", Dataset.from_dict(
        {"image": images, "label": dataset["label"]}, features=dataset.features
    ))


def cut_row(folder):
    """A row whose image ends early."""
    return changed_row(folder, 17, {"bytes": png(1, 5)[:50], "path": None})


def empty_row(folder):
    """A row without an image."""
    return changed_row(folder, 17, None)


def no_file_of_images(folder):
    """A file of another kind."""
    folder.mkdir()
    (folder / "images.zip").write_bytes(b"PK\3\4")
    return folder / "images.zip"


def empty_image(folder):
    """An image file without content."""
    (write_folders(folder) / "low" / "03.png").write_bytes(b"")
    return folder


def folder_as_image(folder):
    """A folder that has the name of an image."""
    (write_folders(folder) / "low" / "03.png").unlink()
    (folder / "low" / "03.png").mkdir()
    return folder


def link_to_nothing(folder):
    """A link in the place of an image, to a file that is gone."""
    (write_folders(folder) / "low" / "03.png").unlink()
    (folder / "low" / "03.png").symlink_to(folder / "gone.png")
    return folder


def bomb(folder, side=10_000):
    """A tiny file that says it is an image of 100 million pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">II", zlib.crc32(header), 9) + b"IDAT"
    (write_folders(folder) / "low" / "03.png").write_bytes(content)
    return folder


def larger_bomb(folder):
    """The same with 400 million pixels."""
    return bomb(folder, 20_000)


def changed_zip(folder, old, new):
    """A zip with some bytes of it exchanged, wherever they are."""
    path = zipped(folder)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


def damaged_in_zip(folder):
    """A zip with an image whose content has changed since it was put in."""
    return changed_zip(folder, png(1, 3), png(1, 3)[:-5] + bytes(5))


def encrypted_zip(folder):
    """A zip that needs a password."""
    return changed_zip(folder, b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1")


def zip_bomb(folder):
    """A small zip with an image that would be 3 GB."""
    sizes = (struct.pack("<IHH", size, len("high/00.png"), 0) for size in (len(png(0, 0)), 3 * 10**9))
    return changed_zip(folder, *sizes)


def names_that_differ_by_case(folder):
    """Class folders `low` and `Low`."""
    return write_folders(folder, [*FIRE_CLASSES, "Low"])


def several_downloads(folder):
    """Two folders of class folders."""
    for name in ("first", "second"):
        write_folders(folder / name)
    return folder


def half_saved_dataset(folder):
    """A saved dataset whose data file ends early."""
    path, = saved_dataset(folder).glob("*.arrow")
    path.write_bytes(path.read_bytes()[:5000])
    return folder


def other_saved_dataset(folder):
    """A saved dataset of something else."""
    Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(folder)
    return folder


def other_class_names(folder):
    """Parquet files whose labels mean different things."""
    one_parquet(folder)
    write_parquet(folder / "other.parquet", image_dataset(FIRE_CLASSES[::-1], PER_CLASS))
    return folder


def cut_parquet(folder):
    """A Parquet file that ends early."""
    path = one_parquet(folder)
    path.write_bytes(path.read_bytes()[:-9])
    return path


def different_parquets(folder):
    """Parquet files with different columns."""
    one_parquet(folder)
    write_parquet(folder / "other.parquet", Dataset.from_dict({"text": ["a"]}))
    return folder


def other_columns(folder):
    """A Parquet file of something else."""
    return write_parquet(folder / "text.parquet", Dataset.from_dict({"text": ["a"], "label": [0]}))


def numbers_as_images(folder):
    """An image column of numbers."""
    return write_parquet(folder / "numbers.parquet", Dataset.from_dict({"image": [1, 2], "label": [0, 1]}))


def lists_as_labels(folder):
    """A label column of lists."""
    return write_parquet(folder / "lists.parquet", Dataset.from_dict({"image": [png(0, 0)] * 2, "label": [[0], [1]]}))


BAD_SOURCES = [
    (nowhere, [], "nowhere does not exist"),
    (empty, [], "neither subfolders with images nor Parquet"),
    (no_images, [], "neither subfolders with images nor Parquet"),
    (one_class, [], "needs two or more different classes"),
    (cut_image, [], r"low/03\.png\) of fire risk is damaged"),
    (text_as_image, [], r"low/03\.png\) of fire risk is damaged"),
    (cut_row, ["--fire_classes", "low", "moderate"], "row 17 of fire risk is damaged"),
    (empty_row, [], "no image in row 17 of fire risk"),
    (no_file_of_images, [], "cannot be read as Parquet or a zip"),
    (empty_image, [], r"low/03\.png\) of fire risk is damaged: it is empty"),
    (folder_as_image, [], r"low/03\.png\) of fire risk is damaged: .*directory"),
    (link_to_nothing, [], r"low/03\.png\) of fire risk is damaged: .*No such file"),
    (bomb, [], r"low/03\.png\) of fire risk is damaged: it has 100,000,000 pixels.*; remove or .*, or add --skip_damaged"),
    (larger_bomb, [], r"low/03\.png\) of fire risk is damaged: .*400000000 pixels"),
    (damaged_in_zip, [], r"source\.zip/low/03\.png\) of fire risk is damaged: Bad CRC"),
    (encrypted_zip, [], "encrypted; unpack it"),
    (zip_bomb, [], r"high/.*\.png of 3 GB, too large"),
    (names_that_differ_by_case, [], "classes 'Low' and 'low', which differ only by case"),
    (several_downloads, [], r"classes in several folders \(first, second\); give one of them"),
    (half_saved_dataset, [], "cannot be read as a saved dataset"),
    (other_saved_dataset, [], "no columns 'image' and 'label' but text, label"),
    (other_class_names, [], "other.parquet has other columns or classes"),
    (cut_parquet, [], "cannot be read as Parquet"),
    (different_parquets, [], "cannot be read as Parquet"),
    (other_columns, [], "no columns 'image' and 'label' but text, label"),
    (numbers_as_images, [], "does not hold images"),
    (lists_as_labels, [], "does not hold images or class labels"),
    (write_folders, ["--fire_classes", "low", "lava"], "no class 'lava'; there are high, low, moderate"),
    (write_folders, ["--fire_classes", "low", "low"], "needs two or more different classes"),
    (write_folders, ["--images_per_class", "13"], "class 'high' of fire risk has 12 images, fewer than 13"),
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest lifts what the code says of it
@pytest.mark.parametrize("make, flags, message", BAD_SOURCES,
                         ids=[f"{make.__name__} {' '.join(flags)}" for make, flags, _ in BAD_SOURCES])
def test_a_source_that_cannot_be_used_is_refused(tmp_path, root, make, flags, message):
    """The message says what is wrong, and nothing is written."""
    with pytest.raises(UserError, match=message):
        prepared(root, make(tmp_path / "source"), *flags, count="all")
    assert left_in(root) == []


def test_a_refused_source_leaves_the_earlier_data(images, tmp_path, root):
    """Also when they were to be made anew."""
    prepared(root, images)
    before = hashes(root)
    with pytest.raises(UserError, match="damaged"):
        prepared(root, cut_image(tmp_path / "source"), "--overwrite", count="all")
    assert hashes(root) == before


def test_damaged_images_can_be_left_out(tmp_path, root, capsys):
    """With --skip_damaged the others are taken, and how many were left out is told and kept; a class may get too few."""
    source = write_folders(tmp_path / "source")
    for name, index in (("low", 3), ("low", 4), ("moderate", 0)):
        (source / name / f"{index:02d}.png").write_bytes(png(1, index)[:50])
    manifest = prepared(root, source, "--skip_damaged", count="all")
    assert (manifest["damaged"], sum(manifest["images"].values())) == (3, 4 * PER_CLASS - 3)
    assert Counter(label for label, _ in all_identities(root)) == {0: 12, 1: 10, 2: 11, 3: 12}
    for path in list((source / "low").iterdir())[:7]:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="class 'low' has only [0-5] images that are not damaged"):
        prepared(tmp_path / "other", source, "--skip_damaged", count="all")
    assert left_in(tmp_path / "other") == []


def test_a_refusal_is_one_line_and_status_2(tmp_path, root, warm_process):
    """The whole script: no traceback, and no images of the other task either."""
    source = cut_image(tmp_path / "source")
    outcome = warm_process.run(SCRIPT, "--root", root, "--fire_source", source, "--images_per_class", "all")
    assert outcome.status == 2 and len(outcome.errors.splitlines()) == 1, outcome.errors
    assert outcome.errors.startswith(f"{SCRIPT}: the image in row ")
    assert left_in(root) == []


# ---- again ----


def test_the_same_settings_again_do_nothing(tmp_path, root):
    """Not even the source is looked at."""
    source = write_folders(tmp_path / "source")
    first = prepared(root, source)
    before = {path: path.stat().st_mtime_ns for path in left_in(root)}
    shutil.rmtree(source)
    assert prepared(root, source) == first
    assert {path: path.stat().st_mtime_ns for path in left_in(root)} == before


@pytest.mark.parametrize("flags, setting", [
    (["--seed", "4"], "seed"),
    (["--images_per_class", "6"], "images_per_class"),
    (["--fire_classes", "low", "high"], "requested_classes"),
    (["--fire_source", "elsewhere"], "source"),
    (["--demo"], "demo"),
])
def test_other_settings_are_refused_by_name(images, root, flags, setting):
    """What was made is kept, and the line names the setting and --overwrite."""
    prepared(root, images)
    before = hashes(root)
    with pytest.raises(UserError, match=f"was made with {setting} = .*--overwrite"):
        prepared(root, images, *flags)
    assert hashes(root) == before


def test_overwrite_makes_it_anew(images, root):
    """With other settings, and nothing of the old is left."""
    prepared(root, images)
    (root / "fire_dataset" / "pixels_of_the_old.safetensors").touch()
    prepared(root, images, "--overwrite", count=6)
    assert len(all_identities(root)) == 24
    assert sorted(path.name for path in root.iterdir()) == ["fire_dataset"]
    assert not (root / "fire_dataset" / "pixels_of_the_old.safetensors").exists()


def test_a_folder_of_someone_else_is_kept(images, root):
    """A fire_dataset that the script did not make is replaced only by --overwrite."""
    (root / "fire_dataset").mkdir(parents=True)
    (root / "fire_dataset" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="did not make it; add --overwrite"):
        prepared(root, images)
    assert (root / "fire_dataset" / "mine.txt").read_text() == "mine"


# ---- the demo ----


def test_the_demo_runs_by_itself(tmp_path):
    """From another folder, without a network: five images a class of both tasks, in demo/."""
    command = [sys.executable, str(PROJECT / SCRIPT), "--demo", "--images_per_class", "5"]
    nowhere_to_go = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(command, cwd=tmp_path, env=nowhere_to_go, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for task in DOCUMENTED:
        data = opened(tmp_path / "demo", task.key)
        assert data["train"].features["label"].names == list(generator(task).CLASS_NAMES)
        assert {name: len(split) for name, split in data.items()} == {"train": 12, "validation": 4, "test": 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]
