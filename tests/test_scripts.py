"""Tests of the six scripts: one small run of them all, looked at from every side; running again; run_all."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import load_from_disk
from peft import PeftModel
from PIL import Image
from pipeline import METHODS, PREDICTIONS, REPOSITORY, Workspace, files_in, hashes
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, BeitForImageClassification, BeitImageProcessorPil

from common import models
from common.cli.flags import SCRIPTS
from common.comparison import mixture
from common.errors import UserError
from common.files import read_json
from common.results.metrics import confusion, scores, told_scores
from common.tasks import DOCUMENTED
from common.training import evaluate as evaluation
from common.training.evaluate import evaluate, features
from common.training.loop import fit
from ContextGatedMOE import ContextGatedMOE

TITLES = {"fire": "Fire_Risk", "game": "Game"}
KEYS = list(TITLES)
EVERY_ROW = [(method, title) for method in METHODS for title in TITLES.values()]  # of the summary
HISTORIES = {
    "Base_Models": ["fire_base", "game_base"],
    "Finetune": ["Finetuned_Fire_Risk", "Finetuned_Game"],
    "Lora_Finetune": ["Lora_Fire_Risk", "Lora_Game"],
    "CGM_Lora": ["CGM_Lora"],
}
MODEL_FILES = ["config.json", "model.safetensors", "preprocessor_config.json", "provenance.json"]
LORA_FILES = ["adapter_config.json", "adapter_model.safetensors", *MODEL_FILES[2:]]
MIXTURE_FILES = ["cgm_config.json", "cgm_model.safetensors", "cgm_statistics.safetensors", "config.json", *MODEL_FILES[2:]]
STATISTICS = "CGM_Lora/Models/fire_game_cgm_lora/cgm_statistics.safetensors"
BLOCK_LINEARS = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"]
LEARNED = (  # how the names of a mixture's trainable tensors end
    "context_gate.score.weight", "context_gate.score.bias", "context_gate.coefficient", "router_scale", "expert_scale",
    "class_share")
# A setting of every script that makes other results.
OTHER_SETTING = {
    "Data_Preparation": ["--images_per_class", "12"],
    "Generate_Base_Model": ["--epochs", "1"],
    "Benchmark": ["--seed", "1"],
    "Finetune": ["--layer_decay", "0.5"],
    "Lora_Finetune": ["--lora_rank", "2"],
    "CGM_Lora": ["--gate_hidden", "2"],
}
RESULTS_OF = {script: "Base_Models" if script == "Generate_Base_Model" else script for script in SCRIPTS}

every_task = pytest.mark.parametrize("key", KEYS)
every_method = pytest.mark.parametrize("method", PREDICTIONS)
every_training = pytest.mark.parametrize(
    "method, name", [(method, name) for method, names in HISTORIES.items() for name in names]
)


def expected_results():
    """Every file of Results/, as the design lists them."""
    names = {"Benchmark_Data", "index.html", "summary.csv", *(f"{method}/config.json" for method in METHODS)}
    names |= {f"{method}/{name}_History.csv" for method, names in HISTORIES.items() for name in names}
    for key, title in TITLES.items():
        names |= {f"Base_Models/{key}_base/{name}" for name in MODEL_FILES}
        names |= {f"Finetune/Models/{key}_finetune/{name}" for name in MODEL_FILES}
        names |= {f"Lora_Finetune/Models/{key}_lora_finetune/{name}" for name in LORA_FILES}
        for folder, prefix in PREDICTIONS.items():
            names |= {f"{folder}/{prefix}_{title}{end}" for end in (".csv", "_Confusion_Matrix.png")}
        for stem in (f"Finetune/Finetuned_{title}", f"Lora_Finetune/Lora_{title}"):
            names |= {f"{stem}_Losses.png", f"{stem}_Accuracies.png"}
    names |= {f"CGM_Lora/Models/fire_game_cgm_lora/{name}" for name in MIXTURE_FILES}
    parts = ("Losses.png", "Accuracies.png", "Routing.png", "Routing.csv", "Confusion_Matrix.png")
    names |= {f"CGM_Lora/CGM_Lora_{name}" for name in parts}
    return names


def data_of(tasks, key):
    """The prepared data of one task."""
    return next(data for data in tasks if data.task.key == key)


def open_trained(workspace, method, key):
    """A saved model, opened as any user of the libraries would."""
    base, folder = workspace.results / "Base_Models" / f"{key}_base", workspace.results / method / "Models"
    if method == "Base_Models":
        return AutoModelForImageClassification.from_pretrained(base)
    if method == "Finetune":
        return AutoModelForImageClassification.from_pretrained(folder / f"{key}_finetune")
    if method == "Lora_Finetune":
        model = AutoModelForImageClassification.from_pretrained(base)
        return PeftModel.from_pretrained(model, folder / f"{key}_lora_finetune")
    return ContextGatedMOE.from_pretrained(folder / "fire_game_cgm_lora")


def adapter_tensors(workspace, key):
    """The tensors in the file of a task's LoRA adapter."""
    return load_file(workspace.results / "Lora_Finetune/Models" / f"{key}_lora_finetune/adapter_model.safetensors")


