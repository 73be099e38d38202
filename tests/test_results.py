"""Tests of what lands in Results/: the summary as spreadsheets leave it, joint predictions, pictures, and what is made anew."""

import csv
import io
import mmap
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from joint import joint_predictions
from matplotlib.figure import Figure
from PIL import Image

from common.errors import UserError
from common.results import plotting
from common.results.folder import Results
from common.results.memory import PeakMemory
from common.results.metrics import (
    NONE,
    JointPredictions,
    confusion,
    joint_confusion,
    joint_table,
    predictions_table,
    scores,
    told_scores,
)
from common.results.reuse import completed, difference
from common.results.summary import read_summary, update_summary

ODD_NAMES = ["$$ premium", "paddle_and_ball", "\\frac{1}{2} & <b>", "two\nlines of a name that goes on and on", "森 é", "_"]


def task_of(key, classes, images=40):
    """A task with test labels only."""
    labels = torch.arange(images) % len(classes)
    return SimpleNamespace(task=SimpleNamespace(key=key, title=key.title(), name=key), classes=classes,
                           test=SimpleNamespace(labels=labels), near_duplicates_in_test=0)


# ---- the summary ----

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


def saved_again(path, separator=",", comma=False, percent=False, quote=csv.QUOTE_MINIMAL, end="\n", extra=False):
    """The text of a summary as another program writes it."""
    rows = [row for row in csv.reader(path.read_text().splitlines())]
    shares = [index for index, name in enumerate(rows[0]) if name.startswith("accuracy") or name == "right_task"]
    for row in rows[1:]:
        for index in shares if percent else []:
            row[index] = f"{float(row[index]) * 100:.4f}%" if row[index] else ""
        row[2:] = [cell.replace(".", ",") for cell in row[2:]] if comma else row[2:]
    if extra:
        rows = [["Bemerkung" if index == 0 else "sehr gut", *row, "", ""] for index, row in enumerate(rows)]
        rows = [[], *rows[:1], [""] * len(rows[0]), *rows[1:], []]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, quoting=quote, lineterminator=end).writerows(rows)
    return text.getvalue()


def test_a_summary_that_a_spreadsheet_saved_reads_as_before(summary):
    expected = read_summary(summary)
    assert expected["trainable_parameters"].tolist() == [1234567] * 4 and expected["accuracy_told_task"].isna().sum() == 2
    saved = [
        saved_again(summary, ";", comma=True).encode(), saved_again(summary, "\t").encode("utf-16"),
        saved_again(summary, quote=csv.QUOTE_ALL, end="\r\n").encode("utf-8-sig"), saved_again(summary, percent=True).encode(),
        saved_again(summary, ";", comma=True, percent=True, end="\r").encode(), saved_again(summary, extra=True).encode(),
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
        "": "no column method", "method\nFinetune\n": "no column task", good.replace("macro_f1", "f1"): "no column macro_f1",
        good.replace("macro_f1", "accuracy"): "more than one column accuracy", "\0": "no column",
        good.replace(line, line.replace("0.845000", "good")): "line 2: accuracy is good",
        good.replace(line, line.replace("0.845000", "84.5")): "a share between 0 and 1",
        good.replace(line, line.replace("0.845000", "nan")): "accuracy is nan",
        good.replace(line, line.replace("0.845000", "")): "accuracy is empty",
        good.replace(line, line.replace("12.500000", "inf")): "seconds is inf",
        good.replace(line, line.replace("1234567", "0.5")): "not a whole number",
        good.replace(line, line.replace("Finetune", "")): "method is empty", good.replace(line, line + ",7"): "more cells",
        good.replace(line, '"' + line): "cannot be read",
    }
    for content, says in spoilt.items():
        summary.write_text(content)
        with pytest.raises(UserError) as refusal:
            read_summary(summary)
        said = str(refusal.value)
        assert says in said and str(summary) in said and "--overwrite" in said and "\n" not in said, said
    summary.write_bytes(b"method,\xff\xe9")
    with pytest.raises(UserError, match="cannot be read"):
        read_summary(summary)


# ---- scores of one task ----


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


def test_the_interval_is_wilsons():
    """8 of 10: Wilson (1927) gives 0.490 to 0.943; it is not empty at the ends either."""
    result = scores(table_of([0] * 10, [0] * 8 + [1] * 2))
    found = result["accuracy"], result["accuracy_low"], result["accuracy_high"]
    assert found == pytest.approx((0.8, 0.49016, 0.94331), abs=1e-4)
    for correct in (0, 5):
        result = scores(table_of([0] * 5, [0] * correct + [1] * (5 - correct)))
        assert 0 <= result["accuracy_low"] <= result["accuracy"] <= result["accuracy_high"] <= 1
        assert result["accuracy_high"] - result["accuracy_low"] > 0.3


