"""Tests of the command `CGM_Lora.py --compare`: its table, what it adds to the results, and when it is made anew."""


import pandas as pd
import pytest
from PIL import Image
from pipeline import Workspace

from common import mixture, models
from common.comparison import compare, ours
from common.comparison.method_comparison import METHODS, ORACLE, MethodComparison
from common.comparison.ours import ANEW, TOP_1
from common.comparison.score import MIXTURE
from common.errors import UserError

TASKS = {"fire": "Fire_Risk", "game": "Game", "third": "third"}
JOINT = "joint LoRA of the total rank"
SEEDED = [method.name for method in METHODS if method.seeded]
ONCE = [MIXTURE, TOP_1, *ANEW, *(method.name for method in METHODS if not method.seeded)]  # the mixture is the same for every seed
TABLE = "CGM_Lora/CGM_Lora_Comparison.csv"


def table_of(place: Workspace, *index: str) -> pd.DataFrame:
    return pd.read_csv(place.results / TABLE).set_index(list(index))


@pytest.fixture(scope="module")
def compared(three):
    """The place of three tasks, in which the comparison was run with two seeds, failed at its end and was run again."""
    return three[0]


def test_every_method_has_a_row_for_every_task_and_all_and_its_number_of_seeds(compared):
    table = table_of(compared, "method")
    rows = set(zip(table.index, table["task"], strict=True))
    assert rows == {(method, task) for method in (*SEEDED, *ONCE) for task in (*TASKS.values(), "All")}
    assert len(table) == len(rows) and (table["images_per_second"] > 0).all()
    assert table["accuracy"].between(table["accuracy_low"], table["accuracy_high"]).all()
    assert (table["accuracy_told_task"] >= table["accuracy"]).all()
    assert (table["right_task"] * table["accuracy_given_right_task"]).fillna(0).sub(table["accuracy"]).abs().max() < 1e-6
    assert set(table.loc[SEEDED, "seeds"]) == {2} and set(table.loc[ONCE, "seeds"]) == {1}
    assert table.loc[ONCE, "accuracy_spread"].isna().all() and table.loc[SEEDED, "accuracy_spread"].notna().all()


def test_the_compared_mixture_is_the_finished_one_and_the_oracle_the_experts(compared):
    table, summary = table_of(compared, "method", "task"), compared.summary().set_index(["method", "task"])
    for task in TASKS.values():
        for name in ("accuracy", "accuracy_low", "accuracy_high", "accuracy_told_task", "right_task", "trainable_parameters"):
            assert table.loc[(MIXTURE, task), name] == pytest.approx(summary.loc[("CGM_Lora", task), name], abs=1e-6)
        expert = pytest.approx(summary.loc[("Lora_Finetune", task), "accuracy"], abs=1e-6)
        assert [table.loc[(ORACLE, task), name] for name in ("accuracy", "accuracy_told_task")] == [expert] * 2


def test_parameters_are_those_that_are_needed(compared):
    folder = models.mixture_folder(str(compared.root), list(TASKS))  # with the gates that pay
    model = mixture.load(folder, compared.config("CGM_Lora"), compared.tasks())
    table, head = table_of(compared, "task").loc["All"].set_index("method"), model.joint_head
    gates = models.trainable_parameters(model)
    base = sum(value.numel() for name, value in model.named_parameters() if ".base." in name or not value.requires_grad)
    lora = sum(value.numel() for name, value in model.named_parameters() if "lora_" in name)
    heads = head.expert_weight.numel() + head.expert_bias.numel()
    backbone = base - lora - heads - sum(value.numel() for value in head.base.parameters())
    read = table.loc["linear discriminant", "trainable_parameters"]
    expected = {MIXTURE: backbone + lora + heads + gates, ORACLE: backbone + lora + heads, JOINT: backbone + heads,
                "linear discriminant": backbone + read, "TIES merge": backbone + heads + read,
                "MASS, subspace router": backbone + lora + heads}
    assert {name: table.loc[name, "total_parameters"] for name in expected} == expected
    assert table.loc[JOINT, "trainable_parameters"] == lora + heads  # as many as all experts have


def test_a_comparison_goes_on_after_the_trainings_that_are_done(three):
    place, printed = three
    # Two joint LoRAs of each seed.
    assert printed.count("trained already") == 4 and ": loss " not in printed
    assert not (place.results / "CGM_Lora" / "Checkpoints").exists()
    with Image.open(place.results / "CGM_Lora" / "CGM_Lora_Comparison.png") as image:
        assert min(image.size) > 600


def test_a_finished_comparison_is_shown_without_work(compared, tmp_path, monkeypatch, capsys):
    again = compared.copy(tmp_path / "root")
    path = again.results / TABLE
    path.with_suffix(".png").unlink()
    monkeypatch.setattr(compare, "MethodComparison", None)
    for _ in range(2):
        capsys.readouterr()
        again.run("CGM_Lora", "--compare", "--seeds", "2")
        shown = capsys.readouterr().out
        assert "finished already" in shown and all(method in shown for method in (*SEEDED, *ONCE)) and " nan" not in shown
    assert path.with_suffix(".png").exists()
    path.write_text("nothing of the kind")
    with pytest.raises(UserError, match="delete it") as told:
        again.run("CGM_Lora", "--compare", "--seeds", "2")
    assert "\n" not in str(told.value)


def test_a_comparison_is_made_anew_for_other_seeds_or_another_mixture(compared, tmp_path, monkeypatch):
    again, asked = compared.copy(tmp_path / "root"), []
    table = pd.read_csv(compared.results / TABLE)
    monkeypatch.setattr(MethodComparison, "run", lambda comparison: asked.append(len(comparison.seeds)) or table)
    again.run("CGM_Lora", "--compare", "--seeds", "3")
    again.run("CGM_Lora", "--overwrite", "--gate_hidden", "3")
    assert not list((again.results / "CGM_Lora").glob("*Comparison*"))
    again.run("CGM_Lora", "--gate_hidden", "3", "--compare")
    assert asked == [3, 1]


def test_what_a_comparison_lacks_is_said_in_one_line_before_the_work(compared, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "mixture", lambda *_: 1 / 0)
    again = compared.copy(tmp_path / "root")
    (again.results / TABLE).unlink()
    (again.results / "Lora_Finetune" / "config.json").unlink()
    with pytest.raises(UserError, match=r"Lora_Finetune\.py") as told:
        again.run("CGM_Lora", "--compare")
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="two tasks or more"):
        compare.compare(again.config("CGM_Lora"), again.tasks()[:1], None, None)
