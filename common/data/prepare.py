"""The pipeline from a source to the folder of prepared images of a task."""

import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.cli.flags import PreparationConfig
from common.data import duplicates
from common.data.folders import files_source, zip_source
from common.data.generated import demo_source
from common.data.hub import hub_source
from common.data.reading import Images, read_images
from common.data.sources import NO_LABEL, NO_SPLIT, SPLITS, TRAIN, Source, first_few
from common.data.splits import FEWEST, choose, grouped_split, own_splits, random_split
from common.data.store import MANIFEST_FILE, fingerprint, read_manifest, write_splits
from common.data.tables import local_parquet_source, saved_source
from common.data.walk import File, walk
from common.errors import UserError
from common.files import locked, tidy, write_json, writing
from common.tasks import HUB, Task, absolute, class_name, merged_tasks, read_tasks

GENERATED = "generated"  # the source of the demo's images


def planned(config: PreparationConfig) -> list[Task]:
    """The tasks that a command line is about: those of --task, else those of the root, else the documented two."""
    if config.task:
        tasks = config.own_tasks()
        merged_tasks(config.root, tasks)  # what speaks against their names is to be known before the work
        return tasks
    return read_tasks(config.root)


def prepare(task: Task, config: PreparationConfig) -> dict[str, Any]:
    """Make the folder of prepared data of one task, as the flags have it, unless it exists; return its manifest.

    Raises UserError if the source cannot be had or used, the folder holds data made with other settings, or another run is
    at work in the root folder.
    """
    if task.demo:
        source, classes = (getattr(config, f"{task.key}_{flag}") for flag in ("source", "classes"))
        task = replace(task, classes=tuple(filter(None, map(class_name, classes))),
                       source=absolute(source) if source else GENERATED if config.demo else task.source)
    folder = Path(config.root) / task.dataset_folder
    wanted = {
        "demo": config.demo, "source": task.source.removeprefix(HUB), "seed": config.seed,
        "split": config.split_of(task), "hub_choice": config.hub_choice, "images_per_class": config.number_of_images(task),
        "requested_classes": list(task.classes),
        "zip_encoding": config.zip_encoding if task.source.lower().endswith(".zip") else None,
    }
    with locked(folder.parent):
        tidy(folder)
        if (folder / MANIFEST_FILE).exists() and not config.overwrite:
            manifest = read_manifest(task, config)
            for key, value in wanted.items():
                if manifest.get(key) != value:
                    raise UserError(f"{folder} was made with {key} = {manifest.get(key)}, not {value}; add --overwrite to "
                                    "make it anew, or choose another --root")
            return manifest
        if folder.exists() and not config.overwrite:
            raise UserError(f"{folder} exists, but Data_Preparation.py did not make it; add --overwrite to replace it, or "
                            "choose another --root")
        source = _opened(task, config)
        classes, rows, labels = choose(source, task, config)
        if config.hub_choice == "clustered":
            _report_blocks(source, classes, rows, task)
        source.fetch(rows)
        with writing(folder) as part:
            part.mkdir()
            with tempfile.TemporaryFile(dir=part) as file:
                images = read_images(source, rows, file, task, config.skip_damaged)
                made = _write(part, images, labels, classes, source.splits[rows], wanted["split"], config.seed)
            manifest = {**wanted, **made}
            write_json(part / MANIFEST_FILE, manifest)
    return manifest


