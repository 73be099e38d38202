"""Tests with a third task, added by --task, and of adding an expert to a finished mixture by --add_expert."""

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
from common.comparison import mixture as steps
from common.errors import UserError
from common.files import read_json, write_json
from common.tasks import read_tasks
from ContextGatedMOE import ContextGatedMOE
from ContextGatedMOE.heads import HEAD_NUMBERS

KEYS = ["fire", "game", "third"]
TITLES = {"fire": "Fire_Risk", "game": "Game", "third": "third"}
ALL_THREE = "Models/fire_game_third_cgm_lora"
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


def test_predictions_of_every_task_are_among_the_classes_of_all(three):
    labels = [(data.task.key, name) for data in three.tasks() for name in data.classes]
    probabilities = [f"Probability {task}: {name}" for task, name in labels]
    for title in TITLES.values():
        table = three.predictions("CGM_Lora", title)
        assert list(table) == ["Image", "Predicted Class", "Actual Class", "Predicted Task", *probabilities,
                               *(f"Gate {key}" for key in KEYS), "Familiarity"]
        assert (table.filter(like="Gate ").sum(axis=1) - 1).abs().max() < 5e-6
        assert (table[probabilities].sum(axis=1) - 1).abs().max() < 5e-5
        best = table[probabilities].to_numpy().argmax(1)
        assert list(zip(table["Predicted Task"], table["Predicted Class"], strict=True)) == [labels[index] for index in best]


def test_the_routing_has_a_row_for_every_task_and_block(three):
    table = pd.read_csv(three.results / "CGM_Lora" / "CGM_Lora_Routing.csv")
    assert list(table) == ["Task", "Layer", *KEYS]
    tasks = [task.name for task in read_tasks(three.root)]
    assert list(zip(table["Task"], table["Layer"], strict=True)) == [
        (task, f"beit.layers.{block}") for task in tasks for block in range(2)]
    assert (table[KEYS].sum(axis=1) - 1).abs().max() < 5e-6


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
            alone = PeftModel.from_pretrained(tiny_beit(0, num_labels=4), adapter).eval()
            assert_close(logits(model, inputs), logits(alone, inputs))


@pytest.mark.parametrize("top_k", [None, 1])
def test_images_of_many_experts_are_kept_apart(many, inputs, top_k):
    model, order = mixture(many, top_k=top_k), [3, 0, 4, 1, 2]
    whole = logits(model, inputs)
    assert_close(logits(model, {"pixel_values": inputs["pixel_values"][order]}), whole[order])
    assert_close(torch.cat([logits(model, {"pixel_values": image[None]}) for image in inputs["pixel_values"]]), whole)


def test_many_experts_saved_and_loaded_in_another_order(many, inputs, tmp_path):
    model = mixture(many)
    model.save_pretrained(tmp_path)
    loaded = ContextGatedMOE.from_pretrained(tmp_path, tiny_beit(0, num_labels=4))
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert torch.equal(logits(mixture(dict(reversed(many.items()))), inputs), logits(model, inputs))


def test_only_scores_coefficients_and_the_numbers_of_the_head_learn(many, inputs):
    model = mixture(many, classes={name: CLASS_NAMES for name in many}).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(**inputs).logits.square().mean().backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    gates = {f"base_model.beit.layers.{block}.context_gate.{part}" for block in range(2)
             for part in ("score.weight", "score.bias", "coefficient")}
    assert moved == gates | {f"base_model.classifier.{name}" for name in HEAD_NUMBERS}


# ---- adding an expert to the finished mixture ----


@pytest.fixture
def ready(three, workspace, tmp_path):
    """A copy of the workspace with the third task's data, which the mixture does not know yet; a test may change it."""
    return with_third_data(workspace, three, tmp_path / "root")


@pytest.fixture(scope="module")
def grown(tmp_path_factory, workspace, three, adapters):
    """The workspace's mixture of two tasks, with the third task's data and its expert added."""
    made = with_third_data(workspace, three, tmp_path_factory.mktemp("grown") / "root")
    made.run("CGM_Lora", "--add_expert", f"third={adapters['third']}")
    return made


def with_third_data(workspace: Workspace, three: Workspace, root: Path) -> Workspace:
    made = workspace.copy(root)
    three.copy(root, "third_dataset", "tasks.json")
    return made


