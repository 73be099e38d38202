"""What the mixture is compared with, all on one shuffled test set of every task, the task not told."""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import ArrowConfig, PeftModel, create_arrow_model
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from torch import Tensor, nn

from common import models
from common.checkpoint import Checkpoint
from common.config import MixtureConfig
from common.data import ImageSet, TaskData, together
from common.files import command, read_json
from common.metrics import predictions_table, scores
from common.training import evaluate, fit

MIXTURE, ORACLE, JOINT = "mixture", "oracle (told the task)", "joint LoRA of the total rank"
# Name in peft -> its own options. Half of the entries are kept, the value peft's documentation uses in its examples.
MERGES = {"linear": {}, "ties": {"density": 0.5}, "dare_linear": {"density": 0.5}}


def mixed_test(tasks: list[TaskData], seed: int) -> ImageSet:
    """The test images of all tasks in one seeded random order."""
    data = together([task.test for task in tasks])
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return ImageSet(data.inputs[order], data.labels[order], data.mean, data.std, data.tasks[order])


class Comparison:
    """Collects predictions of many methods on one test set and scores them side by side."""

    def __init__(self, tasks: list[TaskData], config: MixtureConfig):
        self.tasks, self.config = tasks, config
        self.data = mixed_test(tasks, config.seed)
        self.predictions: dict[str, list[np.ndarray]] = {}  # method -> probabilities (N, C), one for each seed
        self.facts: dict[str, dict[str, float]] = {}

    def add(self, method: str, model: nn.Module, trainable: int = 0, data: ImageSet | None = None) -> None:
        """Predict with `model`; with `data`, predict that instead: a reordering of the same images."""
        data = self.data if data is None else data
        started = time.perf_counter()
        probabilities, _ = evaluate(model, data, self.config)
        self.put(method, probabilities, trainable, len(data) / (time.perf_counter() - started))

    def put(self, method: str, probabilities: np.ndarray, trainable: int = 0, speed: float = float("nan")) -> None:
        """Take over the probabilities (N, C) of a method, one more seed of it if there are some already."""
        self.predictions.setdefault(method, []).append(probabilities)
        self.facts.setdefault(method, {"trainable_parameters": trainable, "images_per_second": speed})

    def add_pure(self, method: str, model: nn.Module, trainable: int) -> None:
        """Predict with batches that each hold images of one task only, for a model in which batch mates matter."""
        pure = torch.empty(len(self.data), len(self.tasks[0].classes))
        for task in range(len(self.tasks)):
            rows = (self.data.tasks == task).nonzero()[:, 0]
            part = ImageSet(self.data.inputs[rows], self.data.labels[rows], self.data.mean, self.data.std)
            pure[rows] = torch.from_numpy(evaluate(model, part, self.config)[0])
        self.put(method, pure.numpy(), trainable)

    def add_oracle(self, single: dict[str, str]) -> None:
        """Every image by its own task's expert. single: task key -> method that is this task's expert alone."""
        own = np.stack([self.predictions[single[data.task.key]][0] for data in self.tasks])  # (tasks, N, C)
        self.put(ORACLE, own[self.data.tasks.numpy(), np.arange(len(self.data))])

    def table(self) -> pd.DataFrame:
        """One row per method and task, and one for all tasks together.

        Accuracy, interval, F1 and the exact McNemar test against the mixture are those of the first seed; mean and
        spread (standard deviation) are over seeds. The accuracy over all tasks is the mean of the tasks' accuracies.
        """
        rows = []
        for method, runs in self.predictions.items():
            by_seed = np.array([[self._correct(run)[rows_of].mean() for rows_of in self._rows()] for run in runs])
            for index, data in enumerate(self.tasks):
                rows_of = self._rows()[index]
                table = predictions_table(runs[0][rows_of], self.data.labels[rows_of].numpy(), data.classes)
                rows.append({"method": method, "task": data.task.title, **scores(table), **self._spread(by_seed[:, index]),
                             "mcnemar_p": self._mcnemar(runs[0], rows_of), **self.facts[method]})
            everywhere = np.arange(len(self.data))
            interval = binomtest(int(self._correct(runs[0]).sum()), len(self.data)).proportion_ci(0.95, method="wilson")
            rows.append({
                "method": method, "task": "All", "accuracy": by_seed[0].mean(), "accuracy_low": interval.low,
                "accuracy_high": interval.high, "macro_f1": np.mean([row["macro_f1"] for row in rows[-len(self.tasks):]]),
                **self._spread(by_seed.mean(1)), "mcnemar_p": self._mcnemar(runs[0], everywhere), **self.facts[method],
            })
        return pd.DataFrame(rows)

    def _rows(self) -> list[np.ndarray]:
        return [np.flatnonzero(self.data.tasks.numpy() == task) for task in range(len(self.tasks))]

    def _correct(self, probabilities: np.ndarray) -> np.ndarray:
        return probabilities.argmax(1) == self.data.labels.numpy()

    @staticmethod
    def _spread(accuracies: np.ndarray) -> dict[str, float]:
        spread = accuracies.std(ddof=1) if len(accuracies) > 1 else 0.0
        return {"seeds": len(accuracies), "accuracy_mean": accuracies.mean(), "accuracy_spread": spread}

    def _mcnemar(self, probabilities: np.ndarray, rows: np.ndarray) -> float:
        """Exact two-sided McNemar test: are the images only one of the two gets right split evenly?"""
        ours, theirs = self._correct(self.predictions[MIXTURE][0])[rows], self._correct(probabilities)[rows]
        only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        return binomtest(only_ours, only_ours + only_theirs).pvalue if only_ours + only_theirs else 1.0