def mixture_tensors(workspace):
    """The tensors in the file of the mixture."""
    return load_file(workspace.results / "CGM_Lora/Models/fire_game_cgm_lora/cgm_model.safetensors")


def predict(workspace, model, data):
    """Probabilities (N, C) of a set of images."""
    return evaluate(model, data, workspace.config("Benchmark"))[0]


def probability_columns(table):
    """The probabilities (N, C) of a table of predictions."""
    return table.filter(like="Probability ").to_numpy()


# ---- files ----


def test_results_hold_the_files_of_the_design_and_no_others(workspace):
    assert files_in(workspace.results) == expected_results()


def test_the_root_holds_datasets_and_results_only(workspace):
    assert {path.name for path in workspace.root.iterdir()} == {"Results", "fire_dataset", "game_dataset", "tasks.json"}


def test_benchmark_data_is_a_relative_link_to_benchmark(workspace):
    assert os.readlink(workspace.results / "Benchmark_Data") == "Benchmark"


def test_every_plot_opens_and_is_not_blank(workspace):
    for name in expected_results():
        if name.endswith(".png"):
            with Image.open(workspace.results / name) as image:
                pixels = np.asarray(image.convert("L"))
            assert min(pixels.shape) > 200 and pixels.std() > 5, name


@pytest.mark.parametrize("method", METHODS)
def test_config_json_tells_the_settings_and_that_it_is_a_demo(workspace, tasks, method):
    config = read_json(workspace.results / method / "config.json", "")
    assert config["demo"] is True and config["seed"] == 3407 and config["model"] == workspace.model
    assert config["data"] == {data.task.key: data.fingerprint for data in tasks}


# ---- predictions ----


@every_task
@every_method
def test_columns_are_those_of_the_design(workspace, tasks, method, key):
    expected = ["Image", "Predicted Class", "Actual Class"]
    if method == "CGM_Lora":  # the classes of all tasks, whichever task the images are of
        every_class = [f"Probability {data.task.key}: {name}" for data in tasks for name in data.classes]
        expected += ["Predicted Task", *every_class, "Gate fire", "Gate game", "Familiarity"]
    else:
        expected += [f"Probability {name}" for name in data_of(tasks, key).classes]
    assert list(workspace.predictions(method, TITLES[key])) == expected


@every_task
@every_method
def test_rows_are_the_test_split_in_order(workspace, method, key):
    test = load_from_disk(str(workspace.root / f"{key}_dataset"))["test"]
    table = workspace.predictions(method, TITLES[key])
    assert list(table["Image"]) == list(range(len(test)))
    assert list(table["Actual Class"]) == [test.features["label"].int2str(label) for label in test["label"]]


@every_task
@every_method
def test_probabilities_sum_to_one(workspace, method, key):
    table = workspace.predictions(method, TITLES[key])
    assert np.allclose(probability_columns(table).sum(1), 1, atol=5e-6)  # six decimals each


@every_task
@every_method
def test_the_predicted_class_is_the_most_probable(workspace, method, key):
    table = workspace.predictions(method, TITLES[key])
    said = table["Predicted Class"]
    if method == "CGM_Lora":
        said = table["Predicted Task"] + ": " + said
    assert list("Probability " + said) == list(table.filter(like="Probability ").idxmax(axis=1))


