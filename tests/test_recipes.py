"""Tests of what is trained how: heads fitted to the end, and settings that follow from the number of images."""

import pandas as pd
import pytest
import torch.nn.functional as F
from trainings import examples, head, settings

from common.cli.flags import LoraConfig
from common.files import read_json
from common.training.head import fit_head


def test_a_fitted_head_is_where_the_penalised_loss_is_flat_and_weaker_penalties_fit_training_images_better():
    train, validation, fitted = examples(60), examples(40, seed=1), head()
    history = fit_head(fitted, train, validation, settings(epochs=6)).history
    assert list(history["epoch"]) == [1, 2, 3, 4, 5, 6] and history["penalty"].is_monotonic_decreasing
    assert (history["training_loss"].diff().dropna() < 0).all() and history["chosen"].idxmax() == history["validation_loss"].idxmin()
    chosen = history[history["chosen"] == 1].iloc[0]
    centre, scale = train.inputs.mean(0), train.inputs.std(0, correction=0)
    weight = (fitted.weight * scale).detach().requires_grad_()
    bias = (fitted.bias + fitted.weight @ centre).detach().requires_grad_()
    loss = F.cross_entropy(F.linear((train.inputs - centre) / scale, weight, bias), train.labels)
    assert loss.item() == pytest.approx(chosen["training_loss"], abs=1e-5)
    (loss + chosen["penalty"] / 2 * weight.square().sum()).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-4


def test_settings_follow_from_the_number_of_images_unless_they_are_given():
    def recipe(count, **given):
        config = LoraConfig(**given).for_images(count)
        return config.epochs, config.accumulation_steps, config.augment

    assert recipe(2400) == recipe(70_000) == (25, 4, False)  # the documented experiment
    assert recipe(300) == recipe(1200) == (8, 1, True)
    assert 10 < recipe(1800)[0] < 25 and recipe(1800)[1:] == (2, True)
    assert recipe(300, epochs=3, accumulation_steps=2, augment=False) == (3, 2, False)
    assert LoraConfig().epochs is None


def test_the_recipe_of_each_task_is_in_config_json(workspace, tasks):
    for method, script in (("Finetune", "Finetune"), ("Lora_Finetune", "Lora_Finetune"), ("Base_Models", "Generate_Base_Model")):
        recipe = read_json(workspace.results / method / "config.json", "")["recipe"]
        for data in tasks:
            config = workspace.config(script).for_images(len(data.train))
            assert recipe[data.task.key] == {name: getattr(config, name) for name in ("epochs", "accumulation_steps", "augment")}
        assert len(recipe) == len(tasks)
    assert "recipe" not in read_json(workspace.results / "Benchmark" / "config.json", "")


def test_with_a_learning_rate_base_heads_are_trained(workspace, tmp_path):
    place = workspace.copy(tmp_path / "root", "fire_dataset", "game_dataset", "tasks.json")
    place.run("Generate_Base_Model", "--learning_rate", "0.01")
    history = pd.read_csv(place.results / "Base_Models" / "fire_base_History.csv")
    assert "penalty" not in history and list(history["epoch"]) == [1, 2] and history["training_loss"].is_monotonic_decreasing
