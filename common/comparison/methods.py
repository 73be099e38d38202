"""What the mixture is compared with, all on one shuffled test set of every task, the task not told."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import ArrowConfig, PeftModel, create_arrow_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import models
from common.cli.flags import MixtureConfig, TrainingFlags
from common.cli.parser import command
from common.comparison.score import EARLIER, JOINT, MIXTURE, Comparison
from common.data.tensors import TaskData, together
from common.files import read_json
from common.training.checkpoint import Checkpoint
from common.training.evaluate import evaluate
from common.training.loop import fit

# Name in peft -> its own options. Half of the entries are kept, the value peft's documentation uses in its examples.
HALF = {"density": 0.5}
MERGES = {"linear": {}, "cat": {}, "ties": HALF, "dare_linear": HALF, "dare_ties": HALF}








# ---- the other ways to use the same adapters ----


def single_expert(config: MixtureConfig, data: TaskData) -> nn.Module:
    """The model of one task's LoRA expert, its update merged into the weights."""
    base = models.load_backbone(config.model, data.classes, config.seed)
    return PeftModel.from_pretrained(base, models.lora_folder(config, data.task)).merge_and_unload()


def merged(config: MixtureConfig, tasks: list[TaskData]) -> Iterator[tuple[str, nn.Module]]:
    """peft's own combinations of the experts: every merge of MERGES, and Arrow routing.

    A merge weighs the experts 1 / E each, their mean, or 1 each, their sum: whichever has the lower loss on the validation
    images. peft merges no heads (`modules_to_save`), so the adapters are loaded without theirs and the base gets the mean
    head.
    """
    validation = together([data.validation for data in tasks])
    with headless(config, tasks) as (folders, head):
        for kind in MERGES:
            candidates = [merge(kind, weight, folders, head, config, tasks) for weight in (1 / len(folders), 1.0)]
            losses = [evaluate(model, validation, config)[1] for model in candidates]
            yield f"peft {kind} merge", candidates[int(np.argmin(losses))]
        arrow = ArrowConfig(top_k=min(len(folders), ArrowConfig.top_k), rng_seed=config.seed)
        yield "peft Arrow routing", create_arrow_model(base_with(head, config, tasks), folders, arrow)


def merge(kind: str, weight: float, folders: list[str], head: dict[str, Tensor], config: MixtureConfig,
          tasks: list[TaskData]) -> nn.Module:
    """The backbone with one merge of the adapters in `folders`, each weighed alike, in its weights."""
    model = PeftModel.from_pretrained(base_with(head, config, tasks), folders[0], adapter_name="0")
    for index, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, str(index))
    names = [str(index) for index in range(len(folders))]
    torch.manual_seed(config.seed)  # DARE drops entries at random
    model.add_weighted_adapter(names, [weight] * len(names), "merged", combination_type=kind, **MERGES[kind])
    return model.merge_and_unload(adapter_names=["merged"])


@contextmanager
def headless(config: MixtureConfig, tasks: list[TaskData]) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """Copies of the experts' adapters without heads, and the mean head {weight (C, D), bias (C,)}."""
    with tempfile.TemporaryDirectory() as top:
        folders, heads = [], []
        for data in tasks:
            source, target = models.lora_folder(config, data.task), Path(top) / data.task.key
            target.mkdir()
            tensors = load_file(source / "adapter_model.safetensors")
            heads.append({key.rpartition(".")[2]: value for key, value in tensors.items() if f".{models.HEAD}." in key})
            save_file({key: value for key, value in tensors.items() if f".{models.HEAD}." not in key},
                      target / "adapter_model.safetensors")
            settings = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
            (target / "adapter_config.json").write_text(json.dumps(settings | {"modules_to_save": None}), encoding="utf-8")
            folders.append(str(target))
        yield folders, {key: torch.stack([head[key] for head in heads]).mean(0) for key in heads[0]}


def base_with(head: dict[str, Tensor], config: MixtureConfig, tasks: list[TaskData]) -> nn.Module:
    """The pretrained backbone with this head."""
    base = models.load_backbone(config.model, tasks[0].classes, config.seed)
    base.classifier.load_state_dict(head)
    return base


