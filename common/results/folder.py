"""The layout of Results/: each script's folder, what is written there, and the summary of all scripts."""

import dataclasses
import os
import resource
import sys
import zlib
from contextlib import ExitStack
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from common import models
from common.cli.flags import RunFlags
from common.data.tensors import TaskData
from common.errors import UserError
from common.files import locked, read_json, remove, sweep, write_csv, write_json, writing
from common.provenance import changes, differences, versions
from common.results import plotting
from common.results.metrics import predictions_table, scores
from common.tasks import TASKS
from common.training import distributed
from common.training.checkpoint import Checkpoint
from common.training.loop import Fit

CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.csv"
CHECKPOINTS = "Checkpoints"
CHECKSUM = "checksum"  # the summary's last column
# Settings that say where and how to run: results made with other values of these are the same results.
NOT_COMPARED = {
    "root", "overwrite", "device", "compare", "seeds", "checkpoint_every_steps", "gradient_checkpointing", "largest_batch",
}


class Results:
    """The folder of one script's results, `<root>/Results/<name>`, and its rows in the summary.

    Used in a `with` statement, to whose end it keeps other runs out of the folder. config.json is written last: a folder
    that has one is complete.
    """

    def __init__(self, config: RunFlags, name: str, script: str):
        self.config, self.name, self.script = config, name, script
        self.top = Path(config.root) / "Results"
        self.folder = self.top / name
        self.made_from: dict[str, Any] = {}
        self._held = ExitStack()

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None and distributed.rank() == 0:
            remove(self.folder / CHECKPOINTS)
        self._held.close()

    def finished(self, tasks: list[TaskData], **starts: dict[str, str | None]) -> bool:
        """True if the same results, of the same settings, data, backbone and models, are there already; prints them.

        starts: kind -> task key -> fingerprint of the model that the script starts from, None if there is none: then
        finished results cannot tell whether they are of the same one, and stay. Raises UserError if another run is at work
        in the folder, or, naming the difference, if it holds finished results of something else and `--overwrite` was
        not given.
        """
        self.made_from = self._made_from(tasks, starts)
        return distributed.any_of(bool(self._finished(starts)))

    @distributed.on_main
    def _finished(self, starts: dict[str, dict[str, str | None]]) -> bool:
        path, summary = self.folder / CONFIG_FILE, self.top / SUMMARY_FILE
        if summary.exists():
            _read_summary(summary)  # a damaged one is to be known before the work, not after it
        self._held.enter_context(locked(self.folder))
        sweep(self.folder)
        if self.config.overwrite:
            path.unlink(missing_ok=True)
            remove(self.folder / CHECKPOINTS)
        if not path.exists():
            return False
        fix = "add --overwrite to make them anew, or choose another --root"
        there = read_json(path, fix)
        unknown = {kind: there.get(kind) for kind, by_task in starts.items() if None in by_task.values()}
        wanted = {**self.made_from, "packages": there.get("packages"), **unknown}
        for difference in changes(there, wanted):
            raise UserError(f"{self.folder} holds finished results with {difference}; {fix}")
        self._print()
        for difference in differences({"packages": there.get("packages")}, {"packages": versions()}):
            print(f"They were made with {difference}")
        print(f"{self.name} is finished already; --overwrite makes it anew")
        return True

    def _made_from(self, tasks: list[TaskData], starts: dict[str, dict[str, str | None]]) -> dict[str, Any]:
        """All that the results depend on: settings, fingerprints of data, backbone and models, versions of packages."""
        settings = {key: value for key, value in dataclasses.asdict(self.config).items() if key not in NOT_COMPARED}
        backbone = models.backbone_fingerprint(models.load_backbone(self.config.model, tasks[0].classes, self.config.seed))
        return {"script": self.script, **settings, "data": {data.task.key: data.fingerprint for data in tasks},
                "backbone": backbone, "preprocessing": tasks[0].preprocessing, **starts, "packages": versions()}

    def made_from_for(self, data: TaskData) -> dict[str, Any]:
        """What the model of one task is made from."""
        return {key: value[data.task.key] if key in ("data", "base") else value for key, value in self.made_from.items()}

    def checkpoint(self, name: str) -> Checkpoint:
        """The checkpoint of one of the script's trainings. Raises UserError if it is damaged or of other results."""
        return Checkpoint(self.folder / CHECKPOINTS / f"{name}.safetensors", self.made_from)

    def title(self, text: str) -> str:
        """The title of a plot; those made from generated images say so."""
        return f"{text} (demo)" if self.config.demo else text

    @distributed.on_main
    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a table into the folder."""
        write_csv(self.folder / name, table)

    @distributed.on_main
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

    @distributed.on_main
    def write_history(self, history: pd.DataFrame, name: str, title: str) -> None:
        """Write the epochs of a training as a table, a loss graph and an accuracy graph."""
        write_csv(self.folder / f"{name}_History.csv", history)
        plotting.curves(self.folder / f"{name}_Losses.png", history, "loss", self.title(title))
        plotting.curves(self.folder / f"{name}_Accuracies.png", history, "accuracy", self.title(title))

    @distributed.on_main
    def row(self, data: TaskData, table: pd.DataFrame, fitted: Fit | None = None, trainable: int = 0) -> dict[str, Any]:
        """One line of the summary from a table of predictions; time and speed are those of training."""
        return {
            "method": self.name, "task": data.task.title, **scores(table),
            "near_duplicates_in_test": data.near_duplicates_in_test, "trainable_parameters": trainable,
            "seconds": fitted.seconds if fitted else 0.0,
            "images_per_second": fitted.images / fitted.seconds if fitted else 0.0, "peak_memory_mib": peak_memory(),
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
        """Put this script's rows into the summary, mark the results as finished and print them."""
        self._finish(rows)
        distributed.any_of(False)  # the others wait until all is there

    @distributed.on_main
    def _finish(self, rows: list[dict[str, Any]]) -> None:
        path = self.top / SUMMARY_FILE
        table = pd.DataFrame(rows)
        table[CHECKSUM] = _checksums(table)
        with locked(self.top, wait=True):  # another script may be at its end too
            if path.exists():
                old = _read_summary(path)
                table = pd.concat([old[old["method"] != self.name], table])
            write_csv(path, table)
        write_json(self.folder / CONFIG_FILE, self.made_from)
        self._print()

    def _print(self) -> None:
        path = self.top / SUMMARY_FILE
        table = _read_summary(path)
        rows = table[table["method"] == self.name]
        if set(rows["task"]) != {task.title for task in TASKS}:
            raise UserError(f"{path} has no rows of {self.name} for every task; add --overwrite to make these results anew")
        print(_as_text(rows))
        print(f"Results are in {self.folder}")


def peak_memory() -> float:
    """The most memory in MiB that this process has held so far: a GPU's if it has used one, else all of its own."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_memory(resource.getrusage(resource.RUSAGE_SELF))


def resident_memory(usage: resource.struct_rusage) -> float:
    """The most memory in MiB that a process has held, by what the system tells of it."""
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def _read_summary(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
        _as_text(table)  # has every column that is shown, with numbers where they belong
        if list(table[CHECKSUM]) != _checksums(table):
            raise ValueError("a value was changed")
        return table
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is missing or damaged; delete it and run the scripts with --overwrite") from error


def _checksums(table: pd.DataFrame) -> list[str]:
    """A checksum of each row of the summary, the same before it is written and after it is read."""
    rows = table.drop(columns=CHECKSUM, errors="ignore").to_dict("records")
    texts = [", ".join(f"{key} {value:.6f}" if isinstance(value, Number) else f"{key} {value}"
                       for key, value in row.items() if not pd.isna(value)) for row in rows]
    return [f"crc {zlib.crc32(text.encode()):08x}" for text in texts]


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
        "peak MiB": [f"{peak:.0f}" for peak in table["peak_memory_mib"]],
    }).to_string(index=False)


def print_summary(root: str) -> None:
    """Print the summary of all scripts."""
    print(_as_text(_read_summary(Path(root) / "Results" / SUMMARY_FILE)))