def test_a_grown_mixture_has_all_results_in_a_folder_of_its_own(grown, three, workspace):
    folder = grown.results / "CGM_Lora_third"
    assert files_in(folder) == {name for name in files_in(three.results / "CGM_Lora") if "Comparison" not in name}
    before, after = hashes(workspace.results), hashes(grown.results)
    assert {name for name in before if after[name] != before[name]} == {"summary.csv", "index.html"}
    rows = grown.summary().set_index("method").loc["CGM_Lora_third"]
    assert list(rows["task"]) == list(TITLES.values())


def test_a_grown_mixture_keeps_the_experts_and_the_numbers_that_it_started_from(grown, three):
    """The experts of two runs with one seed are the same, so they can be looked up in the mixture of all three."""
    start, whole, ours = (load_file(folder / "cgm_model.safetensors") for folder in (
        grown.results / "CGM_Lora/Models/fire_game_cgm_lora", three.results / "CGM_Lora" / ALL_THREE,
        grown.results / "CGM_Lora_third" / ALL_THREE))
    assert read_json(grown.results / "CGM_Lora_third" / ALL_THREE / "cgm_config.json", "")["experts"] == KEYS
    assert ours.keys() == whole.keys()
    numbers = {name for name in ours if name.endswith(("coefficient", *HEAD_NUMBERS))}
    assert len(numbers) == 2 + len(HEAD_NUMBERS)
    assert {name for name in numbers if not torch.equal(ours[name], start[name])} == set()
    experts = {name for name in ours if ".context_gate." not in name} - numbers
    assert {name for name in experts if not torch.equal(ours[name], whole[name])} == set()


def test_an_expert_added_by_its_own_images_gives_the_gates_that_all_images_give(grown, three):
    """The two may differ by rounding only: the mixture of all is fitted to all images at once, with the same numbers."""
    config, tasks = three.config("CGM_Lora"), three.tasks()
    added = steps.load(grown.results / "CGM_Lora_third" / ALL_THREE, config, tasks)
    whole = steps.build(config, tasks)
    whole.fit_gates({data.task.key: steps.Batches(data.train, 8) for data in tasks})
    numbers = {name: tensor for name, tensor in added.state_dict().items() if name.endswith(("coefficient", *HEAD_NUMBERS))}
    assert whole.load_state_dict(numbers, strict=False).unexpected_keys == []
    for data in tasks:
        images = data.test.batch(torch.arange(len(data.test)))
        ours, expected = added.predict(images), whole.predict(images)
        assert_close(ours.logits, expected.logits, 1e-3)
        assert_close(ours.familiarity, expected.familiarity, 1e-3)
        for layer, weights in expected.gates.items():
            assert_close(ours.gates[layer], weights, 1e-3)


def test_a_grown_mixture_is_finished(grown, adapters, capsys):
    before = hashes(grown.results)
    grown.run("CGM_Lora", "--add_expert", f"third={adapters['third']}")
    assert "CGM_Lora_third is finished already" in capsys.readouterr().out
    assert hashes(grown.results) == before


def test_an_expert_that_cannot_be_added_is_refused_in_one_line(ready, adapters):
    third, before = f"third={adapters['third']}", hashes(ready.results)
    for flags, said in (
        (["nowhere"], "NAME=FOLDER"),
        (["a b=folder"], "NAME=FOLDER"),
        ([third, third], "one name"),
        ([third, "--compare"], "--compare"),
        ([f"x={adapters['third']}"], "no task x,.*Data_Preparation.py.*--task x=SOURCE"),
        (["third=no_such_folder"], "'third'"),
        ([f"fire={adapters['fire']}"], "game_third_cgm_lora"),  # the mixture without it was never made
        ([third, "--gate_hidden", "2"], r"gate_hidden = \d+, not 2; run python CGM_Lora.py .*--overwrite"),
    ):
        with pytest.raises(UserError, match=said) as refusal:
            ready.run("CGM_Lora", "--add_expert", *flags)
        assert "\n" not in str(refusal.value)
        assert hashes(ready.results) == before, flags


def test_a_mixture_of_other_images_does_not_grow(ready, adapters):
    file = ready.results / "CGM_Lora/Models/fire_game_cgm_lora/provenance.json"
    made_from = read_json(file, "")
    write_json(file, {**made_from, "data": {**made_from["data"], "fire": "other"}})
    with pytest.raises(UserError, match="data.fire = other.*python CGM_Lora.py"):
        ready.run("CGM_Lora", "--add_expert", f"third={adapters['third']}")