@every_task
def test_gate_weights_are_shares(workspace, key):
    gates = workspace.predictions("CGM_Lora", TITLES[key]).filter(like="Gate ").to_numpy()
    assert gates.min() >= 0 and np.allclose(gates.sum(1), 1, atol=5e-6)


def test_the_routing_table_has_the_mean_weights_before_every_block_for_every_task(workspace):
    table = pd.read_csv(workspace.results / "CGM_Lora" / "CGM_Lora_Routing.csv")
    assert list(table) == ["Task", "Layer", *KEYS]
    rows = list(zip(table["Task"], table["Layer"], strict=True))
    assert rows == [(task.name, f"beit.layers.{block}") for task in DOCUMENTED for block in range(2)]
    assert np.allclose(table["fire"] + table["game"], 1, atol=5e-6)
    for task in DOCUMENTED:  # the gates of the images are the same weights, averaged over blocks instead of over images
        by_image = workspace.predictions("CGM_Lora", TITLES[task.key])["Gate fire"]
        assert table[table["Task"] == task.name]["fire"].mean() == pytest.approx(by_image.mean(), abs=5e-6)


# ---- summary and history ----


def test_the_summary_has_a_row_for_every_method_and_task(workspace):
    summary = workspace.summary()
    assert list(summary) == ["method", "task", "accuracy", "accuracy_low", "accuracy_high", "macro_f1",
                             "accuracy_told_task", "right_task", "near_duplicates_in_test", "trainable_parameters",
                             "seconds", "images_per_second", "peak_memory_mib"]
    assert (summary["peak_memory_mib"] > 0).all() and (summary["near_duplicates_in_test"] == 0).all()
    assert list(zip(summary["method"], summary["task"], strict=True)) == EVERY_ROW


@every_task
@every_method
def test_predictions_confusion_matrix_and_summary_agree(workspace, tasks, method, key):
    table, summary = workspace.predictions(method, TITLES[key]), workspace.summary()
    row = summary[(summary["method"] == method) & (summary["task"] == TITLES[key])].iloc[0]
    classes, joint = data_of(tasks, key).classes, key if method == "CGM_Lora" else None
    counts, _ = confusion(table, classes, joint)
    assert counts.sum() == len(table)
    assert row["accuracy"] == pytest.approx(np.trace(counts) / counts.sum(), abs=1e-6)
    for name, value in (scores(table, joint) | (told_scores(table, key, classes) if joint else {})).items():
        assert row[name] == pytest.approx(value, abs=1e-6)


def test_accuracy_lies_in_its_interval(workspace):
    summary = workspace.summary()
    assert (summary["accuracy_low"] <= summary["accuracy"]).all()
    assert (summary["accuracy"] <= summary["accuracy_high"]).all()


@pytest.mark.parametrize("method, key", [(method, key) for method in METHODS if method != "Benchmark" for key in KEYS])
def test_the_summary_counts_what_was_trained(workspace, method, key):
    """Heads, all weights, adapters with their heads, gates: counted anew from the saved files."""
    width, classes = 32, 4
    head = width * classes + classes
    adapters, gated = adapter_tensors(workspace, key), mixture_tensors(workspace)
    expected = {
        "Base_Models": head,
        "Finetune": sum(p.numel() for p in open_trained(workspace, "Finetune", key).parameters()),
        "Lora_Finetune": sum(tensor.numel() for tensor in adapters.values()),
        "CGM_Lora": sum(tensor.numel() for name, tensor in gated.items() if name.endswith(LEARNED)),
    }
    summary = workspace.summary().set_index(["method", "task"])
    assert summary.loc[(method, TITLES[key]), "trainable_parameters"] == expected[method]


@every_training
def test_history_has_one_row_per_epoch_and_the_chosen_one_has_the_lowest_validation_loss(workspace, method, name):
    history = pd.read_csv(workspace.results / method / f"{name}_History.csv")
    assert list(history) == [
        "epoch", "training_loss", "validation_loss", "training_accuracy", "validation_accuracy", "chosen"
    ]
    assert list(history["epoch"]) == ([0, 1, 2] if method == "CGM_Lora" else [1, 2])  # 0 is the start of the gates
    assert history["chosen"].sum() == 1
    assert history["chosen"].idxmax() == history["validation_loss"].idxmin()


# ---- models ----


