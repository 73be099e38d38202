"""Where gates belong in a backbone: what one linear discriminant on the plain backbone's features knows, depth by depth."""

import time

import pandas as pd
from matplotlib.figure import Figure

from common import models
from common.cli.flags import MixtureConfig
from common.cli.parser import parse
from common.comparison.features import HEAD_INPUT, backbone_features
from common.comparison.inputs import PlainInputs
from common.data.tensors import load_task
from common.errors import UserError
from common.tasks import read_tasks
from common.training.blocks import block_names
from tests.bench.measure import Settings

NEAR = 0.005  # of the best is as good as the best


def depths(settings: Settings) -> pd.DataFrame:
    """right task and joint accuracy by depth in the plain backbone --model, of the tasks of --root, a folder with prepared
    images: one discriminant a depth, before the first block, behind each, and on what reaches the head; nothing is trained."""
    config = parse(MixtureConfig, ["--root", str(settings.root), "--model", settings.model, "--device", str(settings.device)])
    processor = models.load_processor(config.model)
    tasks = [load_task(task, config, processor) for task in read_tasks(config.root)]
    if len(tasks) < 2:
        raise UserError("depths needs two tasks or more; add one with Data_Preparation.py --task NAME=SOURCE")
    inputs = PlainInputs(config, tasks)
    inputs.features = backbone_features(inputs.body, inputs.train, inputs.validation, inputs.test, config,
                                        range(len(block_names(inputs.body)) + 1))
    rows = []
    for depth, features in inputs.features.train.items():
        started = time.perf_counter()
        chosen = inputs.discriminant_at((depth,))
        row = {"backbone": settings.model_name, "depth": depth, "features": features.shape[1],
               "shrinkage": chosen.classifier.strength}
        answers = inputs.validation_answers, inputs.test_answers
        for split, own, scores in zip(("validation_", ""), answers, chosen.scores(inputs.features), strict=True):
            for name, right in {"right_task": own.right_task, "accuracy": own.right,
                                "accuracy_told_task": own.right_told}.items():
                row[split + name] = float(own.weights @ right(scores))
        rows.append(row | {"milliseconds_of_an_image": 1e3 * inputs.features.seconds[depth],
                           "seconds": time.perf_counter() - started})
    table = pd.DataFrame(rows)
    print(found(table), flush=True)
    return table


def places(table: pd.DataFrame) -> tuple[int, int]:
    """Rows of two depths, chosen by validation images: the first at which the right task is found about as often as
    anywhere, and the one of the best joint accuracy."""
    tasks = table["validation_right_task"]
    return int((tasks >= tasks.max() - NEAR).idxmax()), int(table["validation_accuracy"].idxmax())


def shown(depth: object) -> str:
    """A depth in words."""
    return f"on {depth}" if depth == HEAD_INPUT else f"behind block {depth}" if str(depth) != "0" else "before the first block"


def found(table: pd.DataFrame) -> str:
    """What the table says, in a line; depths are chosen by validation images, the shares are of test images."""
    task, joint = (table.iloc[place] for place in places(table))
    first = table.iloc[0]
    return (f"{first['backbone']}: the right task is within half a point of its best from the depth {shown(task['depth'])} "
            f"({task['right_task']:.1%}; {shown(first['depth'])} {first['right_task']:.1%}); joint accuracy is best "
            f"{shown(joint['depth'])} ({joint['accuracy']:.1%}, right task {joint['right_task']:.1%}; "
            f"{shown(first['depth'])} {first['accuracy']:.1%}).")


def picture(table: pd.DataFrame, _: str) -> Figure:
    """Both curves over the depth, the two chosen places marked."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    task, joint = places(table)
    for name, label, colour in (("right_task", "right task", "C0"), ("accuracy", "right class among all tasks' (joint)", "C3")):
        axes.plot(table.index, table[name], "o-", markersize=4, color=colour, label=label)
    for place, label, colour, style in ((task, "right task within half a point of its best", "C0", ":"),
                                        (joint, "best joint depth", "C3", "--")):
        axes.axvline(place, color=colour, linestyle=style, linewidth=1.2, label=f"{label}, by validation images")
    axes.set_xticks(table.index, ["head" if depth == HEAD_INPUT else str(depth) for depth in table["depth"]])
    axes.set(xlabel="blocks passed (0: before the first; head: what reaches the head)", ylabel="share of test images",
             ylim=(None, 1.005), title=f"one discriminant a depth, plain backbone: {table['backbone'][0]}")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return figure
