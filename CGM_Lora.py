"""Step 6: one context-gated mixture over all LoRA experts; only its gates are trained, and it is never told the task.

--compare puts it beside single experts, merges, Arrow routing and joint training, in CGM_Lora_Comparison.csv and .png.
--add_expert NAME=FOLDER starts from the finished mixture, adds the peft LoRA adapter in FOLDER as one more expert and trains
the gates again, on the images of all tasks; the results are in Results/CGM_Lora_NAME, the mixture it started from stays.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import BeitForImageClassification, BeitImageProcessorPil

from common import models
from common.cli.flags import MixtureConfig
from common.cli.run import run
from common.comparison import methods as comparison
from common.data.tensors import ImageSet, TaskData, load_task, together
from common.errors import UserError
from common.files import read_json, remove
from common.provenance import PROVENANCE_FILE, command, differences
from common.results import plotting
from common.results.folder import Results
from common.tasks import read_tasks
from common.training import distributed
from common.training.checkpoint import Checkpoint
from common.training.evaluate import device_of, evaluate
from common.training.loop import Fit, fit
from common.training.objective import Objective
from ContextGatedMOE import ContextGatedMOE, MixtureError

COMPARISON = "CGM_Lora_Comparison"
WARM_START_IMAGES = 256


def main(config: MixtureConfig) -> None:
    """Train the gates on all tasks together, evaluate on each, and write the one model."""
    added = config.added_experts()
    with Results(config, "_".join(["CGM_Lora", *added]), "CGM_Lora") as results:
        processor = models.load_processor(config.model)
        tasks = [load_task(task, config, processor) for task in read_tasks(config.root)]
        adapters = {data.task.key: models.lora_folder(config, data.task) for data in tasks} | added
        folder = results.folder / "Models" / mixture_name(list(adapters))
        starts = {"experts": {name: models.fingerprint(adapter) for name, adapter in adapters.items()}}
        if added:
            starts["start"] = {"mixture": models.fingerprint(start_folder(config))}
        if not results.finished(tasks, **starts):
            make(config, tasks, results, processor, folder)
        if config.compare:
            table = comparison.compare(config, tasks, load(folder, config, tasks), build, train, results.checkpoint)
            results.write_table(f"{COMPARISON}.csv", table)
            plotting.comparison(results.folder / f"{COMPARISON}.png", table, results.title("One model for all tasks"))
            shown = table[["method", "task", "accuracy_mean", "accuracy_spread", "mcnemar_p"]]
            print(shown.to_string(index=False, float_format="{:.3g}".format))


def make(config: MixtureConfig, tasks: list[TaskData], results: Results, processor: BeitImageProcessorPil,
         folder: Path) -> None:
    """Train the mixture and write it into `folder`, and its predictions and routing beside that."""
    model = grow(config, tasks) if config.add_expert else build(config, tasks)
    fitted = train(model, config, tasks, results.checkpoint(folder.name))
    rows, routes = [], []
    for data in tasks:
        probabilities, by_image, by_layer = predict(model, data.test, config)
        rows.append(results.write_test(
            data, probabilities, f"CGM_Lora_{data.task.title}", "Context-gated mixture", fitted,
            models.trainable_parameters(model), gates=dict(zip(model.expert_names, by_image.T, strict=True)),
        ))
        by_layer.insert(0, "Task", data.task.name)
        routes.append(by_layer)
    results.write_history(fitted.history, "CGM_Lora", "Context-gated mixture, all tasks")
    routing = pd.concat(routes)
    results.write_table("CGM_Lora_Routing.csv", routing)
    plotting.routing(results.folder / "CGM_Lora_Routing.png", routing, results.title("Routing of the mixture"))
    classes = {data.task.key: data.classes for data in tasks}
    models.save(folder, model, processor, {**results.made_from, "classes": classes})
    for ending in (".csv", ".png"):
        remove(results.folder / f"{COMPARISON}{ending}")  # one from before was of another mixture
    results.finish(rows)


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


if __name__ == "__main__":
    run(main, MixtureConfig)
