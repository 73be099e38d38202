"""The mixture of every task's LoRA expert: build it, add experts, train its gates, open it, and predict."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import BeitForImageClassification

from common import models
from common.cli.flags import MixtureConfig
from common.cli.parser import command
from common.data.tensors import ImageSet, TaskData, together
from common.errors import UserError
from common.files import read_json
from common.provenance import PROVENANCE_FILE, differences
from common.tasks import read_tasks
from common.training import distributed
from common.training.checkpoint import Checkpoint
from common.training.evaluate import device_of, evaluate
from common.training.loop import Fit, fit
from common.training.objective import Objective
from ContextGatedMOE import ContextGatedMOE, MixtureError

WARM_START_IMAGES = 256


def build(config: MixtureConfig, tasks: list[TaskData]) -> ContextGatedMOE:
    """The untrained mixture of every task's LoRA expert on their common backbone."""
    base = load_base(config, tasks)
    for data in tasks:
        models.check_expert(config, data, models.backbone_fingerprint(base))
    torch.manual_seed(config.seed)
    try:
        experts = {data.task.key: models.lora_folder(config, data.task) for data in tasks}
        return ContextGatedMOE.from_adapters(base, experts, config.gate_hidden)
    except MixtureError as error:
        raise UserError(f"{error}; run {command('Lora_Finetune', config)} --overwrite") from error


def grow(config: MixtureConfig, tasks: list[TaskData]) -> ContextGatedMOE:
    """The finished mixture with the experts of --add_expert added, its gates as they were for the others.

    Raises UserError if there is no such mixture, its images or gates are others than now, or an expert cannot be added.
    """
    folder, added = start_folder(config), config.added_experts()
    model = load(folder, config, tasks)
    made_from = read_json(folder / PROVENANCE_FILE, f"run {command('CGM_Lora', config)} --overwrite")
    images = {data.task.key: data.fingerprint for data in tasks if data.task.key not in added}
    now = {"data": images, "gate_hidden": config.gate_hidden}
    for difference in differences({key: made_from.get(key) for key in now}, now):
        raise UserError(f"{folder} was made with {difference}; run {command('CGM_Lora', config)} --overwrite first")
    torch.manual_seed(config.seed)  # layers that only a new expert adapts get new gates
    try:
        for name, adapter in added.items():
            model.add_expert(name, adapter)
    except MixtureError as error:
        raise UserError(f"--add_expert: {error}") from error
    return model


def train(model: ContextGatedMOE, config: MixtureConfig, tasks: list[TaskData], checkpoint: Checkpoint | None = None) -> Fit:
    """Train the gates on the training images of all tasks in random order."""
    images, validation = together([data.train for data in tasks]), together([data.validation for data in tasks])
    own = torch.tensor([model.expert_names.index(data.task.key) for data in tasks])
    device = device_of(config)
    sample = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))[:WARM_START_IMAGES]
    model.to(device).warm_start(own[images.tasks[sample]], images.batch(sample).to(device))
    with model.record_gates() as gates:
        objective = RoutingObjective(own, config.routing_weight, gates)
        return fit(model, images, validation, config, "CGM", objective=objective, checkpoint=checkpoint)


def load(folder: Path, config: MixtureConfig, tasks: list[TaskData]) -> ContextGatedMOE:
    """The trained mixture in `folder`. Raises UserError if it is missing or damaged."""
    try:
        return ContextGatedMOE.from_pretrained(folder, load_base(config, tasks))
    except MixtureError as error:
        raise UserError(f"{error}; run {command('CGM_Lora', config)} --overwrite") from error


def load_base(config: MixtureConfig, tasks: list[TaskData]) -> BeitForImageClassification:
    """The backbone that all experts share. Raises UserError if the tasks have different numbers of classes."""
    counts = {data.task.key: len(data.classes) for data in tasks}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{key} {count}" for key, count in counts.items())
        flags = " and ".join(f"--{key}_classes" for key in counts)
        raise UserError(f"the mixture needs as many classes in every task ({listed}): choose them with {flags} of "
                        f"{command('Data_Preparation', config)} --overwrite, then run the other scripts with --overwrite")
    classes = [" / ".join(names) for names in zip(*(data.classes for data in tasks), strict=True)]
    return models.load_backbone(config.model, classes, config.seed)


def start_folder(config: MixtureConfig) -> Path:
    """Where the mixture is that --add_expert starts from: the one of the tasks whose experts are not among those added."""
    names = [task.key for task in read_tasks(config.root) if task.key not in config.added_experts()]
    return Path(config.root) / "Results" / "CGM_Lora" / "Models" / mixture_name(names)


def mixture_name(experts: list[str]) -> str:
    """What the folder of a mixture of these experts is called."""
    return f"{'_'.join(experts)}_cgm_lora"


class RoutingObjective(Objective):
    """In training, cross-entropy plus `weight` times the mean over gates of -log(gate weight of the image's task's expert).

    own: (tasks,) position of each task's expert. gates: those recorded of the last pass. The known task is used here, in
    training, and nowhere else.
    """

    def __init__(self, own: Tensor, weight: float, gates: dict[str, Tensor]):
        self.own, self.weight, self.gates = own, weight, gates

    def labels(self, data: ImageSet) -> Tensor:
        """Class and expert of every image (N, 2)."""
        return torch.stack([data.labels, self.own.to(data.tasks.device)[data.tasks]], dim=1)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each image (B,)."""
        losses = super().losses(logits, labels[:, 0])
        if not logits.requires_grad:
            return losses
        weights = torch.stack(list(self.gates.values()))  # (layers, B, E)
        expert = labels[:, 1].expand(len(weights), -1)[..., None]  # (layers, B, 1)
        return losses - self.weight * weights.gather(2, expert).clamp_min(1e-6).log().mean(0)[:, 0]

    def correct(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Which images are right (B,)."""
        return super().correct(scores, labels[:, 0])


def predict(model: ContextGatedMOE, data: ImageSet, config: MixtureConfig) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Probabilities (N, C), mean gate weight by image (N, E), and mean gate weight by layer (columns Layer, experts)."""
    recorded: list[Tensor] = []
    with model.record_gates() as gates:
        probabilities, _ = evaluate(
            model, data, config, after_batch=lambda: recorded.append(torch.stack(list(gates.values()), dim=1))
        )
    weights = distributed.gathered(torch.cat(recorded), len(data)).transpose(0, 1).cpu()  # (layers, N, E)
    by_layer = pd.DataFrame(weights.mean(1).numpy(), columns=model.expert_names)
    by_layer.insert(0, "Layer", list(gates))
    return probabilities, weights.mean(0).numpy(), by_layer
