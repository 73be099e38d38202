"""Prepared images as tensors for a backbone, resized once and kept beside the data."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image as PILImage
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import BaseImageProcessor

from common.cli.flags import RunFlags
from common.cli.parser import command
from common.data.reading import CORES, in_order
from common.data.sources import SPLITS
from common.data.store import Row, fingerprint, read_manifest, read_split
from common.errors import UserError
from common.files import locked, sweep, writing
from common.provenance import tensor_fingerprint
from common.tasks import Task


@dataclass
class ImageSet:
    """Examples in memory. inputs: images (N, 3, S, S) uint8 or features (N, D) float; labels: (N,) int64.

    mean, std: (3,) of the backbone's image processor, for pixels in [0, 1]; None for features.
    tasks: (N,) int64, the position in the root's tasks of the one an image belongs to; only the mixture's training reads it.
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


def _resized(folder: Path, manifest: dict[str, Any], processor: BaseImageProcessor, fix: str) -> dict[str, torch.Tensor]:
    """Images (N, 3, S, S) uint8 and labels (N,) of every split, resized on all cores.

    Raises UserError, ending with `fix`, if they are not those of the manifest.
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
        raise UserError(f"{folder} is damaged ({error}); {fix}") from error
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
