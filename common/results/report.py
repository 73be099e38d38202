"""Results/index.html: all results so far on one page that holds everything it shows."""

import base64
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import load_from_disk
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from common.data.tensors import TaskData
from common.files import locked, read_csv, read_json, remove, writing
from common.results.metrics import NAMES, NONE
from common.results.summary import SUMMARY_FILE, read_summary

PAGE = "index.html"
TEMPLATE = "report.html"
MIXTURE = "CGM_Lora"
# Folder -> what the method is called, and how the files of its tasks begin.
METHODS = {
    "Benchmark": ("Pretrained, untrained head", "Benchmark"), "Base_Models": ("Base model, trained head", ""),
    "Finetune": ("Full fine-tuning", "Finetuned"), "Lora_Finetune": ("LoRA, one expert per task", "Lora"),
    MIXTURE: ("Context-gated mixture", MIXTURE),
}
IMAGES_SHOWN = 64  # of all tasks together
SIDE = 112  # of these, in pixels


def write_report(top: Path, tasks: list[TaskData], demo: bool) -> None:
    """Write the page of the results folder `top`. If that fails, one line tells so and nothing else is lost."""
    path = top / PAGE
    try:
        with locked(top, wait=True):  # another script may be at its end too
            page = _page(top, tasks, demo)
            with writing(path) as part:
                part.write_text(page, encoding="utf-8")
    except Exception as error:  # whatever names, tables and images that somebody changed lead to
        remove(path)  # one from before would tell of other results
        reason = " ".join(str(error).split())[:300]
        print(f"{path} cannot be written ({type(error).__name__}: {reason}); no result is lost", file=sys.stderr)


def _page(top: Path, tasks: list[TaskData], demo: bool) -> str:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda share: "" if pd.isna(share) else f"{share:.1%}"
    summary = read_summary(top / SUMMARY_FILE)
    summary = summary[summary["task"].isin([data.task.title for data in tasks])]
    present = set(summary["method"])
    methods = {name: what for name, what in METHODS.items() if name in present}
    for name in sorted(present - methods.keys()):
        added = name.removeprefix(f"{MIXTURE}_")
        methods[name] = (f"Context-gated mixture with {added}", MIXTURE) if added != name else (name, "")
    mixtures = [name for name in methods if name.startswith(MIXTURE)]
    return environment.get_template(TEMPLATE).render(
        demo=demo, tasks=[_task(data) for data in tasks],
        scores=[{"name": data.task.name, "rows": _scores(summary, data, methods)} for data in tasks],
        matrices=[{"name": data.task.name, "pictures": _pictures(
            (top / name / f"{prefix}_{data.task.title}_Confusion_Matrix.png", what, f"confusion matrix on {data.task.name}")
            for name, (what, prefix) in methods.items())} for data in tasks],
        joint=_pictures((top / name / f"{MIXTURE}_Confusion_Matrix.png", f"{methods[name][0]}, all tasks",
                         "confusion matrix over the classes of all tasks") for name in mixtures),
        curves=_curves(top, tasks, methods), comparison=_comparison(top),
        routing=_pictures((top / name / f"{MIXTURE}_Routing.png", f"{methods[name][0]}, routing", "mean gate weight of every "
                           "expert by layer, one panel for the images of each task") for name in methods),
        images=[{"name": data.task.name, "groups": _images(top, mixtures[0], data, len(tasks))} for data in tasks]
        if mixtures else [],
        settings=[{"name": methods[name][0], "values": _settings(top / name / "config.json")} for name in methods],
    )


def _task(data: TaskData) -> dict[str, Any]:
    return {"name": data.task.name, "classes": data.classes, "near_duplicates": data.near_duplicates_in_test,
            **{name: len(getattr(data, name)) for name in ("train", "validation", "test")}}


