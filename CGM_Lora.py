"""Step 6: one context-gated mixture over all LoRA experts; only its gates are trained, and it is never told the task."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from common import comparison, models, plotting
from common.config import MixtureConfig, UserError, run
from common.data import ImageSet, TaskData, load_task, together
from common.files import command, provenance, write_csv
from common.results import Results
from common.tasks import TASKS
from common.training import Fit, Loss, cross_entropy, evaluate, fit
from ContextGatedMOE import ContextGatedMOE, MixtureError


def main(config: MixtureConfig) -> None:
    """Train the gates on all tasks together, evaluate on each, and write the one model."""
    results = Results(config, "CGM_Lora", "CGM_Lora")
    processor = models.load_processor(config.model)
    tasks = [load_task(task, config, processor) for task in TASKS]
    name = "_".join(data.task.key for data in tasks) + "_cgm_lora"
    if not results.finished(tasks):
        model, fitted = train(config, tasks)
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
        made_from = provenance(
            data={data.task.key: data.fingerprint for data in tasks}, model=config.model,
            classes={data.task.key: data.classes for data in tasks}, base=model.base_fingerprint(),
        )
        models.save(results.folder / "Models" / name, model, processor, made_from)
        results.finish(rows, tasks)
    if config.compare:
        table = comparison.compare(
            config, tasks, build=lambda settings: build(settings, tasks), train=lambda settings: train(settings, tasks)[0]
        )
        write_csv(results.folder / "CGM_Lora_Comparison.csv", table)
        plotting.comparison(results.folder / "CGM_Lora_Comparison.png", table, results.title("One model for all tasks"))
        print(table[["method", "task", "accuracy_mean", "accuracy_spread", "mcnemar_p"]].to_string(index=False))


def build(config: MixtureConfig, tasks: list[TaskData]) -> ContextGatedMOE:
    """The untrained mixture of every task's LoRA expert on their common backbone."""
    experts = {data.task.key: models.lora_folder(config, data.task) for data in tasks}
    base = models.load_backbone(config.model, tasks[0].classes, config.seed)
    for data in tasks:
        folder = experts[data.task.key]
        made_from = models.check_model(folder, data, "Lora_Finetune", config)
        models.check_backbone(folder, made_from, base, "Lora_Finetune", config)
    torch.manual_seed(config.seed)
    try:
        return ContextGatedMOE.from_adapters(base, experts, config.gate_hidden)
    except MixtureError as error:
        raise UserError(f"{error}; run {command('Lora_Finetune', config)} --overwrite") from error


def train(config: MixtureConfig, tasks: list[TaskData]) -> tuple[ContextGatedMOE, Fit]:
    """The mixture with gates trained on the training images of all tasks in random order."""
    model = build(config, tasks)
    images, validation = together([data.train for data in tasks]), together([data.validation for data in tasks])
    own = torch.tensor([model.expert_names.index(data.task.key) for data in tasks])
    return model, fit(model, images, validation, config, "CGM", loss=routing_loss(own, config.routing_weight))


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
