"""One LoRA for all tasks, trained on all of them together; and the head that training begins with."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import models
from common.cli.flags import BaseModelConfig, MixtureConfig, TrainingFlags
from common.cli.parser import command
from common.comparison.inputs import Inputs
from common.comparison.score import Scores
from common.comparison.timing import collect
from common.data.tensors import ImageSet
from common.files import read_json
from common.models.lora import add_lora
from common.training.evaluate import features
from common.training.head import fit_head
from common.training.loop import fit
from common.training.objective import JointObjective


def joint_lora(inputs: Inputs) -> Scores:
    """One LoRA of the experts' total rank for all tasks' classes, trained on all tasks together, tasks weighing alike.

    It starts from a head fitted to the plain backbone's features, as the experts do, and learns by their recipe. With many tasks
    and the rank of all their experts the recipe's learning rate can be too high, so it is also trained with that rate over the
    number of tasks; the one of lower validation loss answers. Raises UserError if the recipe is missing.
    """
    config, tasks = inputs.config, inputs.tasks
    recipe = recipe_of(config)
    kept = {field.name: recipe[field.name] for field in dataclasses.fields(TrainingFlags) if field.name in recipe}
    settings = dataclasses.replace(config, **kept)
    rank = sum(max(len(layer[task][0]) for layer in inputs.adapters.values()) for task in range(len(tasks)))
    objective = JointObjective(torch.from_numpy(inputs.space.first))
    head = fitted_head(inputs, objective)
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


def recipe_of(config: MixtureConfig) -> dict[str, Any]:
    """The settings that the experts were trained with. Raises UserError if they are missing."""
    path = Path(config.root) / "Results" / "Lora_Finetune" / "config.json"
    return read_json(path, f"run {command('Lora_Finetune', config)} --overwrite", {"lora_rank": int, "lora_alpha": int})


def fitted_head(inputs: Inputs, objective: JointObjective) -> nn.Linear:
    """A head over all tasks' classes, fitted to the plain backbone's features, as Generate_Base_Model.py does for one task.

    Heads of single tasks side by side would begin with answers that are sure and wrong.
    """
    config, classes = inputs.config, [name for data in inputs.tasks for name in data.classes]
    base = models.load_backbone(config.model, classes, config.seed)
    train, validation = (ImageSet(features(base, part, config).inputs, objective.labels(part))
                         for part in (inputs.train, inputs.validation))
    fit_head(base.classifier, train, validation, BaseModelConfig(root=config.root, model=config.model, device=config.device))
    return base.classifier
