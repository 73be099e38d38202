"""Tests with a third task, added by --task, and of adding an expert to a finished mixture by --add_expert."""

import shutil

import pytest
from pipeline import files_in, hashes

from common.errors import UserError
from common.files import read_json, write_json

KEYS = ["fire", "game", "third"]
TITLES = ["Fire_Risk", "Game", "third"]
TWO = "Models/fire_game_cgm_lora"


@pytest.fixture(scope="module")
def added(three):
    """The workspace to which a third task was added, with which all scripts have run."""
    return three[0]


def test_a_task_that_is_added_has_every_file_and_leaves_those_of_the_others(added, workspace):
    """What there is of the second task there is of the third; the mixture, which answers for all, is made anew."""
    two = files_in(workspace.root)
    third = {name.replace("game_", "third_").replace("Game", "third") for name in two
             if "game_" in name.replace("fire_game", "") or "Game" in name}
    mixture = {name.replace("fire_game_cgm", "fire_game_third_cgm") for name in two}
    comparison = {f"Results/CGM_Lora/CGM_Lora_Comparison.{ending}" for ending in ("csv", "png")}
    gone = {name for name in two if "fire_game_cgm" in name}
    assert files_in(added.root) - gone == (two | third | mixture | comparison) - gone
    before, after = hashes(workspace.root), hashes(added.root)
    changed = {name for name, digest in before.items() if after.get(name) != digest and "/CGM_Lora/" not in name}
    assert changed == {"tasks.json", "Results/summary.csv", "Results/index.html", *(
        f"Results/{method}/config.json" for method in ("Base_Models", "Benchmark", "Finetune", "Lora_Finetune"))}
    assert set(added.summary().groupby("method")["task"].agg(tuple)) == {tuple(TITLES)}


# ---- adding an expert to the finished mixture ----


@pytest.fixture(scope="module")
def adapters(added):
    """The three experts, as --add_expert takes them."""
    return {key: f"{key}={added.results}/Lora_Finetune/Models/{key}_lora_finetune" for key in KEYS}


@pytest.fixture(scope="module")
def grown(tmp_path_factory, workspace, added, adapters):
    """A copy of the workspace, where none of this was known, to whose mixture the third task's expert was added."""
    made = workspace.copy(tmp_path_factory.mktemp("grown") / "root")
    added.copy(made.root, "third_dataset", "tasks.json")
    made.run("CGM_Lora", "--add_expert", adapters["third"])
    return made


def test_a_grown_mixture_has_all_results_in_a_folder_of_its_own(grown, workspace, adapters, capsys):
    expected = {name.replace("fire_game_cgm", "fire_game_third_cgm") for name in files_in(workspace.results / "CGM_Lora")}
    expected |= {"CGM_Lora_third.csv", "CGM_Lora_third_Confusion_Matrix.png"}
    assert files_in(grown.results / "CGM_Lora_third") == expected
    before, after = hashes(workspace.results), hashes(grown.results)
    assert {name for name in before if after[name] != before[name]} == {"summary.csv", "index.html"}
    assert list(grown.summary().set_index("method").loc["CGM_Lora_third", "task"]) == TITLES
    grown.run("CGM_Lora", "--add_expert", adapters["third"])
    assert "CGM_Lora_third is finished already" in capsys.readouterr().out and hashes(grown.results) == after


def test_an_expert_that_cannot_be_added_is_refused_in_one_line(grown, adapters, tmp_path):
    ready, third = grown.copy(tmp_path / "root"), adapters["third"]
    shutil.rmtree(ready.results / "CGM_Lora_third")
    made_from = ready.results / "CGM_Lora" / TWO / "provenance.json"
    usual = read_json(made_from, "")
    other_images = {**usual, "data": {**usual["data"], "fire": "other"}}
    for flags, said, record in (
        (["no/where"], "NAME=FOLDER", usual),
        (["nowhere"], "no task nowhere", usual),
        ([third, third], "one name", usual),
        ([third, "--compare"], "--compare", usual),
        ([third.replace("third=", "x=")], "no task x,.*Data_Preparation.py.*--task x=SOURCE", usual),
        (["third=no_such_folder"], "'third'", usual),
        ([adapters["fire"]], "game_third_cgm_lora", usual),  # the mixture without it was never made
        ([third, "--gate_hidden", "2"], r"gate_hidden = \d+, not 2; run python CGM_Lora.py .*--overwrite", usual),
        ([third], "data.fire = other.*python CGM_Lora.py", other_images),
    ):
        write_json(made_from, record)
        before = hashes(ready.results)
        with pytest.raises(UserError, match=said) as refusal:
            ready.run("CGM_Lora", "--add_expert", *flags)
        assert "\n" not in str(refusal.value) and hashes(ready.results) == before, flags
