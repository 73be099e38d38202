"""What every method is given, each part computed once, when a method first asks: images, features, experts, their heads."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from common import models
from common.cli.flags import MixtureConfig
from common.comparison.answers import Space
from common.comparison.features import Depth, Features, backbone_features, depth_text
from common.comparison.linear import Linear, discriminants
from common.comparison.timing import collect
from common.data.tensors import ImageSet, TaskData, together
from common.training.checkpoint import Checkpoint
from ContextGatedMOE import ContextGatedMOE

Candidate = TypeVar("Candidate")
Updates = Mapping[str, Tensor]  # layer -> (d_out, d_in), what is added to the layer's weight


@dataclass
class Logits:
    """Logits (N, C) of all experts' heads for the images of two splits, and the seconds of one image."""

    validation: np.ndarray
    test: np.ndarray
    seconds: float


@dataclass
class ClassRouter:
    """A discriminant of all tasks' classes on the features of some depths, side by side."""

    depths: tuple[Depth, ...]
    classifier: Linear

    def scores(self, features: Features) -> list[np.ndarray]:
        """Scores (N, C) of the validation and of the test images."""
        return [self.classifier(split) for split in features.together(self.depths)[1:]]

    @property
    def parameters(self) -> int:
        """How many numbers have been learnt."""
        return self.classifier.parameters

    def __str__(self) -> str:
        return f"{depth_text(self.depths)}, shrinkage {self.classifier.strength:g}"


def mixed_test(tasks: list[TaskData], seed: int) -> ImageSet:
    """The test images of all tasks in one seeded random order."""
    data = together([task.test for task in tasks])
    return data.take(torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)))


class PlainInputs:
    """What needs no experts. Choices are made by the validation images; the test images are only answered."""

    def __init__(self, config: MixtureConfig, tasks: list[TaskData]):
        self.config, self.tasks = config, tasks
        self.space = Space.of(tasks)
        self.train, self.validation = (together([getattr(data, split) for data in tasks]) for split in ("train", "validation"))
        self.test = mixed_test(tasks, config.seed)
        self.train_answers, self.validation_answers, self.test_answers = (
            self.space.answers(images) for images in (self.train, self.validation, self.test))

    @cached_property
    def body(self) -> nn.Module:
        """The pretrained backbone: images to what reaches the head (B, D)."""
        body = models.load_backbone(self.config.model, self.tasks[0].classes, self.config.seed)
        body.classifier = nn.Identity()
        return body

    @cached_property
    def backbone_parameters(self) -> int:
        """Those of the backbone without its head."""
        return sum(value.numel() for value in self.body.parameters())

    @cached_property
    def features(self) -> Features:
        """The plain backbone's features at every depth."""
        return backbone_features(self.body, self.train, self.validation, self.test, self.config)

    @cached_property
    def discriminants(self) -> list[ClassRouter]:
        """For each depth, and for several together, the best discriminant of all classes by the validation images."""
        return [self.discriminant_at(depths) for depths in self.features.choices]

    def discriminant_at(self, depths: tuple[Depth, ...]) -> ClassRouter:
        """The best discriminant of all classes on the features of these depths, side by side."""
        priors = 1 / (len(self.tasks) * np.array(self.space.sizes)[self.space.owner])
        train, validation, _ = self.features.together(depths)
        fitted = discriminants(train, self.train_answers.labels, self.train_answers.weights, priors)
        return ClassRouter(depths, self.best(fitted, lambda classifier: classifier(validation)))

    @cached_property
    def discriminant(self) -> ClassRouter:
        """The best of them."""
        return self.best(self.discriminants, lambda found: found.scores(self.features)[0])

    def best(self, candidates: Iterable[Candidate], scores: Callable[[Candidate], np.ndarray]) -> Candidate:
        """The candidate whose scores (N, C) for the validation images are most often right, then likeliest."""
        return max(candidates, key=lambda candidate: self.validation_answers.rating(scores(candidate)))


class Inputs(PlainInputs):
    """What every method is given.

    mixture: the finished one, whose experts the methods use. checkpoint: by the name of a training, where it goes on.
    """

    def __init__(self, config: MixtureConfig, tasks: list[TaskData], mixture: ContextGatedMOE,
                 checkpoint: Callable[[str], Checkpoint | None] = lambda name: None):
        super().__init__(config, tasks)
        self.mixture, self.checkpoint = mixture, checkpoint
        # The mixture has its experts in an order of its own.
        order = [mixture.expert_names.index(data.task.key) for data in tasks]
        columns = [column for data in tasks for column in mixture.columns[data.task.key]]
        heads = mixture.joint_head.expert_weight, mixture.joint_head.expert_bias
        self.head_weight, self.head_bias = (value.detach().cpu().numpy()[columns] for value in heads)
        # Per layer, each task's A (r, d_in) and B (d_out, r), scaling in B.
        self.adapters: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name, layer in mixture.mixture_layers().items():
            if hasattr(layer, "lora_A"):
                downs, ups = layer.lora_A.detach().cpu().split(layer.ranks), layer.lora_B.detach().cpu().split(layer.ranks, 1)
                self.adapters[name] = [(downs[number].float(), ups[number].float()) for number in order]

    def seeded(self, config: MixtureConfig) -> "Inputs":
        """The same with the settings of another seed; what was computed stays."""
        if config is self.config:
            return self
        other = copy.copy(self)
        other.config = config
        return other

    # ---- numbers of parameters; the head that the backbone came with answers nothing ----

    @property
    def merged_parameters(self) -> int:
        """Those of the backbone and of all experts' heads."""
        return self.backbone_parameters + self.head_weight.size + self.head_bias.size

    @property
    def expert_parameters(self) -> int:
        """Those of the backbone and of all experts with their heads."""
        adapters = (part for layer in self.adapters.values() for pair in layer for part in pair)
        return self.merged_parameters + sum(part.numel() for part in adapters)

    # ---- the experts ----

    def logits(self, updates: Updates, images: ImageSet) -> tuple[np.ndarray, float]:
        """Logits (N, C) of all experts' heads on the backbone with these updates added, and the seconds of an image."""
        weights = {name: self.body.get_submodule(name).weight.data for name in updates}
        before = {name: weight.clone() for name, weight in weights.items()}
        for name, update in updates.items():
            weights[name] += update.to(weights[name])
        try:
            (features,), seconds = collect(self.body, images, self.config)
        finally:
            for name, weight in before.items():
                self.body.get_submodule(name).weight.data.copy_(weight)
        return features @ self.head_weight.T + self.head_bias, seconds[-1]

    def expert(self, task: int) -> Updates:
        """The updates of one task's expert."""
        return {name: up @ down for name, pairs in self.adapters.items() for down, up in [pairs[task]]}

    @cached_property
    def experts(self) -> Logits:
        """The logits of each expert, through its own adapter, for its own classes; seconds of one expert."""
        splits = [np.empty((len(images), len(self.space.owner)), np.float32) for images in (self.validation, self.test)]
        seconds = []
        for task in range(len(self.tasks)):
            own = self.space.own(task)
            for split, images in zip(splits, (self.validation, self.test), strict=True):
                found, taken = self.logits(self.expert(task), images)
                split[:, own] = found[:, own]
            seconds.append(taken)
        return Logits(*splits, float(np.mean(seconds)))
