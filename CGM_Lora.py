"""Step 6: one context-gated mixture over all LoRA experts; only its gates are trained, and it is never told the task."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import BeitImageProcessorPil

from common import comparison, models, plotting
from common.checkpoint import Checkpoint
from common.config import MixtureConfig, UserError, run
from common.data import ImageSet, TaskData, load_task, together
from common.files import command, write_csv
from common.results import Results
from common.tasks import TASKS
from common.training import Fit, Loss, cross_entropy, evaluate, fit
from ContextGatedMOE import ContextGatedMOE, MixtureError


def main(config: MixtureConfig) -> None:
    """Train the gates on all tasks together, evaluate on each, and write the one model."""
    with Results(config, "CGM_Lora", "CGM_Lora") as results:
        processor = models.load_processor(config.model)
        tasks = [load_task(task, config, processor) for task in TASKS]
        experts = {task.key: models.fingerprint(models.lora_folder(config, task)) for task in TASKS}
        if not results.finished(tasks, experts=experts):
            make(config, tasks, results, processor)
        if config.compare:
            table = comparison.compare(
                config, tasks, build=lambda changed: build(changed, tasks),
                train=lambda changed, checkpoint: train(changed, tasks, checkpoint)[0], checkpoint=results.checkpoint,
            )
            write_csv(results.folder / "CGM_Lora_Comparison.csv", table)
            plotting.comparison(results.folder / "CGM_Lora_Comparison.png", table, results.title("One model for all tasks"))
            print(table[["method", "task", "accuracy_mean", "accuracy_spread", "mcnemar_p"]].to_string(index=False))


def make(config: MixtureConfig, tasks: list[TaskData], results: Results, processor: BeitImageProcessorPil) -> None:
    """Train the mixture and write it, its predictions and its routing."""
    name = "_".join(data.task.key for data in tasks) + "_cgm_lora"
    model, fitted = train(config, tasks, results.checkpoint(name))
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
    write_csv(results.folder / "CGM_Lora_Routing.csv", routing)
    plotting.routing(results.folder / "CGM_Lora_Routing.png", routing, results.title("Routing of the mixture"))
    classes = {data.task.key: data.classes for data in tasks}
    models.save(results.folder / "Models" / name, model, processor, {**results.made_from, "classes": classes})
    results.finish(rows)


def build(config: MixtureConfig, tasks: list[TaskData]) -> ContextGatedMOE:
    """The untrained mixture of every task's LoRA expert on their common backbone."""
    experts = {data.task.key: models.lora_folder(config, data.task) for data in tasks}
    base = models.load_backbone(config.model, tasks[0].classes, config.seed)
    for data in tasks:
        models.check_expert(config, data, models.backbone_fingerprint(base))
    torch.manual_seed(config.seed)
    try:
        return ContextGatedMOE.from_adapters(base, experts, config.gate_hidden)
    except MixtureError as error:
        raise UserError(f"{error}; run {command('Lora_Finetune', config)} --overwrite") from error


def train(config: MixtureConfig, tasks: list[TaskData], checkpoint: Checkpoint | None = None) -> tuple[ContextGatedMOE, Fit]:
    """The mixture with gates trained on the training images of all tasks in random order."""
    model = build(config, tasks)
    images, validation = together([data.train for data in tasks]), together([data.validation for data in tasks])
    own = torch.tensor([model.expert_names.index(data.task.key) for data in tasks])
    loss = routing_loss(own, config.routing_weight)
    return model, fit(model, images, validation, config, "CGM", loss=loss, checkpoint=checkpoint)


def routing_loss(own: Tensor, weight: float) -> Loss:
    """Cross-entropy plus `weight` times the mean over gates of -log(gate weight of the expert of the image's own task).

    own: (tasks,) position of each task's expert. The known task is used here, in training, and nowhere else.
    """

    def loss(model: ContextGatedMOE, inputs: Tensor, labels: Tensor, tasks: Tensor) -> tuple[Tensor, Tensor]:
        with model.record_gates() as gates:
            summed, logits = cross_entropy(model, inputs, labels, tasks)
        weights = torch.stack(list(gates.values()))  # (layers, B, E)
        expert = own.to(tasks.device)[tasks].expand(len(weights), -1)[..., None]  # (layers, B, 1)
        surprise = -weights.gather(2, expert).clamp_min(1e-6).log()
        return summed + weight * surprise.sum() / len(weights), logits

    return loss


def predict(model: ContextGatedMOE, data: ImageSet, config: MixtureConfig) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Probabilities (N, C), mean gate weight by image (N, E), and mean gate weight by layer (columns Layer, experts)."""
    recorded: list[Tensor] = []
    with model.record_gates() as gates:
        probabilities, _ = evaluate(
            model, data, config, after_batch=lambda: recorded.append(torch.stack(list(gates.values())).cpu())
        )
    weights = torch.cat(recorded, dim=1)  # (layers, N, E)
    by_layer = pd.DataFrame(weights.mean(1).numpy(), columns=model.expert_names)
    by_layer.insert(0, "Layer", list(gates))
    return probabilities, weights.mean(0).numpy(), by_layer


if __name__ == "__main__":
    run(main, MixtureConfig)