def _opened(task: Task, config: PreparationConfig) -> Source:
    """A task's source, without its own split unless that is to be kept; how many images cannot be used is printed.

    Where its own train is kept, what is in no split that has a name of one is left out.
    """
    if task.source.startswith(HUB):
        source = hub_source(task)
    elif task.source != GENERATED:
        source = local_source(Path(task.source), task.source_flag, config.zip_encoding)
    elif config.images_per_class == "all":
        raise UserError("--images_per_class all needs a source with an end; --demo can generate any number, say how many")
    else:
        source = demo_source(task, config.seed, int(config.number_of_images(task)))
    if lost := (source.labels == NO_LABEL).sum():
        print(f"{task.name}: {lost:,} images have no label and are left out", flush=True)
    splits = np.where(source.labels == NO_LABEL, NO_SPLIT, source.splits)
    if config.split_of(task) != "own" or TRAIN not in splits:
        if config.split_of(task) == "own" and (splits != NO_SPLIT).any():
            print(f"{task.name}: none of its splits is called train, so all images are cut anew", flush=True)
        return replace(source, splits=np.full_like(splits, NO_SPLIT))
    if left := (splits == NO_SPLIT).sum() - lost:
        print(f"{task.name}: {left:,} images are in no split called {', '.join(SPLITS)} and are left out; --split random "
              "cuts all images anew", flush=True)
    return replace(source, labels=np.where(splits == NO_SPLIT, NO_LABEL, source.labels), splits=splits)


def local_source(path: Path, where: str, zip_encoding: str | None = None) -> Source:
    """Open a folder of images, a zip of it, a saved Dataset or DatasetDict, or Parquet files.

    where: begins messages. zip_encoding: of names in a zip that do not tell it. Raises UserError if there is nothing of the
    kind, or it cannot be read.
    """
    if not path.exists():
        raise UserError(f"{where} does not exist")
    if path.is_file():
        if zipfile.is_zipfile(path):
            return zip_source(path, where, zip_encoding)
        kind = "Parquet" if path.suffix.lower() == ".parquet" else "Parquet or a zip"
        return local_parquet_source([File((path.name,), path)], where, kind)
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return saved_source(path, where)
    files = list(walk(path))
    parquet = [file for file in files if file.ending == ".parquet"]
    if not parquet:
        return files_source(files, where)
    if images := [file for file in files if file.is_image]:
        raise UserError(f"{where} holds Parquet files ({first_few(parquet)}) and images ({first_few(images)}); give a folder of "
                        "one of them")
    return local_parquet_source(parquet, where, "Parquet")


def _report_blocks(source: Source, classes: list[str], rows: np.ndarray, task: Task) -> None:
    """Print it if the images that lie in other blocks had no chance to be chosen."""
    of_classes = np.isin(source.labels, [source.classes.index(name) for name in classes])
    used, in_all = (len(np.unique(blocks)) for blocks in (source.blocks[rows], source.blocks[of_classes]))
    if used < in_all:
        print(f"{task.name}: the images are from {used} of the {in_all} row groups of the Hub's files that hold these classes, "
              "so neighbours come together; --hub_choice uniform chooses among all images alike", flush=True)


def _write(folder: Path, images: Images, labels: np.ndarray, classes: list[str], own: np.ndarray, split: str,
           seed: int) -> dict[str, Any]:
    """Split the images and write them; return what the manifest holds on them. labels, own: (N,), of the damaged ones too."""
    kept = np.flatnonzero(images.kept)
    for label, name in enumerate(classes):
        if (count := (labels[kept] == label).sum()) < FEWEST:
            raise UserError(f"class {name!r} has only {count} images that are not damaged; choose other classes or more "
                            "images")
    if split == "grouped":
        splits = grouped_split(labels[kept], duplicates.groups(images.hashes[kept]), seed, classes)
    else:
        splits = random_split(labels[kept], seed, own[kept], classes)
    splits = {name: kept[indices] for name, indices in splits.items()}
    digest = fingerprint({name: [(images.digests[i], int(labels[i])) for i in indices] for name, indices in splits.items()})
    rows = {name: zip(images.contents(indices), labels[indices].tolist(), strict=True) for name, indices in splits.items()}
    write_splits(folder, rows, classes, digest)
    near = duplicates.have_near(images.hashes[splits["test"]], images.hashes[splits["train"]])
    return {
        "classes": classes, "images": {name: len(indices) for name, indices in splits.items()}, "fingerprint": digest,
        "own_splits": own_splits(own), "grey_levels": images.levels, "damaged": len(labels) - len(kept),
        "near_duplicates_in_test": int(near.sum()),
    }
