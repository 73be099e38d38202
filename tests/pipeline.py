"""Running the six scripts in-process on a tiny backbone, as small as they go, and looking at what they leave behind."""

import hashlib
import importlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import BeitConfig, BeitForImageClassification, BeitImageProcessorPil

from common import models
from common.cli.flags import SCRIPTS, RunFlags
from common.cli.parser import parse
from common.data.tensors import TaskData, load_task
from common.files import read_csv
from common.results.metrics import NAMES
from common.tasks import read_tasks

REPOSITORY = Path(__file__).parents[1]
IMAGE_SIZE = 32
ON_CPU = ["--device", "cpu"]
TRAINING = [*ON_CPU, "--epochs", "2", "--batch_size", "8"]
SMALL = {"Data_Preparation": ["--images_per_class", "10"], "Benchmark": ON_CPU}  # the other scripts train
METHODS = ["Base_Models", "Benchmark", "Finetune", "Lora_Finetune", "CGM_Lora"]
# Method -> how the files of its predictions begin.
PREDICTIONS = {"Benchmark": "Benchmark", "Finetune": "Finetuned", "Lora_Finetune": "Lora", "CGM_Lora": "CGM_Lora"}


def tiny_beit(seed: int, **changes: object) -> BeitForImageClassification:
    """A random BEiT: hidden 32, 2 blocks, 2 heads, 32x32 pixels in patches of 8."""
    torch.manual_seed(seed)
    return BeitForImageClassification(BeitConfig(**{
        "image_size": IMAGE_SIZE, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "use_relative_position_bias": True, "layer_scale_init_value": 1.0,
        "drop_path_rate": 0.0, "use_mean_pooling": True, "initializer_range": 0.06, **changes,
    }))


def save_tiny_backbone(folder: Path, seed: int) -> str:
    """Write a tiny BEiT with its image processor in the Hugging Face layout; return the folder as a name."""
    tiny_beit(seed).save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    BeitImageProcessorPil(
        size=size, crop_size=size, resample=2, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)
    return str(folder)


@dataclass
class Workspace:
    """A root folder and the backbone its scripts run with. Drawing takes long: without `pictures`, all are empty."""

    root: Path
    model: str
    pictures: bool = False

    @property
    def results(self) -> Path:
        """The folder of all results."""
        return self.root / "Results"

    def flags(self, script: str, *more: str) -> list[str]:
        """The command line of a small run of a script; `more` comes last and wins."""
        return ["--demo", "--root", str(self.root), "--model", self.model, *SMALL.get(script, TRAINING), *more]

    def config(self, script: str, *more: str) -> RunFlags:
        """The settings of a small run of a script."""
        return parse(SCRIPTS[script], self.flags(script, *more))

    def run(self, script: str, *more: str) -> None:
        """Run a script in this process."""
        with mock.patch.object(Figure, "savefig", Figure.savefig if self.pictures else write_nothing):
            importlib.import_module(script).main(self.config(script, *more))

    def tasks(self) -> list[TaskData]:
        """The prepared data of every task."""
        processor = models.load_processor(self.model)
        return [load_task(task, self.config("Benchmark"), processor) for task in read_tasks(self.root)]

    def predictions(self, method: str, title: str) -> pd.DataFrame:
        """The table of predictions of a method on the task of this title."""
        return read_csv(self.results / method / f"{PREDICTIONS[method]}_{title}.csv", NAMES)

    def summary(self) -> pd.DataFrame:
        """The summary of all scripts."""
        return pd.read_csv(self.results / "summary.csv")

    def copy(self, root: Path, *parts: str) -> "Workspace":
        """The same workspace, or these parts of it, elsewhere; what is run there draws nothing."""
        for part in parts or [path.name for path in self.root.iterdir()]:
            if (self.root / part).is_dir():
                shutil.copytree(self.root / part, root / part, symlinks=True)
            else:
                shutil.copy(self.root / part, root / part)
        return Workspace(root, self.model)


def write_nothing(figure: Figure, path: Path, **options: object) -> None:
    """Save an empty picture in place of a figure."""
    Image.new("L", (1, 1)).save(path, format="png")


def files_in(folder: Path) -> set[str]:
    """Every file and link below a folder, by its path from there."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


def hashes(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file below a folder."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in files_in(folder) if not (folder / name).is_symlink()}
