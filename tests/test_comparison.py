"""Tests of `CGM_Lora.py --compare`: what each method computes, how methods are scored, and what is written."""

from math import sqrt

import numpy as np
import pandas as pd
import pytest
import torch
from mixture_models import assert_close, logits, randomise_gates
from peft import PeftModel
from PIL import Image
from pipeline import Workspace, hashes
from safetensors.torch import load_file

from common import models
from common.comparison import methods as comparison
from common.comparison import score
from common.comparison.methods import MERGES, earlier_formulation, headless, merge
from common.comparison.mixture import build
from common.comparison.score import EARLIER, JOINT, MIXTURE, ORACLE, Comparison, mixed_test
from common.data.tensors import ImageSet
from common.errors import UserError
from common.training.evaluate import evaluate

KEYS = ["fire", "game"]
TRAINED = [MIXTURE, "mixture, top 1", JOINT, f"{EARLIER}, mixed batches", f"{EARLIER}, pure batches"]
UNTRAINED = ["fire expert alone", "game expert alone", ORACLE, "uniform mixing", *(f"peft {kind} merge" for kind in MERGES),
             "peft Arrow routing"]
LAYER = "beit.layers.1.mlp.fc1"


@pytest.fixture(scope="module")
def config(workspace):
    return workspace.config("CGM_Lora")


@pytest.fixture
def mixture(config, tasks):
    """A mixture of the workspace's experts with random gates."""
    return randomise_gates(build(config, tasks)).eval()


@pytest.fixture(scope="module")
def images(tasks):
    """A few images of both tasks, as the model takes them."""
    return {"pixel_values": mixed_test(tasks, 0).batch(torch.arange(6))}


# ---- scores ----


@pytest.fixture
def result(config, tasks):
    """A comparison on the workspace's 16 test images, 8 a task."""
    return Comparison(tasks, config)


def answers(result, right):
    """Probabilities (N, 4) of a method that is right about these images only."""
    labels = result.data.labels.numpy()
    return np.eye(4)[np.where(right, labels, (labels + 1) % 4)]


def row_of(result, method, task="All"):
    table = result.table().set_index(["method", "task"])
    return table.loc[(method, task)]


def test_the_mixed_test_set_is_every_test_image_in_a_random_order(tasks):
    data, again = mixed_test(tasks, 3), mixed_test(tasks, 3)
    assert torch.equal(data.inputs[:], again.inputs[:]) and not torch.equal(data.inputs[:], mixed_test(tasks, 4).inputs[:])
    assert len(data.tasks.unique_consecutive()) > len(tasks)
    for task, own in enumerate(tasks):
        rows = [(row.numpy().tobytes(), int(label)) for row, label in zip(own.test.inputs, own.test.labels, strict=True)]
        found = [(data.inputs[row].numpy().tobytes(), int(data.labels[row])) for row in (data.tasks == task).nonzero()[:, 0]]
        assert sorted(found) == sorted(rows)


def test_mcnemar_is_the_binomial_test_by_hand(result):
    """7 images only the mixture gets right, 1 only the other: twice the chance of at most 1 head in 8 tosses."""
    result.put(MIXTURE, answers(result, np.arange(16) < 11))
    result.put("other", answers(result, (np.arange(16) < 4) | (np.arange(16) == 15)))
    assert row_of(result, "other")["mcnemar_p"] == pytest.approx(2 * (1 + 8) / 2**8)
    assert row_of(result, MIXTURE)["mcnemar_p"] == 1


def test_mcnemar_of_a_task_is_of_its_images(result):
    of_fire = result.data.tasks.numpy() == 0
    result.put(MIXTURE, answers(result, of_fire))
    result.put("other", answers(result, ~of_fire))
    assert row_of(result, "other", "Fire_Risk")["mcnemar_p"] == pytest.approx(2 / 2**8)
    assert row_of(result, "other", "Game")["mcnemar_p"] == pytest.approx(2 / 2**8)
    assert row_of(result, "other")["mcnemar_p"] == 1