def joint_lora(config: MixtureConfig, tasks: list[TaskData], checkpoint: Checkpoint | None = None) -> nn.Module:
    """One LoRA of the experts' total rank with one head, trained on all tasks together by the experts' recipe."""
    folder = Path(config.root) / "Results" / "Lora_Finetune"
    recipe = read_json(folder / "config.json", f"run {command('Lora_Finetune', config)} --overwrite",
                       {"lora_rank": int, "lora_alpha": int})
    kept = {field.name: recipe[field.name] for field in dataclasses.fields(TrainingFlags) if field.name in recipe}
    settings = dataclasses.replace(config, **kept)
    base = models.load_backbone(config.model, tasks[0].classes, config.seed)
    model = models.add_lora(base, recipe["lora_rank"] * len(tasks), recipe["lora_alpha"] * len(tasks), config.seed)
    train, validation = together([data.train for data in tasks]), together([data.validation for data in tasks])
    fit(model, train, validation, settings, JOINT, checkpoint=checkpoint)
    return model


class BatchAveragedLinear(nn.Module):
    """A layer of the mixture in the formulation found in earlier implementations.

    The gate weights are averaged over the batch, and A and B are mixed apart: y = W x + b + (sum_e g_e B_e)(sum_e g_e
    A_e) x. A prediction then depends on its batch mates, and products B_i A_j of different experts appear.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.base, self.gate, self.routing = layer.base, layer.gate, layer.routing
        self.down = nn.Parameter(torch.stack(layer.lora_A.split(layer.ranks)), requires_grad=False)  # (E, r, d_in)
        self.up = nn.Parameter(torch.stack(layer.lora_B.split(layer.ranks, dim=1)), requires_grad=False)  # (E, d_out, r)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, d_in). Returns (B, T, d_out)."""
        weights = self.gate(self.routing.per_image(x), self.routing).mean(0)  # (E,)
        down, up = (torch.tensordot(weights.to(x.dtype), stack.to(x.dtype), 1) for stack in (self.down, self.up))
        return self.base(x) + x @ down.T @ up.T


def earlier_formulation(mixture: nn.Module, head: str) -> nn.Module:
    """Turn an untrained mixture, in place, into the earlier formulation; it keeps the head of the expert `head` only."""
    first = mixture.expert_names.index(head)
    for name, layer in mixture.mixture_layers().items():
        if hasattr(layer, "lora_A"):
            mixture.base_model.set_submodule(name, BatchAveragedLinear(layer))
        else:
            classes, features = layer.expert_weight.shape[1:]
            only = nn.Linear(features, classes).requires_grad_(False)
            only.weight.copy_(layer.expert_weight[first])
            only.bias.copy_(layer.expert_bias[first])
            mixture.base_model.set_submodule(name, only)
    return mixture


def compare(
    config: MixtureConfig, tasks: list[TaskData], mixture: nn.Module, build: Callable[..., nn.Module],
    train: Callable[..., Any], checkpoint: Callable[[str], Checkpoint],
) -> pd.DataFrame:
    """Evaluate the finished mixture and everything it is compared with; see `Comparison.table` for the result.

    build(config, tasks) makes an untrained mixture, train(mixture, config, tasks, checkpoint) trains it, checkpoint(name)
    is that of a training. All that is trained is trained `config.seeds` times, with the seeds from `config.seed` on; the
    experts are those of Lora_Finetune.py every time. Updates that are the same for every image are merged into the
    weights, as whoever used them would.
    """
    result = Comparison(tasks, config)
    train_sets = together([data.train for data in tasks]), together([data.validation for data in tasks])
    for settings in (dataclasses.replace(config, seed=config.seed + number) for number in range(config.seeds)):
        if settings.seed != config.seed:
            mixture = build(settings, tasks)
            train(mixture, settings, tasks, checkpoint(f"compared_mixture_{settings.seed}"))
        gates = models.trainable_parameters(mixture)
        result.add(MIXTURE, mixture, gates)
        mixture.top_k = 1
        result.add("mixture, top 1", mixture, gates)
        mixture.top_k = None
        joint = joint_lora(settings, tasks, checkpoint(f"compared_joint_{settings.seed}"))
        count = models.trainable_parameters(joint)
        result.add(JOINT, joint.merge_and_unload(), count)
        earlier = earlier_formulation(build(settings, tasks), tasks[0].task.key)
        fit(earlier, *train_sets, settings, EARLIER, checkpoint=checkpoint(f"compared_earlier_{settings.seed}"))
        result.add(f"{EARLIER}, mixed batches", earlier, models.trainable_parameters(earlier))
        result.add(f"{EARLIER}, pure batches", earlier, models.trainable_parameters(earlier), pure=True)
    single = [f"{data.task.key} expert alone" for data in tasks]
    for method, data in zip(single, tasks, strict=True):
        result.add(method, single_expert(config, data))
    result.add_oracle(single)
    with mixture.fixed_gates(dict.fromkeys(mixture.expert_names, 1 / len(tasks))):
        result.add("uniform mixing", mixture)
    for method, model in merged(config, tasks):
        result.add(method, model)
    return result.table()
