"""Sources of images of every kind for tests, made small, and Data_Preparation.py run on them in this process."""

import zipfile
from pathlib import Path

from datasets import Dataset, Features, Value, load_from_disk
from hub import FIRE_CLASSES, colour, image_dataset, png

import Data_Preparation
from common.cli.flags import PreparationConfig
from common.cli.parser import parse
from common.data.prepare import prepare
from common.data.store import MANIFEST_FILE, read_manifest
from common.tasks import DOCUMENTED, read_tasks

PROJECT = Path(__file__).parents[1]
SCRIPT = "Data_Preparation.py"
FIRE = DOCUMENTED[0]
PER_CLASS = 12  # images of each class in every source
IMAGES = [(label, index) for label in range(len(FIRE_CLASSES)) for index in range(PER_CLASS)]


def prepared(root, source, *flags, count=10):
    """Prepare fire risk from a local source; return the manifest."""
    argv = ["--root", str(root), "--fire_source", str(source), "--images_per_class", str(count), *flags]
    return prepare(FIRE, parse(PreparationConfig, argv))


def run(root, *flags):
    """Run Data_Preparation.py; return the manifests of those of the root's tasks that are prepared, by key."""
    config = parse(PreparationConfig, ["--root", str(root), *map(str, flags)])
    Data_Preparation.main(config)
    return {task.key: read_manifest(task, config) for task in read_tasks(root)
            if (root / task.dataset_folder / MANIFEST_FILE).exists()}


def opened(root, key="fire"):
    """The prepared data, opened as any user of `datasets` would."""
    return load_from_disk(str(root / f"{key}_dataset"))


def all_identities(root, key="fire", classes=FIRE_CLASSES):
    """Which source images all splits hold together, by their colours: each once, and of the class its label names."""
    known = {colour(label, index): (label, index) for label in range(len(classes)) for index in range(PER_CLASS)}
    found = []
    for split in opened(root, key).values():
        found += [known[image.getpixel((0, 0))] for image in split["image"]]
        names = split.features["label"].names
        assert [classes[label] for label, _ in found[-len(split):]] == [names[label] for label in split["label"]]
    assert len(found) == len(set(found))
    return found


def left_in(folder):
    """Everything in a folder, hidden files too; nothing if there is no folder."""
    return list(folder.rglob("*"))


def write_folders(folder, classes=FIRE_CLASSES, per_class=PER_CLASS):
    """A subfolder of PNG files a class, so many in each or as many as a list says; return the folder."""
    counts = [per_class] * len(classes) if isinstance(per_class, int) else per_class
    for label, (name, count) in enumerate(zip(classes, counts, strict=True)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index:02d}.png").write_bytes(png(label, index))
    return folder


def wrapped_folders(folder):
    write_folders(folder / "a" / "b" / "c" / "FireRisk")
    return folder


def write_parquet(path, dataset):
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(path)
    return path


def one_parquet(folder):
    return write_parquet(folder / "all.parquet", image_dataset(FIRE_CLASSES, PER_CLASS))


def parquet_without_metadata(folder):
    """A Parquet file that others wrote: image bytes and class names, nothing that `datasets` knows by itself."""
    columns = {"image": [png(*image) for image in IMAGES], "label": [FIRE_CLASSES[label] for label, _ in IMAGES]}
    features = Features({"image": Value("binary"), "label": Value("string")})
    return write_parquet(folder / "bare.parquet", Dataset.from_dict(columns, features=features))


def zip_of(path, folder, renamed=lambda name: name):
    """A zip of what is in a folder, uncompressed, under other names; return the path."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            archive.writestr(zipfile.ZipInfo(renamed(file.relative_to(folder).as_posix())), file.read_bytes())
    return path


def zipped(folder):
    return zip_of(folder.with_suffix(".zip"), write_folders(folder))


def zipped_with_more(folder):
    """A zip of a folder of class folders, with what macOS adds, and images whose paths lead out of it."""
    path = zip_of(folder.with_suffix(".zip"), write_folders(folder / "FireRisk").parent)
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("__MACOSX/FireRisk/high/._00.png", "FireRisk/.DS_Store", "../outside.png", "../../high/outside.png",
                     "/high/outside.png"):
            archive.writestr(name, png(0, 0))
    return path


def saved_dataset(folder):
    image_dataset(FIRE_CLASSES, PER_CLASS).save_to_disk(folder)
    return folder


def metadata_csv(folder):
    (folder / "images").mkdir(parents=True)
    rows = ["file_name,label"]
    for label, index in IMAGES:
        rows.append(f"images/{label}_{index:02d}.png,{FIRE_CLASSES[label]}")
        (folder / f"images/{label}_{index:02d}.png").write_bytes(png(label, index))
    (folder / "metadata.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    return folder


LAYOUTS = (wrapped_folders, one_parquet, parquet_without_metadata, zipped_with_more, saved_dataset, metadata_csv)


def changed_file(path, old, new):
    """A file with some bytes exchanged wherever they are."""
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path
