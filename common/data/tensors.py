"""Prepared images as a model takes them: resized once, kept beside the data, read as they are used."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from tqdm import tqdm
from transformers import BaseImageProcessor

from common.cli.flags import RunFlags
from common.cli.parser import command
from common.data import pixels
from common.data.images import Levels
from common.data.pixels import StoredImages
from common.data.processing import affine_of, processed, same_size
from common.data.sources import SPLITS
from common.data.store import Row, fingerprint, read_manifest, read_split
from common.data.threads import CORES, in_order
from common.errors import UserError
from common.files import locked, sweep, writing
from common.tasks import Task

FEW = 2**30  # bytes of images that are copied to a GPU as a whole


@dataclass
class ImageSet:
    """Examples. inputs: images (N, C, H, W), in memory or on disk, or features (N, D) float; labels: (N,) int64.

    scale, offset: (C,), which make of uint8 pixels what the model takes; None for inputs that are that already.
    tasks: (N,) int64, the position of the task an image belongs to; a label is the number of the class within it.
    """

    inputs: torch.Tensor | StoredImages
    labels: torch.Tensor
    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    tasks: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "ImageSet":
        """The same examples on `device`; images on disk only if they are few and it has a memory of its own."""
        fields = dict(vars(self))
        if isinstance(self.inputs, StoredImages):
            few = torch.device(device).type != "cpu" and self.inputs.nbytes <= FEW
            fields["inputs"] = self.inputs[:].to(device) if few else self.inputs
        return ImageSet(**{name: value.to(device) if isinstance(value, torch.Tensor) else value
                           for name, value in fields.items()})

    def batch(self, rows: torch.Tensor) -> torch.Tensor:
        """Model inputs of these rows: (B, C, H, W) float32, as the image processor gives them, or (B, D)."""
        inputs = self.inputs[rows].to(self.labels.device)
        if self.scale is None:
            return inputs
        return inputs.float().mul_(self.scale[:, None, None]).add_(self.offset[:, None, None])

    def take(self, rows: torch.Tensor) -> "ImageSet":
        """The examples of these rows (M,); images on disk stay there."""
        inputs = self.inputs.take(rows) if isinstance(self.inputs, StoredImages) else self.inputs[rows]
        return ImageSet(inputs, self.labels[rows], self.scale, self.offset, None if self.tasks is None else self.tasks[rows])


@dataclass
class TaskData:
    """One prepared task in memory.

    fingerprint: SHA-256 of the prepared images and labels. preprocessing: the start of that of the image processor's
    settings. near_duplicates_in_test: how many test images have a near-duplicate in train. grey_levels: those that became 0
    and 255 in images of more than 8 bits; None if there are none, or it is not known.
    """

    task: Task
    classes: list[str]
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    fingerprint: str
    preprocessing: str
    near_duplicates_in_test: int
    grey_levels: Levels | None = None


def load_task(task: Task, config: RunFlags, processor: BaseImageProcessor) -> TaskData:
    """Prepared images of a task as tensors for a backbone. Raises UserError if they are missing or damaged, or the image
    processor is of no use for them.

    The processor's resizing and cropping is done once for each dataset and kept on disk beside the data.
    """
    manifest = read_manifest(task, config)
    folder, counts = Path(config.root) / task.dataset_folder, {name: manifest["images"][name] for name in SPLITS}
    settings = json.dumps(processor.to_dict(), sort_keys=True, default=str)
    preprocessing = hashlib.sha256(settings.encode()).hexdigest()[:12]
    cache, of = folder / f"pixels_{preprocessing}.npy", f"{manifest['fingerprint']} {preprocessing}"
    scale, offset = affine_of(processor) or (None, None)
    with locked(folder, wait=True):  # two scripts may want to resize at once
        sweep(folder)
        stored = pixels.read(cache, counts, of)
        if stored is None:
            with writing(cache) as part:
                batches = _processed(folder, manifest, processor, scale is not None, config)
                pixels.write(part, counts, batches, of)
            stored = pixels.read(cache, counts, of)
    sets = {name: ImageSet(*stored[name], scale, offset) for name in SPLITS}
    return TaskData(task, manifest["classes"], **sets, fingerprint=manifest["fingerprint"], preprocessing=preprocessing,
                    near_duplicates_in_test=manifest["near_duplicates_in_test"], grey_levels=manifest.get("grey_levels"))


def _processed(folder: Path, manifest: dict[str, Any], processor: BaseImageProcessor, unscaled: bool,
               config: RunFlags) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Images (n, C, H, W) of all splits as the processor makes them, on all cores, with their labels.

    Raises UserError if the images are not those of the manifest, or not of one size then.
    """
    def work(rows: list[Row]) -> tuple[torch.Tensor, list[tuple[bytes, int]]]:
        images = [PILImage.open(BytesIO(content)).convert("RGB") for content, _ in rows]
        digests = [(hashlib.sha256(content).digest(), label) for content, label in rows]
        return processed(processor, images, unscaled, config.model), digests

    found: dict[str, list[tuple[bytes, int]]] = {}
    shape: torch.Size | None = None
    try:
        for name in SPLITS:
            found[name] = []
            bar = tqdm(desc=f"resizing {name}", total=manifest["images"][name], unit="image", leave=False, disable=None)
            with bar, ThreadPoolExecutor(CORES) as pool:
                for images, rows in in_order(pool, work, read_split(folder, name)):
                    shape = shape or images.shape
                    found[name] += rows
                    yield same_size(images, shape, config.model), [label for _, label in rows]
                    bar.update(len(rows))
        counts = {name: len(rows) for name, rows in found.items()}
        if fingerprint(found) != manifest["fingerprint"] or counts != manifest["images"]:
            raise ValueError("its images are not those of its manifest")
    except UserError:
        raise
    except Exception as error:  # Arrow and decoders raise whatever comes up in a damaged file
        fix = f"run {command('Data_Preparation', config)} --overwrite"
        raise UserError(f"{folder} is damaged ({error}); {fix}") from error


def together(sets: list[ImageSet]) -> ImageSet:
    """Several tasks' examples as one set that remembers which task each is of. Raises UserError if images differ in size."""
    inputs = sets[0].inputs
    for part in sets[1:]:
        if part.inputs.shape[1:] != inputs.shape[1:]:
            raise UserError(f"the tasks' images differ in size ({tuple(inputs.shape[1:])} and {tuple(part.inputs.shape[1:])}); "
                            "choose a --model whose image processor makes them all of one size")
        stored = isinstance(inputs, StoredImages) and isinstance(part.inputs, StoredImages)
        inputs = inputs.followed_by(part.inputs) if stored else torch.cat([inputs[:], part.inputs[:]])
    tasks = torch.cat([torch.full((len(part),), index) for index, part in enumerate(sets)])
    return ImageSet(inputs, torch.cat([part.labels for part in sets]), sets[0].scale, sets[0].offset, tasks)
