"""Images: from their sources to a prepared DatasetDict on disk, and from there to tensors in memory."""

import hashlib
import io
import json
import logging
import os
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import (
    ClassLabel, Dataset, DatasetDict, Features, Image, disable_progress_bars, load_dataset, load_from_disk,
)
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import HTTPError
from PIL import Image as PILImage
from PIL import ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import BaseImageProcessor

from common.config import PreparationConfig, RunFlags, UserError
from common.files import command, read_json, write_json, writing
from common.tasks import Task

MANIFEST_FILE = "manifest.json"
GENERATED = "generated"  # the source of the demo's images
SPLITS = {"train": 0.6, "validation": 0.2, "test": 0.2}
CLASSES_PER_TASK = 4
IMAGE_FILES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}

for library in ("datasets", "huggingface_hub"):  # what they try again is no news; what fails is told here, in one line
    logging.getLogger(library).setLevel(logging.CRITICAL)
if not sys.stderr.isatty():
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
    """One prepared task in memory. fingerprint: SHA-256 of the prepared images and labels."""

    task: Task
    classes: list[str]
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    fingerprint: str


def prepare(task: Task, config: PreparationConfig) -> dict:
    """Make the folder of prepared data of one task, unless it is there already; return its manifest.

    Raises UserError if the source cannot be had or used, or the folder holds data made with other settings.
    """
    folder = Path(config.root) / task.dataset_folder
    wanted = {
        "demo": config.demo, "source": _source_name(task, config), "seed": config.seed,
        "images_per_class": config.images_per_class, "requested_classes": getattr(config, f"{task.key}_classes"),
    }
    if (folder / MANIFEST_FILE).exists() and not config.overwrite:
        manifest = read_manifest(task, config)
        for key, value in wanted.items():
            if manifest.get(key) != value:
                raise UserError(f"{folder} was made with {key} = {manifest.get(key)}, not {value}; add --overwrite to make "
                                "it anew, or choose another --root")
        return manifest
    if folder.exists() and not config.overwrite:
        raise UserError(f"{folder} exists, but Data_Preparation.py did not make it; add --overwrite to replace it, or choose "
                        "another --root")
    dataset = _demo_images(task, config) if wanted["source"] == GENERATED else _read_source(task, config)
    dataset, classes = _choose(dataset, task, config)
    splits = _split(dataset, config.seed)
    manifest = {
        **wanted, "classes": classes, "images": {name: len(split) for name, split in splits.items()},
        "fingerprint": _fingerprint(splits),
    }
    with writing(folder) as part:
        splits.save_to_disk(part)
        write_json(part / MANIFEST_FILE, manifest)
    return manifest


def read_manifest(task: Task, config: RunFlags) -> dict:
    """What the prepared data of a task were made from. Raises UserError if there are none."""
    folder = Path(config.root) / task.dataset_folder
    if not (folder / MANIFEST_FILE).exists():
        raise UserError(f"there are no images of {task.name} in {folder}; run {command('Data_Preparation', config)}")
    mend = f"run {command('Data_Preparation', config)} --overwrite"
    manifest = read_json(folder / MANIFEST_FILE, mend)
    if not {"classes", "fingerprint", "images"} <= set(manifest):
        raise UserError(f"{folder / MANIFEST_FILE} is damaged; {mend}")
    return manifest


def _source_name(task: Task, config: PreparationConfig) -> str:
    local = getattr(config, f"{task.key}_source")
    return str(Path(local).resolve()) if local else GENERATED if config.demo else task.hub_id


# ---- sources: each returns a Dataset with columns image (encoded bytes or path) and label (ClassLabel) ----


def _demo_images(task: Task, config: PreparationConfig) -> Dataset:
    """Generate the demo's images, the same for the same seed, on all cores."""
    if config.images_per_class == "all":
        raise UserError("--images_per_class all needs a source with an end; --demo can generate any number, say how many")
    per_class = int(config.images_per_class)
    jobs = [(task, config.seed, label, index) for label in range(len(task.demo_classes)) for index in range(per_class)]
    with ProcessPoolExecutor() as pool:
        images = list(tqdm(pool.map(_demo_image, jobs, chunksize=16), total=len(jobs), desc=f"{task.name}: drawing", unit="image", disable=None))
    labels = [label for _, _, label, _ in jobs]
    return Dataset.from_dict({"image": images, "label": labels}, features=_features(list(task.demo_classes)))


def _demo_image(job: tuple[Task, int, int, int]) -> dict:
    task, seed, label, index = job
    rng = np.random.default_rng([zlib.crc32(task.key.encode()), seed, label, index])
    return {"bytes": _png(PILImage.fromarray(task.render(label, rng))), "path": None}


