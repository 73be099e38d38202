"""Tests of the routing suite: its tasks are what it says, the same for a seed, and its experts are kept while they fit."""

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel

from common import models
from common.cli.flags import DEMO_BACKBONE
from tests.bench.__main__ import main
from tests.bench.measure import Settings
from tests.bench.routing import FACTS, member
from tests.bench.routing_tasks import RECIPES, make


def test_images_are_different_pictures_of_every_class_the_same_for_a_seed():
    for name, recipe in RECIPES.items():
        task = make(name, 1, 2)
        assert task.classes == list(recipe.classes)
        assert task.labels.tolist() == np.repeat(np.arange(len(task.classes)), 2).tolist()
        assert task.images.shape == (2 * len(task.classes), 3, 64, 64) and task.images.dtype == np.uint8
        assert len(np.unique(task.images.reshape(len(task.images), -1), axis=0)) == len(task.images), name
        assert (task.images.std(axis=(1, 2, 3)) > 2).all(), f"{name} has a picture of nothing"
    assert np.array_equal(make(name, 1, 2).images, task.images) and not np.array_equal(make(name, 2, 2).images, task.images)


def test_an_expert_is_a_peft_adapter_of_its_accuracy_and_kept_while_it_fits_its_images(tmp_path, monkeypatch):
    settings, images = Settings(torch.device("cpu"), 1, True, tmp_path), make("weaves", 1, 20)
    monkeypatch.setattr("tests.bench.routing.make", lambda *_: images)
    first = member("weaves", settings, 1, tmp_path)
    model = PeftModel.from_pretrained(models.load_backbone(str(DEMO_BACKBONE), first.classes, 0), first.adapter).eval()
    for part, accuracy in ((first.validation, first.validation_accuracy), (first.test, first.accuracy)):
        with torch.no_grad():
            answers = model(part.batch(torch.arange(len(part)))).logits.argmax(1)
        assert (answers == part.labels).float().mean().item() == pytest.approx(accuracy)

    written = (first.adapter / FACTS).stat().st_mtime_ns
    again = member("weaves", settings, 1, tmp_path)
    assert (first.adapter / FACTS).stat().st_mtime_ns == written
    assert (again.accuracy, again.base_accuracy, again.seconds) == (first.accuracy, first.base_accuracy, first.seconds)
    images = make("weaves", 2, 8)
    member("weaves", settings, 1, tmp_path)
    assert (first.adapter / FACTS).stat().st_mtime_ns != written


def test_the_benchmarks_write_a_row_for_each_expert_and_for_each_mixture(tmp_path, monkeypatch):
    names = ["counts", "weaves", "grounds"]
    monkeypatch.setattr("tests.bench.routing.RECIPES", {name: RECIPES[name] for name in names})
    main(["--quick", "--device", "cpu", "--output", str(tmp_path), "routing_experts", "routing", "--seeds", "2"])
    table = pd.read_csv(tmp_path / "routing_experts.csv")
    assert list(table["seed"]) == [2, 2, 2] and list(table["task"]) == names
    assert table["expert"].between(0, 1).all() and (table["images"] == 5 * table["classes"]).all()
    table = pd.read_csv(tmp_path / "routing.csv", keep_default_na=False)
    assert list(table["experts"]) == [2, 3, 2] and list(table["left_out"]) == ["", "", "counts"]
    assert list(table["classes"]) == [5, 10, 8]
    for larger in ("joint_3", "told", "right_task"):
        assert (table["joint_1"] <= table[larger]).all()
    assert all(0 <= float(value) <= 1 for value in table["auroc"] if value) and (table["auroc"] != "").sum() == 1