@pytest.mark.parametrize("right", [0, 5, 16])
def test_accuracy_over_all_images_with_its_wilson_interval(result, right):
    result.put(MIXTURE, answers(result, np.arange(16) < right))
    row, z, p = row_of(result, MIXTURE), 1.959964, right / 16
    middle, reach = (p + z**2 / 32) / (1 + z**2 / 16), z / (1 + z**2 / 16) * sqrt(p * (1 - p) / 16 + z**2 / 4 / 16**2)
    assert row["accuracy"] == p
    assert [row["accuracy_low"], row["accuracy_high"]] == pytest.approx([middle - reach, middle + reach], abs=1e-6)


def test_the_row_of_all_tasks_is_the_mean_of_the_tasks(result):
    result.put(MIXTURE, answers(result, np.random.default_rng(0).random(16) < 0.6))
    for name in ("accuracy", "macro_f1"):
        each = [row_of(result, MIXTURE, task)[name] for task in ("Fire_Risk", "Game")]
        assert row_of(result, MIXTURE)[name] == pytest.approx(np.mean(each))


def test_mean_and_spread_are_over_seeds_and_the_rest_of_the_first(result):
    for right in (8, 12, 16):
        result.put(MIXTURE, answers(result, np.arange(16) < right), trainable=right, speed=right)
    row = row_of(result, MIXTURE)
    assert row["accuracy"] == 0.5 and row["trainable_parameters"] == row["images_per_second"] == 8
    assert (row["seeds"], row["accuracy_mean"], row["accuracy_spread"]) == (3, 0.75, 0.25)


def test_the_oracle_is_each_image_by_its_own_expert(result):
    singles = [np.random.default_rng(task).random((16, 4)) for task in range(2)]
    for name, probabilities in zip(KEYS, singles, strict=True):
        result.put(name, probabilities)
    result.add_oracle(KEYS)
    expected = [singles[task][image] for image, task in enumerate(result.data.tasks)]
    assert np.array_equal(result.predictions[ORACLE][0], expected)


def test_pure_batches_hold_one_task_and_keep_the_order(result, config, mixture, monkeypatch):
    seen = []
    whole = evaluate(mixture, result.data, config)[0]
    monkeypatch.setattr(score, "evaluate", lambda model, data, *rest: seen.append(data) or evaluate(model, data, *rest))
    result.add("pure", mixture, pure=True)
    assert [data.tasks.unique().tolist() for data in seen] == [[0], [1]]
    assert np.allclose(result.predictions["pure"][0], whole, atol=1e-5)


# ---- the methods ----


def test_a_single_expert_is_the_mixture_with_that_gate(config, tasks, mixture, images):
    for data in tasks:
        with mixture.fixed_gates({data.task.key: 1.0}):
            assert_close(logits(comparison.single_expert(config, data), images), logits(mixture, images))


def test_the_mean_of_peft_cat_is_uniform_mixing(config, tasks, mixture, images):
    """peft's cat merge sums the experts' updates exactly; the mean head is what even gates make of the heads."""
    with headless(config, tasks) as (folders, head), mixture.fixed_gates({"fire": 0.5, "game": 0.5}):
        assert_close(logits(merge("cat", 0.5, folders, head, config, tasks), images), logits(mixture, images))


def test_the_linear_merge_adds_up_a_and_b_apart(config, tasks):
    """Which is how peft documents it; alpha / rank is 2 here."""
    base = models.load_backbone(config.model, tasks[0].classes, 0).get_submodule(LAYER).weight
    adapters = [load_file(models.lora_folder(config, data.task) / "adapter_model.safetensors") for data in tasks]
    down, up = (sum(sqrt(0.5 * 2) * adapter[f"base_model.model.{LAYER}.lora_{part}.weight"] for adapter in adapters) for part in "AB")
    with headless(config, tasks) as (folders, head):
        model = merge("linear", 0.5, folders, head, config, tasks)
    assert_close(model.get_submodule(LAYER).weight, base + up @ down)