def test_macro_f1_counts_a_class_that_is_never_predicted_as_zero():
    """cat: 2 of 2 found, 4 said: F1 2/3; dog and owl are never said."""
    assert scores(table_of([0, 0, 1, 2], [0, 0, 0, 0]))["macro_f1"] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert scores(table_of([0, 1, 2], [0, 1, 2]))["macro_f1"] == 1


# ---- predictions among the classes of all tasks ----


@pytest.fixture
def answers():
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
    gates = {"fire": np.full(6, 0.7), "game": np.full(6, 0.3)}
    refused = np.array([False] * 5 + [True])
    return fire, game, JointPredictions(probabilities, labels, gates, np.arange(6.0), refused)


def test_an_answer_is_right_if_task_and_class_are(answers):
    fire, _, said = answers
    table = joint_table(said, fire)
    assert list(table) == ["Image", "Predicted Class", "Actual Class", "Predicted Task", "Probability fire: high",
                           "Probability fire: low", "Probability game: high", "Probability game: chess", "Gate fire",
                           "Gate game", "Familiarity"]
    assert list(table["Predicted Task"]) == ["fire", "fire", "game", "fire", "game", NONE]
    assert list(table["Predicted Class"]) == ["high", "low", "high", "high", "high", NONE]
    found = scores(table, "fire")
    assert found["accuracy"] == pytest.approx(2 / 6) and found["accuracy_low"] < 2 / 6 < found["accuracy_high"]
    assert found["macro_f1"] == pytest.approx((2 * 1 / (2 * 1 + 1 + 2) + 2 * 1 / (2 * 1 + 0 + 2)) / 2)
    assert told_scores(table, "fire", fire.classes) == pytest.approx({"accuracy_told_task": 5 / 6, "right_task": 3 / 6})


def test_confusion_matrices_tell_other_tasks_and_refusals(answers):
    fire, game, said = answers
    tables = {"fire": joint_table(said, fire)}
    counts, columns = confusion(tables["fire"], fire.classes, "fire")
    assert columns == ["high", "low", "another task", "none"] and counts.tolist() == [[1, 0, 2, 0], [1, 1, 0, 1]]
    plain, columns = confusion(tables["fire"].iloc[:2], fire.classes, "fire")
    assert columns == ["high", "low"] and plain.tolist() == [[1, 0], [0, 1]]
    tables["game"] = joint_table(joint_predictions([fire, game], game), game)
    counts, rows, columns = joint_confusion(tables, said.labels)
    assert rows == ["fire: high", "fire: low", "game: high", "game: chess"] and columns == [*rows, "none"]
    assert counts[:2].tolist() == [[1, 0, 2, 0, 0], [1, 1, 0, 0, 1]] and counts.sum() == 7


def test_the_files_of_a_mixture_agree_with_each_other(tmp_path, workspace, capsys):
    """Of tasks with different numbers of classes, odd names, and some refusals; what is read back gives the same scores."""
    tasks = [task_of("odd", ODD_NAMES), task_of("two", ["high", "low"], 31), task_of("three", ["high", "low", "c"])]
    with Results(workspace.config("CGM_Lora", "--root", str(tmp_path)), "CGM_Lora", "CGM_Lora") as results:
        said = [joint_predictions(tasks, data, refused=0.1) for data in tasks]
        fitted = SimpleNamespace(seconds=4.0, images=200)
        rows = results.write_joint_test(tasks, said, "CGM_Lora", "Mixture", fitted, 7)
    assert [row["seconds"] for row in rows] == [4.0, None, None] and [row["trainable_parameters"] for row in rows] == [7] * 3
    for row, data in zip(rows, tasks, strict=True):
        table = pd.read_csv(tmp_path / f"Results/CGM_Lora/CGM_Lora_{data.task.title}.csv", keep_default_na=False)
        assert len(table) == len(data.test.labels)
        again = {**scores(table, data.task.key), **told_scores(table, data.task.key, data.classes)}
        assert {name: row[name] for name in again} == pytest.approx(again, abs=1e-12)
        written = table.filter(regex="^Probability ").to_numpy()
        assert np.allclose(written, said[tasks.index(data)].probabilities, rtol=1e-5, atol=0)  # small ones too
        counts, _ = confusion(table, data.classes, data.task.key)
        assert np.trace(counts) / counts.sum() == pytest.approx(row["accuracy"])
    for name in ("CGM_Lora_Odd", "CGM_Lora_Two", "CGM_Lora_Three", "CGM_Lora"):
        assert (tmp_path / f"Results/CGM_Lora/{name}_Confusion_Matrix.png").exists()
    assert "cannot be drawn" not in capsys.readouterr().err


