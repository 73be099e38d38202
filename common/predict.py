"""Ask the finished mixture about photos: `python -m common.predict --root demo IMAGE_OR_FOLDER ...`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli.flags import PredictConfig
from common.cli.run import run
from common.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from ContextGatedMOE import ContextGatedMOE, Prediction

ANSWERS = 4  # the first, and the three next
BATCH = 16
ANSWER_COLUMNS = [f"Answer {place}" for place in range(2, ANSWERS + 1)]
NAME_WIDTH = 24  # of class names on the terminal


def main(config: PredictConfig) -> None:
    """Print what the mixture says of each image as soon as it is known, and write it to --output.

    Raises UserError if there is no mixture or no image; at the end, if some images could not be read.
    """
    paths = find_images(config.images)
    import pandas as pd  # the libraries that take time, once it is known that there is something to do

    from common import models
    from common.comparison import mixture
    from common.files import write_csv
    from common.training.evaluate import device_of

    folder = mixture.finished_folder(config)
    model, processor = mixture.open_by_name(folder, config), models.load_processor(str(folder))
    device = device_of(config)
    model.to(device)
    width = min(40, max(len(str(path)) for path in paths))
    rows: list[dict[str, object]] = []
    for batch in in_batches(paths):
        pixels = processor([image for _, image in batch], return_tensors="pt").pixel_values
        said = model.predict(pixel_values=pixels.to(device))
        for number, (path, _) in enumerate(batch):
            rows.append(answer(path, number, said, model))
            if len(rows) == 1:
                print(as_line({name: name for name in rows[0]}, width))
            print(as_line(rows[-1], width), flush=True)
    if config.output and rows:
        write_csv(Path(config.output), pd.DataFrame(rows))
    if len(rows) < len(paths):
        raise UserError(f"{len(paths) - len(rows)} of {len(paths)} images could not be read; the lines above name them")


def find_images(names: list[str]) -> list[Path]:
    """The image files that are given, and those in the folders that are given. Raises UserError if there are none."""
    from common.data.images import image_endings

    found: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in image_endings() and file.is_file()]
            if not inside:
                raise UserError(f"{path} holds no images")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"there is no {path}")
    if not found:
        raise UserError("give one or more images, or folders of images")
    return found


def in_batches(paths: list[Path]) -> Iterator[list[tuple[Path, "Image.Image"]]]:
    """The images in order, a few at a time, read ahead on all cores; those that are damaged are named and left out."""
    from concurrent.futures import ThreadPoolExecutor

    from common.data.images import DamagedImage, open_image
    from common.data.reading import CORES, in_order

    def opened(path: Path) -> "tuple[Path, Image.Image] | DamagedImage":
        try:
            return path, open_image(path)
        except DamagedImage as error:
            return error

    batch: list[tuple[Path, Image.Image]] = []
    with ThreadPoolExecutor(CORES) as pool:
        for result in in_order(pool, opened, paths):
            if isinstance(result, DamagedImage):
                print(f"{result.path.strip(' ()')} is no image that can be read: {result}", file=sys.stderr, flush=True)
                continue
            batch.append(result)
            if len(batch) == BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def answer(path: Path, number: int, said: "Prediction", model: "ContextGatedMOE") -> dict[str, object]:
    """What the mixture says of image `number` of a batch: a row of the table."""
    best = said.logits[number].topk(min(ANSWERS, len(model.labels)))
    shares, answers = best.values.exp().tolist(), [model.labels[index] for index in best.indices.tolist()]
    familiarity = float("nan") if said.familiarity is None else said.familiarity[number].item()
    refused = model.refuse_below is not None and familiarity < model.refuse_below
    task, name = ("none", "none") if refused else answers[0]
    row: dict[str, object] = {"Image": str(path), "Predicted Task": task, "Predicted Class": name, "Probability": shares[0]}
    for column, share, (other, its_name) in zip(ANSWER_COLUMNS, shares[1:], answers[1:], strict=False):
        row |= {column: f"{other}: {its_name}", column.replace("Answer", "Probability"): share}
    gates = sum(weights[number] for weights in said.gates.values()) / len(said.gates)
    row |= {f"Gate {expert}": weight for expert, weight in zip(model.expert_names, gates.tolist(), strict=True)}
    return row | {"Familiarity": familiarity}


def as_line(row: dict[str, object], width: int) -> str:
    """A row of the table on the terminal. row: column -> value; width: of the column of paths."""
    cells = []
    for name, value in row.items():
        size = width if name == "Image" else NAME_WIDTH if name in ("Predicted Class", *ANSWER_COLUMNS) else max(len(name), 6)
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        if len(text) > size:
            text = f"…{text[1 - size:]}" if name == "Image" else f"{text[: size - 1]}…"
        cells.append(f"{text:<{size}}")
    return "  ".join(cells).rstrip()


if __name__ == "__main__":
    run(main, PredictConfig)