def _read_source(task: Task, config: PreparationConfig) -> Dataset:
    local = getattr(config, f"{task.key}_source")
    dataset = _read_local(Path(local), task) if local else _read_hub(task)
    if not {"image", "label"} <= set(dataset.column_names):
        raise UserError(f"{local or task.hub_id} has no columns 'image' and 'label' but {', '.join(dataset.column_names)}")
    try:
        dataset = dataset.select_columns(["image", "label"]).cast_column("image", Image(decode=False))
        return dataset if isinstance(dataset.features["label"], ClassLabel) else dataset.class_encode_column("label")
    except (NotImplementedError, TypeError, ValueError) as error:  # what Arrow and datasets raise for a cast
        raise UserError(f"{local or task.hub_id}: column 'image' or 'label' does not hold images or class labels ({error})") from error


def _read_hub(task: Task) -> Dataset:
    """Download the training split from the Hub. Raises UserError with the way out if that fails."""
    offline = f"use --demo for generated images, or --{task.key}_source FOLDER for a local copy"
    print(f"{task.name}: fetching {task.hub_id} from the Hub", flush=True)
    try:
        return load_dataset(task.hub_id, split="train")
    except DatasetNotFoundError as error:
        raise UserError(f"the Hub has no dataset {task.hub_id} that you may read; {offline}") from error
    except (OSError, ValueError, DatasetsError, HTTPError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"{task.hub_id} could not be fetched from the Hub ({reason}); check the network, or {offline}") from error


def _read_local(source: Path, task: Task) -> Dataset:
    """Open a folder of class subfolders of images, a folder of Parquet files, or one Parquet file."""
    if not source.exists():
        raise UserError(f"--{task.key}_source: {source} does not exist")
    parquet = [source] if source.is_file() else sorted(source.rglob("*.parquet"))
    if parquet:
        try:
            return Dataset.from_parquet([str(path) for path in parquet])
        except (OSError, ValueError, DatasetsError) as error:
            raise UserError(f"--{task.key}_source: {source} cannot be read as Parquet ({error.__cause__ or error})") from error
    folders = _class_folders(source)
    if not folders:
        raise UserError(f"--{task.key}_source: {source} has neither subfolders with images nor Parquet files")
    paths = [(str(path), label) for label, folder in enumerate(folders) for path in _images_in(folder)]
    return Dataset.from_dict(
        {"image": [path for path, _ in paths], "label": [label for _, label in paths]},
        features=_features([folder.name for folder in folders]),
    )


def _class_folders(source: Path) -> list[Path]:
    """The subfolders that hold images, by name; one level deeper if the download is wrapped in a single folder."""
    folders = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [folder for folder in folders if _images_in(folder)]
    return found or (_class_folders(folders[0]) if len(folders) == 1 else [])


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_FILES and not path.name.startswith("."))


def _features(classes: list[str]) -> Features:
    return Features({"image": Image(decode=False), "label": ClassLabel(names=classes)})


# ---- choosing, splitting, cleaning ----


def _choose(dataset: Dataset, task: Task, config: PreparationConfig) -> tuple[Dataset, list[str]]:
    """Keep the wanted classes, as labels 0 to C - 1 in the wanted order, and a seeded choice of images of each."""
    names = dataset.features["label"].names
    classes = getattr(config, f"{task.key}_classes") or names[:CLASSES_PER_TASK]
    for name in classes:
        if name not in names:
            raise UserError(f"--{task.key}_classes: there is no class {name!r}; there are {', '.join(names)}")
    if len(set(classes)) < max(2, len(classes)):
        raise UserError(f"--{task.key}_classes: needs two or more different classes, not {', '.join(classes)}")
    labels = np.array(dataset["label"])
    rng = np.random.default_rng(config.seed)
    chosen = []
    for name in classes:
        rows = np.flatnonzero(labels == names.index(name))
        count = len(rows) if config.images_per_class == "all" else int(config.images_per_class)
        if len(rows) < max(count, 5):
            raise UserError(f"class {name!r} of {task.name} has {len(rows)} images, fewer than {max(count, 5)}; "
                            "lower --images_per_class or choose other classes")
        chosen.append(np.sort(rng.permutation(rows)[:count]))
    position = {names.index(name): label for label, name in enumerate(classes)}
    rows = np.concatenate(chosen)
    dataset = dataset.select(rows).map(
        lambda row, index: {"image": _as_rgb(row["image"], rows[index], task), "label": position[row["label"]]},
        with_indices=True, features=_features(classes), load_from_cache_file=False, desc=f"{task.name}: reading",
    )
    return dataset, classes