@every_task
@pytest.mark.parametrize("method", ["Finetune", "Lora_Finetune", "CGM_Lora"])
def test_a_saved_model_gives_the_written_probabilities(workspace, tasks, method, key):
    written = probability_columns(workspace.predictions(method, TITLES[key]))
    given = predict(workspace, open_trained(workspace, method, key), data_of(tasks, key).test)
    assert np.allclose(given, written, atol=1e-5)


@every_task
def test_a_base_model_gives_the_accuracy_of_the_summary(workspace, tasks, key):
    data, summary = data_of(tasks, key), workspace.summary().set_index(["method", "task"])
    predicted = predict(workspace, open_trained(workspace, "Base_Models", key), data.test).argmax(1)
    accuracy = (predicted == data.test.labels.numpy()).mean()
    assert summary.loc[("Base_Models", TITLES[key]), "accuracy"] == pytest.approx(accuracy, abs=1e-6)


@every_task
def test_a_saved_image_processor_gives_what_the_model_was_trained_on(workspace, tasks, key):
    """Images from the dataset, through the processor beside the model, are the project's own tensors."""
    test = load_from_disk(str(workspace.root / f"{key}_dataset"))["test"]
    processor = BeitImageProcessorPil.from_pretrained(workspace.results / "Finetune" / "Models" / f"{key}_finetune")
    pixels = processor(list(test["image"]), return_tensors="pt").pixel_values
    assert torch.allclose(pixels, data_of(tasks, key).test.batch(torch.arange(len(test))), atol=1e-6)


@every_task
@pytest.mark.parametrize("method", ["Finetune", "Lora_Finetune", "CGM_Lora"])
def test_a_prediction_does_not_depend_on_the_other_images_of_the_batch(workspace, tasks, monkeypatch, method, key):
    test, model = data_of(tasks, key).test, open_trained(workspace, method, key)
    backwards = test.take(torch.arange(len(test)).flip(0))
    together = predict(workspace, model, test)
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 3)
    assert np.allclose(predict(workspace, model, backwards)[::-1], together, atol=1e-5)


@every_task
@pytest.mark.parametrize("method", ["Base_Models", "Finetune", "Lora_Finetune"])
def test_class_names_are_in_the_config(workspace, tasks, method, key):
    config = open_trained(workspace, method, key).config
    assert config.id2label == dict(enumerate(data_of(tasks, key).classes))
    assert config.label2id == {name: label for label, name in enumerate(data_of(tasks, key).classes)}


@every_task
def test_an_adapter_file_holds_adapters_and_head_only(workspace, key):
    adapters = {f"base_model.model.beit.layers.{block}.{linear}.lora_{matrix}.weight"
                for block in range(2) for linear in BLOCK_LINEARS for matrix in "AB"}
    head = {f"base_model.model.classifier.{name}" for name in ("weight", "bias")}
    assert set(adapter_tensors(workspace, key)) == adapters | head


def test_a_mixture_file_holds_gates_experts_and_one_head_only(workspace):
    """A gate before every block; statistics, which gates of other experts are made from, are in a file of their own."""
    gates = {f"beit.layers.{block}.context_gate.{name}" for block in range(2)
             for name in ("score.weight", "score.bias", "coefficient", "axes", "origin", "centres")}
    experts = {f"beit.layers.{block}.{linear}.lora_{matrix}"
               for block in range(2) for linear in BLOCK_LINEARS for matrix in "AB"}
    head = {f"classifier.{name}" for name in ("expert_weight", "expert_bias", "router_scale", "expert_scale", "class_share")}
    assert set(mixture_tensors(workspace)) == gates | experts | head


# ---- what stays frozen ----


@every_task
def test_a_base_model_has_the_pretrained_backbone_bit_for_bit(workspace, key):
    pretrained = BeitForImageClassification.from_pretrained(workspace.model).beit.state_dict()
    based = open_trained(workspace, "Base_Models", key).beit.state_dict()
    assert pretrained.keys() == based.keys()
    assert all(torch.equal(tensor, based[name]) for name, tensor in pretrained.items())


def test_lora_training_moves_adapters_and_head_and_nothing_else(workspace, tasks):
    config = workspace.config("Lora_Finetune")
    model = models.add_lora(models.load_base(config, tasks[0]), config.lora_rank, config.lora_alpha, config.seed)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fit(model, tasks[0].train, tasks[0].validation, config, "LoRA")
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if ".lora_" in name or ".modules_to_save." in name}