# ---- pictures ----


def texts_of(monkeypatch, draw, *arguments):
    """All texts of the figure that `draw` saves, and its size in pixels."""
    texts, save = [], Figure.savefig

    def saved(figure, path, **options):
        save(figure, path, **options)
        with Image.open(path) as image:
            shown = [text.get_text() for text in figure.findobj(plotting.Text) if text.get_visible() and text.get_text()]
            texts.append((image.size, shown))

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", saved)
        draw(*arguments)
    return texts[-1]


def test_a_confusion_matrix_is_bounded_whatever_the_number_of_classes(tmp_path, monkeypatch):
    for classes in (2, 40, 41, 300):
        names, counts = [f"class {index} of this task" for index in range(classes)], np.eye(classes, dtype=int) * 5003
        size, texts = texts_of(monkeypatch, plotting.confusion_matrix, tmp_path / "m.png", counts, names, names, "title")
        assert max(size) < 2600 and texts.count("5003") == (classes if classes <= 40 else 0)
        assert 2 <= sum(text.startswith("class") for text in texts) <= 2 * 40


def test_names_in_pictures_are_text_and_short(tmp_path, monkeypatch, capsys):
    path, counts = tmp_path / "m.png", np.eye(len(ODD_NAMES), dtype=int)
    _, texts = texts_of(monkeypatch, plotting.confusion_matrix, path, counts, ODD_NAMES, ODD_NAMES, "$x_")
    assert texts.count("$$ premium") == texts.count("\\frac{1}{2} & <b>") == texts.count("_") == 2 and "$x_" in texts
    assert max(len(text) for text in texts if text.startswith("two lines")) == plotting.LONGEST
    history = pd.DataFrame({"epoch": [0], "training_loss": [np.nan], "validation_loss": [1.0], "chosen": [1]})
    plotting.curves(tmp_path / "c.png", history, "loss", "a $ b $ \\frac")
    routes = pd.DataFrame([{"Task": name, "Layer": "$l$", **dict.fromkeys(ODD_NAMES, 0.1)} for name in ODD_NAMES])
    plotting.routing(tmp_path / "r.png", routes, "$$")
    table = pd.DataFrame([{"method": "$$ a", "group": "$g_$", "task": task, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6,
                           "accuracy_told_task": 0.55, "accuracy_mean": 0.5, "seeds": 1} for task in [*ODD_NAMES, "All"]])
    plotting.comparison(tmp_path / "k.png", table, "_")
    assert all((tmp_path / f"{name}.png").exists() for name in "mcrk") and "cannot" not in capsys.readouterr().err


def test_curves_show_the_start_as_an_epoch_and_leave_out_what_is_not_there(tmp_path, monkeypatch):
    history = pd.DataFrame({"epoch": [0, 1], "training_loss": [np.nan, 1.0], "validation_loss": [1.0, 2.0], "chosen": [1, 0]})
    both = texts_of(monkeypatch, plotting.curves, tmp_path / "a.png", history, "loss", "t")[1]
    assert {"training", "validation", "chosen: epoch 0, the start"} <= set(both)
    start = texts_of(monkeypatch, plotting.curves, tmp_path / "a.png", history[:1], "loss", "t")[1]
    assert "training" not in start and {"validation", "0"} <= set(start)


def test_a_model_that_was_not_trained_has_no_curves_of_one_that_was(tmp_path, workspace):
    data, history = task_of("fire", ["high", "low"]), pd.DataFrame({"epoch": [1], "chosen": [1]})
    for name in ("training_loss", "validation_loss", "training_accuracy", "validation_accuracy"):
        history[name] = 0.5
    with Results(workspace.config("Lora_Finetune", "--root", str(tmp_path)), "Lora_Finetune", "Lora_Finetune") as results:
        results.write_history(history, "Lora_Fire", "LoRA")
        assert len(list(results.folder.glob("Lora_Fire_*"))) == 3
        results.write_test(data, np.full((40, 2), 0.5), "Lora_Fire", "LoRA")
    assert [path.name for path in results.folder.glob("Lora_Fire_*")] == ["Lora_Fire_Confusion_Matrix.png"]


