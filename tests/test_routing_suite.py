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
    for name in RECIPES:
        task = make(name, 1, 2)
        classes = RECIPES[name].classes
        assert task.classes == list(classes) and task.labels.tolist() == np.repeat(np.arange(len(classes)), 2).tolist()
        assert task.images.shape == (2 * len(classes), 3, 64, 64) and task.images.dtype == np.uint8
        assert len(np.unique(task.images.reshape(len(task.images), -1), axis=0)) == len(task.images), name
        assert (task.images.std(axis=(1, 2, 3)) > 2).all(), f"{name} has a picture of nothing"
    for name in list(RECIPES)[:3]:
        assert np.array_equal(make(name, 1, 2).images, make(name, 1, 2).images), name
        assert not np.array_equal(make(name, 2, 2).images, make(name, 1, 2).images), name


def test_an_expert_is_a_peft_adapter_of_its_accuracy_and_kept_while_it_fits_its_images(tmp_path, monkeypatch):
    settings = Settings(torch.device("cpu"), 1, True, tmp_path)
    images, others = make("weaves", 1, 40), make("weaves", 2, 8)  # enough for an accuracy that is that of no other model
    monkeypatch.setattr("tests.bench.routing.make", lambda *_: images)
    first = member("weaves", settings, 1, tmp_path)
    model = PeftModel.from_pretrained(models.load_backbone(str(DEMO_BACKBONE), first.classes, 0), first.adapter).eval()
    for part, accuracy in ((first.validation, first.validation_accuracy), (first.test, first.accuracy)):
        with torch.no_grad():
            answers = model(part.batch(torch.arange(len(part)))).logits.argmax(1)
        assert (answers == part.labels).float().mean().item() == pytest.approx(accuracy)

    written = {path.name: path.stat().st_mtime_ns for path in first.adapter.iterdir()}
    again = member("weaves", settings, 1, tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in again.adapter.iterdir()} == written
    assert (again.accuracy, again.base_accuracy, again.seconds) == (first.accuracy, first.base_accuracy, first.seconds)

    monkeypatch.setattr("tests.bench.routing.make", lambda *_: others)
    member("weaves", settings, 1, tmp_path)
    assert (first.adapter / FACTS).stat().st_mtime_ns != written[FACTS]


def test_the_benchmarks_write_a_row_for_each_expert_and_for_each_mixture(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.bench.routing.RECIPES", {name: RECIPES[name] for name in ("counts", "weaves", "grounds")})
    main(["--quick", "--device", "cpu", "--output", str(tmp_path), "routing_experts", "routing", "--seeds", "2"])
    table = pd.read_csv(tmp_path / "routing_experts.csv")
    assert list(zip(table["seed"], table["task"], strict=True)) == [
        (2, name) for name in ("counts", "weaves", "grounds")]
    assert table["expert"].between(0, 1).all() and (table["images"] == 5 * table["classes"]).all()
    assert (tmp_path / "routing_experts" / "2" / "weaves" / "adapter_model.safetensors").exists()
    table = pd.read_csv(tmp_path / "routing.csv", keep_default_na=False)
    assert list(table["experts"]) == [2, 3, 2] and list(table["left_out"]) == ["", "", "counts"]
    assert list(table["classes"]) == [5, 10, 8]
    assert (table["joint_1"] <= table["joint_3"]).all() and (table["joint_1"] <= table["told"]).all()
    assert (table["joint_1"] <= table["right_task"]).all()
    assert all(0 <= float(value) <= 1 for value in table["auroc"] if value) and (table["auroc"] != "").sum() == 1
