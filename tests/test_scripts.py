"""Tests of the six scripts: one small run of them all, looked at from every side, and running them again."""

import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import load_from_disk
from peft import PeftModel
from PIL import Image
from pipeline import METHODS, PREDICTIONS, Workspace, files_in, hashes
from refusals import RESULTS_OF
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, BeitForImageClassification

from common import models
from common.cli.flags import SCRIPTS
from common.errors import UserError
from common.files import read_json
from common.provenance import versions
from common.results.metrics import confusion, scores, told_scores
from common.tasks import DOCUMENTED
from common.training import evaluate as evaluation
from common.training.evaluate import evaluate
from ContextGatedMOE import ContextGatedMOE

TITLES = {"fire": "Fire_Risk", "game": "Game"}
EVERY_ROW = [(method, title) for method in METHODS for title in TITLES.values()]  # of the summary
HISTORIES = [
    "Base_Models/fire_base", "Base_Models/game_base", "Finetune/Finetuned_Fire_Risk", "Finetune/Finetuned_Game",
    "Lora_Finetune/Lora_Fire_Risk", "Lora_Finetune/Lora_Game", "CGM_Lora/CGM_Lora"]
MIXTURE = "CGM_Lora/Models/fire_game_cgm_lora"
MODELS = {  # folder -> its files, beside those that all have
    **{f"Base_Models/{key}_base": ["config.json", "model.safetensors"] for key in TITLES},
    **{f"Finetune/Models/{key}_finetune": ["config.json", "model.safetensors"] for key in TITLES},
    **{f"Lora_Finetune/Models/{key}_lora_finetune": ["adapter_config.json", "adapter_model.safetensors", "config.json"]
       for key in TITLES},
    MIXTURE: ["config.json", "cgm_config.json", "cgm_model.safetensors", "cgm_statistics.safetensors"],
}
LEARNED = (  # how the names of a mixture's trainable tensors end
    *(f"context_gate.{name}" for name in (
        "score.weight", "score.bias", "class_score.weight", "class_score.bias", "coefficient", "class_coefficient")),
    "expert_scale", "expert_prior")
# A setting of every script that makes other results.
OTHER_SETTING = {
    "CGM_Lora": ["--gate_hidden", "2"], "Lora_Finetune": ["--lora_rank", "2"], "Finetune": ["--layer_decay", "0.5"],
    "Benchmark": ["--seed", "1"], "Generate_Base_Model": ["--epochs", "1"], "Data_Preparation": ["--images_per_class", "12"],
}


def expected_results():
    """Every file of Results/, as the design lists them."""
    names = {"Benchmark_Data", "index.html", "summary.csv", *(f"{method}/config.json" for method in METHODS)}
    names |= {f"{name}_History.csv" for name in HISTORIES}
    names |= {f"{name}_{curve}.png" for name in HISTORIES[2:] for curve in ("Losses", "Accuracies")}
    names |= {f"{folder}/{prefix}_{title}{end}" for folder, prefix in PREDICTIONS.items() for title in TITLES.values()
              for end in (".csv", "_Confusion_Matrix.png")}
    names |= {f"{folder}/{name}" for folder, own in MODELS.items()
              for name in (*own, "preprocessor_config.json", "provenance.json")}
    return names | {f"CGM_Lora/CGM_Lora_{name}" for name in ("Routing.png", "Routing.csv", "Confusion_Matrix.png")}


def open_trained(workspace, method, key):
    """A saved model, opened as any user of the libraries would."""
    base, folder = workspace.results / "Base_Models" / f"{key}_base", workspace.results / method / "Models"
    if method == "CGM_Lora":
        return ContextGatedMOE.from_pretrained(workspace.results / MIXTURE)
    if method == "Finetune":
        return AutoModelForImageClassification.from_pretrained(folder / f"{key}_finetune")
    model = AutoModelForImageClassification.from_pretrained(base)
    return PeftModel.from_pretrained(model, folder / f"{key}_lora_finetune") if method == "Lora_Finetune" else model


def adapter_tensors(workspace, key):
    """The tensors in the file of a task's LoRA adapter."""
    return load_file(workspace.results / "Lora_Finetune/Models" / f"{key}_lora_finetune/adapter_model.safetensors")


def mixture_tensors(workspace):
    """The tensors in the file of the mixture."""
    return load_file(workspace.results / MIXTURE / "cgm_model.safetensors")


def test_results_hold_the_files_of_the_design_and_no_others(workspace):
    assert files_in(workspace.results) == expected_results()
    assert {path.name for path in workspace.root.iterdir()} == {"Results", "fire_dataset", "game_dataset", "tasks.json"}
    assert os.readlink(workspace.results / "Benchmark_Data") == "Benchmark"
    for path in workspace.results.rglob("*.png"):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) > 200 and pixels.std() > 5, path
    for path in workspace.results.rglob("*.json"):  # so that results can be moved
        assert str(workspace.root) not in path.read_text(), path