# ---- the other ways to use the same adapters ----


def merged(config: MixtureConfig, tasks: list[TaskData]) -> Iterator[tuple[str, nn.Module]]:
    """peft's own combinations of the experts: every merge of MERGES, and Arrow routing.

    peft merges no heads (`modules_to_save`), so the adapters are loaded without theirs and the base gets the mean head.
    """
    with headless(config, tasks) as (folders, head):
        for kind, options in MERGES.items():
            model = PeftModel.from_pretrained(base_with(head, config, tasks), folders[0], adapter_name="0")
            for index, folder in enumerate(folders[1:], start=1):
                model.load_adapter(folder, str(index))
            names, weights = [str(index) for index in range(len(folders))], [1 / len(folders)] * len(folders)
            torch.manual_seed(config.seed)  # DARE drops entries at random
            model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **options)
            model.set_adapter("merged")
            yield f"peft {kind} merge", model
        arrow = create_arrow_model(base_with(head, config, tasks), folders, ArrowConfig(top_k=len(folders), rng_seed=config.seed))
        yield "peft Arrow routing", arrow


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
    recipe = read_json(folder / "config.json", f"run {command('Lora_Finetune', config)} --overwrite")
    kept = ("epochs", "batch_size", "accumulation_steps", "learning_rate", "weight_decay", "warmup_epochs")
    settings = dataclasses.replace(config, **{name: recipe[name] for name in kept})
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
    config: MixtureConfig, tasks: list[TaskData], build: Callable[[MixtureConfig], nn.Module],
    train: Callable[[MixtureConfig, Checkpoint], nn.Module], checkpoint: Callable[[str], Checkpoint],
) -> pd.DataFrame:
    """Evaluate the mixture and everything it is compared with; see `Comparison.table` for the result.

    build, train: make an untrained and a trained mixture; checkpoint: gives the checkpoint of a training by its name. All
    that is trained here is trained `config.seeds` times, with the seeds from `config.seed` on; the experts are those of
    Lora_Finetune.py every time.
    """
    result = Comparison(tasks, config)
    train_sets = together([data.train for data in tasks]), together([data.validation for data in tasks])
    for repetition in range(config.seeds):
        settings = dataclasses.replace(config, seed=config.seed + repetition)
        mixture = train(settings, checkpoint(f"compared_mixture_{settings.seed}"))
        gates = models.trainable_parameters(mixture)
        result.add(MIXTURE, mixture, gates)
        mixture.top_k = 1
        result.add("mixture, top 1", mixture, gates)
        mixture.top_k = None
        joint = joint_lora(settings, tasks, checkpoint(f"compared_joint_{settings.seed}"))
        result.add(JOINT, joint, models.trainable_parameters(joint))
        earlier = earlier_formulation(build(settings), tasks[0].task.key)
        earlier_checkpoint = checkpoint(f"compared_earlier_{settings.seed}")
        fit(earlier, *train_sets, settings, "earlier formulation", checkpoint=earlier_checkpoint)
        result.add("earlier formulation, mixed batches", earlier, models.trainable_parameters(earlier))
        result.add_pure("earlier formulation, pure batches", earlier, models.trainable_parameters(earlier))
    single = {name: f"{name} expert alone" for name in mixture.expert_names}
    for name, method in single.items():
        with mixture.fixed_gates({name: 1.0}):
            result.add(method, mixture)
    result.add_oracle(single)
    with mixture.fixed_gates(dict.fromkeys(single, 1 / len(single))):
        result.add("uniform mixing", mixture)
    for method, model in merged(config, tasks):
        result.add(method, model)
    return result.table()
