"""Tests of flags that make no sense, results made from something else, and what goes wrong on the way: one line, status 2."""

import os
import re
import shutil
from types import SimpleNamespace

import pytest
from pipeline import REPOSITORY, Workspace, files_in, hashes
from refusals import AFTER_DATA, RESULTS_OF, complaint, files_of_at_most

from common.run_all import main as run_all
from ContextGatedMOE import training as gates


@pytest.fixture
def refuse(monkeypatch, capsys, mutable):
    """Run a script; check that it is refused with one line and changes no file; return the line."""

    def refused(script: str, *flags: str) -> str:
        before = hashes(mutable.root)
        line = complaint(monkeypatch, capsys, script, mutable.flags(script, *flags))
        assert hashes(mutable.root) == before
        return line

    return refused


BAD_FLAGS = {
    "Data_Preparation": "--images_per_class x 4 -5 1.5 all",
    "Generate_Base_Model":
        "--epochs 0 x --batch_size 0 2.5 --accumulation_steps 0 --learning_rate -0.001 nan --weight_decay -1 "
        "--warmup_epochs -1 inf --seed -1 99999999999999999999 --precision fp8 --device abacus meta "
        "--model /no/such/folder {tests} --checkpoint_every_steps -1 --augment perhaps",
    "Benchmark": "--device abacus hpu --model /no/such/folder",
    "Finetune": "--layer_decay 0 2 nan --epochs 0",
    "Lora_Finetune": "--lora_rank 0 1.5 --lora_alpha 0",
    "CGM_Lora": "--gate_hidden 0 --top_k -1 0 some --refuse -0.1 nan --batch_size -1",
}


def test_a_bad_flag_is_refused_in_one_line_with_its_value_before_anything_is_done(monkeypatch, capsys, workspace, tmp_path):
    place = workspace.copy(tmp_path / "root", *(name for name in os.listdir(workspace.root) if name != "Results"))
    before = hashes(place.root)
    for script, listed in BAD_FLAGS.items():
        for word in listed.format(tests=REPOSITORY / "tests").split():
            if word.startswith("--"):
                flag = word
                continue
            root = [] if script in AFTER_DATA else ["--root", str(tmp_path / "new")]
            line = complaint(monkeypatch, capsys, script, place.flags(script, *root, flag, word))
            assert flag in line and word in line, line
        assert "--epoch " in complaint(monkeypatch, capsys, script, ["--epoch", "3"])
    assert "--epochs" in complaint(monkeypatch, capsys, "run_all", ["--demo", "--epochs", "3"], run_all)
    assert hashes(place.root) == before and not files_in(tmp_path / "new")


def test_base_models_that_were_exchanged_are_found_out_at_every_step_and_missing_ones_not_missed(refuse, mutable, capsys):
    shutil.rmtree(mutable.results / "CGM_Lora")
    mutable.run("Generate_Base_Model", "--epochs", "1", "--learning_rate", "0.1", "--overwrite")  # fitted, it may be the same one
    line = refuse("CGM_Lora")
    assert "fire_lora_finetune" in line and "another base model" in line
    assert f"python Lora_Finetune.py --demo --root {mutable.root}" in line and "--overwrite" in line
    assert "base.fire = " in refuse("Lora_Finetune")
    mutable.run("Lora_Finetune", "--overwrite", "--epochs", "1")
    mutable.run("CGM_Lora", "--epochs", "1")
    for script, start in (("Lora_Finetune", "Base_Models"), ("CGM_Lora", "Lora_Finetune")):
        shutil.rmtree(mutable.results / start)
        mutable.run(script, "--epochs", "1")
        assert f"{script} is finished already" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_named_with_the_way_out(refuse, mutable):
    for script in ("CGM_Lora", "Lora_Finetune", "Finetune", "Generate_Base_Model"):
        shutil.rmtree(mutable.results / RESULTS_OF[script])
        with pytest.MonkeyPatch.context() as patch:
            if script == "CGM_Lora":  # a softmax regression on features bears any rate
                patch.setattr(gates, "math", SimpleNamespace(isfinite=lambda _: False))
            line = refuse(script, "--learning_rate", "4e9", "--weight_decay", "4e9", "--epochs", "8")
        assert re.search("loss (of the gates )?is", line) and "--learning_rate" in line


def test_a_full_disk_leaves_nothing_half_written(monkeypatch, capsys, mutable, tmp_path):
    """No dataset, and no file of resized images, which safetensors writes, with an error of its own."""
    new = Workspace(tmp_path / "new", mutable.model)
    shutil.rmtree(mutable.results / "Benchmark")
    for path in mutable.root.glob("*_dataset/pixels_*"):
        path.unlink()
    before = hashes(mutable.root)
    with files_of_at_most(20_000):
        complaint(monkeypatch, capsys, "Data_Preparation", new.flags("Data_Preparation"))
        complaint(monkeypatch, capsys, "Benchmark", mutable.flags("Benchmark"))
    assert files_in(new.root) == set() and hashes(mutable.root) == before
