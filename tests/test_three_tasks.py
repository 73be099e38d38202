"""Tests with a third task, added by --task, and of adding an expert to a finished mixture by --add_expert."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mixture_models import assert_close, logits, randomise_gates
from peft import PeftModel
from PIL import Image
from pipeline import Workspace, files_in, hashes, tiny_beit
from safetensors.torch import load_file, save_file

from common.cli.flags import SCRIPTS
from common.errors import UserError
from common.files import read_json, write_json
from ContextGatedMOE import ContextGatedMOE

KEYS = ["fire", "game", "third"]
TITLES = {"fire": "Fire_Risk", "game": "Game", "third": "third"}
CLASS_NAMES = ["bars", "checks", "plain", "stripes"]


def write_patterns(folder: Path) -> Path:
    """Ten images of each of four patterns in random colours, 48 x 64, in one subfolder a class."""
    rng = np.random.default_rng(0)
    rows, columns = np.indices((48, 64)) // 8 % 2
    for name, pattern in zip(CLASS_NAMES, (columns, (rows + columns) % 2, np.zeros_like(rows), rows), strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(10):
            noisy = rng.integers(0, 256, (2, 3))[pattern] + rng.normal(0, 8, (48, 64, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory, workspace):
    """All six scripts with three tasks, and the comparison; what the workspace has of two tasks is not used."""
    top = tmp_path_factory.mktemp("three")
    made = Workspace(top / "root", workspace.model)
    made.run("Data_Preparation")
    made.run("Data_Preparation", "--task", f"third={write_patterns(top / 'patterns')}")
    for script in [*SCRIPTS][1:]:
        made.run(script, *(["--compare"] if script == "CGM_Lora" else []))
    return made


@pytest.fixture(scope="module")
def adapters(three):
    """The three experts' folders."""
    return {key: three.results / "Lora_Finetune/Models" / f"{key}_lora_finetune" for key in KEYS}


# ---- the third task ----


def test_every_script_has_every_file_for_the_third_task_too(three, workspace):
    """What there is of the second task there is of the third; the mixture is one of three."""
    two = {name.replace("fire_game_cgm", "fire_game_third_cgm") for name in files_in(workspace.results)}
    third = {name.replace("game_", "third_").replace("Game", "third") for name in two
             if "game_" in name.replace("fire_game", "") or "Game" in name}
    comparison = {f"CGM_Lora/CGM_Lora_Comparison.{ending}" for ending in ("csv", "png")}
    assert files_in(three.results) == two | third | comparison


def test_predictions_of_the_third_task_have_three_gate_columns(three):
    table = three.predictions("CGM_Lora", "third")
    assert list(table.columns[3:]) == [*(f"Probability {name}" for name in CLASS_NAMES), *(f"Gate {key}" for key in KEYS)]
    assert (table.filter(like="Gate ").sum(axis=1) - 1).abs().max() < 5e-6


def test_the_routing_has_three_tasks_of_three_experts(three):
    table = pd.read_csv(three.results / "CGM_Lora" / "CGM_Lora_Routing.csv")
    assert list(table) == ["Task", "Layer", *KEYS]
    assert table["Task"].value_counts().to_dict() == {"fire risk": 13, "video games": 13, "third": 13}


def test_the_summary_has_three_rows_of_every_method(three):
    assert set(three.summary().groupby("method")["task"].agg(tuple)) == {tuple(TITLES.values())}


def test_the_comparison_is_of_three_tasks(three):
    table = pd.read_csv(three.results / "CGM_Lora" / "CGM_Lora_Comparison.csv")
    assert set(table.groupby("method")["task"].agg(tuple)) == {(*TITLES.values(), "All")}
    assert "third expert alone" in set(table["method"])


# ---- three experts, and eight ----


@pytest.fixture(scope="module", params=[3, 8])
def many(request, adapters, tmp_path_factory):
    """Three experts, or eight: those three and copies of them with noise."""
    experts, top = dict(adapters), tmp_path_factory.mktemp("copies")
    torch.manual_seed(0)
    for number in range(request.param - 3):
        source, copy = adapters[KEYS[number % 3]], top / f"copy{number}"
        copy.mkdir()
        tensors = load_file(source / "adapter_model.safetensors")
        noisy = {name: tensor + 0.1 * tensor.std() * torch.randn_like(tensor) for name, tensor in tensors.items()}
        save_file(noisy, copy / "adapter_model.safetensors")
        (copy / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
        experts[copy.name] = copy
    return experts


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(5, 3, 32, 32)}


def mixture(experts: dict[str, Path], **options: object) -> ContextGatedMOE:
    return randomise_gates(ContextGatedMOE.from_adapters(tiny_beit(0, num_labels=4).eval(), experts, **options))


def test_each_of_many_experts_is_that_peft_model(many, inputs):
    model = mixture(many)
    for name, adapter in many.items():
        with model.fixed_gates({name: 1.0}):
            assert_close(logits(model, inputs), logits(PeftModel.from_pretrained(tiny_beit(0, num_labels=4), adapter).eval(), inputs))


