"""Tests of what goes wrong: one line that names the thing and the way out, status 2, and earlier results untouched."""

import importlib
import json
import resource
import shutil
import sys
from contextlib import contextmanager

import pytest

from common.config import SCRIPTS, RunAllConfig, parse, run
from common.run_all import main as run_all
from pipeline import REPOSITORY, Workspace, files_in, hashes

RESULTS_OF = {script: "Base_Models" if script == "Generate_Base_Model" else script for script in SCRIPTS}


def complaint(monkeypatch, capsys, script, flags, main=None):
    """Run a script by its command line, as `python SCRIPT.py` does; return the one line it ends with."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    with pytest.raises(SystemExit) as end:
        run(main or importlib.import_module(script).main, SCRIPTS.get(script, RunAllConfig))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and said.startswith(f"{script}.py: ")
    return said


@pytest.fixture
def refuse(monkeypatch, capsys):
    """Run a script in a workspace; check that it is refused with one line and changes no file; return the line."""

    def refused(place: Workspace, script: str, *flags: str) -> str:
        before = hashes(place.root)
        line = complaint(monkeypatch, capsys, script, place.flags(script, *flags))
        assert hashes(place.root) == before
        return line

    return refused


@pytest.fixture
def unfinished(mutable):
    """A copy of the workspace without the results of a script, which it therefore makes anew."""

    def prepared(script: str) -> Workspace:
        shutil.rmtree(mutable.results / RESULTS_OF[script])
        return mutable

    return prepared


@pytest.fixture(scope="session")
def other_images(tmp_path_factory, backbone):
    """A workspace with other images of the same tasks, and no results."""
    made = Workspace(tmp_path_factory.mktemp("other_images"), backbone)
    made.run("Data_Preparation", "--seed", "8")
    made.tasks()  # so that the resized images are there too
    return made


def exchange_images(place, other_images):
    """Put other images in place of those that the results of a workspace were made from."""
    for name in ("fire_dataset", "game_dataset"):
        shutil.rmtree(place.root / name)
    other_images.copy(place.root)


def damage(path):
    """Cut a file in the middle."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# ---- flags ----

BAD_VALUES = {
    "Data_Preparation": [("--images_per_class", value) for value in ("x", "4", "-5", "1.5", "all")],
    "Generate_Base_Model": [
        ("--epochs", "0"), ("--epochs", "x"), ("--batch_size", "0"), ("--batch_size", "2.5"),
        ("--accumulation_steps", "0"),
        ("--learning_rate", "-0.001"), ("--learning_rate", "nan"), ("--weight_decay", "-1"), ("--warmup_epochs", "-1"),
        ("--warmup_epochs", "inf"), ("--seed", "-1"), ("--seed", "99999999999999999999"), ("--precision", "fp8"),
        ("--device", "abacus"), ("--device", "meta"), ("--model", "/no/such/folder"),
        ("--model", str(REPOSITORY / "tests")),
    ],
    "Benchmark": [("--device", "abacus"), ("--device", "hpu"), ("--model", "/no/such/folder")],
    "Finetune": [("--layer_decay", "0"), ("--layer_decay", "2"), ("--layer_decay", "nan"), ("--epochs", "0")],
    "Lora_Finetune": [("--lora_rank", "0"), ("--lora_alpha", "0"), ("--lora_rank", "1.5")],
    "CGM_Lora": [
        ("--gate_hidden", "0"), ("--routing_weight", "-0.1"), ("--routing_weight", "inf"), ("--batch_size", "-1"),
    ],
}


def needs(script):
    """What must be there before a script can run."""
    before = {"Lora_Finetune": ["Results/Base_Models"], "CGM_Lora": ["Results/Lora_Finetune"]}
    return [] if script == "Data_Preparation" else ["fire_dataset", "game_dataset", *before.get(script, [])]


@pytest.mark.parametrize("script, flag, value", [(s, *bad) for s, all_bad in BAD_VALUES.items() for bad in all_bad])
def test_a_bad_value_is_refused_by_name(refuse, workspace, tmp_path, script, flag, value):
    place = workspace.copy(tmp_path / "root", *needs(script)) if needs(script) else Workspace(tmp_path, workspace.model)
    line = refuse(place, script, flag, value)
    assert flag in line and value in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_flag_is_refused_by_name(refuse, workspace, script):
    line = refuse(workspace, script, "--epoch", "3")
    assert "--epoch" in line and "--help" in line


