"""Draw the README's pictures of the generated images: `python -m common.demo.contact_sheet FOLDER`."""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from common.data.generated import generator
from common.tasks import DOCUMENTED, Task

COLUMNS = 8
UNSEEN = 1  # the seed of images that no demo has been trained on


def contact_sheet(task: Task, path: Path, seed: int = 0) -> None:
    """Write a picture with one row of freshly generated images per class."""
    module = generator(task)
    rows = len(module.CLASS_NAMES)
    sample = [[module.render(label, np.random.default_rng([seed, label, i])) for i in range(COLUMNS)] for label in range(rows)]
    height, width = sample[0][0].shape[:2]
    figure = Figure(figsize=(1.3 * COLUMNS, 1.3 * rows * height / width + 0.3 * rows), layout="constrained")
    for label, panels in enumerate(figure.subplots(rows, COLUMNS)):
        for panel, image in zip(panels, sample[label], strict=True):
            panel.imshow(image, interpolation="nearest")
            panel.set_axis_off()
        panels[0].set_title(module.CLASS_NAMES[label], loc="left", fontsize=9)
    figure.savefig(path, dpi=100, pil_kwargs={"quality": 88})


def main() -> None:
    """Write one sheet per task, and one image of its own to ask a mixture about."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write <task>.jpg and one_<task>.png into")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for task in DOCUMENTED:
        contact_sheet(task, folder / f"{task.key}.jpg")
        Image.fromarray(generator(task).render(0, np.random.default_rng(UNSEEN))).save(folder / f"one_{task.key}.png")


if __name__ == "__main__":
    main()
