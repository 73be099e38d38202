"""One LoRA for all tasks, trained on all of them together; and the heads that training begins with."""

import copy
import dataclasses
from pathlib import Path

import torch
from torch import nn

from common import models
from common.cli.flags import MixtureConfig, TrainingFlags
from common.cli.parser import command
from common.comparison.inputs import Inputs
from common.comparison.score import Scores
from common.comparison.timing import collect
from common.data.tensors import TaskData
from common.files import read_json
from common.models.lora import add_lora
from common.training.loop import fit
from common.training.objective import JointObjective


def joint_lora(inputs: Inputs) -> Scores:
    """One LoRA of the experts' total rank for all tasks' classes, trained on all tasks together, tasks weighing alike.

    It starts from the base models' heads, as the experts do, and learns by their recipe. With many tasks and the rank of all
    their experts the recipe's learning rate can be too high, so it is also trained with that rate over the number of tasks;
    the one of lower validation loss answers. Raises UserError if a base model or the recipe is missing.
    """
    config, tasks = inputs.config, inputs.tasks
    folder = Path(config.root) / "Results" / "Lora_Finetune"
    recipe = read_json(folder / "config.json", f"run {command('Lora_Finetune', config)} --overwrite",
                       {"lora_rank": int, "lora_alpha": int})
    kept = {field.name: recipe[field.name] for field in dataclasses.fields(TrainingFlags) if field.name in recipe}
    settings = dataclasses.replace(config, **kept)
    rank = sum(max(len(layer[task][0]) for layer in inputs.adapters.values()) for task in range(len(tasks)))
    head, objective = base_heads(config, tasks), JointObjective(torch.from_numpy(inputs.space.first))
    trained = []
    for rate in (settings.learning_rate, settings.learning_rate / len(tasks)):
        base = models.load_backbone(config.model, tasks[0].classes, config.seed)
        base.classifier = copy.deepcopy(head)
        model = add_lora(base, rank, round(rank * recipe["lora_alpha"] / recipe["lora_rank"]), config.seed)
        fitted = fit(model, inputs.train, inputs.validation, dataclasses.replace(settings, learning_rate=rate),
                     f"joint LoRA, seed {config.seed}, learning rate {rate:g}", objective=objective,
                     checkpoint=inputs.checkpoint(f"compared_joint_{config.seed}_{rate:g}"))
        trained.append((fitted.history["validation_loss"].min(), model, rate))
    _, model, rate = min(trained, key=lambda entry: entry[0])
    count = models.trainable_parameters(model)
    (scores,), seconds = collect(model.merge_and_unload(), inputs.test, config)
    return Scores(scores, seconds[-1], count, inputs.merged_parameters, f"learning rate {rate:g}")


def base_heads(config: MixtureConfig, tasks: list[TaskData]) -> nn.Linear:
    """The heads of the tasks' base models, one after the other. Raises UserError if one is missing."""
    heads = [models.load_base(config, data).classifier for data in tasks]
    joint = nn.Linear(heads[0].in_features, sum(head.out_features for head in heads))
    with torch.no_grad():
        joint.weight.copy_(torch.cat([head.weight for head in heads]))
        joint.bias.copy_(torch.cat([head.bias for head in heads]))
    return joint