def test_a_merge_is_the_better_of_mean_and_sum_on_validation(config, tasks):
    validation = comparison.together([data.validation for data in tasks])
    yielded = dict(comparison.merged(config, tasks))
    assert list(yielded) == [method for method in UNTRAINED if method.startswith("peft")]
    with headless(config, tasks) as (folders, head):
        losses = [evaluate(merge("ties", weight, folders, head, config, tasks), validation, config)[1] for weight in (0.5, 1)]
    assert losses[0] != losses[1]
    assert evaluate(yielded["peft ties merge"], validation, config)[1] == pytest.approx(min(losses))
    assert isinstance(yielded["peft Arrow routing"], PeftModel) and yielded["peft Arrow routing"].active_adapter == "arrow_router"


def test_the_earlier_formulation_averages_gates_over_the_batch_and_mixes_a_and_b_apart(mixture):
    layer, x = mixture.mixture_layers()[LAYER], torch.randn(3, 5, 32)
    mixture.routing.batch = 3
    hidden = torch.relu(x @ layer.gate.hidden.weight.T + layer.gate.hidden.bias).mean(1)
    weights = torch.softmax(hidden @ layer.gate.output.weight.T + layer.gate.output.bias, 1).mean(0)
    down = sum(weight * part for weight, part in zip(weights, layer.lora_A.split(layer.ranks), strict=True))
    up = sum(weight * part for weight, part in zip(weights, layer.lora_B.split(layer.ranks, 1), strict=True))
    expected = layer.base(x) + x @ down.T @ up.T
    earlier = earlier_formulation(mixture, "fire").base_model.get_submodule(LAYER)
    assert_close(earlier(x), expected)


def test_the_earlier_formulation_keeps_one_head(config, tasks, mixture, images):
    """With gates that are sure of the first expert it is that expert, head and all."""
    for layer in mixture.mixture_layers().values():
        layer.gate.output.bias.data[mixture.expert_names.index("fire")] += 100
    expected = logits(comparison.single_expert(config, tasks[0]), images)
    assert_close(logits(earlier_formulation(mixture, "fire"), images), expected)


def test_a_prediction_of_the_earlier_formulation_depends_on_the_batch(mixture, images):
    earlier = earlier_formulation(mixture, "fire")
    alone = torch.cat([logits(earlier, {"pixel_values": image[None]}) for image in images["pixel_values"]])
    assert (logits(earlier, images) - alone).abs().max() > 1e-4


def test_only_gates_are_trained_in_the_earlier_formulation(mixture):
    trainable = {name for name, parameter in earlier_formulation(mixture, "fire").named_parameters() if parameter.requires_grad}
    assert trainable and all(".gate." in name for name in trainable)


def test_the_joint_lora_has_the_total_rank_and_learns_by_the_experts_recipe(config, tasks, monkeypatch):
    fits = []
    monkeypatch.setattr(comparison, "fit", lambda *arguments, **_: fits.append(arguments))
    model = comparison.joint_lora(config, tasks)
    adapter = model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha) == (32, 64)
    _, train, validation, settings, _ = fits[0]
    assert (len(train), len(validation)) == (48, 16)
    assert settings.learning_rate == 2e-3 and (settings.epochs, settings.batch_size, settings.augment) == (2, 8, True)


# ---- the command ----


@pytest.fixture(scope="module")
def compared(workspace, tmp_path_factory):
    """A copy of the workspace in which the comparison was run with two seeds."""
    made = workspace.copy(tmp_path_factory.mktemp("compared") / "root")
    made.run("CGM_Lora", "--compare", "--seeds", "2")
    return made


def table_of(made: Workspace) -> pd.DataFrame:
    return pd.read_csv(made.results / "CGM_Lora" / "CGM_Lora_Comparison.csv")


