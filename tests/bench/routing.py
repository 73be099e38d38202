"""The routing suite: an expert for each task, and how well a mixture of them finds the right one."""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from common import models
from common.cli.flags import BaseModelConfig, LoraConfig
from common.cli.parser import parse
from common.data.processing import affine_of
from common.data.splits import random_split
from common.data.tensors import ImageSet
from common.errors import UserError
from common.files import read_json, write_json, writing
from common.models.lora import add_lora
from common.provenance import tensor_fingerprint
from common.training.evaluate import evaluate, features
from common.training.loop import fit
from tests.bench.measure import Settings
from tests.bench.routing_tasks import RECIPES, TaskImages, make

FACTS = "expert.json"  # beside an adapter: what it was made from, and how good it is


@dataclass
class Member:
    """A task of the suite with its expert. adapter: folder of the peft adapter; accuracy: of the expert on the test images,
    told the task; base_accuracy: of the head alone on the frozen backbone's features."""

    name: str
    classes: list[str]
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    adapter: Path
    accuracy: float
    validation_accuracy: float
    base_accuracy: float
    seconds: float


def experts(settings: Settings) -> pd.DataFrame:
    """the tasks of the routing suite and how good their experts are; experts are kept in the output folder."""
    return pd.DataFrame([
        {"seed": seed, "task": member.name, "classes": len(member.classes),
         "images": len(member.train) + len(member.validation) + len(member.test), "base": member.base_accuracy,
         "expert": member.accuracy, "seconds": member.seconds}
        for seed in settings.seeds for member in members(settings, seed)
    ])


def members(settings: Settings, seed: int, names: list[str] | None = None) -> list[Member]:
    """Tasks of the suite, by default all, with their experts: those of an earlier run where they still fit."""
    bar = tqdm(names or list(RECIPES), unit="task", disable=None)
    return [member(name, settings, seed, settings.output / "routing_experts" / str(seed)) for name in bar]


def member(name: str, settings: Settings, seed: int, folder: Path) -> Member:
    """One task with its expert, which is trained by the demo's recipe unless `folder` holds it for the same images.

    The images are made anew: what they are decides whether the expert fits.
    """
    flags = ["--demo", "--seed", str(seed), "--device", str(settings.device), *(["--epochs", "1"] if settings.quick else [])]
    base_config, config = parse(BaseModelConfig, [*flags, "--learning_rate", "2e-4"]), parse(LoraConfig, flags)
    task, processor = make(name, seed, 5 if settings.quick else None), models.load_processor(config.model)
    sets = _split(task, seed, *affine_of(processor))
    model = models.load_backbone(config.model, task.classes, seed)
    tensors = {"images": torch.from_numpy(task.images), "labels": torch.from_numpy(task.labels), **model.state_dict()}
    made_from = f"{tensor_fingerprint(tensors)} {_digest(base_config, config)}"
    adapter = folder / name
    try:
        facts = read_json(adapter / FACTS, "")
    except UserError:  # there is none, or it is damaged
        facts = {}
    if facts.get("made_from") != made_from:
        started = time.perf_counter()
        train, validation, test = (features(model, sets[part], base_config) for part in ("train", "validation", "test"))
        fit(model.classifier, train, validation, base_config, f"base {name}")
        base_accuracy = _accuracy(model.classifier, test, base_config)
        expert = add_lora(model, config.lora_rank, config.lora_alpha, seed)
        fit(expert, sets["train"], sets["validation"], config, f"LoRA {name}")
        facts = {
            "made_from": made_from, "base_accuracy": base_accuracy, "accuracy": _accuracy(expert, sets["test"], config),
            "validation_accuracy": _accuracy(expert, sets["validation"], config), "seconds": time.perf_counter() - started,
        }
        expert.to("cpu")
        with writing(adapter) as part:
            expert.save_pretrained(part)
            write_json(part / FACTS, facts)
    facts.pop("made_from")
    return Member(name, task.classes, **sets, adapter=adapter, **facts)


def _split(task: TaskImages, seed: int, scale: torch.Tensor, offset: torch.Tensor) -> dict[str, ImageSet]:
    """The images of each split. scale, offset: (3,) of the backbone's image processor."""
    images, labels = torch.from_numpy(task.images), torch.from_numpy(task.labels)
    return {name: ImageSet(images[rows], labels[rows], scale, offset) for name, rows in random_split(task.labels, seed).items()}


def _digest(*configs: object) -> str:
    """The start of the SHA-256 of settings."""
    return hashlib.sha256(json.dumps([vars(config) for config in configs], sort_keys=True).encode()).hexdigest()[:12]


def _accuracy(model: torch.nn.Module, data: ImageSet, config: LoraConfig) -> float:
    return float(np.mean(evaluate(model, data, config)[0].argmax(1) == data.labels.numpy()))
