"""Made-up tasks and predictions of a mixture, for the tests of what is written of them."""

from types import SimpleNamespace

import numpy as np
import torch

from common.data.tensors import TaskData
from common.results.metrics import JointPredictions

ODD_NAMES = ["$$ premium", "paddle_and_ball", "\\frac{1}{2} & <b>", "two\nlines of a name that goes on and on", "森 é", "_"]


def task_of(key, classes, images=40):
    """A task with test labels only."""
    labels = torch.arange(images) % len(classes)
    return SimpleNamespace(task=SimpleNamespace(key=key, title=key.title(), name=key), classes=classes,
                           test=SimpleNamespace(labels=labels), near_duplicates_in_test=0)


def joint_predictions(tasks: list[TaskData], data: TaskData, refused: float = 0.0, seed: int = 0) -> JointPredictions:
    """Mostly right ones for the test images of `data`, a share of which is refused."""
    rng, labels = np.random.default_rng(seed), [(task.task.key, name) for task in tasks for name in task.classes]
    actual = [labels.index((data.task.key, data.classes[label])) for label in data.test.labels]
    logits = rng.normal(0, 1, (len(actual), len(labels)))
    logits[np.arange(len(actual)), actual] += 2
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gates = rng.dirichlet(np.ones(len(tasks)), len(actual))
    return JointPredictions(probabilities, labels, dict(zip((task.task.key for task in tasks), gates.T, strict=True)),
                            rng.normal(size=len(actual)), rng.random(len(actual)) < refused if refused else None)
