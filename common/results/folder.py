"""The layout of Results/: each script's folder, what is written there, and the summary of all scripts."""

import dataclasses
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common import models
from common.cli.flags import RunFlags
from common.data.tensors import TaskData
from common.errors import UserError
from common.files import locked, read_json, remove, sweep, write_csv, write_json, writing
from common.provenance import differences, versions
from common.results import plotting
from common.results.metrics import (
    JointPredictions,
    confusion,
    joint_confusion,
    joint_table,
    predictions_table,
    scores,
    told_scores,
)
from common.results.report import PAGE, write_report
from common.results.reuse import DATA, completed, difference, joined, recipes, without
from common.results.summary import SUMMARY_FILE, peak_memory, read_summary, summary_text, update_summary
from common.training import distributed
from common.training.checkpoint import Checkpoint
from common.training.loop import Fit

CONFIG_FILE = "config.json"
CHECKPOINTS = "Checkpoints"
HISTORY = ("History.csv", "Losses.png", "Accuracies.png")  # how the files that tell of a training end
# Settings that say where and how to run: results made with other values of these are the same results.
NOT_COMPARED = {
    "root", "overwrite", "device", "compare", "seeds", "checkpoint_every_steps", "gradient_checkpointing", "largest_batch",
    "expert",  # which task's expert an adapter is: `starts` of Results.missing tells that
}


