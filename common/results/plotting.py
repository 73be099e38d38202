"""The pictures: confusion matrices, loss and accuracy curves, routing."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay

from common.files import writing
from common.results import metrics
from common.training.distributed import on_main

matplotlib.use("agg")  # files only: works without a screen


@on_main
def _save(figure: Figure, path: Path) -> None:
    with writing(path) as part:
        # No date or version inside: the same results give the same file.
        figure.savefig(part, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})


def confusion_matrix(path: Path, table: pd.DataFrame, classes: list[str], title: str) -> None:
    """Draw the confusion matrix of a table of predictions, with class names, counts and the accuracy."""
    figure = Figure(figsize=(1.5 + 1.1 * len(classes), 1.2 + 0.95 * len(classes)))
    axes = figure.subplots()
    counts = metrics.confusion(table, classes)
    ConfusionMatrixDisplay(counts, display_labels=classes).plot(ax=axes, cmap="Blues", colorbar=False)
    axes.tick_params(axis="x", rotation=30)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")
    axes.set(xlabel="Predicted class", ylabel="Actual class")
    axes.set_title(f"{title}\naccuracy {np.trace(counts) / counts.sum():.1%} of {counts.sum()} test images", fontsize=11)
    _save(figure, path)


def curves(path: Path, history: pd.DataFrame, quantity: str, title: str) -> None:
    """Draw training and validation `quantity` ("loss" or "accuracy") by epoch, with the chosen epoch marked."""
    figure = Figure(figsize=(6.4, 4.2))
    axes = figure.subplots()
    epochs = history["epoch"]
    for part, style in (("training", "o-"), ("validation", "s-")):
        axes.plot(epochs, history[f"{part}_{quantity}"], style, markersize=4, label=part)
    chosen = history.loc[history["chosen"].idxmax()]
    axes.axvline(chosen["epoch"], color="grey", linestyle="--", linewidth=1, label=f"chosen: epoch {chosen['epoch']:.0f}")
    axes.plot(chosen["epoch"], chosen[f"validation_{quantity}"], "k*", markersize=12)
    axes.set(xlabel="Epoch", ylabel=quantity.capitalize())
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def routing(path: Path, table: pd.DataFrame, title: str) -> None:
    """Draw the mean gate weight of every expert in every layer, one panel a task.

    table: columns Task, Layer, then one per expert; layers in the model's order.
    """
    tasks, experts = list(dict.fromkeys(table["Task"])), list(table.columns[2:])
    layers = table["Layer"].nunique()
    width = 2.2 + 0.9 * len(experts)
    figure = Figure(figsize=(1.5 + width * len(tasks), 1.5 + 0.17 * layers), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for panel, task in zip(panels, tasks, strict=True):
        rows = table[table["Task"] == task]
        image = panel.imshow(rows[experts], vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        panel.set_title(f"images of {task}", fontsize=10)
        panel.set_xticks(range(len(experts)), [f"{name}\nexpert" for name in experts])
        panel.set_yticks(range(layers), rows["Layer"], fontsize=6)
    figure.colorbar(image, ax=panels, label="mean gate weight")
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def comparison(path: Path, table: pd.DataFrame, title: str) -> None:
    """Draw the accuracy of every method by task, with its interval, the best method over all tasks on top.

    table: as `common.comparison` makes it.
    """
    overall = table[table["task"] == "All"].sort_values("accuracy_mean")
    methods, tasks = list(overall["method"]), [task for task in dict.fromkeys(table["task"]) if task != "All"]
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(methods)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(tasks)
    for index, task in enumerate(tasks):
        rows = table[table["task"] == task].set_index("method").loc[methods]
        offset = (len(tasks) - 1) / 2 - index
        below, above = rows["accuracy"] - rows["accuracy_low"], rows["accuracy_high"] - rows["accuracy"]
        axes.barh(np.arange(len(methods)) + offset * height, rows["accuracy"], height, xerr=np.stack([below, above]),
                  error_kw={"linewidth": 0.8, "capsize": 2}, label=task.replace("_", " "))
    axes.set_yticks(range(len(methods)), methods, fontsize=8)
    seeds = table["seeds"].max()
    which = f"; first seed, in the order of the means over {seeds}" if seeds > 1 else ""
    axes.set(xlabel=f"accuracy on the mixed test set, with 95 % interval{which}", xlim=(0, 1))
    axes.set_title(title, fontsize=11)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower left", bbox_to_anchor=(1.0, 0.0), fontsize=8)
    _save(figure, path)
