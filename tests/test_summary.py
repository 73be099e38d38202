"""Tests of the summary: with columns that somebody added, and spoilt."""

import pandas as pd
import pytest

from common.errors import UserError
from common.results.summary import read_summary, update_summary

ROW = {"accuracy": 0.845, "accuracy_low": 0.8, "accuracy_high": 0.88, "macro_f1": 0.84, "calibration_error": 0.05,
       "accuracy_told_task": None, "right_task": None, "near_duplicates_in_test": 3, "trainable_parameters": 1234567, "seconds": 12.5,
       "images_per_second": 88.25, "peak_memory_mib": 512.0}


@pytest.fixture
def summary(tmp_path):
    """A summary of two methods on tasks whose names look like numbers."""
    path = tmp_path / "summary.csv"
    for method in ("Finetune", "CGM_Lora"):
        update_summary(path, method, [{"method": method, "task": task, **ROW} for task in ("007", "NA")])
    return path


def test_the_next_script_replaces_its_own_rows_and_keeps_the_others_and_added_columns(summary):
    read_summary(summary).assign(remark="mine").to_csv(summary, index=False)
    update_summary(summary, "Finetune", [{"method": "Finetune", "task": "NA", **ROW, "accuracy": 0.5}])
    table = pd.read_csv(summary, dtype={"task": str}, keep_default_na=False)
    assert list(zip(table["method"], table["task"], table["accuracy"], table["remark"], strict=True)) == [
        ("CGM_Lora", "007", 0.845, "mine"), ("CGM_Lora", "NA", 0.845, "mine"),
        ("Finetune", "007", 0.845, "mine"), ("Finetune", "NA", 0.5, "")]
    assert read_summary(summary)["trainable_parameters"].tolist() == [1234567] * 4


def test_a_summary_that_is_not_one_is_refused_in_one_line(summary):
    good = summary.read_text()
    for spoilt, says in (("", "No columns"), (good.replace("macro_f1", "f1"), "no column macro_f1"),
                         (good.replace("0.845000", "good"), "good"), (good.replace("1234567", ""), "cannot be read"),
                         (good.replace(",", ";"), "no column"), (b"\xff\xfem", "utf-8")):
        summary.write_bytes(spoilt if isinstance(spoilt, bytes) else spoilt.encode())
        with pytest.raises(UserError, match=says) as refusal:
            read_summary(summary)
        line = str(refusal.value)
        assert str(summary) in line and "--overwrite" in line and "\n" not in line