def _as_rgb(image: dict | None, row: int, task: Task) -> dict:
    """The encoded image as it is if it is upright RGB, else as an RGB PNG.

    row: its number in the source. Raises UserError if it is damaged or missing.
    """
    if not image or not (image["bytes"] or image["path"]):
        raise UserError(f"there is no image in row {row} of {task.name}; remove the row or put one in")
    source = io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]
    try:
        with PILImage.open(source) as opened:
            upright = ImageOps.exif_transpose(opened)
            upright.load()
            if opened.mode == "RGB" and upright.size == opened.size and not opened.getexif().get(0x0112, 1) > 1:
                return {"bytes": image["bytes"] or Path(image["path"]).read_bytes(), "path": None}
            return {"bytes": _png(to_rgb(upright)), "path": None}
    except Exception as error:  # decoders of damaged files raise whatever comes up, AttributeError and KeyError too
        where = f"row {row}" + (f" ({image['path']})" if image.get("path") else "")
        raise UserError(f"the image in {where} of {task.name} is damaged: {error}; remove or replace it") from error


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """Convert any image Pillow opens: transparency over white, 16 bits a channel scaled to 8."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith("I") else max(values.max(), 1.0)
        return PILImage.fromarray((values / top * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _png(image: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _split(dataset: Dataset, seed: int) -> DatasetDict:
    """Cut every class 60/20/20, then shuffle each split; both by the seed."""
    rng = np.random.default_rng(seed)
    labels = np.array(dataset["label"])
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        ends = np.round(np.cumsum(list(SPLITS.values())) * len(rows)).astype(int)
        for name, part in zip(SPLITS, np.split(rows, ends[:-1]), strict=True):
            parts[name].append(part)
    splits = {name: dataset.select(rng.permutation(np.concatenate(part))) for name, part in parts.items()}
    return DatasetDict(splits).cast_column("image", Image())


def _fingerprint(splits: DatasetDict) -> str:
    digest = hashlib.sha256()
    for name, split in splits.items():
        digest.update(name.encode())
        for row in split.cast_column("image", Image(decode=False)):
            digest.update(hashlib.sha256(row["image"]["bytes"]).digest() + bytes([row["label"]]))
    return digest.hexdigest()


# ---- tensors ----


def load_task(task: Task, config: RunFlags, processor: BaseImageProcessor) -> TaskData:
    """Prepared images of a task as tensors for a backbone. Raises UserError if they are missing or damaged.

    The processor's resizing is done once for each dataset and size and kept on disk beside the data.
    """
    manifest = read_manifest(task, config)
    folder = Path(config.root) / task.dataset_folder
    settings = json.dumps(processor.to_dict(), sort_keys=True, default=str)
    cache = folder / f"pixels_{hashlib.sha256(settings.encode()).hexdigest()[:12]}.safetensors"
    wanted = {f"{name}.{part}" for name in SPLITS for part in ("images", "labels")}
    try:
        tensors = load_file(cache)
    except (FileNotFoundError, SafetensorError):
        tensors = {}
    if set(tensors) != wanted:
        try:
            splits = load_from_disk(str(folder))
            tensors = {key: value for name in SPLITS for key, value in _tensors(name, splits[name], processor).items()}
        except (OSError, ValueError, KeyError, SyntaxError) as error:
            raise UserError(f"{folder} is damaged ({error}); run {command('Data_Preparation', config)} --overwrite") from error
        with writing(cache) as part:
            save_file(tensors, part)
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    sets = {name: ImageSet(tensors[f"{name}.images"], tensors[f"{name}.labels"], mean, std) for name in SPLITS}
    return TaskData(task, manifest["classes"], **sets, fingerprint=manifest["fingerprint"])


def _tensors(name: str, split: Dataset, processor: BaseImageProcessor) -> dict[str, torch.Tensor]:
    """Resized images (N, 3, S, S) uint8 and labels (N,) of one split; threads share the decoding."""

    def pixels(rows: list[int]) -> torch.Tensor:
        images = [image.convert("RGB") for image in split[rows]["image"]]
        resized = processor(images, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
        return resized.to(torch.uint8)

    chunks = [list(range(start, min(start + 32, len(split)))) for start in range(0, len(split), 32)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(pool.map(pixels, chunks), total=len(chunks), desc=f"resizing {name}", leave=False, disable=None)
        return {f"{name}.images": torch.cat(list(bar)), f"{name}.labels": torch.tensor(split["label"])}


def together(sets: list[ImageSet]) -> ImageSet:
    """Several tasks' examples as one set that remembers which task each image is of."""
    tasks = [torch.full((len(part),), index) for index, part in enumerate(sets)]
    return ImageSet(
        torch.cat([part.inputs for part in sets]), torch.cat([part.labels for part in sets]),
        sets[0].mean, sets[0].std, torch.cat(tasks),
    )


def batches(count: int, size: int) -> Iterator[torch.Tensor]:
    """Row numbers 0 to count - 1 in order, `size` at a time."""
    return iter(torch.arange(count).split(size))
