"""The pictures: confusion matrices, loss and accuracy curves, routing, the comparison."""

import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import style as styles
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.ft2font import FaceFlags
from matplotlib.text import Text

from common.errors import UserError
from common.files import remove, writing
from common.training.distributed import on_main

FEW, MANY = 12, 64  # classes: a matrix of more than FEW leaves zeros out, one of more than MANY all numbers and some labels
LONGEST = 28  # characters of a name in a picture
# Names are text, never markup, and a picture does not depend on the settings of who makes it.
STYLE = {"text.parse_math": False, "text.usetex": False, "font.family": ["DejaVu Sans"]}


def picture(draw: Callable[..., Figure]) -> Callable[..., None]:
    """Let a function that returns a figure take a path first, and save the figure there.

    A picture that cannot be drawn costs no results: one line tells so, and what was there before it is deleted. Raises
    UserError if the disk does not take it.
    """
    @on_main
    @wraps(draw)
    def drawn(path: Path, *arguments: object, **named: object) -> None:
        try:
            with styles.context(STYLE, after_reset=True):
                _save(draw(*arguments, **named), path)
        except UserError:
            raise
        except Exception as error:  # whatever the names and numbers of the results lead to
            remove(path)
            reason = " ".join(str(error).split())[:200]
            print(f"{path} cannot be drawn ({type(error).__name__}: {reason}); no result is lost", file=sys.stderr)

    return drawn


def _save(figure: Figure, path: Path) -> None:
    """Write the figure; characters that its font lacks are taken from other installed fonts."""
    with writing(path) as part:
        missing = _write(figure, part)
        if missing:
            families = [*STYLE["font.family"], *_fonts_with(missing)]
            for text in figure.findobj(Text):
                text.set_fontfamily(families)
            missing = _write(figure, part)
        if missing:
            print(f"{path}: no installed font has {' '.join(sorted(missing))}; boxes stand for them", file=sys.stderr)


