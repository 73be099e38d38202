"""Results/summary.csv: written by every script, read back also after a spreadsheet has saved it."""

import csv
import io
from pathlib import Path
from typing import Any

import pandas as pd

from common.errors import UserError
from common.files import write_csv

SUMMARY_FILE = "summary.csv"
TEXTS = ["method", "task"]
SHARES = ["accuracy", "accuracy_low", "accuracy_high", "macro_f1", "accuracy_told_task", "right_task"]  # between 0 and 1
COUNTS = ["near_duplicates_in_test", "trainable_parameters"]
NUMBERS = [*SHARES, *COUNTS, "seconds", "images_per_second", "peak_memory_mib"]
TYPES = dict.fromkeys(NUMBERS, float) | dict.fromkeys(COUNTS, int)
MAY_BE_EMPTY = {"accuracy_told_task", "right_task", "seconds", "images_per_second", "peak_memory_mib"}


def read_summary(path: Path) -> pd.DataFrame:
    """The summary with its numbers as numbers, however a spreadsheet has separated, quoted or encoded it.

    Columns that somebody has added stay as texts; empty rows and columns are dropped. Raises UserError, naming the place,
    if a column is missing, a number is none, or the file is no table.
    """
    fix = f"fix it, or delete {path} and run the scripts again with --overwrite"
    try:
        content = path.read_bytes()
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        header = text.lstrip().partition("\n")[0]
        separator = max(",;\t", key=header.count)
        reader = csv.reader(io.StringIO(text, newline=None), delimiter=separator, strict=True)
        rows = [(reader.line_num, cells) for row in reader if any(cells := [cell.strip() for cell in row])]
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table ({error}); {fix}") from error
    names = rows[0][1] if rows else []
    for name in [*TEXTS, *NUMBERS]:
        if names.count(name) != 1:
            raise UserError(f"{path} has {'no' if name not in names else 'more than one'} column {name}; {fix}")
    records = []
    for number, row in rows[1:]:
        if len(row) > len(names) and any(row[len(names):]):
            raise UserError(f"{path}, line {number}: more cells than columns; {fix}")
        record: dict[str, Any] = dict(zip(names, [*row, *[""] * len(names)], strict=False))
        for name in TEXTS:
            if not record[name]:
                raise UserError(f"{path}, line {number}: {name} is empty; {fix}")
        for name in NUMBERS:
            record[name] = _number(name, record[name], separator, f"{path}, line {number}", fix)
        records.append(record)
    table = pd.DataFrame(records, columns=[name for name in names if name])
    return table.astype(TYPES)


def _number(name: str, cell: str, separator: str, where: str, fix: str) -> float:
    """The number in a cell, in percent too and, where commas do not separate cells, with a decimal comma."""
    if not cell and name in MAY_BE_EMPTY:
        return float("nan")
    try:
        digits = cell.removesuffix("%").strip()
        digits = digits if separator == "," else digits.replace(",", ".")
        number = float(digits) / (100 if cell.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not (0 <= number <= (1 if name in SHARES else float(2**63 - 1))) or name in COUNTS and number % 1:
        kind = "a share between 0 and 1" if name in SHARES else "a whole number" if name in COUNTS else "a number"
        raise UserError(f"{where}: {name} is {cell or 'empty'}, not {kind}; {fix}")
    return number


def update_summary(path: Path, method: str, rows: list[dict[str, Any]]) -> None:
    """Put a method's rows of some tasks behind all others, in place of its earlier ones of these tasks."""
    table = pd.DataFrame(rows).astype(TYPES)
    if path.exists():
        old = read_summary(path)
        own = old["method"] == method
        table = pd.concat([old[~own], old[own & ~old["task"].isin(table["task"])], table])
    write_csv(path, table)


def as_text(table: pd.DataFrame) -> str:
    """The summary as people read it: percentages with their interval."""
    def column(name: str, form: str) -> list[str]:
        return ["" if pd.isna(value) else f"{value:{form}}" for value in table[name]]

    columns = {
        "method": table["method"], "task": table["task"], "accuracy": column("accuracy", ".1%"),
        "95 % interval": [f"{low} to {high}" for low, high in
                          zip(column("accuracy_low", ".1%"), column("accuracy_high", ".1%"), strict=True)],
        "told the task": column("accuracy_told_task", ".1%"), "right task": column("right_task", ".1%"),
        "macro F1": column("macro_f1", ".3f"), "trained parameters": column("trainable_parameters", ",.0f"),
        "seconds": column("seconds", ".1f"), "images/s": column("images_per_second", ".0f"),
        "peak MiB": column("peak_memory_mib", ".0f"),
    }
    return pd.DataFrame({name: values for name, values in columns.items() if any(values)}).to_string(index=False)


def print_summary(root: str) -> None:
    """Print the summary of all scripts."""
    print(as_text(read_summary(Path(root) / "Results" / SUMMARY_FILE)))
