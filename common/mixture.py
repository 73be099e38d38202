"""The product's core, the mixture of every task's LoRA expert: build it, fit its gates, add experts, open it, ask it."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common import models
from common.cli.flags import MixtureConfig
from common.cli.parser import command
from common.data.tensors import ImageSet, TaskData, together
from common.errors import UserError
from common.files import read_json
from common.models import lora
from common.provenance import PROVENANCE_FILE, differences
from common.results.metrics import JointPredictions
from common.tasks import read_tasks
from common.training import distributed
from common.training.distributed import device_of
from common.training.evaluate import EVALUATION_BATCH, evaluate
from common.training.loop import Fit
from common.training.memory import in_batches, with_smaller_batches
from common.training.objective import JointObjective
from ContextGatedMOE import ContextGatedMOE, MixtureError

# All experts of 16 take 1.4 times as long as one expert, of 64 three times (measured at BEiT-base's size); one of any number
# takes hardly longer than one expert, and is about as accurate.
MOST_AT_ONCE = 16


def build(config: MixtureConfig, tasks: list[TaskData]) -> ContextGatedMOE:
    """The mixture of every task's LoRA expert on their common backbone, its gates not fitted yet; with --quick, of experts that
    have no adapters."""
    base = load_base(config, tasks)
    if not config.quick:
        for data in tasks:
            models.check_expert(config, data, models.backbone_fingerprint(base))
    experts = {data.task.key: None if config.quick else models.lora_folder(config, data.task) for data in tasks}
    classes = {data.task.key: data.classes for data in tasks}
    try:
        model = ContextGatedMOE.from_adapters(base, experts, classes, gate_hidden=config.gate_hidden, passes=config.passes)
    except MixtureError as error:
        raise UserError(f"{error}; run {command('Lora_Finetune', config)} --overwrite") from error
    model.top_k = experts_at_once(config, len(tasks))
    return model.eval()


def experts_at_once(config: MixtureConfig, experts: int) -> int | None:
    """How many experts an image uses; None for all."""
    if config.top_k == "auto":
        return None if experts <= MOST_AT_ONCE else 1
    return None if config.top_k == "all" else int(config.top_k)


def starts(config: MixtureConfig, tasks: list[TaskData]) -> dict[str, dict[str, str | None]]:
    """Fingerprints of what a mixture is made from: the experts and, with --add_expert, the mixture it starts from."""
    adapters = {} if config.quick else {data.task.key: models.lora_folder(config, data.task) for data in tasks}
    adapters |= {name: folder for name, folder in config.added_experts().items() if folder is not None}
    found = {"experts": {name: models.fingerprint(adapter) for name, adapter in adapters.items()}}
    return found | ({"start": {"mixture": models.fingerprint(start_folder(config))}} if config.add_expert else {})


def fit_gates(model: ContextGatedMOE, config: MixtureConfig, tasks: list[TaskData]) -> Fit:
    """Fit the gates in closed form and train them on; that start is epoch 0 of the training and may be the chosen one.

    With --add_expert the gates follow from the statistics that the mixture holds, and nothing is trained.
    """
    started = time.perf_counter()
    model.to(device_of(config))
    try:
        rows = [] if config.add_expert else with_smaller_batches(EVALUATION_BATCH, lambda size: model.fit_gates(
            {data.task.key: Batches(data.train, size) for data in tasks},
            {data.task.key: Batches(data.validation, size) for data in tasks},
            epochs=config.epochs, learning_rate=config.learning_rate))
    except MixtureError as error:
        raise UserError(f"{error} (--learning_rate is {config.learning_rate})") from error
    history = pd.DataFrame(rows or [_as_it_is(model, config, tasks)])
    history["chosen"] = (history.index == history["validation_loss"].idxmin()).astype(int)
    if config.refuse:
        model.refuse_below = least_familiar(model, config, tasks)
    images = sum(len(data.train) for data in tasks)
    return Fit(history, time.perf_counter() - started, images * (1 + config.epochs))


def _as_it_is(model: ContextGatedMOE, config: MixtureConfig, tasks: list[TaskData]) -> dict[str, float]:
    """The row of a history that tells of a model without training."""
    objective, row = JointObjective(torch.tensor([model.columns[data.task.key][0] for data in tasks])), {"epoch": 0}
    for split in ("training", "validation"):
        images = together([data.train if split == "training" else data.validation for data in tasks])
        probabilities, row[f"{split}_loss"] = evaluate(model, images, config, objective)
        right = objective.correct(torch.from_numpy(probabilities), objective.labels(images).cpu())
        weights = objective.weights(images).cpu()
        row[f"{split}_accuracy"] = ((right * weights).sum() / weights.sum()).item()
    return row


def least_familiar(model: ContextGatedMOE, config: MixtureConfig, tasks: list[TaskData]) -> float:
    """The familiarity that a share of `config.refuse` of the validation images stays below, tasks weighing alike."""
    parts = [predict(model, data.validation, config)[0].familiarity for data in tasks]
    values, weights = np.concatenate(parts), np.concatenate([np.full(len(part), 1 / len(part)) for part in parts])
    order = values.argsort()
    reached = weights[order].cumsum() / weights.sum()
    return float(values[order][np.searchsorted(reached, config.refuse)])


class Batches:
    """The batches of a split as the mixture takes them, as often as they are asked for."""

    def __init__(self, data: ImageSet, size: int):
        self.data, self.size = data, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.arange(len(self.data)).split(self.size):
            yield self.data.batch(rows), self.data.labels[rows]


def grow(config: MixtureConfig, tasks: list[TaskData]) -> ContextGatedMOE:
    """The finished mixture with the experts of --add_expert added, each by the training images of the task of its name alone.

    Raises UserError if there is no such mixture or no such task, its images or gates are others than now, or an expert cannot
    be added.
    """
    folder, added, by_key = start_folder(config), config.added_experts(), {data.task.key: data for data in tasks}
    for name in added:
        if name not in by_key:
            raise UserError(f"--add_expert {name}: there is no task {name}, whose images the gates need; prepare them with "
                            f"{command('Data_Preparation', config)} --task {name}=SOURCE")
    model = load(folder, config, tasks)
    made_from = read_json(folder / PROVENANCE_FILE, f"run {command('CGM_Lora', config)} --overwrite")
    images = {key: data.fingerprint for key, data in by_key.items() if key not in added}
    now = {"data": images, "gate_hidden": config.gate_hidden}
    for difference in differences({key: made_from.get(key) for key in now}, now):
        raise UserError(f"{folder} was made with {difference}; run {command('CGM_Lora', config)} --overwrite first")
    model.to(device_of(config))
    try:
        for name, adapter in added.items():
            data = by_key[name]
            expert = None if adapter is None else lora.expert_of(
                name, lora.adopt(config, data, lora.read_adapter(name, str(adapter), "--add_expert")))
            with_smaller_batches(EVALUATION_BATCH, lambda size, name=name, expert=expert, data=data: model.add_expert(
                name, expert, classes=data.classes, images=Batches(data.train, size)))
    except MixtureError as error:
        raise UserError(f"--add_expert: {error}") from error
    model.top_k = experts_at_once(config, len(model.expert_names))
    return model


def load(folder: Path, config: MixtureConfig, tasks: list[TaskData]) -> ContextGatedMOE:
    """The finished mixture in `folder`. Raises UserError if it is missing or damaged."""
    try:
        return ContextGatedMOE.from_pretrained(folder, load_base(config, tasks))
    except MixtureError as error:
        raise UserError(f"{error}; run {command('CGM_Lora', config)} --overwrite") from error


def load_base(config: MixtureConfig, tasks: list[TaskData]) -> PreTrainedModel:
    """The backbone that all experts share. Its head is of no use: the experts bring theirs."""
    return models.load_backbone(config.model, tasks[0].classes, config.seed)


def start_folder(config: MixtureConfig) -> Path:
    """Where the mixture is that --add_expert starts from: the one of the tasks whose experts are not among those added."""
    names = [task.key for task in read_tasks(config.root) if task.key not in config.added_experts()]
    return models.mixture_folder(config.root, names)


@torch.no_grad()
def predict(model: ContextGatedMOE, data: ImageSet, config: MixtureConfig) -> tuple[JointPredictions, pd.DataFrame]:
    """What the mixture says of images, in order, and the mean weight of every expert by layer (columns Layer, experts)."""
    device = device_of(config)
    model.to(device).eval()
    own, _ = distributed.share(len(data))
    layers: list[str] = []
    logits, gates, familiarity = [], [], []
    for _, said in in_batches(own, EVALUATION_BATCH, lambda rows: model.predict(data.batch(rows).to(device))):
        layers = list(said.gates)
        logits.append(said.logits)
        gates.append(torch.stack(list(said.gates.values()), dim=1))  # (B, layers, E)
        familiarity.append(said.familiarity)
    logits, gates, familiarity = (
        distributed.gathered(torch.cat(parts), len(data)).cpu() for parts in (logits, gates, familiarity)
    )
    by_layer = pd.DataFrame(gates.mean(0).numpy(), columns=model.expert_names)
    by_layer.insert(0, "Layer", layers)
    by_image = dict(zip(model.expert_names, gates.mean(1).T.numpy(), strict=True))
    refused = None if model.refuse_below is None else (familiarity < model.refuse_below).numpy()
    return JointPredictions(logits.exp().numpy(), model.labels, by_image, familiarity.numpy(), refused), by_layer

