"""`python -m common.predict` over a folder of photos, beside the bare loop of decoding, image processor and model.

`python -m tests.bench.photos MIXTURE FOLDER` is that loop, as whoever needs no table of answers would write it.
"""

import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path

import pandas as pd
import torch
from datasets import load_from_disk
from PIL import Image
from transformers import AutoImageProcessor

from common.errors import UserError
from common.models import mixture_folder
from common.tasks import read_tasks
from ContextGatedMOE import ContextGatedMOE
from tests.bench.measure import Settings
from tests.bench.scripts import seconds_of

FEW, MANY = 16, 3000
BATCH = 32


def run_photos(settings: Settings) -> pd.DataFrame:
    """predict on 3,000 images of --root, a folder with a finished mixture, and the bare loop, each in processes of its own in
    turn: seconds for 16 images, for all, and images a second in between."""
    tasks = read_tasks(settings.root)
    mixture = mixture_folder(str(settings.root), [task.key for task in tasks])
    if not mixture.is_dir():
        raise UserError("photos needs a folder in which all six scripts have run; give it with --root")
    rows = []
    with tempfile.TemporaryDirectory() as top:
        few, many = Path(top) / "few", Path(top) / "many"
        _write([settings.root / task.dataset_folder for task in tasks], few, FEW)
        _write([settings.root / task.dataset_folder for task in tasks], many, 4 * FEW if settings.quick else MANY)
        commands = {"bare loop": ["tests.bench.photos", str(mixture)], "predict": ["common.predict", "--root", settings.root]}
        for number in range(settings.repeats):
            for name, command in commands.items():
                first, seconds = (seconds_of([sys.executable, "-m", *command, folder], name) for folder in (few, many))
                rate = (len(list(many.iterdir())) - FEW) / (seconds - first)
                rows.append({"round": number, "what": name, "seconds_for_few": first, "seconds": seconds,
                             "images_per_second": rate})
    return pd.DataFrame(rows)


def _write(datasets: list[Path], folder: Path, count: int) -> None:
    """Write so many test images of these datasets as files, over again where there are fewer."""
    folder.mkdir()
    images = [row["image"] for dataset in datasets for row in load_from_disk(str(dataset))["test"]]
    for number, image in enumerate(islice(cycle(images), count)):
        image.save(folder / f"{number:04}.png")


@torch.no_grad()
def _bare(mixture: str, folder: str) -> None:
    """Print the best answer for each image of a folder."""
    model = ContextGatedMOE.from_pretrained(mixture).eval()
    processor = AutoImageProcessor.from_pretrained(mixture, backend="pil")
    files = sorted(Path(folder).iterdir())
    for start in range(0, len(files), BATCH):
        pixels = processor([Image.open(file).convert("RGB") for file in files[start : start + BATCH]], return_tensors="pt")
        print(model(**pixels).logits.argmax(1).tolist())


if __name__ == "__main__":
    _bare(*sys.argv[1:])