class Results:
    """The folder of one script's results, `<root>/Results/<name>`, and its rows in the summary.

    Used in a `with` statement: until its end other runs are kept out of the folder, and at its end the page of all results
    is written. config.json is written after all other files: a folder that has one is complete.
    """

    def __init__(self, config: RunFlags, name: str, script: str):
        self.config, self.name, self.script = config, name, script
        self.top = Path(config.root) / "Results"
        self.folder = self.top / name
        self.made_from: dict[str, Any] = {}
        self._tasks: list[TaskData] = []
        self._kinds: list[str] = []  # entries of made_from that have one value for each task
        self._record: dict[str, Any] = {}  # what config.json is to tell: of results that stay, too
        self._packages: dict[str, str] = {}  # those that finished results were made with
        self._written = False  # anything that the page shows
        self._held = ExitStack()

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None and distributed.rank() == 0:
            remove(self.folder / CHECKPOINTS)
            if self._tasks and (self._written or not (self.top / PAGE).exists()):
                write_report(self.top, self._tasks, self.config.demo)
            if (self.top / PAGE).exists():
                print(f"All results so far on one page: {self.top / PAGE}")
        self._held.close()

    def missing(self, tasks: list[TaskData], **starts: dict[str, str | None]) -> list[TaskData]:
        """The tasks whose results, each of its own model, are not there yet; prints the results if all are.

        starts: kind -> task key -> fingerprint of the model that the script starts from, None if there is none: then
        finished results cannot tell whether they are of the same one, and stay. Raises UserError if another run is at work
        in the folder, or, naming the difference, if it holds finished results of other settings, images, backbone or models
        and `--overwrite` was not given.
        """
        done = self._finished_tasks(tasks, starts, one_model=False)
        missing = [data for data in tasks if not distributed.any_of(data.task.key in done)]
        if done and missing:
            print(f"{self.name} of {', '.join(sorted(done))} is finished already and stays")
        self._show_finished(not missing)
        return missing

    def finished(self, tasks: list[TaskData], **starts: dict[str, str | None]) -> bool:
        """True if the results of one model of all these tasks are there already; prints them.

        If they are of fewer tasks only, they are to be made anew. All else is as in `missing`.
        """
        done = self._finished_tasks(tasks, starts, one_model=True)
        finished = distributed.any_of(bool(done) and done >= {data.task.key for data in tasks})
        self._show_finished(finished)
        return finished

    def _finished_tasks(self, tasks: list[TaskData], starts: dict[str, dict[str, str | None]], one_model: bool) -> set[str]:
        """Keys of the tasks whose results are there; in the main process, the others have an empty set."""
        starts = recipes(self.config, tasks) | starts
        self._tasks, self._kinds = tasks, [DATA, *starts]
        self.made_from = self._record = self._made_from(tasks, starts)
        return self._compare(one_model) or set()

    @distributed.on_main
    def _compare(self, one_model: bool) -> set[str]:
        path, summary = self.folder / CONFIG_FILE, self.top / SUMMARY_FILE
        if summary.exists():
            read_summary(summary)  # a damaged one is to be known before the work, not after it
        self._held.enter_context(locked(self.folder))
        sweep(self.folder)
        anew = self.config.made_anew()
        if self.config.overwrite and anew is None:
            path.unlink(missing_ok=True)
        if not path.exists():
            if self.config.overwrite:
                remove(self.folder / CHECKPOINTS)
            return set()
        fix = "add --overwrite to make them anew, or choose another --root"
        recorded = completed(read_json(path, fix), self._kinds, str(path), fix)
        others = without(recorded, self._kinds, anew or set())
        if self.config.overwrite:
            recorded, fix = others, "leave --expert out to make all anew, or give the settings that they were made with"
        elif anew and not difference(others, self.made_from, self._kinds, one_model):
            fix = f"add --overwrite to make those of {', '.join(sorted(anew))} anew, or choose another --root"
        if recorded[DATA] and (found := difference(recorded, self.made_from, self._kinds, one_model)):
            raise UserError(f"{self.folder} holds finished results with {found}; {fix}")
        if self.config.overwrite:
            write_json(path, recorded)  # what is made anew is not finished until it is
        self._packages = recorded["packages"]
        if not one_model:
            self._record = joined(recorded, self.made_from, self._kinds)
        finished = recorded[DATA].keys() & self.made_from[DATA].keys()
        self._rows({data.task.title for data in self._tasks if data.task.key in finished})
        return finished

    @distributed.on_main
    def _show_finished(self, finished: bool) -> None:
        if finished:
            self._print()
            for found in differences({"packages": self._packages}, {"packages": versions()}):
                print(f"They were made with {found}")
            print(f"{self.name} is finished already; --overwrite makes it anew")

    def _made_from(self, tasks: list[TaskData], starts: dict[str, dict[str, str | None]]) -> dict[str, Any]:
        """All that the results depend on: settings, fingerprints of data, backbone and models, versions of packages."""
        settings = {key: value for key, value in dataclasses.asdict(self.config).items() if key not in NOT_COMPARED}
        backbone = models.backbone_fingerprint(models.load_backbone(self.config.model, tasks[0].classes, self.config.seed))
        return {"script": self.script, **settings, "data": {data.task.key: data.fingerprint for data in tasks},
                "backbone": backbone, "preprocessing": tasks[0].preprocessing, **starts, "packages": versions()}

    def made_from_for(self, data: TaskData) -> dict[str, Any]:
        """What the model of one task is made from."""
        return {key: value.get(data.task.key) if key in self._kinds else value for key, value in self.made_from.items()}

    def checkpoint(self, name: str, data: TaskData | None = None) -> Checkpoint:
        """The checkpoint of one of the script's trainings, on `data` alone or on all tasks.

        Raises UserError if it is damaged or of other results.
        """
        made_from = self.made_from
        if data is not None:
            made_from = {key: {data.task.key: value.get(data.task.key)} if key in self._kinds else value
                         for key, value in made_from.items()}
        return Checkpoint(self.folder / CHECKPOINTS / f"{name}.safetensors", made_from)

    def title(self, text: str) -> str:
        """The title of a plot; those made from generated images say so."""
        return f"{text} (demo)" if self.config.demo else text

    @distributed.on_main
    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a table into the folder."""
        self._written = True
        write_csv(self.folder / name, table)

    @distributed.on_main
    def write_test(self, data: TaskData, probabilities: np.ndarray, name: str, title: str, fitted: Fit | None = None,
                   trainable: int = 0) -> dict[str, Any]:
        """Write predictions and confusion matrix of one task's test split; return its row of the summary.

        probabilities: (N, C); trainable: number of trained parameters.
        """
        table = predictions_table(probabilities, data.test.labels.numpy(), data.classes)
        write_csv(self.folder / f"{name}.csv", table)
        row = self.row(data, table, fitted, trainable)
        for ending in HISTORY if fitted is None else ():  # of a model that was trained, which this one replaces
            remove(self.folder / f"{name}_{ending}")
        self._draw_confusion(name, f"{title}, {plotting.short(data.task.name)}", *confusion(table, data.classes), data.classes,
                             row["accuracy"])
        return row

    @distributed.on_main
    def write_joint_test(self, tasks: list[TaskData], predictions: list[JointPredictions], name: str, title: str,
                         fitted: Fit | None = None, trainable: int = 0) -> list[dict[str, Any]]:
        """Write predictions and confusion matrix of every task's test split, and the matrix of all tasks together.

        predictions: of each task's test images, in the order of `tasks`. Returns a row of the summary for each task; seconds
        and speed, which are of one training for all, are in the first.
        """
        tables, rows = {}, []
        for data, found in zip(tasks, predictions, strict=True):
            key = data.task.key
            tables[key] = joint_table(found, data)
            write_csv(self.folder / f"{name}_{data.task.title}.csv", tables[key], float_format="%.6g")
            rows.append(self.row(data, tables[key], fitted, trainable, joint=True))
            counts, columns = confusion(tables[key], data.classes, key)
            self._draw_confusion(f"{name}_{data.task.title}", f"{title}, {plotting.short(data.task.name)}", counts, columns,
                                 data.classes, rows[-1]["accuracy"])
            fitted = None
        labels = predictions[0].labels
        counts, names, columns = joint_confusion(tables, labels)
        borders = [index for index in range(1, len(labels)) if labels[index][0] != labels[index - 1][0]]
        right = sum(row["accuracy"] * len(tables[data.task.key]) for row, data in zip(rows, tasks, strict=True))
        self._draw_confusion(name, f"{title}, all tasks", counts, columns, names, right / counts.sum(), borders)
        return rows

    def _draw_confusion(self, name: str, title: str, counts: np.ndarray, columns: list[str], rows: list[str],
                        accuracy: float, borders: Sequence[int] = ()) -> None:
        title = f"{self.title(title)}\naccuracy {accuracy:.1%} of {counts.sum()} test images"
        plotting.confusion_matrix(self.folder / f"{name}_Confusion_Matrix.png", counts, rows, columns, title, borders)

    @distributed.on_main
    def write_history(self, history: pd.DataFrame, name: str, title: str) -> None:
        """Write the epochs of a training as a table, a loss graph and an accuracy graph."""
        table, losses, accuracies = (self.folder / f"{name}_{ending}" for ending in HISTORY)
        write_csv(table, history)
        plotting.curves(losses, history, "loss", self.title(title))
        plotting.curves(accuracies, history, "accuracy", self.title(title))

    @distributed.on_main
    def write_routing(self, tasks: list[TaskData], routes: Sequence[pd.DataFrame], name: str, title: str) -> None:
        """Write the mean weight of every expert by layer (columns Layer, then experts), of each task's test images."""
        table = pd.concat([route.assign(Task=data.task.name) for data, route in zip(tasks, routes, strict=True)])
        table = table[["Task", *routes[0].columns]]
        write_csv(self.folder / f"{name}.csv", table)
        plotting.routing(self.folder / f"{name}.png", table, self.title(title))

    @distributed.on_main
    def row(self, data: TaskData, table: pd.DataFrame, fitted: Fit | None = None, trainable: int = 0,
            joint: bool = False) -> dict[str, Any]:
        """One line of the summary from a table of predictions; time and speed are those of training.

        joint: the table is one of `joint_table`; other methods have nothing in the columns for these. Peak memory is that of the
        main process so far.
        """
        key = data.task.key
        return {
            "method": self.name, "task": data.task.title, **scores(table, key if joint else None),
            **(told_scores(table, key, data.classes) if joint else {"accuracy_told_task": None, "right_task": None}),
            "near_duplicates_in_test": data.near_duplicates_in_test, "trainable_parameters": trainable,
            "seconds": fitted.seconds if fitted else None,
            "images_per_second": fitted.images / fitted.seconds if fitted and fitted.images else None, "peak_memory_mib": peak_memory(),
        }

    @distributed.on_main
    def link(self, name: str) -> None:
        """Make `Results/<name>` another name of this folder: a relative link. Raises UserError if a folder is there."""
        other = self.top / name
        if other.is_dir() and not other.is_symlink():
            raise UserError(f"{other} is a folder where a link to {self.folder} belongs; move it away")
        if not other.is_symlink() or os.readlink(other) != self.name:
            with writing(other) as part:
                part.symlink_to(self.name, target_is_directory=True)

    def finish(self, rows: list[dict[str, Any]]) -> None:
        """Put the rows of what was made into the summary, mark the results as finished and print them."""
        self._finish(rows)
        distributed.any_of(False)  # the others wait until all is there

    @distributed.on_main
    def _finish(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        self._written = True
        with locked(self.top, wait=True):  # another script may be at its end too
            update_summary(self.top / SUMMARY_FILE, self.name, rows)
        write_json(self.folder / CONFIG_FILE, self._record)
        self._print()

    def _print(self) -> None:
        print(summary_text(self._rows({data.task.title for data in self._tasks})))
        print(f"Results are in {self.folder}")

    def _rows(self, titles: set[str]) -> pd.DataFrame:
        """This script's rows of the summary, of these tasks. Raises UserError if one is missing."""
        path = self.top / SUMMARY_FILE
        table = read_summary(path) if path.exists() else pd.DataFrame(columns=["method", "task"])
        rows = table[(table["method"] == self.name) & table["task"].isin(titles)]
        if set(rows["task"]) != titles:
            raise UserError(f"{path} has no rows of {self.name} for every task; add --overwrite to make these results anew")
        return rows
