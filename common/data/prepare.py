"""Images: from their sources to a prepared dataset on disk, and from there to tensors in memory."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.cli.flags import PreparationConfig
from common.data import duplicates
from common.data.hub import hub_source
from common.data.reading import Images, read_images
from common.data.sources import Source, demo_source, local_source
from common.data.splits import FEWEST, choose, grouped_split, random_split
from common.data.store import MANIFEST_FILE, fingerprint, read_manifest, write_splits
from common.errors import UserError
from common.files import locked, tidy, write_json, writing
from common.tasks import DOCUMENTED, HUB, Task, place, with_those_of

GENERATED = "generated"  # the source of the demo's images


def planned(config: PreparationConfig) -> list[Task]:
    """The tasks that a command line is about: those of --task, else those of the root, else the documented two."""
    if config.task:
        tasks = config.own_tasks()
        with_those_of(config.root, tasks)  # what speaks against their names is to be known before the work
        return tasks
    return with_those_of(config.root, []) or list(DOCUMENTED)


def prepare(task: Task, config: PreparationConfig) -> dict[str, Any]:
    """Make the folder of prepared data of one task, as the flags have it, unless it is there; return its manifest.

    Raises UserError if the source cannot be had or used, the folder holds data made with other settings, or another run is
    at work in the root folder.
    """
    task = _as_asked(task, config)
    folder = Path(config.root) / task.dataset_folder
    wanted = {
        "demo": config.demo, "source": task.source.removeprefix(HUB), "seed": config.seed, "split": config.split,
        "images_per_class": config.number_of_images(task), "requested_classes": list(task.classes),
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
        source = _source(task, config)
        classes, rows, labels = choose(source, task, config)
        source.fetch(rows)
        with writing(folder) as part:
            part.mkdir()
            with tempfile.TemporaryFile(dir=part) as file:
                images = read_images(source, rows, file, task, config.skip_damaged)
                manifest = {**wanted, **_write(part, images, labels, classes, config)}
            write_json(part / MANIFEST_FILE, manifest)
    return manifest


def _as_asked(task: Task, config: PreparationConfig) -> Task:
    """A documented task with the source and the classes that the flags give it; any other as it is."""
    if not task.demo:
        return task
    source = getattr(config, f"{task.key}_source")
    source = place(source) if source else GENERATED if config.demo else task.source
    return replace(task, source=source, classes=tuple(getattr(config, f"{task.key}_classes")))


def _source(task: Task, config: PreparationConfig) -> Source:
    if task.source.startswith(HUB):
        return hub_source(task)
    if task.source != GENERATED:
        return local_source(Path(task.source), task)
    if config.images_per_class == "all":
        raise UserError("--images_per_class all needs a source with an end; --demo can generate any number, say how many")
    return demo_source(task, config.seed, int(config.number_of_images(task)))


def _write(
        folder: Path, images: Images, labels: np.ndarray, classes: list[str], config: PreparationConfig) -> dict[str, Any]:
    """Split the images and write them; return what the manifest tells of them. labels: (N,), of the damaged ones too."""
    kept = np.flatnonzero(images.kept)
    for label, name in enumerate(classes):
        if (count := (labels[kept] == label).sum()) < FEWEST:
            raise UserError(f"class {name!r} has only {count} images that are not damaged; choose other classes or more "
                            "images")
    if config.split == "grouped":
        splits = grouped_split(labels[kept], duplicates.groups(images.hashes[kept]), config.seed, classes)
    else:
        splits = random_split(labels[kept], config.seed)
    splits = {name: kept[places] for name, places in splits.items()}
    digest = fingerprint({name: [(images.digests[i], int(labels[i])) for i in places] for name, places in splits.items()})
    rows = {name: zip(images.contents(places), labels[places].tolist(), strict=True) for name, places in splits.items()}
    write_splits(folder, rows, classes, digest)
    near = duplicates.have_near(images.hashes[splits["test"]], images.hashes[splits["train"]])
    return {
        "classes": classes, "images": {name: len(places) for name, places in splits.items()}, "fingerprint": digest,
        "damaged": len(labels) - len(kept), "near_duplicates_in_test": int(near.sum()),
    }


# ---- tensors ----