def test_the_trained_mixture_holds_the_experts_as_they_were(workspace):
    """The stacked experts and heads after training are those of the LoRA models, with scale alpha / rank = 2."""
    stacked, experts = mixture_tensors(workspace), [adapter_tensors(workspace, key) for key in KEYS]
    for block in range(2):
        for linear in BLOCK_LINEARS:
            name = f"beit.layers.{block}.{linear}"
            down = torch.cat([expert[f"base_model.model.{name}.lora_A.weight"] for expert in experts])
            up = torch.cat([expert[f"base_model.model.{name}.lora_B.weight"] for expert in experts], dim=1)
            assert torch.equal(stacked[f"{name}.lora_A"], down) and torch.equal(stacked[f"{name}.lora_B"], 2 * up)
    for part in ("weight", "bias"):
        heads = torch.cat([expert[f"base_model.model.classifier.{part}"] for expert in experts])
        assert torch.equal(stacked[f"classifier.expert_{part}"], heads)


def test_the_base_of_the_trained_mixture_is_as_it_was(workspace):
    """The fingerprint saved after training is that of the pretrained backbone."""
    folders = {key: workspace.results / "Lora_Finetune/Models" / f"{key}_lora_finetune" for key in KEYS}
    fresh = ContextGatedMOE.from_adapters(models.load_backbone(workspace.model, list("abcd"), 0), folders)
    saved = json.loads((workspace.results / "CGM_Lora/Models/fire_game_cgm_lora/cgm_config.json").read_text())
    assert saved["base_fingerprint"] == fresh.base_fingerprint()


def test_the_gates_are_those_of_the_training_images_or_were_trained_from_there(workspace, tasks):
    """Another fit to the same images has the same statistics and, where the start was chosen, the same gates and numbers."""
    config = workspace.config("CGM_Lora")
    fresh, saved = mixture.build(config, tasks), open_trained(workspace, "CGM_Lora", "fire")
    untouched = {name: value.clone() for name, value in fresh.state_dict().items()}
    mixture.fit_start(fresh, config, tasks)
    for expert, by_layer in fresh.statistics.items():
        for layer, sums in by_layer.items():
            for name, value in vars(sums).items():
                assert torch.allclose(vars(saved.statistics[expert][layer])[name], value, rtol=1e-5)
    history = pd.read_csv(workspace.results / "CGM_Lora/CGM_Lora_History.csv")
    started = history.loc[history["chosen"] == 1, "epoch"].item() == 0
    learned = [name for name in untouched if name.endswith(LEARNED)]
    assert len(learned) == 2 * 3 + 3
    for name in learned:
        now, start = saved.state_dict()[name], fresh.state_dict()[name]
        assert not torch.equal(now, untouched[name]), name
        assert torch.allclose(now, start, atol=1e-5) == started, name


# ---- the same again ----


@pytest.fixture(scope="module")
def again(tmp_path_factory, workspace):
    """All six scripts, with the same commands, in another root and folder, of another name, locale and hash seed."""
    folder = tmp_path_factory.mktemp("wieder & wieder, дважды")
    code = ("from pipeline import SCRIPTS, Path, Workspace\n"
            f"for script in SCRIPTS: Workspace(Path('new root'), {workspace.model!r}).run(script)")
    elsewhere = {"LC_ALL": "C", "PYTHONHASHSEED": "1", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, env={**os.environ, **elsewhere})
    return Workspace(folder / "new root", workspace.model)


@pytest.fixture(scope="module")
def reseeded(tmp_path_factory, workspace):
    """The five scripts after Data_Preparation, on the same images but with another seed."""
    made = workspace.copy(tmp_path_factory.mktemp("reseeded"), "fire_dataset", "game_dataset")
    for script in list(SCRIPTS)[1:]:
        made.run(script, "--seed", "7")
    return made


def test_the_same_seed_gives_the_same_images(workspace, again):
    assert [data.fingerprint for data in again.tasks()] == [data.fingerprint for data in workspace.tasks()]


def test_the_same_seed_gives_the_same_files(workspace, again):
    """All but the summary, which tells time and memory taken."""
    first, second = hashes(workspace.results), hashes(again.results)
    differ = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    assert differ <= {"summary.csv"}