@pytest.mark.parametrize("top_k", [None, 1])
def test_images_of_many_experts_are_kept_apart(many, inputs, top_k):
    model, order = mixture(many, top_k=top_k), [3, 0, 4, 1, 2]
    whole = logits(model, inputs)
    assert_close(logits(model, {"pixel_values": inputs["pixel_values"][order]}), whole[order])
    assert_close(torch.cat([logits(model, {"pixel_values": image[None]}) for image in inputs["pixel_values"]]), whole)


def test_many_experts_saved_and_loaded_in_another_order(many, inputs, tmp_path):
    model = mixture(many)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(ContextGatedMOE.from_pretrained(tmp_path, tiny_beit(0, num_labels=4)), inputs), logits(model, inputs))
    assert torch.equal(logits(mixture(dict(reversed(many.items()))), inputs), logits(model, inputs))


def test_only_the_gates_of_many_experts_learn(many, inputs):
    model = mixture(many).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.gate_parameters(), lr=0.1)
    model(**inputs).logits.square().mean().backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".gate." in name}


# ---- adding an expert to the finished mixture ----


def gates_and_experts(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """A saved mixture's tensors and configuration."""
    return load_file(folder / "cgm_model.safetensors"), json.loads((folder / "cgm_config.json").read_text())


@pytest.fixture(scope="module")
def grown(tmp_path_factory, workspace, three, adapters):
    """The workspace's mixture of two tasks, with the third task's data and its expert added."""
    made = workspace.copy(tmp_path_factory.mktemp("grown") / "root")
    three.copy(made.root, "third_dataset", "tasks.json")
    made.run("CGM_Lora", "--add_expert", f"third={adapters['third']}")
    return made


def test_a_grown_mixture_has_all_results_in_a_folder_of_its_own(grown, three, workspace):
    folder = grown.results / "CGM_Lora_third"
    assert files_in(folder) == {name for name in files_in(three.results / "CGM_Lora") if "Comparison" not in name}
    before, after = hashes(workspace.results), hashes(grown.results)
    assert {name for name in before if after[name] != before[name]} == {"summary.csv"}
    rows = grown.summary().set_index("method").loc["CGM_Lora_third"]
    assert list(rows["task"]) == list(TITLES.values())


def test_a_grown_mixture_holds_the_old_experts_and_the_new(grown, three):
    """It is the mixture of all three but for its gates: the experts of two runs with one seed are the same."""
    name = "Models/fire_game_third_cgm_lora"
    ours, others = (gates_and_experts(made.results / folder / name) for made, folder in ((grown, "CGM_Lora_third"), (three, "CGM_Lora")))
    assert ours[1]["experts"] == others[1]["experts"] == KEYS
    assert ours[0].keys() == others[0].keys()
    assert {key for key in ours[0] if not torch.equal(ours[0][key], others[0][key])} == {key for key in ours[0] if ".gate." in key}


def test_a_grown_mixture_is_finished(grown, adapters, capsys):
    before = hashes(grown.results)
    grown.run("CGM_Lora", "--add_expert", f"third={adapters['third']}")
    assert "CGM_Lora_third is finished already" in capsys.readouterr().out
    assert hashes(grown.results) == before


def test_gates_start_from_those_of_the_mixture(workspace, adapters, tmp_path):
    """At a learning rate of zero all but the new expert's outputs are as they were; it needs no task of its own."""
    made = workspace.copy(tmp_path / "root")
    made.run("CGM_Lora", "--add_expert", f"twin={adapters['fire']}", "--learning_rate", "0")
    old, new = (gates_and_experts(made.results / folder)[0] for folder in
                ("CGM_Lora/Models/fire_game_cgm_lora", "CGM_Lora_twin/Models/fire_game_twin_cgm_lora"))
    for name, tensor in old.items():
        if ".gate." in name:
            assert torch.equal(new[name] if "hidden" in name else new[name][:2], tensor)


@pytest.mark.parametrize("flags, said", [
    (["--add_expert", "nowhere"], "NAME=FOLDER"),
    (["--add_expert", "a b=folder"], "NAME=FOLDER"),
    (["--add_expert", "x=one", "x=two"], "one name"),
    (["--add_expert", "x=one", "--compare"], "--compare"),
    (["--add_expert", "x=no_such_folder"], "'x'"),
    (["--add_expert", "fire=no_such_folder"], "game_cgm_lora"),
    (["--add_expert", "x=no_such_folder", "--gate_hidden", "2"], "gate_hidden = 4, not 2"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_an_expert_that_cannot_be_added_is_refused_in_one_line(mutable, flags, said):
    before = hashes(mutable.results)
    with pytest.raises(UserError, match=said) as refusal:
        mutable.run("CGM_Lora", *flags)
    assert "\n" not in str(refusal.value)
    assert hashes(mutable.results) == before


def test_a_mixture_of_other_images_does_not_grow(mutable, adapters):
    file = mutable.results / "CGM_Lora/Models/fire_game_cgm_lora/provenance.json"
    made_from = read_json(file, "")
    write_json(file, {**made_from, "data": {**made_from["data"], "fire": "other"}})
    with pytest.raises(UserError, match="data.fire = other.*python CGM_Lora.py"):
        mutable.run("CGM_Lora", "--add_expert", f"third={adapters['third']}")