def _write(figure: Figure, path: Path) -> set[str]:
    """Write the figure and return the characters that no font of it has."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # No date or version inside: the same results give the same file.
        figure.savefig(path, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    return {chr(int(found[1])) for warning in caught if (found := re.match(r"Glyph (\d+) ", str(warning.message)))}


def _fonts_with(characters: set[str]) -> list[str]:
    """Names of installed fonts that together have these characters, as far as there are any."""
    names, missing = [], set(characters)
    for entry in fontManager.ttflist:
        font = get_font(entry.fname)
        found = {character for character in missing if ord(character) in font.get_charmap()}
        if found and FaceFlags.SCALABLE in font.face_flags and "LastResort" not in entry.fname:
            names.append(entry.name)
            missing -= found
    return names


def short(name: str, longest: int = LONGEST) -> str:
    """A name on one line, its middle left out if it is longer than `longest` characters."""
    text = " ".join("".join(character if character.isprintable() else " " for character in name).split())
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[len(text) + 1 - (longest + 1) // 2 :]}"


@picture
def confusion_matrix(counts: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str,
                     borders: Sequence[int] = ()) -> Figure:
    """Draw counts (R, K), actual classes as rows. borders: the rows and columns that a new task begins with."""
    most = max(counts.shape)
    cell = min(1.0, 12 / most) if most > MANY else max(min(1.0, 12 / most), 0.3)  # inches
    figure = Figure(figsize=(1 + cell * len(columns), 1 + cell * len(rows)))
    axes = figure.subplots()
    image = axes.imshow(counts, cmap="Blues", vmin=0, interpolation="nearest")
    step, size = math.ceil(most / MANY), max(min(10, 24 * cell), 6)
    axes.set_xticks(range(0, len(columns), step), [short(name) for name in columns[::step]],
                    rotation=30 if most <= FEW else 90, ha="right" if most <= FEW else "center", fontsize=size)
    axes.set_yticks(range(0, len(rows), step), [short(name) for name in rows[::step]], fontsize=size)
    if most <= MANY:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if count > counts.max() / 2 else "black" if count else "darkgrey"
            if count or most <= FEW:
                axes.text(column, row, f"{count}", ha="center", va="center", color=colour, fontsize=size)
    else:
        figure.colorbar(image, ax=axes, label="images", fraction=0.04, pad=0.02)
    for border in borders:
        axes.axvline(border - 0.5, color="grey", linewidth=0.8)
        axes.axhline(border - 0.5, color="grey", linewidth=0.8)
    axes.set(xlabel="Predicted class", ylabel="Actual class", xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_title(title, fontsize=11)
    return figure


@picture
def curves(history: pd.DataFrame, quantity: str, title: str) -> Figure:
    """Draw training and validation `quantity` ("loss" or "accuracy") by epoch, with the chosen epoch marked.

    Epoch 0, if there is one, is the model before training, which has no training values.
    """
    figure = Figure(figsize=(6.4, 4.2))
    axes = figure.subplots()
    for part, style in (("training", "C0o-"), ("validation", "C1s-")):
        if history[f"{part}_{quantity}"].notna().any():
            axes.plot(history["epoch"], history[f"{part}_{quantity}"], style, markersize=4, label=part)
    chosen = history.loc[history["chosen"].idxmax()]
    name = f"chosen: epoch {chosen['epoch']:.0f}{'' if chosen['epoch'] else ', the start'}"
    axes.axvline(chosen["epoch"], color="grey", linestyle="--", linewidth=1, label=name)
    axes.plot(chosen["epoch"], chosen[f"validation_{quantity}"], "k*", markersize=12)
    axes.set(xlabel="Epoch", ylabel=quantity.capitalize())
    if len(history) == 1:
        axes.set_xlim(chosen["epoch"] - 1, chosen["epoch"] + 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


@picture
def routing(table: pd.DataFrame, title: str) -> Figure:
    """Draw the mean gate weight of every expert in every layer, one panel a task, up to five side by side.

    table: columns Task, Layer, then one per expert; layers in the model's order.
    """
    tasks, experts = list(dict.fromkeys(table["Task"])), list(table.columns[2:])
    layers = list(dict.fromkeys(table["Layer"]))
    across = min(len(tasks), 5)
    down = math.ceil(len(tasks) / across)
    width, height = max(1.8, 0.3 * len(experts)), min(8.0, max(1.6, 0.17 * len(layers)))
    figure = Figure(figsize=(2.2 + width * across, 0.8 + (height + 1.4) * down), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    step = math.ceil(len(layers) / (height / 0.11))
    for panel in panels[len(tasks):]:
        panel.set_axis_off()
    for panel, task in zip(panels, tasks, strict=False):
        rows = table[table["Task"] == task]
        image = panel.imshow(rows[experts], vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        panel.set_title(f"images of\n{short(task, 22)}", fontsize=9)
        panel.set_xticks(range(len(experts)), [short(name, 16) for name in experts], fontsize=8,
                         rotation=0 if len(experts) <= 2 else 90)
        panel.set_yticks(range(0, len(layers), step), [short(name) for name in layers[::step]], fontsize=7)
    figure.colorbar(image, ax=figure.axes, label="mean gate weight", aspect=30)
    figure.supxlabel("expert", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


@picture
def comparison(table: pd.DataFrame, title: str) -> Figure:
    """Draw the accuracy of every method, in groups, the best of a group on top, and the two shares it is the product of.

    The first method of the first group and the first of the last, which is told the task, are lines through all.

    table: as `common.comparison.score` makes it; its rows of the task "All" are those of all tasks together.
    """
    overall = table[table["task"] == "All"].set_index("method")
    groups = list(dict.fromkeys(overall["group"]))
    rows, ticks = [], []  # methods by the line they stand in, None for that of a group's name
    for group in groups:
        own = overall[overall["group"] == group].sort_values("accuracy_mean", ascending=False, kind="stable")
        rows += [None, *own.index]
        ticks += [f"{group}:", *own.index]
    figure = Figure(figsize=(9, 1.6 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    lines = {method: line for line, method in enumerate(rows) if method is not None}
    own = overall.loc[list(lines)]
    for name, marker, label in (("right_task", "s", "right task"),
                                ("accuracy_given_right_task", "o", "accuracy where the task is right")):
        axes.plot(own[name], list(lines.values()), linestyle="none", marker=marker, markerfacecolor="none", label=label)
    axes.hlines(list(lines.values()), own["accuracy_low"], own["accuracy_high"], color="black", linewidth=1)
    axes.plot(own["accuracy_mean"], list(lines.values()), linestyle="none", marker="|", markersize=11, markeredgewidth=2.2,
              color="black", label="accuracy = right task x accuracy where it is right, 95 % interval")
    best, oracle = (overall[overall["group"] == group]["accuracy_mean"].iloc[0] for group in (groups[0], groups[-1]))
    axes.axvline(best, color="C3", linewidth=1, zorder=0, label=f"{overall.index[0]}, not told the task")
    axes.axvline(oracle, color="C2", linewidth=1, linestyle="--", zorder=0, label=groups[-1])
    axes.set_yticks(range(len(rows)), [short(name, 48) for name in ticks], fontsize=8)
    for label, method in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if method is None else "normal")
    seeds = table["seeds"].max()
    means = f"; means over {seeds:.0f} seeds, intervals of the first" if seeds > 1 else ""
    axes.set(xlabel=f"share of test images{means}", xlim=(max(0, own["accuracy_low"].min() - 0.05), 1.01),
             ylim=(len(rows) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, fontsize=11)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure
