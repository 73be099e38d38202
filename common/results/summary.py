"""Results/summary.csv: a row for each method and task, written by every script and read back by the next one."""

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

from common.errors import UserError
from common.files import write_csv

SUMMARY_FILE = "summary.csv"
TEXTS = ["method", "task"]
COUNTS = ["near_duplicates_in_test", "trainable_parameters"]
NUMBERS = ["accuracy", "accuracy_low", "accuracy_high", "macro_f1", "calibration_error", "accuracy_told_task", "right_task",
           *COUNTS, "seconds", "images_per_second", "peak_memory_mib"]
TYPES = dict.fromkeys(NUMBERS, float) | dict.fromkeys(COUNTS, int)
# Title of a column as people read it -> column and format.
SHOWN = {
    "method": ("method", ""), "task": ("task", ""), "accuracy": ("accuracy", ".1%"),
    "told the task": ("accuracy_told_task", ".1%"), "right task": ("right_task", ".1%"), "macro F1": ("macro_f1", ".3f"),
    "calibration error": ("calibration_error", ".3f"), "trained parameters": ("trainable_parameters", ",.0f"),
    "seconds": ("seconds", ".1f"), "images/s": ("images_per_second", ".0f"), "peak MiB": ("peak_memory_mib", ".0f"),
}


def read_summary(path: Path) -> pd.DataFrame:
    """The summary; columns that somebody has added stay as they are. Raises UserError if it is not a table of these columns."""
    fix = f"fix it, or delete {path} and run the scripts again with --overwrite"
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str), keep_default_na=False, na_values=dict.fromkeys(NUMBERS, [""]))
        if missing := [name for name in (*TEXTS, *NUMBERS) if name not in table]:
            raise UserError(f"{path} has no column {missing[0]}; {fix}")
        return table.astype(TYPES)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a table ({error}); {fix}") from error


def update_summary(path: Path, method: str, rows: list[dict[str, Any]]) -> None:
    """Put a method's rows of some tasks behind all others, in place of its earlier ones of these tasks."""
    table = pd.DataFrame(rows).astype(TYPES)
    if path.exists():
        old = read_summary(path)
        own = old["method"] == method
        table = pd.concat([old[~own], old[own & ~old["task"].isin(table["task"])], table])
    write_csv(path, table)


def as_text(table: pd.DataFrame, columns: dict[str, tuple[str, str]]) -> str:
    """A table as people read it, without empty columns; behind the accuracy comes its interval.

    columns: title -> column of the table and format of its values.
    """
    shown = {}
    for title, (name, form) in columns.items():
        shown[title] = ["" if pd.isna(value) else f"{value:{form}}" for value in table[name]]
        if name == "accuracy":
            bounds = zip(table["accuracy_low"], table["accuracy_high"], strict=True)
            shown["95 % interval"] = [f"{low:.1%} to {high:.1%}" for low, high in bounds]
    return pd.DataFrame({title: values for title, values in shown.items() if any(values)}).to_string(index=False)


def summary_text(table: pd.DataFrame) -> str:
    """Rows of the summary as people read them."""
    return as_text(table, SHOWN)


def print_summary(root: str) -> None:
    """Print the summary of all scripts."""
    print(summary_text(read_summary(Path(root) / "Results" / SUMMARY_FILE)))


def peak_memory() -> float:
    """The most memory that this process has held, in MiB: a GPU's if one is used, else its own."""
    if torch.cuda.is_initialized() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource  # which Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