def test_an_unknown_flag_of_run_all_is_refused_by_name(monkeypatch, capsys):
    assert "--epochs" in complaint(monkeypatch, capsys, "run_all", ["--demo", "--epochs", "3"], run_all)


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_are_written_with_hyphens_too(workspace, script):
    flags = [flag.replace("_", "-") if flag.startswith("--") else flag for flag in workspace.flags(script)]
    assert parse(SCRIPTS[script], flags) == workspace.config(script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_tells_every_flag_and_what_the_demo_changes(monkeypatch, capsys, script):
    monkeypatch.setenv("COLUMNS", "500")  # no line breaks within a flag's help
    with pytest.raises(SystemExit) as end:
        parse(SCRIPTS[script], ["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "with --demo demo" in said
    assert all(f"--{name}" in said for name in vars(SCRIPTS[script]()))


def test_a_flag_wins_over_the_demo():
    config = parse(SCRIPTS["Finetune"], ["--demo", "--root", "elsewhere", "--epochs", "3"])
    assert (config.root, config.epochs, config.batch_size) == ("elsewhere", 3, 16)


def test_a_learning_rate_of_zero_learns_nothing(unfinished):
    place = unfinished("Finetune")
    place.run("Finetune", "--learning_rate", "0")
    history = (place.results / "Finetune" / "Finetuned_Game_History.csv").read_text().splitlines()
    assert history[1].split(",")[2] == history[2].split(",")[2]  # validation loss


# ---- missing and damaged files ----


@pytest.mark.parametrize("script", list(SCRIPTS)[1:])
def test_a_missing_dataset_names_the_script_that_makes_it(refuse, mutable, script):
    shutil.rmtree(mutable.root / "game_dataset")
    line = refuse(mutable, script)
    assert "game_dataset" in line and f"python Data_Preparation.py --demo --root {mutable.root}" in line


@pytest.mark.parametrize("content", ["", "{", "[]", "\0"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_damaged_manifest_names_the_way_to_make_it_anew(refuse, mutable, script, content):
    (mutable.root / "fire_dataset" / "manifest.json").write_text(content)
    line = refuse(mutable, script)
    assert "manifest.json" in line and "Data_Preparation.py" in line and "--overwrite" in line


def test_damaged_images_name_the_way_to_make_them_anew(refuse, unfinished):
    place = unfinished("Benchmark")
    for path in (place.root / "fire_dataset").glob("pixels_*"):
        path.unlink()
    damage(next((place.root / "fire_dataset" / "test").glob("*.arrow")))
    line = refuse(place, "Benchmark")
    assert "fire_dataset" in line and "Data_Preparation.py" in line and "--overwrite" in line


def test_a_missing_base_model_names_the_script_that_makes_it(refuse, unfinished):
    place = unfinished("Lora_Finetune")
    shutil.rmtree(place.results / "Base_Models" / "fire_base")
    line = refuse(place, "Lora_Finetune")
    assert "fire_base" in line and f"python Generate_Base_Model.py --demo --root {place.root}" in line


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "provenance.json"])
def test_a_damaged_base_model_names_the_way_to_make_it_anew(refuse, unfinished, name):
    place = unfinished("Lora_Finetune")
    damage(place.results / "Base_Models" / "fire_base" / name)
    line = refuse(place, "Lora_Finetune")
    assert "fire_base" in line and "Generate_Base_Model.py" in line and "--overwrite" in line


def test_a_missing_expert_names_the_script_that_makes_it(refuse, unfinished):
    place = unfinished("CGM_Lora")
    shutil.rmtree(place.results / "Lora_Finetune" / "Models" / "game_lora_finetune")
    line = refuse(place, "CGM_Lora")
    assert "game_lora_finetune" in line and f"python Lora_Finetune.py --demo --root {place.root}" in line


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "provenance.json"])
def test_a_damaged_expert_is_named(refuse, unfinished, name):
    place = unfinished("CGM_Lora")
    damage(place.results / "Lora_Finetune" / "Models" / "game_lora_finetune" / name)
    assert "game_lora_finetune" in refuse(place, "CGM_Lora")


@pytest.mark.parametrize("script", list(SCRIPTS)[1:])
@pytest.mark.parametrize("content", ["", "method\nFinetune\n", "a,b\n1,2\n", "\0"])
def test_a_damaged_summary_is_named_before_any_work(refuse, unfinished, script, content):
    place = unfinished(script)
    (place.results / "summary.csv").write_text(content)
    line = refuse(place, script)
    assert "summary.csv" in line and "--overwrite" in line


@pytest.mark.parametrize("script", list(SCRIPTS)[1:])
def test_finished_results_that_the_summary_lacks_are_named(refuse, mutable, script):
    path = mutable.results / "summary.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(RESULTS_OF[script])))
    line = refuse(mutable, script)
    assert f"no rows of {RESULTS_OF[script]}" in line and "--overwrite" in line


@pytest.mark.parametrize("script", list(SCRIPTS)[1:])
def test_a_damaged_config_of_finished_results_is_named(refuse, mutable, script):
    damage(mutable.results / RESULTS_OF[script] / "config.json")
    line = refuse(mutable, script)
    assert f"{RESULTS_OF[script]}/config.json" in line and "--overwrite" in line


def test_a_folder_in_the_place_of_the_link_is_not_deleted(monkeypatch, capsys, unfinished):
    place = unfinished("Benchmark")
    mine = place.results / "Benchmark_Data"
    mine.unlink()
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    assert "Benchmark_Data" in complaint(monkeypatch, capsys, "Benchmark", place.flags("Benchmark"))
    assert (mine / "notes.txt").read_text() == "mine"


# ---- results made from something else ----


@pytest.mark.parametrize("script", list(SCRIPTS)[1:])
def test_finished_results_of_other_images_are_refused(refuse, mutable, other_images, script):
    exchange_images(mutable, other_images)
    line = refuse(mutable, script)
    assert "data.fire = " in line and "--overwrite" in line


def test_base_models_of_other_images_are_refused(refuse, unfinished, other_images):
    place = unfinished("Lora_Finetune")
    exchange_images(place, other_images)
    line = refuse(place, "Lora_Finetune")
    assert "fire_base" in line and "other images" in line and "Generate_Base_Model.py" in line and "--overwrite" in line


def test_experts_of_other_images_are_refused(refuse, unfinished, other_images):
    place = unfinished("CGM_Lora")
    exchange_images(place, other_images)
    line = refuse(place, "CGM_Lora")
    assert "fire_lora_finetune" in line and "other images" in line
    assert "Lora_Finetune.py" in line and "--overwrite" in line


@pytest.mark.parametrize("script, made_by", [("Lora_Finetune", "Generate_Base_Model"), ("CGM_Lora", "Lora_Finetune")])
def test_models_on_another_backbone_are_refused(refuse, unfinished, other_backbone, script, made_by):
    line = refuse(unfinished(script), script, "--model", other_backbone)
    assert f"not {other_backbone}" in line and f"{made_by}.py" in line and "--overwrite" in line


@pytest.mark.parametrize("script", list(SCRIPTS)[1:])
def test_finished_results_on_another_backbone_are_refused(refuse, workspace, other_backbone, script):
    line = refuse(workspace, script, "--model", other_backbone)
    assert f"model = {workspace.model}, not {other_backbone}" in line and "--overwrite" in line


def test_a_backbone_that_is_no_beit_is_refused(refuse, unfinished, workspace, tmp_path):
    shutil.copytree(workspace.model, tmp_path / "vit")
    path = tmp_path / "vit" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "vit"}))
    line = refuse(unfinished("Benchmark"), "Benchmark", "--model", str(tmp_path / "vit"))
    assert "vit" in line and "BEiT" in line


# ---- what goes wrong on the way ----


@pytest.mark.parametrize("script", ["Generate_Base_Model", "Finetune", "Lora_Finetune", "CGM_Lora"])
def test_a_loss_that_is_not_finite_is_named_with_the_way_out(refuse, unfinished, script):
    line = refuse(unfinished(script), script, "--learning_rate", "4e9", "--weight_decay", "4e9", "--epochs", "8")
    assert "loss is" in line and "--learning_rate" in line


@contextmanager
def files_of_at_most(size):
    """A disk that is full after `size` bytes of any one file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "script, size", [("Finetune", 50_000), ("Finetune", 500), ("Benchmark", 500), ("CGM_Lora", 50_000)]
)
def test_a_full_disk_leaves_no_half_written_file_and_no_earlier_result_harmed(
        monkeypatch, capsys, unfinished, script, size):
    place = unfinished(script)
    before = hashes(place.root)
    with files_of_at_most(size):
        complaint(monkeypatch, capsys, script, place.flags(script))
    after = hashes(place.root)
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in files_in(place.root) if ".part" in name]
    assert not (place.results / script / "config.json").exists()


def test_a_full_disk_leaves_no_half_written_tensors(monkeypatch, capsys, unfinished):
    """safetensors reports it by an error of its own."""
    place = unfinished("Benchmark")
    for path in place.root.glob("*_dataset/pixels_*"):
        path.unlink()
    before = hashes(place.root)
    with files_of_at_most(20_000):
        complaint(monkeypatch, capsys, "Benchmark", place.flags("Benchmark"))
    assert hashes(place.root) == before


def test_a_full_disk_leaves_no_half_dataset(monkeypatch, capsys, workspace, tmp_path):
    place = Workspace(tmp_path / "root", workspace.model)
    with files_of_at_most(20_000):
        complaint(monkeypatch, capsys, "Data_Preparation", place.flags("Data_Preparation"))
    assert files_in(place.root) == set()


def test_a_run_that_was_cut_short_is_made_whole_by_the_same_command(monkeypatch, capsys, unfinished, workspace):
    place = unfinished("Finetune")
    with files_of_at_most(50_000):
        complaint(monkeypatch, capsys, "Finetune", place.flags("Finetune"))
    place.run("Finetune")
    assert hashes(place.results / "Finetune") == hashes(workspace.results / "Finetune")


def test_an_interrupted_script_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["Benchmark.py", "--demo"])

    def interrupted(config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run(interrupted, SCRIPTS["Benchmark"])
    assert "\n" not in end.value.code and "interrupted" in end.value.code
