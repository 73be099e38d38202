"""Tests of what lands in Results/: scores, predictions among all tasks' classes, and what is made anew."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from joint import ODD_NAMES, joint_predictions, task_of
from matplotlib.figure import Figure
from pipeline import write_nothing

from common.errors import UserError
from common.results.folder import Results
from common.results.metrics import (
    NONE,
    JointPredictions,
    calibration_error,
    confusion,
    joint_confusion,
    joint_table,
    predictions_table,
    scores,
    told_scores,
)
from common.results.reuse import completed, difference


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """No figure is drawn."""
    monkeypatch.setattr(Figure, "savefig", write_nothing)


def table_of(actual, predicted, classes=("cat", "dog", "owl")):
    """The table of predictions that are certain of these labels."""
    return predictions_table(np.eye(len(classes))[predicted], np.array(actual), list(classes))


def test_a_table_of_predictions_tells_what_the_model_said():
    table = predictions_table(np.array([[0.2, 0.8], [0.9, 0.1]]), np.array([1, 1]), ["cat", "dog"])
    assert table.to_dict("list") == {
        "Image": [0, 1], "Predicted Class": ["dog", "cat"], "Actual Class": ["dog", "dog"],
        "Probability cat": [0.2, 0.9], "Probability dog": [0.8, 0.1]}
    counts, columns = confusion(table_of([0, 0, 1, 2], [0, 1, 1, 1]), ["cat", "dog", "owl"])
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 0]] and columns == ["cat", "dog", "owl"]


def test_the_interval_is_wilsons_and_macro_f1_counts_a_class_that_is_never_predicted_as_zero():
    """8 of 10: Wilson (1927) gives 0.490 to 0.943. cat: 2 of 2 found, 4 said: F1 2/3; dog and owl are never said."""
    result = scores(table_of([0] * 10, [0] * 8 + [1] * 2))
    found = result["accuracy"], result["accuracy_low"], result["accuracy_high"]
    assert found == pytest.approx((0.8, 0.49016, 0.94331), abs=1e-4)
    assert scores(table_of([0, 0, 1, 2], [0, 0, 0, 0]))["macro_f1"] == pytest.approx((2 / 3 + 0 + 0) / 3)


def test_the_calibration_error_is_by_how_much_answers_are_surer_than_right():
    """Of ten answers that are 0.9 sure 8 are right, of five that are 0.55 sure 3, of five that are certain all."""
    confidence = np.repeat([0.9, 0.55, 1.0], [10, 5, 5])
    right = np.repeat([True, False, True, False, True], [8, 2, 3, 2, 5])
    assert calibration_error(confidence, right) == pytest.approx((10 * 0.1 + 5 * 0.05) / 20)
    assert scores(table_of([0, 1], [0, 1]))["calibration_error"] == pytest.approx(
        1 - table_of([0, 1], [0, 1]).filter(like="Probability").max(axis=1).mean())


def test_an_answer_is_right_if_task_and_class_are():
    """Six images of the task "fire" and what a mixture says of them; both tasks have a class "high"."""
    fire, game = task_of("fire", ["high", "low"], 6), task_of("game", ["high", "chess"], 1)
    labels = [("fire", "high"), ("fire", "low"), ("game", "high"), ("game", "chess")]
    probabilities = np.array([
        [0.9, 0.1, 0, 0],  # high: right
        [0.1, 0.8, 0.1, 0],  # low: right
        [0.3, 0.1, 0.5, 0.1],  # high: the other task's high, which is wrong
        [0.4, 0.3, 0.2, 0.1],  # low: said high
        [1e-9, 0, 0.5, 0.5 - 1e-9],  # high: another task, but right if told
        [0, 0.9, 0.05, 0.05],  # low: refused
    ])
    gates, refused = {"fire": np.full(6, 0.7), "game": np.full(6, 0.3)}, np.array([False] * 5 + [True])
    table = joint_table(JointPredictions(probabilities, labels, gates, np.arange(6.0), refused), fire)
    assert list(table) == ["Image", "Predicted Class", "Actual Class", "Predicted Task", "Probability fire: high",
                           "Probability fire: low", "Probability game: high", "Probability game: chess", "Gate fire",
                           "Gate game", "Familiarity"]
    assert list(table["Predicted Task"]) == ["fire", "fire", "game", "fire", "game", NONE]
    assert list(table["Predicted Class"]) == ["high", "low", "high", "high", "high", NONE]
    found = scores(table, "fire")
    assert found["accuracy"] == pytest.approx(2 / 6) and found["accuracy_low"] < 2 / 6 < found["accuracy_high"]
    assert found["macro_f1"] == pytest.approx((2 * 1 / (2 * 1 + 1 + 2) + 2 * 1 / (2 * 1 + 0 + 2)) / 2)
    assert told_scores(table, "fire", fire.classes) == pytest.approx({"accuracy_told_task": 5 / 6, "right_task": 3 / 6})
    counts, columns = confusion(table, fire.classes, "fire")
    assert columns == ["high", "low", "another task", "none"] and counts.tolist() == [[1, 0, 2, 0], [1, 1, 0, 1]]
    plain, columns = confusion(table.iloc[:2], fire.classes, "fire")
    assert columns == ["high", "low"] and plain.tolist() == [[1, 0], [0, 1]]
    tables = {"fire": table, "game": joint_table(joint_predictions([fire, game], game), game)}
    counts, rows, columns = joint_confusion(tables, labels)
    assert rows == ["fire: high", "fire: low", "game: high", "game: chess"] and columns == [*rows, "none"]
    assert counts[:2].tolist() == [[1, 0, 2, 0, 0], [1, 1, 0, 0, 1]] and counts.sum() == 7


def test_the_files_of_a_mixture_agree_with_each_other(tmp_path, workspace, capsys):
    """Of tasks with different numbers of classes, odd names, and some refusals; what is read back gives the same scores."""
    tasks = [task_of("odd", ODD_NAMES), task_of("two", ["high", "low"], 31)]
    with Results(workspace.config("CGM_Lora", "--root", str(tmp_path)), "CGM_Lora", "CGM_Lora") as results:
        said = [joint_predictions(tasks, data, refused=0.1) for data in tasks]
        rows = results.write_joint_test(tasks, said, "CGM_Lora", "Mixture", SimpleNamespace(seconds=4.0, images=200), 7)
    assert [(row["seconds"], row["trainable_parameters"]) for row in rows] == [(4.0, 7), (None, 7)]
    for row, data, predictions in zip(rows, tasks, said, strict=True):
        table = pd.read_csv(tmp_path / f"Results/CGM_Lora/CGM_Lora_{data.task.title}.csv", keep_default_na=False)
        again = {**scores(table, data.task.key), **told_scores(table, data.task.key, data.classes)}
        assert len(table) == len(data.test.labels) and {name: row[name] for name in again} == pytest.approx(
            again, abs=1e-6)  # the CSV has six digits of a probability
        written = table.filter(regex="^Probability ").to_numpy()
        assert np.allclose(written, predictions.probabilities, rtol=1e-5, atol=0)  # small ones too
    assert "cannot be drawn" not in capsys.readouterr().err


def test_only_what_belongs_to_tasks_that_are_there_is_compared():
    there = {"lr": 1, "model": "m", "backbone": "b", "packages": {"torch": "1"}, "data": {"a": "1", "b": "2"},
             "base": {"a": "x"}}
    same = {**there, "packages": {"torch": "2"}, "model": "moved"}
    cases = [  # what is wanted instead, whether for one model of all tasks, the difference
        ({}, True, None), ({"lr": 2}, False, "lr = 1, not 2"), ({"backbone": "c"}, False, "model = m, not moved"),
        ({"data": {"a": "1", "b": "2", "c": "3"}, "base": {"a": "x", "c": "y"}}, True, None),
        ({"data": {"a": "1"}}, False, None), ({"data": {"a": "1"}}, True, "data.b = 2, not None"),
        ({"data": {"a": "9", "b": "2"}}, False, "data.a = 1, not 9"),
        ({"base": {"a": "z"}}, False, "base.a = x, not z"), ({"base": {"a": None}}, False, None),
        ({"adapter": {"b": "y"}}, False, "adapter.b = None, not y"),
    ]
    for wanted, one_model, expected in cases:
        wanted = same | wanted
        kinds = [kind for kind in ("data", "base", "adapter") if kind in wanted]
        assert difference(completed(there, kinds, "", ""), wanted, kinds, one_model) == expected, (wanted, one_model)
    for record in ({}, {"data": {}}, {"data": [], "packages": {}}, {"data": {}, "packages": {}, "base": "x"}):
        with pytest.raises(UserError, match="config.json does not tell '.*'; run it again"):
            completed(record, ["data", "base"], "config.json", "run it again")


def test_a_task_that_is_added_is_made_alone(workspace, tasks, tmp_path, capsys):
    def run(these, *flags):
        with Results(workspace.config("Benchmark", "--root", str(tmp_path), *flags), "Benchmark", "Benchmark") as results:
            missing = results.missing(these)
            results.finish([results.write_test(data, np.eye(4)[data.test.labels], data.task.key, "t") for data in missing])
        return [data.task.key for data in missing]

    workspace.copy(tmp_path, "fire_dataset", "game_dataset")
    assert run(tasks[:1]) == ["fire"] and run(tasks[:1]) == []
    first, summary = tmp_path / "Results/Benchmark/fire.csv", tmp_path / "Results/summary.csv"
    written, away = first.stat().st_mtime_ns, summary.rename(tmp_path / "away")
    with pytest.raises(UserError, match="no rows of Benchmark for every task; add --overwrite"):
        run(tasks)
    assert not first.with_name("game.csv").exists()  # it is told before the work
    away.rename(summary)
    capsys.readouterr()
    assert run(tasks) == ["game"] and "fire is finished already and stays" in capsys.readouterr().out
    assert run(tasks) == run(tasks[:1]) == []  # a task that is gone leaves its results
    assert first.stat().st_mtime_ns == written and list(pd.read_csv(summary)["task"]) == ["Fire_Risk", "Game"]
    assert run(tasks[:1], "--overwrite") == ["fire"] and run(tasks[1:]) == ["game"] and run(tasks) == []
