"""The layout of Results/: each script's folder, what is written there, and the summary of all scripts."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common import plotting
from common.config import RunFlags, UserError
from common.data import TaskData
from common.files import read_json, write_csv, write_json, writing
from common.metrics import predictions_table, scores
from common.training import Fit

CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.csv"
# Settings that say where and how to run: results made with other values of these are the same results.
NOT_COMPARED = {"root", "overwrite", "device", "compare", "seeds"}


class Results:
    """The folder of one script's results, `<root>/Results/<name>`, and its rows in the summary.

    config.json is written last: a folder that has one is complete.
    """

    def __init__(self, config: RunFlags, name: str, script: str):
        self.config, self.name, self.script = config, name, script
        self.top = Path(config.root) / "Results"
        self.folder = self.top / name

    def finished(self, tasks: list[TaskData]) -> bool:
        """True if the same results, of the same settings and data, are there already; prints them.

        Raises UserError, naming the difference, if there are finished results of other settings or data and
        `--overwrite` was not given.
        """
        path, summary = self.folder / CONFIG_FILE, self.top / SUMMARY_FILE
        if summary.exists():
            _read_summary(summary)  # a damaged one is to be known before the work, not after it
        if self.config.overwrite:
            path.unlink(missing_ok=True)
        if not path.exists():
            return False
        mend = "add --overwrite to make them anew, or choose another --root"
        there, wanted = read_json(path, mend), self._record(tasks)
        for key in sorted({*there, *wanted}):
            if there.get(key) != wanted.get(key):
                raise UserError(
                    f"{self.folder} holds finished results with {key} = {there.get(key)}, not {wanted.get(key)}; {mend}"
                )
        self._print()
        print(f"{self.name} is finished already; --overwrite makes it anew")
        return True

    def _record(self, tasks: list[TaskData]) -> dict[str, Any]:
        """The resolved settings and the fingerprints of the data."""
        settings = {key: value for key, value in dataclasses.asdict(self.config).items() if key not in NOT_COMPARED}
        return {"script": self.script, **settings, "data": {data.task.key: data.fingerprint for data in tasks}}

    def title(self, text: str) -> str:
        """The title of a plot; those made from generated images say so."""
        return f"{text} (demo)" if self.config.demo else text

    def write_test(self, data: TaskData, probabilities: np.ndarray, name: str, title: str, fitted: Fit | None = None,
                   trainable: int = 0, gates: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
        """Write predictions and confusion matrix of one task's test split; return its row of the summary.

        probabilities: (N, C); gates: expert -> mean gate weight (N,); trainable: number of trained parameters.
        """
        table = predictions_table(probabilities, data.test.labels.numpy(), data.classes, gates)
        write_csv(self.folder / f"{name}.csv", table)
        plotting.confusion_matrix(
            self.folder / f"{name}_Confusion_Matrix.png", table, data.classes, self.title(f"{title}, {data.task.name}")
        )
        return self.row(data, table, fitted, trainable)

    def write_history(self, history: pd.DataFrame, name: str, title: str) -> None:
        """Write the epochs of a training as a table, a loss graph and an accuracy graph."""
        write_csv(self.folder / f"{name}_History.csv", history)
        plotting.curves(self.folder / f"{name}_Losses.png", history, "loss", self.title(title))
        plotting.curves(self.folder / f"{name}_Accuracies.png", history, "accuracy", self.title(title))

    def row(self, data: TaskData, table: pd.DataFrame, fitted: Fit | None = None, trainable: int = 0) -> dict[str, Any]:
        """One line of the summary from a table of predictions; time and speed are those of training."""
        return {
            "method": self.name, "task": data.task.title, **scores(table), "trainable_parameters": trainable,
            "seconds": fitted.seconds if fitted else 0.0,
            "images_per_second": fitted.images / fitted.seconds if fitted else 0.0,
        }

    def link(self, name: str) -> None:
        """Make `Results/<name>` another name of this folder: a relative link. Raises UserError if a folder is there."""
        other = self.top / name
        if other.is_dir() and not other.is_symlink():
            raise UserError(f"{other} is a folder where a link to {self.folder} belongs; move it away")
        if not other.is_symlink() or os.readlink(other) != self.name:
            with writing(other) as part:
                part.symlink_to(self.name, target_is_directory=True)

    def finish(self, rows: list[dict[str, Any]], tasks: list[TaskData]) -> None:
        """Put this script's rows into the summary, mark the results as finished and print them."""
        path = self.top / SUMMARY_FILE
        table = pd.DataFrame(rows)
        if path.exists():
            old = _read_summary(path)
            table = pd.concat([old[old["method"] != self.name], table])
        write_csv(path, table)
        write_json(self.folder / CONFIG_FILE, self._record(tasks))
        self._print()

    def _print(self) -> None:
        path = self.top / SUMMARY_FILE
        table = _read_summary(path)
        rows = table[table["method"] == self.name]
        if rows.empty:
            raise UserError(f"{path} has no rows of {self.name}; add --overwrite to make these results anew")
        print(_as_text(rows))
        print(f"Results are in {self.folder}")


def _read_summary(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
        _as_text(table)  # has every column that is shown, with numbers where they belong
        return table
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is missing or damaged; delete it and run the scripts with --overwrite") from error


def _as_text(table: pd.DataFrame) -> str:
    """The summary as people read it: percentages with their interval."""
    return pd.DataFrame({
        "method": table["method"],
        "task": table["task"],
        "accuracy": [f"{a:.1%}" for a in table["accuracy"]],
        "95 % interval": [
            f"{low:.1%} to {high:.1%}" for low, high in zip(table["accuracy_low"], table["accuracy_high"], strict=True)
        ],
        "macro F1": [f"{f1:.3f}" for f1 in table["macro_f1"]],
        "trained parameters": [f"{count:,}" for count in table["trainable_parameters"]],
        "seconds": [f"{seconds:.1f}" for seconds in table["seconds"]],
        "images/s": [f"{speed:.0f}" for speed in table["images_per_second"]],
    }).to_string(index=False)


def print_summary(root: str) -> None:
    """Print the summary of all scripts."""
    print(_as_text(_read_summary(Path(root) / "Results" / SUMMARY_FILE)))
