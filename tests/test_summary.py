"""Tests of the summary: as spreadsheets leave it, with columns that somebody added, and spoilt."""

import csv
import io

import pandas as pd
import pytest

from common.errors import UserError
from common.results.summary import read_summary, update_summary

ROW = {"accuracy": 0.845, "accuracy_low": 0.8, "accuracy_high": 0.88, "macro_f1": 0.84, "accuracy_told_task": None,
       "right_task": None, "near_duplicates_in_test": 3, "trainable_parameters": 1234567, "seconds": 12.5,
       "images_per_second": 88.25, "peak_memory_mib": 512.0}


@pytest.fixture
def summary(tmp_path):
    """A summary of two methods."""
    path = tmp_path / "summary.csv"
    for method in ("Finetune", "CGM_Lora"):
        joint = {"accuracy_told_task": 0.9, "right_task": 0.95} if method == "CGM_Lora" else {}
        update_summary(path, method, [{"method": method, "task": task, **ROW, **joint} for task in ("Fire_Risk", "Game")])
    return path


def saved_again(path, separator=",", comma=False, percent=False, extra=False, **how):
    """The text of a summary as another program writes it."""
    rows = list(csv.reader(path.read_text().splitlines()))
    shares = [index for index, name in enumerate(rows[0]) if name.startswith("accuracy") or name == "right_task"]
    for row in rows[1:]:
        for index in shares if percent else []:
            row[index] = f"{float(row[index]) * 100:.4f}%" if row[index] else ""
        row[2:] = [cell.replace(".", ",") for cell in row[2:]] if comma else row[2:]
    if extra:
        rows = [["Bemerkung" if index == 0 else "sehr gut", *row, "", ""] for index, row in enumerate(rows)]
        rows = [[], *rows[:1], [""] * len(rows[0]), *rows[1:], []]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, **how).writerows(rows)
    return text.getvalue()


def test_a_summary_that_a_spreadsheet_saved_reads_as_before(summary):
    expected = read_summary(summary)
    assert expected["trainable_parameters"].tolist() == [1234567] * 4 and expected["accuracy_told_task"].isna().sum() == 2
    saved = [
        saved_again(summary, ";", comma=True, percent=True, lineterminator="\r").encode(),
        saved_again(summary, "\t").encode("utf-16"), saved_again(summary, extra=True).encode(),
        saved_again(summary, quoting=csv.QUOTE_ALL).encode("utf-8-sig"),
    ]
    for content in saved:
        summary.write_bytes(content)
        found = read_summary(summary).drop(columns="Bemerkung", errors="ignore")
        pd.testing.assert_frame_equal(found, expected)


def test_the_next_script_keeps_the_rows_and_the_columns_that_somebody_added(summary):
    summary.write_text(saved_again(summary, extra=True))
    update_summary(summary, "Finetune", [{"method": "Finetune", "task": "Game", **ROW, "accuracy": 0.5}])
    table = pd.read_csv(summary, keep_default_na=False)
    assert list(zip(table["method"], table["task"], table["accuracy"], table["Bemerkung"], strict=True)) == [
        ("CGM_Lora", "Fire_Risk", 0.845, "sehr gut"), ("CGM_Lora", "Game", 0.845, "sehr gut"),
        ("Finetune", "Fire_Risk", 0.845, "sehr gut"), ("Finetune", "Game", 0.5, "")]


def test_a_summary_that_nobody_can_have_meant_is_refused_in_one_line(summary):
    good = summary.read_text()
    line = good.splitlines()[1]
    spoilt = {
        "": "no column method", good.replace("macro_f1", "f1"): "no column macro_f1",
        good.replace("macro_f1", "accuracy"): "more than one column accuracy", b"method,\xff\xe9": "cannot be read",
        good.replace(line, '"' + line): "cannot be read", good.replace(line, line + ",7"): "more cells",
    } | {good.replace(line, line.replace(old, new)): says for old, new, says in [
        ("0.845000", "good", "line 2: accuracy is good"), ("0.845000", "84.5", "a share between 0 and 1"),
        ("0.845000", "", "accuracy is empty"), ("12.500000", "inf", "seconds is inf"),
        ("1234567", "0.5", "not a whole number"), ("Finetune", "", "method is empty"),
    ]}
    for content, says in spoilt.items():
        summary.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError) as refusal:
            read_summary(summary)
        said = str(refusal.value)
        assert says in said and str(summary) in said and "--overwrite" in said and "\n" not in said, said
