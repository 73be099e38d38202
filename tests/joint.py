"""Made-up predictions of a mixture, for the tests of what is written of it."""

import numpy as np

from common.data.tensors import TaskData
from common.results.metrics import JointPredictions


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