def _scores(summary: pd.DataFrame, data: TaskData, methods: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """The rows of the summary of one task, in the order of the methods; what differs from run to run is left out."""
    own = summary[summary["task"] == data.task.title].drop_duplicates("method", keep="last").set_index("method")
    return [{"method": what, "own": name.startswith(MIXTURE), **own.loc[name].to_dict()}
            for name, (what, _) in methods.items() if name in own.index]


def _pictures(found: Any) -> list[dict[str, Any]]:
    """Those pictures that are there, embedded. found: path, caption and what is to be seen of each."""
    pictures = []
    for path, caption, what in found:
        if path.exists():
            with Image.open(path) as image:
                width, height = image.size
            pictures.append({"source": _embedded(path.read_bytes(), "png"), "caption": caption, "text": f"{caption}: {what}",
                             "width": width, "height": height})
    return pictures


def _embedded(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _curves(top: Path, tasks: list[TaskData], methods: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """One entry for each task and one for all of them together, with the losses and accuracies of every training."""
    def drawn(task: str, stems: list[tuple[Path, str]]) -> list[dict[str, Any]]:
        return _pictures((path.with_name(f"{path.name}_{quantity}.png"), f"{what}, {quantity.lower()}",
                          f"{task}, in training and validation by epoch, the chosen epoch marked")
                         for path, what in stems for quantity in ("Losses", "Accuracies"))

    by_task = [(data.task.name, [(top / name / f"{prefix}_{data.task.title}", what)
                                 for name, (what, prefix) in methods.items()]) for data in tasks]
    joint = [(top / name / MIXTURE, what) for name, (what, prefix) in methods.items() if prefix == MIXTURE]
    entries = [{"name": name, "pictures": drawn(name, stems)} for name, stems in [*by_task, ("All tasks together", joint)]]
    return [entry for entry in entries if entry["pictures"]]


def _comparison(top: Path) -> dict[str, Any] | None:
    """The comparison with other ways to have one model for all tasks, if it was made."""
    path = top / MIXTURE / f"{MIXTURE}_Comparison.csv"
    if not path.exists():
        return None
    table = read_csv(path, ("group", "method", "task", "of_mixture"))
    rows = [["" if pd.isna(value) else f"{value:.3g}" if isinstance(value, float) else str(value) for value in row]
            for row in table.astype(object).itertuples(index=False)]
    return {"columns": [name.replace("_", " ") for name in table], "rows": rows, "pictures": _pictures([
        (path.with_suffix(".png"), "One model for all tasks", "accuracy of every method by task, as in the table below")])}


def _images(top: Path, mixture: str, data: TaskData, tasks: int) -> list[dict[str, Any]]:
    """Test images of one task that the mixture got wrong, the surest answers first, and those it was least sure of."""
    path, key = top / mixture / f"{MIXTURE}_{data.task.title}.csv", data.task.key
    if not path.exists():
        return []
    table = read_csv(path, NAMES)
    table["Sure"] = table.filter(regex="^Probability ").max(axis=1)
    wrong = (table["Predicted Task"] != key) | (table["Predicted Class"] != table["Actual Class"])
    count = max(2, IMAGES_SHOWN // (2 * tasks))
    first = table[wrong].sort_values("Sure", ascending=False, kind="stable").head(count)
    unsure = table.drop(first.index).sort_values("Sure", kind="stable").head(count)
    images = load_from_disk(str(top.parent / data.task.dataset_folder))["test"]
    groups = [(f"Wrong: {wrong.sum()} of {len(table)}, here those with the surest answers", first),
              ("Least sure among all others", unsure)]
    return [{"title": title, "images": [_image(images[int(row["Image"])]["image"], row) for _, row in rows.iterrows()]}
            for title, rows in groups if len(rows)]


def _image(image: Image.Image, row: pd.Series) -> dict[str, Any]:
    """A test image, small, with what it shows and what the mixture said of it."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    content = BytesIO()
    small.save(content, "JPEG", quality=80)
    prediction = NONE if row["Predicted Task"] == NONE else f"{row['Predicted Task']}: {row['Predicted Class']}"
    return {"source": _embedded(content.getvalue(), "jpeg"), "width": small.width, "height": small.height,
            "number": row["Image"], "actual": row["Actual Class"], "prediction": prediction, "sure": row["Sure"]}


def _settings(path: Path) -> dict[str, Any]:
    """The plain settings of a script; of a folder, the name alone: the page may be shown to others."""
    if not path.exists():
        return {}
    settings = {}
    for key, value in read_json(path, "").items():
        if isinstance(value, bool | int | float | str) and key not in ("backbone", "script"):
            settings[key.replace("_", " ")] = Path(value).name if key == "model" and Path(value).is_absolute() else value
    return settings
