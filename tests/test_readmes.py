"""Tests of the READMEs: their Python examples run as they stand."""

import re

import numpy as np
from families import save_family
from hub import folder_repo
from peft import LoraConfig, get_peft_model
from PIL import Image
from pipeline import IMAGE_SIZE, REPOSITORY
from transformers import ViTForImageClassification

pytest_plugins = ["warm_process"]

NAME = "google/vit-base-patch16-224"
CLASSES = {"birds": ["jay", "wren"], "cells": ["blood", "nerve", "skin"]}


def example(folder, readme):
    """The one Python example of a README as a script that runs in a folder."""
    code, = re.findall(r"```python\n(.*?)```", (REPOSITORY / readme).read_text(encoding="utf-8"), re.DOTALL)
    path = folder / "example.py"
    path.write_text(f"import os\nos.chdir({str(folder)!r})\n{code}", encoding="utf-8")
    return path


def test_the_example_with_adapters_of_ones_own_runs(warm_process, hub, tmp_path):
    """What it names is there: a tiny model of that name on the Hub, adapters, and photos that differ in colour."""
    save_family("vit", tmp_path / "base")
    hub.repos[NAME] = folder_repo(tmp_path / "base")
    rng = np.random.default_rng(0)
    for task, classes in CLASSES.items():
        base = ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=len(classes), ignore_mismatched_sizes=True)
        adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"]))
        adapted.save_pretrained(tmp_path / f"{task}_lora")
        for label, name in enumerate(classes):
            (tmp_path / "photos" / task / name).mkdir(parents=True)
            for number in range(8):
                pixels = rng.integers(0, 80, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
                pixels[:, :, label] += 100 if task == "birds" else 170
                Image.fromarray(pixels).save(tmp_path / "photos" / task / name / f"{number}.png")
    done = warm_process.run(example(tmp_path, "README.md"))
    assert done.status == 0, done.errors
    assert re.fullmatch(r"birds: (jay|wren) tensor\(\[.*\]\)", done.output.splitlines()[-1])


def test_the_example_from_nothing_of_the_packages_readme_runs(warm_process, tmp_path):
    """And its mixture is right."""
    done = warm_process.run(example(tmp_path, "ContextGatedMOE/README.md"))
    assert done.status == 0, done.errors
    assert int(re.search(r"(\d+) of 60 right", done.output)[1]) >= 55