def test_every_method_has_a_row_for_every_task_and_all(compared):
    table = table_of(compared)
    assert list(table) == ["method", "task", "accuracy", "accuracy_low", "accuracy_high", "macro_f1", "seeds", "accuracy_mean",
                           "accuracy_spread", "mcnemar_p", "trainable_parameters", "images_per_second"]
    rows = list(zip(table["method"], table["task"], strict=True))
    assert rows == [(method, task) for method in (*TRAINED, *UNTRAINED) for task in ("Fire_Risk", "Game", "All")]
    assert (table["images_per_second"] > 0).all()
    assert ((table["accuracy_low"] <= table["accuracy"]) & (table["accuracy"] <= table["accuracy_high"])).all()


def test_what_is_trained_is_trained_with_every_seed(compared):
    table = table_of(compared).set_index("method")
    assert set(table.loc[TRAINED, "seeds"]) == {2} and set(table.loc[UNTRAINED, "seeds"]) == {1}
    assert (table.loc[TRAINED, "trainable_parameters"] > 0).all() and not table.loc[UNTRAINED, "trainable_parameters"].any()


def test_the_compared_mixture_is_the_finished_one(compared):
    table, summary = (frame.set_index(["method", "task"]) for frame in (table_of(compared), compared.summary()))
    for task in ("Fire_Risk", "Game"):
        for name in ("accuracy", "accuracy_low", "accuracy_high", "macro_f1", "trainable_parameters"):
            assert table.loc[(MIXTURE, task), name] == pytest.approx(summary.loc[("CGM_Lora", task), name], abs=1e-6)


def test_the_plot_of_the_comparison_opens(compared):
    with Image.open(compared.results / "CGM_Lora" / "CGM_Lora_Comparison.png") as image:
        assert min(image.size) > 200


def test_a_comparison_adds_two_files_and_changes_no_other(compared, workspace):
    names = {f"CGM_Lora/CGM_Lora_Comparison.{ending}" for ending in ("csv", "png")}
    before, after = hashes(workspace.results), hashes(compared.results)
    assert after.keys() - before.keys() == names
    assert all(after[name] == digest for name, digest in before.items())


def test_a_comparison_goes_with_its_mixture(compared, tmp_path):
    """A mixture made anew has none; made again it is the same but for speed, and the folder counts as finished."""
    again = compared.copy(tmp_path / "root")
    again.run("CGM_Lora", "--overwrite")
    assert not list((again.results / "CGM_Lora").glob("*Comparison*"))
    again.run("CGM_Lora", "--compare", "--seeds", "2")
    assert table_of(again).drop(columns="images_per_second").equals(table_of(compared).drop(columns="images_per_second"))
    before = hashes(again.results)
    again.run("CGM_Lora")
    assert hashes(again.results) == before


def test_tasks_with_different_numbers_of_classes_are_refused_by_flag(config, tasks):
    odd = [tasks[0], type(tasks[1])(**{**vars(tasks[1]), "classes": tasks[1].classes[:3]})]
    with pytest.raises(UserError, match=r"fire 4, game 3.*--fire_classes and --game_classes") as refusal:
        build(config, odd)
    assert "\n" not in str(refusal.value)


def test_speed_is_that_of_the_median_batch_after_the_first(result, config, monkeypatch):
    """Batches of 4: the first takes 9 seconds, the others 1, 2 and 4, so the median is 2."""
    ends = iter([0, 9, 10, 12, 16])
    monkeypatch.setattr(score, "EVALUATION_BATCH", 4)
    monkeypatch.setattr(score.time, "perf_counter", lambda: next(ends))

    def four_batches(model: object, data: ImageSet, settings: object, after_batch: object) -> tuple[np.ndarray, float]:
        for _ in range(4):
            after_batch()
        return np.full((16, 4), 0.25), 0.0

    monkeypatch.setattr(score, "evaluate", four_batches)
    result.add(MIXTURE, None)
    assert result.facts[MIXTURE]["images_per_second"] == pytest.approx(4 / 2)
