"""Tests of the pictures: bounded, with names as text, and never at the cost of results."""

import numpy as np
import pandas as pd
from joint import ODD_NAMES, task_of
from matplotlib.figure import Figure
from PIL import Image

from common.results import plotting
from common.results.folder import Results


def test_pictures_are_bounded_and_names_in_them_are_text_and_short(tmp_path, monkeypatch, capsys):
    """Whatever the number of classes, and whatever the names."""
    texts, save = [], Figure.savefig

    def saved(figure, path, **options):
        save(figure, path, **options)
        texts[:] = [text.get_text() for text in figure.findobj(plotting.Text) if text.get_visible() and text.get_text()]

    monkeypatch.setattr(Figure, "savefig", saved)
    for classes in (2, 46, 300):
        names, counts = [f"class {index} of this task" for index in range(classes)], np.eye(classes, dtype=int) * 5003
        plotting.confusion_matrix(tmp_path / "m.png", counts, names, names, "title")
        with Image.open(tmp_path / "m.png") as image:
            assert max(image.size) < 2600
        assert texts.count("5003") == (classes if classes < 300 else 0)
        assert sum(text.startswith("class") for text in texts) == 2 * (classes if classes < 300 else 60)
    plotting.confusion_matrix(tmp_path / "m.png", np.eye(len(ODD_NAMES), dtype=int), ODD_NAMES, ODD_NAMES, "$x_")
    assert texts.count("$$ premium") == texts.count("\\frac{1}{2} & <b>") == texts.count("_") == 2 and "$x_" in texts
    assert max(len(text) for text in texts if text.startswith("two lines")) == plotting.LONGEST
    routes = pd.DataFrame([{"Task": name, "Layer": "$l$", **dict.fromkeys(ODD_NAMES, 0.1)} for name in ODD_NAMES])
    plotting.routing(tmp_path / "r.png", routes, "$$")
    table = pd.DataFrame([{
        "method": "$$ a", "group": "$g_$", "task": task, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6,
        "accuracy_told_task": 0.55, "right_task": 0.9, "accuracy_given_right_task": 5 / 9, "accuracy_mean": 0.5, "seeds": 1} for task in [*ODD_NAMES, "All"]])
    plotting.comparison(tmp_path / "k.png", table, "_")
    assert all((tmp_path / f"{name}.png").exists() for name in "mrk") and "cannot" not in capsys.readouterr().err


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

    old = tmp_path / "Results/Benchmark/Benchmark_Confusion_Matrix.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", fail)
    with Results(workspace.config("Benchmark", "--root", str(tmp_path)), "Benchmark", "Benchmark") as results:
        row = results.write_test(task_of("fire", ["high", "low"]), np.full((40, 2), 0.5), "Benchmark", "title")
    said = capsys.readouterr().err
    assert row["accuracy"] == 0.5 and len(pd.read_csv(old.with_name("Benchmark.csv"))) == 40 and not old.exists()
    assert said.count("\n") == 1 and "Benchmark_Confusion_Matrix.png cannot be drawn (MemoryError: no more)" in said
