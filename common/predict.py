"""Ask the finished mixture about photos: `python -m common.predict --root demo IMAGE_OR_FOLDER ...`."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli.flags import PredictConfig
from common.cli.parser import command
from common.cli.run import run
from common.errors import UserError
from common.files import read_json
from common.output import Output
from common.tasks import read_tasks

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor

    from common.data.images import Levels
    from ContextGatedMOE import ContextGatedMOE, Prediction

ANSWERS = 4  # the first, and the three next
BATCH = 16
NAME_WIDTH = 24  # of class names on the terminal
HEADER = r"Image,Predicted Task,Predicted Class,Probability,.*Familiarity\s*"  # of what this command writes to --output


def main(config: PredictConfig) -> None:
    """Print what the mixture says of each image as soon as it is known, and write it to --output.

    Raises UserError if there is no mixture or no image, or something else is at --output; at the end, if some images could
    not be read.
    """
    paths = find_images(config.images)
    output = Output(config.output, HEADER, paths) if config.output else None
    from common import models  # the libraries that take time, once it is known that there is something to do
    from common.training.distributed import device_of

    folder = finished_mixture(config)
    model, processor, device = open_mixture(folder, config), models.load_processor(str(folder)), device_of(config)
    model.to(device)
    width = min(40, max(len(str(path)) for path in paths))
    count = 0
    for answers in ask(paths, model, processor, device, known_levels(folder)):
        if output and answers:
            output.write(answers)  # first, so that no terminal can lose them
        if not (output and output.is_stdout):
            titles = [{name: name for name in row} for row in answers[:1] if not count]
            print(*(as_line(row, width) for row in [*titles, *answers]), sep="\n", end="\n" * bool(answers), flush=True)
        count += len(answers)
    if count < len(paths):
        raise UserError(f"{len(paths) - count} of {len(paths)} images could not be read; the lines above name them")


def finished_mixture(config: PredictConfig) -> Path:
    """Where the mixture is that is asked: --mixture, or the one below --root. Raises UserError if there is none."""
    from common.models import mixture_folder
    from ContextGatedMOE.saving import CONFIG_FILE

    folder = Path(config.mixture) if config.mixture else mixture_folder(
        config.root, [task.key for task in read_tasks(config.root)])
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"there is no finished mixture in {folder}; run {command('CGM_Lora', config)}, or give another --root "
                        "or --mixture")
    return folder


def open_mixture(folder: Path, config: PredictConfig) -> "ContextGatedMOE":
    """The mixture in `folder` on --model, or on the backbone it was made on. Raises UserError if either cannot be read."""
    from common.models import load_backbone
    from ContextGatedMOE import ContextGatedMOE, MixtureError
    from ContextGatedMOE.saving import read_config

    try:
        stored = read_config(folder)
        name, commit = (config.model, None) if config.model else (stored["base_model"], stored["base_commit"])
        if not name or not config.model and commit is None and not Path(name).is_dir():  # not to be asked for on the Hub
            raise UserError(f"{folder} was made on the backbone {name or 'without a name'}, which is not there; give --model")
        model = load_backbone(name, ["any"], config.seed, commit or "main")
        return ContextGatedMOE.from_pretrained(folder, model)
    except MixtureError as error:
        raise UserError(f"{error}; run {command('CGM_Lora', config)} --overwrite") from error


def find_images(names: list[str]) -> list[Path]:
    """The image files that are given, and those in the folders that are given. Raises UserError if there are none."""
    from common.data.walk import walk

    found: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = [path.joinpath(*file.parts) for file in walk(path) if file.is_image]
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


def known_levels(folder: Path) -> "list[Levels]":
    """The grey levels of those tasks of the mixture in `folder` that have images of more than 8 bits, as far as is known."""
    from common.provenance import PROVENANCE_FILE

    path = folder / PROVENANCE_FILE  # which a mixture that was saved by its own method does not have
    by_task = read_json(path, "delete it or give another --mixture").get("grey_levels", {}) if path.exists() else {}
    return [(low, high) for low, high in filter(None, by_task.values())]


def ask(paths: list[Path], model: "ContextGatedMOE", processor: "BaseImageProcessor", device: "torch.device",
        levels: "list[Levels]") -> Iterator[list[dict[str, object]]]:
    """Rows of the table, batch by batch in the order of the images. Those that are damaged are named and left out.

    levels: of grey, of the tasks' images of more than 8 bits.
    """
    from common.data.images import DamagedImage, open_image

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            names, images = [], []
            for path, opened in zip(batch, [pool.submit(open_image, path, levels) for path in batch], strict=True):
                try:
                    image, remark = opened.result()
                except DamagedImage as error:
                    print(f"{path} is no image that can be read: {error}", file=sys.stderr, flush=True)
                    continue
                names.append(path)
                images.append(image)
                if remark:
                    print(f"{path}: {remark}", file=sys.stderr, flush=True)
            if names:
                pixels = processor(images, return_tensors="pt").pixel_values.to(device)
                yield answers_of(names, model.predict(pixel_values=pixels), model)


def answers_of(paths: list[Path], prediction: "Prediction", model: "ContextGatedMOE") -> list[dict[str, object]]:
    """What the mixture says of each image of a batch: rows of the table."""
    best = prediction.logits.topk(min(ANSWERS, len(model.labels)))
    gates = sum(prediction.gates.values()) / len(prediction.gates)  # (B, E): mean over the layers
    familiarity = [float("nan")] * len(paths) if prediction.familiarity is None else prediction.familiarity.tolist()
    rows = []
    for path, logits, columns, weights, familiar in zip(paths, best.values, best.indices.tolist(), gates.tolist(), familiarity,
                                                        strict=True):
        refused = model.refuse_below is not None and familiar < model.refuse_below
        answers, shares = [model.labels[column] for column in columns], logits.exp().tolist()
        task, name = ("none", "none") if refused else answers[0]
        row = {"Image": str(path), "Predicted Task": task, "Predicted Class": name, "Probability": shares[0]}
        for place, ((other, its_name), share) in enumerate(zip(answers[1:], shares[1:], strict=True), start=2):
            row |= {f"Answer {place}": f"{other}: {its_name}", f"Probability {place}": share}
        row |= {f"Gate {expert}": weight for expert, weight in zip(model.expert_names, weights, strict=True)}
        rows.append(row | {"Familiarity": familiar})
    return rows


def as_line(row: dict[str, object], width: int) -> str:
    """A row of the table on the terminal. row: column -> value; width: of the column of paths."""
    cells = []
    for name, value in row.items():
        size = width if name == "Image" else NAME_WIDTH if name.startswith(("Predicted Class", "Answer")) else max(len(name), 6)
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        if len(text) > size:
            text = f"…{text[1 - size:]}" if name == "Image" else f"{text[: size - 1]}…"
        cells.append(f"{text:<{size}}")
    return "  ".join(cells).rstrip()


if __name__ == "__main__":
    run(main, PredictConfig)