def test_config_json_tells_the_settings_and_all_that_results_were_made_from(workspace, tasks):
    starts = {"Lora_Finetune": ("base", "Base_Models/{}_base"), "CGM_Lora": (
        "experts", "Lora_Finetune/Models/{}_lora_finetune")}
    for method in METHODS:
        config = read_json(workspace.results / method / "config.json", "")
        assert config["demo"] is True and config["seed"] == 3407 and config["model"] == workspace.model
        assert config["data"] == {data.task.key: data.fingerprint for data in tasks}
        assert config["packages"] == versions() and len(config["backbone"]) == 64
        for kind, folder in [starts[method]] if method in starts else []:
            assert config[kind] == {key: models.fingerprint(workspace.results / folder.format(key)) for key in TITLES}


def test_predictions_are_one_row_a_test_image_with_its_most_probable_class(workspace, tasks):
    joint = [f"Probability {data.task.key}: {name}" for data in tasks for name in data.classes]
    for method, data in ((method, data) for method in PREDICTIONS for data in tasks):
        table = workspace.predictions(method, data.task.title)
        columns, said = [f"Probability {name}" for name in data.classes], table["Predicted Class"]
        if method == "CGM_Lora":  # among the classes of all tasks, whichever task the images are of
            columns = ["Predicted Task", *joint, "Gate fire", "Gate game", "Familiarity"]
            said = table["Predicted Task"] + ": " + said
            gates = table[["Gate fire", "Gate game"]]
            assert (gates >= 0).all(axis=None) and np.allclose(gates.sum(axis=1), 1, atol=5e-6)
        assert list(table) == ["Image", "Predicted Class", "Actual Class", *columns]
        test = load_from_disk(str(workspace.root / f"{data.task.key}_dataset"))["test"]
        assert list(table["Image"]) == list(range(len(test)))
        assert list(table["Actual Class"]) == [test.features["label"].int2str(label) for label in test["label"]]
        probabilities = table.filter(like="Probability ")
        assert np.allclose(probabilities.sum(axis=1), 1, atol=5e-6)  # six decimals each
        assert list("Probability " + said) == list(probabilities.idxmax(axis=1))


def test_the_routing_table_has_the_mean_weights_before_every_block_for_every_task(workspace):
    table = pd.read_csv(workspace.results / "CGM_Lora" / "CGM_Lora_Routing.csv")
    assert list(table) == ["Task", "Layer", *TITLES] and np.allclose(table["fire"] + table["game"], 1, atol=5e-6)
    rows = list(zip(table["Task"], table["Layer"], strict=True))
    assert rows == [(task.name, f"beit.layers.{block}") for task in DOCUMENTED for block in range(2)]
    for task in DOCUMENTED:  # the gates of the images are the same weights, averaged over blocks instead of over images
        by_image = workspace.predictions("CGM_Lora", TITLES[task.key])["Gate fire"]
        assert table[table["Task"] == task.name]["fire"].mean() == pytest.approx(by_image.mean(), abs=5e-6)


def test_the_summary_agrees_with_predictions_and_confusion_matrices_and_counts_what_was_trained(workspace, tasks):
    summary = workspace.summary()
    assert list(summary) == ["method", "task", "accuracy", "accuracy_low", "accuracy_high", "macro_f1", "calibration_error",
                             "accuracy_told_task", "right_task", "near_duplicates_in_test", "trainable_parameters",
                             "seconds", "images_per_second", "peak_memory_mib"]
    assert list(zip(summary["method"], summary["task"], strict=True)) == EVERY_ROW
    assert (summary["peak_memory_mib"] > 0).all() and (summary["near_duplicates_in_test"] == 0).all()
    assert summary["accuracy"].between(summary["accuracy_low"], summary["accuracy_high"]).all()
    gates = sum(value.numel() for name, value in mixture_tensors(workspace).items() if name.endswith(LEARNED))
    for row, data in zip(summary.to_dict("records"), [*tasks] * len(METHODS), strict=True):
        key, method, classes = data.task.key, row["method"], data.classes
        if method != "Benchmark":  # heads, all weights, adapters with their heads, gates: counted anew from the saved files
            trained = {"Base_Models": 4 * 32 + 4, "Finetune": open_trained(workspace, "Finetune", key).num_parameters(),
                       "Lora_Finetune": sum(tensor.numel() for tensor in adapter_tensors(workspace, key).values()),
                       "CGM_Lora": gates}
            assert row["trainable_parameters"] == trained[method]
        if method == "Base_Models":  # which has no table
            said = evaluate(open_trained(workspace, method, key), data.test, workspace.config("Benchmark"))[0].argmax(1)
            assert row["accuracy"] == pytest.approx((said == data.test.labels.numpy()).mean(), abs=1e-6)
            continue
        table, joint = workspace.predictions(method, row["task"]), key if method == "CGM_Lora" else None
        counts, _ = confusion(table, classes, joint)
        assert counts.sum() == len(table) and row["accuracy"] == pytest.approx(np.trace(counts) / counts.sum(), abs=1e-6)
        for name, value in (scores(table, joint) | (told_scores(table, key, classes) if joint else {})).items():
            assert row[name] == pytest.approx(value, abs=1e-6)


