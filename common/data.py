"""Images: from their sources to a prepared dataset on disk, and from there to tensors in memory."""

import hashlib
import json
import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import disable_progress_bars
from PIL import Image as PILImage
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import BaseImageProcessor

from common import duplicates
from common.config import PreparationConfig, RunFlags, UserError
from common.files import command, locked, sweep, tensor_fingerprint, tidy, write_json, writing
from common.hub import hub_source
from common.prepared import MANIFEST_FILE, Row, fingerprint, read_manifest, read_split, write_splits
from common.reading import CORES, Images, in_order, read_images
from common.sources import Source, demo_source, local_source
from common.splits import FEWEST, SPLITS, choose, grouped_split, random_split
from common.tasks import Task

GENERATED = "generated"  # the source of the demo's images

for library in ("datasets", "huggingface_hub"):  # what they try again is no news; what fails is told here, in one line
    logging.getLogger(library).setLevel(logging.CRITICAL)
disable_progress_bars()


@dataclass
class ImageSet:
    """Examples in memory. inputs: images (N, 3, S, S) uint8 or features (N, D) float; labels: (N,) int64.

    mean, std: (3,) of the backbone's image processor, for pixels in [0, 1]; None for features.
    tasks: (N,) int64, the position in TASKS of the task an image belongs to; only training of the mixture reads it.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    mean: torch.Tensor | None = None
    std: torch.Tensor | None = None
    tasks: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "ImageSet":
        """The same examples on `device`."""
        return ImageSet(*(None if t is None else t.to(device) for t in vars(self).values()))

    def batch(self, rows: torch.Tensor) -> torch.Tensor:
        """Model inputs of these rows: (B, 3, S, S) float32, normalised as the image processor does, or (B, D)."""
        inputs = self.inputs[rows]
        if self.mean is None:
            return inputs
        return (inputs.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]


@dataclass
class TaskData:
    """One prepared task in memory.

    fingerprint: SHA-256 of the prepared images and labels. preprocessing: the start of that of the image processor's
    settings. near_duplicates_in_test: how many test images have a near-duplicate in train.
    """

    task: Task
    classes: list[str]
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    fingerprint: str
    preprocessing: str
    near_duplicates_in_test: int


def prepare(task: Task, config: PreparationConfig) -> dict[str, Any]:
    """Make the folder of prepared data of one task, unless it is there already; return its manifest.

    Raises UserError if the source cannot be had or used, the folder holds data made with other settings, or another run is
    at work in the root folder.
    """
    folder = Path(config.root) / task.dataset_folder
    wanted = {
        "demo": config.demo, "source": _source_name(task, config), "seed": config.seed, "split": config.split,
        "images_per_class": config.images_per_class, "requested_classes": getattr(config, f"{task.key}_classes"),
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


def _source_name(task: Task, config: PreparationConfig) -> str:
    local = getattr(config, f"{task.key}_source")
    return str(Path(local).resolve()) if local else GENERATED if config.demo else task.hub_id


def _source(task: Task, config: PreparationConfig) -> Source:
    if local := getattr(config, f"{task.key}_source"):
        return local_source(Path(local), task)
    if not config.demo:
        return hub_source(task)
    if config.images_per_class == "all":
        raise UserError("--images_per_class all needs a source with an end; --demo can generate any number, say how many")
    return demo_source(task, config.seed, int(config.images_per_class))


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


def load_task(task: Task, config: RunFlags, processor: BaseImageProcessor) -> TaskData:
    """Prepared images of a task as tensors for a backbone. Raises UserError if they are missing or damaged.

    The processor's resizing is done once for each dataset and size and kept on disk beside the data.
    """
    manifest = read_manifest(task, config)
    folder = Path(config.root) / task.dataset_folder
    settings = json.dumps(processor.to_dict(), sort_keys=True, default=str)
    preprocessing = hashlib.sha256(settings.encode()).hexdigest()[:12]
    cache = folder / f"pixels_{preprocessing}.safetensors"
    with locked(folder, wait=True):  # two scripts may want to resize at once
        sweep(folder)
        tensors = _cached(cache, manifest)
        if not tensors:
            tensors = _resized(folder, manifest, processor, f"run {command('Data_Preparation', config)} --overwrite")
            with writing(cache) as part:
                save_file(tensors, part, {"of": _checksum(tensors, manifest)})
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    sets = {name: ImageSet(tensors[f"{name}.images"], tensors[f"{name}.labels"], mean, std) for name in SPLITS}
    return TaskData(task, manifest["classes"], **sets, fingerprint=manifest["fingerprint"], preprocessing=preprocessing,
                    near_duplicates_in_test=manifest["near_duplicates_in_test"])


def _cached(path: Path, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The resized images on disk; nothing if there are none, or they are damaged or of other images."""
    try:
        with safe_open(path, "pt") as file:
            written = file.metadata()
        tensors = load_file(path)
    except (OSError, SafetensorError):
        return {}
    return tensors if written == {"of": _checksum(tensors, manifest)} else {}


def _checksum(tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> str:
    return f"{manifest['fingerprint']} {tensor_fingerprint(tensors)}"


def _resized(folder: Path, manifest: dict[str, Any], processor: BaseImageProcessor, mend: str) -> dict[str, torch.Tensor]:
    """Images (N, 3, S, S) uint8 and labels (N,) of every split, resized on all cores.

    Raises UserError, ending with `mend`, if they are not those of the manifest.
    """
    def resized(rows: list[Row]) -> tuple[torch.Tensor, list[tuple[bytes, int]]]:
        images = [_decoded(content) for content, _ in rows]
        pixels = processor(images, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
        return pixels.to(torch.uint8), [(hashlib.sha256(content).digest(), label) for content, label in rows]

    tensors, found = {}, {}
    try:
        for name in SPLITS:
            count = manifest["images"][name]
            images, known = torch.empty(0), []
            bar = tqdm(desc=f"resizing {name}", total=count, unit="image", leave=False, disable=None)
            with bar, ThreadPoolExecutor(CORES) as pool:
                for pixels, rows in in_order(pool, resized, read_split(folder, name)):
                    images = images if known else torch.empty((count, *pixels.shape[1:]), dtype=torch.uint8)
                    images[len(known) : len(known) + len(rows)] = pixels
                    known += rows
                    bar.update(len(rows))
            tensors[f"{name}.images"], tensors[f"{name}.labels"] = images, torch.tensor([label for _, label in known])
            found[name] = known
        if fingerprint(found) != manifest["fingerprint"]:
            raise ValueError("its images are not those of its manifest")
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, pa.ArrowException) as error:
        raise UserError(f"{folder} is damaged ({error}); {mend}") from error
    return tensors


def _decoded(content: bytes) -> PILImage.Image:
    try:
        return PILImage.open(BytesIO(content)).convert("RGB")
    except Exception as error:  # decoders of damaged files raise whatever comes up
        raise ValueError(f"an image cannot be decoded: {error}") from error


def together(sets: list[ImageSet]) -> ImageSet:
    """Several tasks' examples as one set that remembers which task each image is of."""
    tasks = [torch.full((len(part),), index) for index, part in enumerate(sets)]
    return ImageSet(
        torch.cat([part.inputs for part in sets]), torch.cat([part.labels for part in sets]),
        sets[0].mean, sets[0].std, torch.cat(tasks),
    )