def test_the_same_seed_gives_the_same_summary_but_for_time_and_memory(workspace, again):
    measured = ["seconds", "images_per_second", "peak_memory_mib"]
    assert workspace.summary().drop(columns=measured).equals(again.summary().drop(columns=measured))


def test_another_seed_gives_other_files(workspace, reseeded):
    first, second = hashes(workspace.results), hashes(reseeded.results)
    same = {name for name in first if first[name] == second[name] and name.endswith((".csv", ".safetensors"))}
    assert same == {STATISTICS}  # of the images, as the pretrained backbone alone sees them


# ---- running a finished script again ----


def times_in(folder):
    """When every file below a folder was last written."""
    return {name: (folder / name).lstat().st_mtime_ns for name in files_in(folder)}


def test_a_finished_script_does_nothing_but_say_so_and_show_its_scores(workspace, capsys):
    before = times_in(workspace.root)
    for script in SCRIPTS:
        workspace.run(script)
        said = capsys.readouterr().out
        if script != "Data_Preparation":
            assert f"{RESULTS_OF[script]} is finished already" in said and "Fire_Risk" in said and "Game" in said
    assert times_in(workspace.root) == before


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


def test_other_settings_are_refused_by_name(workspace):
    before = hashes(workspace.root)
    for script, (flag, value) in OTHER_SETTING.items():
        with pytest.raises(UserError) as refusal:
            workspace.run(script, flag, value)
        said = str(refusal.value)
        assert f"{flag[2:]} = " in said and f"not {value};" in said and "--overwrite" in said
    assert hashes(workspace.root) == before


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "Data_Preparation"])
def test_overwrite_makes_results_anew(mutable, script):
    """The new setting is in config.json, the predictions changed, and the summary still has a row for each."""
    flag, value = OTHER_SETTING[script]
    folder = mutable.results / RESULTS_OF[script]
    before = hashes(folder)
    mutable.run(script, flag, value, "--overwrite")
    assert str(read_json(folder / "config.json", "")[flag[2:]]) == value
    assert files_in(mutable.results) == expected_results()
    changed = {name for name, digest in hashes(folder).items() if before[name] != digest}
    assert {name for name in before if name.endswith((".safetensors", ".csv"))} <= changed
    summary = mutable.summary()
    assert sorted(zip(summary["method"], summary["task"], strict=True)) == sorted(EVERY_ROW)


def test_overwrite_makes_data_anew(mutable):
    mutable.run("Data_Preparation", *OTHER_SETTING["Data_Preparation"], "--overwrite")
    assert [len(data.train) + len(data.validation) + len(data.test) for data in mutable.tasks()] == [48, 48]


def test_overwrite_with_the_same_settings_gives_the_same_files(mutable):
    before = hashes(mutable.results / "Finetune")
    mutable.run("Finetune", "--overwrite")
    assert hashes(mutable.results / "Finetune") == before


def test_results_do_not_name_their_root(workspace):
    """So that they can be moved."""
    for name in files_in(workspace.results):
        if name.endswith(".json"):
            assert str(workspace.root) not in (workspace.results / name).read_text(), name


def test_cached_features_are_those_of_the_backbone(workspace, tasks):
    """What the heads of the base models were trained on."""
    model = open_trained(workspace, "Base_Models", "fire").eval()
    with torch.no_grad():
        expected = model.beit(tasks[0].test.batch(torch.arange(len(tasks[0].test)))).pooler_output
    assert torch.allclose(features(model, tasks[0].test, workspace.config("Benchmark")).inputs, expected, atol=1e-6)


# ---- the command line ----


def start(script, *flags, cwd):
    """Run a script as people do, from another folder."""
    command = [sys.executable, REPOSITORY / f"{script}.py", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_a_script_succeeds_with_status_0_and_an_empty_stderr(workspace, tmp_path):
    done = start("Benchmark", *workspace.flags("Benchmark"), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "Benchmark is finished already" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_script_fails_with_status_2_and_one_line(workspace, tmp_path):
    done = start("Benchmark", "--demo", "--root", "here", "--model", workspace.model, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("Benchmark.py: ")
    assert f"python Data_Preparation.py --demo --root here --model {workspace.model}" in done.stderr
    assert not list(tmp_path.iterdir())