def test_a_history_has_a_row_per_epoch_and_the_chosen_one_has_the_lowest_validation_loss(workspace):
    for name in HISTORIES:
        history = pd.read_csv(workspace.results / f"{name}_History.csv")
        assert list(history) == [
            "epoch", "training_loss", "validation_loss", "training_accuracy", "validation_accuracy",
            *(["penalty"] if "Base_Models" in name else []), "chosen"]
        assert history.notna().all(axis=None)
        assert list(history["epoch"]) == ([0, 1, 2] if "CGM" in name else [1, 2])  # 0: the start of the gates
        assert history["chosen"].sum() == 1 and history["chosen"].idxmax() == history["validation_loss"].idxmin()


def test_a_saved_model_gives_the_written_probabilities_whatever_the_other_images_of_the_batch(workspace, tasks, monkeypatch):
    config = workspace.config("Benchmark")
    for method, data in ((method, data) for method in ("Finetune", "Lora_Finetune", "CGM_Lora") for data in tasks):
        model = open_trained(workspace, method, data.task.key)
        together = evaluate(model, data.test, config)[0]
        written = workspace.predictions(method, data.task.title).filter(like="Probability ")
        assert np.allclose(together, written, atol=1e-5)
        backwards = data.test.take(torch.arange(len(data.test)).flip(0))
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "EVALUATION_BATCH", 3)
            assert np.allclose(evaluate(model, backwards, config)[0][::-1], together, atol=1e-5)
        if method != "CGM_Lora":
            assert model.config.id2label == dict(enumerate(data.classes))
            assert model.config.label2id == {name: label for label, name in enumerate(data.classes)}


def test_a_base_model_has_the_pretrained_backbone_bit_for_bit(workspace):
    pretrained = BeitForImageClassification.from_pretrained(workspace.model).beit.state_dict()
    for key in TITLES:
        based = open_trained(workspace, "Base_Models", key).beit.state_dict()
        assert pretrained.keys() == based.keys()
        assert all(torch.equal(tensor, based[name]) for name, tensor in pretrained.items())


def test_a_finished_script_does_nothing_but_say_so_and_show_its_scores(workspace, capsys, monkeypatch):
    before = {name: (workspace.root / name).lstat().st_mtime_ns for name in files_in(workspace.root)}
    monkeypatch.setattr("common.results.folder.versions", lambda: {**versions(), "torch": "1.0"})
    for script in SCRIPTS:
        workspace.run(script)
        said = capsys.readouterr().out
        if script != "Data_Preparation":
            assert f"{RESULTS_OF[script]} is finished already" in said and "Fire_Risk" in said and "Game" in said
            assert f"made with packages.torch = {versions()['torch']}, not 1.0" in said
    assert {name: (workspace.root / name).lstat().st_mtime_ns for name in files_in(workspace.root)} == before


def test_a_backbone_that_was_moved_is_the_same_one(workspace, mutable, capsys):
    """Finished results stay finished, and the next script goes on from them."""
    moved = Workspace(mutable.root, str(shutil.copytree(mutable.model, mutable.root / "elsewhere")))
    moved.run("Finetune")
    moved.run("Lora_Finetune")
    assert capsys.readouterr().out.count("is finished already") == 2
    shutil.rmtree(moved.results / "CGM_Lora")
    moved.run("CGM_Lora")
    for title in TITLES.values():
        assert moved.predictions("CGM_Lora", title).equals(workspace.predictions("CGM_Lora", title))


def test_other_settings_are_refused_by_name_and_made_with_overwrite(mutable):
    """The new setting is in config.json, predictions are others, and the summary still has a row for each."""
    whole = hashes(mutable.root)
    for script, (flag, value) in OTHER_SETTING.items():
        with pytest.raises(UserError) as refusal:
            mutable.run(script, flag, value)
        said = str(refusal.value)
        assert f"{flag[2:]} = " in said and f"not {value};" in said and "--overwrite" in said
    assert hashes(mutable.root) == whole
    for script in ("CGM_Lora", "Benchmark"):
        flag, value = OTHER_SETTING[script]
        mutable.run(script, flag, value, "--overwrite")
        folder, now = RESULTS_OF[script], hashes(mutable.root)
        assert str(read_json(mutable.results / folder / "config.json", "")[flag[2:]]) == value
        made = [name for name in now if name.startswith(f"Results/{folder}/") and name.endswith((".safetensors", ".csv"))]
        assert made and all(now[name] != whole[name] for name in made)
        assert files_in(mutable.results) == expected_results()
        assert sorted(mutable.summary()[["method", "task"]].itertuples(index=False, name=None)) == sorted(EVERY_ROW)
    mutable.run("Data_Preparation", *OTHER_SETTING["Data_Preparation"], "--overwrite")
    assert [len(data.train) + len(data.validation) + len(data.test) for data in mutable.tasks()] == [48, 48]