def test_a_picture_that_cannot_be_drawn_loses_no_results(tmp_path, workspace, monkeypatch, capsys):
    """One line tells so; an older picture, which would be of other results, goes."""
    def fail(*_, **__):
        raise MemoryError("no\nmore")

    data = task_of("fire", ["high", "low"])
    old = tmp_path / "Results/Benchmark/Benchmark_Confusion_Matrix.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", fail)
    with Results(workspace.config("Benchmark", "--root", str(tmp_path)), "Benchmark", "Benchmark") as results:
        row = results.write_test(data, np.full((40, 2), 0.5), "Benchmark", "title")
    said = capsys.readouterr().err
    assert row["accuracy"] == 0.5 and len(pd.read_csv(old.with_name("Benchmark.csv"))) == 40 and not old.exists()
    assert said.count("\n") == 1 and "Benchmark_Confusion_Matrix.png cannot be drawn (MemoryError: no more)" in said


def test_peak_memory_is_that_since_the_last_restart():
    memory = PeakMemory()
    if memory.mib() is None:
        pytest.skip("this system tells no peak memory of a part of a process's life")
    before = memory.mib()
    with mmap.mmap(-1, 2**29) as held:  # not of an allocator, which might keep it
        held.write(b"a" * 2**29)
        with_it = memory.mib()
    assert with_it > before + 200 and memory.mib() == pytest.approx(with_it, abs=50)
    memory.restart()
    assert memory.mib() < with_it - 200


# ---- what is made anew, and what stays ----


def test_only_what_belongs_to_tasks_that_are_there_is_compared():
    there = {"lr": 1, "model": "m", "backbone": "b", "packages": {"torch": "1"}, "data": {"a": "1", "b": "2"},
             "base": {"a": "x"}}
    same = {**there, "packages": {"torch": "2"}, "model": "moved"}
    cases = [  # what is wanted, whether for one model of all tasks, the difference
        (same, True, None), (same | {"lr": 2}, False, "lr = 1, not 2"),
        (same | {"backbone": "c"}, False, "model = m, not moved"),
        (same | {"data": {"a": "1", "b": "2", "c": "3"}, "base": {"a": "x", "c": "y"}}, True, None),
        (same | {"data": {"a": "1"}}, False, None), (same | {"data": {"a": "1"}}, True, "data.b = 2, not None"),
        (same | {"data": {"a": "9", "b": "2"}}, False, "data.a = 1, not 9"),
        (same | {"base": {"a": "z"}}, False, "base.a = x, not z"), (same | {"base": {"a": None}}, False, None),
        (same | {"base": {"a": "x", "b": "y"}}, False, "base.b = None, not y"),
        (same | {"adapter": {"b": "y"}}, False, "adapter.b = None, not y"),
    ]
    for wanted, one_model, expected in cases:
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
    first, written = (tmp_path / "Results/Benchmark/fire.csv"), (tmp_path / "Results/Benchmark/fire.csv").stat().st_mtime_ns
    summary = (tmp_path / "Results/summary.csv").rename(tmp_path / "away")
    with pytest.raises(UserError, match="no rows of Benchmark for every task; add --overwrite"):
        run(tasks)
    assert not first.with_name("game.csv").exists()  # it is told before the work
    summary.rename(tmp_path / "Results/summary.csv")
    capsys.readouterr()
    assert run(tasks) == ["game"] and "fire is finished already and stays" in capsys.readouterr().out
    assert run(tasks) == [] and first.stat().st_mtime_ns == written
    assert run(tasks[:1]) == []  # a task that is gone leaves its results
    assert list(pd.read_csv(tmp_path / "Results/summary.csv")["task"]) == ["Fire_Risk", "Game"]
    with pytest.raises(UserError, match="seed = 3407, not 1"):
        run(tasks, "--seed", "1")
    assert run(tasks, "--overwrite") == ["fire", "game"]
    assert run(tasks[:1], "--overwrite") == ["fire"] and run(tasks[1:]) == ["game"] and run(tasks) == []


def test_one_model_of_all_tasks_is_made_anew_for_a_task_that_is_added(workspace, tasks, tmp_path):
    def finished(these):
        with Results(workspace.config("CGM_Lora", "--root", str(tmp_path)), "CGM_Lora", "CGM_Lora") as results:
            there = results.finished(these, experts={data.task.key: data.task.key for data in these})
            if not there:
                said = [joint_predictions(these, data) for data in these]
                results.finish(results.write_joint_test(these, said, "CGM_Lora", "t"))
        return there

    workspace.copy(tmp_path, "fire_dataset", "game_dataset")
    assert [finished(these) for these in (tasks[:1], tasks[:1], tasks, tasks)] == [False, True, False, True]
    with pytest.raises(UserError, match="data.game = .*, not None"):
        finished(tasks[:1])
