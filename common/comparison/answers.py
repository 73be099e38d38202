"""Answers among the classes of all tasks: from an expert's own log-probabilities and from evidence for the experts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp

from common.data.tensors import ImageSet, TaskData

SMALLEST, LARGEST = 0.05, 20.0  # of a scale or a weight; where validation has no mistakes there is no best value
NOT_CHOSEN = 1e4  # what the classes of an expert that does not run lose: only if the task were told would it be asked


@dataclass(frozen=True)
class Space:
    """The classes of all tasks, one task after the other. sizes: how many each has; owner: (C,) the task of each class."""

    sizes: list[int]
    owner: np.ndarray

    @classmethod
    def of(cls, tasks: list[TaskData]) -> "Space":
        """That of these tasks."""
        sizes = [len(data.classes) for data in tasks]
        return cls(sizes, np.repeat(np.arange(len(sizes)), sizes))

    @property
    def first(self) -> np.ndarray:
        """Where the classes of each task begin."""
        return np.cumsum([0, *self.sizes[:-1]])

    def own(self, task: int) -> slice:
        """The columns of a task's classes."""
        return slice(self.first[task], self.first[task] + self.sizes[task])

    def heads(self, logits: np.ndarray) -> np.ndarray:
        """Log-probabilities (N, C), normalised within each task, from logits (N, C) of heads side by side."""
        return np.concatenate([log_softmax(logits[:, self.own(task)], axis=1) for task in range(len(self.sizes))], axis=1)

    def evidence(self, scores: np.ndarray) -> list[np.ndarray]:
        """Log-probabilities of the tasks, for each of their classes, and of the classes; each (N, C), from scores (N, C) that
        are log-probabilities of the classes up to a constant."""
        classes = log_softmax(scores.astype(np.float64), axis=1)
        tasks = [logsumexp(classes[:, self.own(task)], axis=1) for task in range(len(self.sizes))]
        return [np.stack(tasks, axis=1)[:, self.owner], classes]

    def only(self, scores: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Scores (N, C) where each image is answered by the expert of one task (N,)."""
        return scores - NOT_CHOSEN * (self.owner != tasks[:, None])

    def answers(self, data: ImageSet) -> "Answers":
        """The right answers of images of all tasks."""
        tasks = data.tasks.numpy()
        counts = np.bincount(tasks, minlength=len(self.sizes))
        return Answers(self, tasks, self.first[tasks] + data.labels.numpy(), 1 / (np.count_nonzero(counts) * counts[tasks]))


@dataclass(frozen=True)
class Answers:
    """The right answers of N images. tasks: (N,); labels: (N,) columns; weights: (N,), the same sum for each task, 1 in all."""

    space: Space
    tasks: np.ndarray
    labels: np.ndarray
    weights: np.ndarray

    def right(self, scores: np.ndarray) -> np.ndarray:
        """Which images are right (N,) if the answer is the largest of the scores (N, C)."""
        return scores.argmax(1) == self.labels

    def right_told(self, scores: np.ndarray) -> np.ndarray:
        """Which images are right (N,) if it is the largest of the own task's; a score of minus infinity is no answer."""
        own = np.where(self.space.owner == self.tasks[:, None], scores, -np.inf)
        return (own.argmax(1) == self.labels) & np.isfinite(own.max(1))

    def right_task(self, scores: np.ndarray) -> np.ndarray:
        """Which images' answers (N,) are classes of the own task."""
        return self.space.owner[scores.argmax(1)] == self.tasks

    def loss(self, scores: np.ndarray) -> float:
        """Mean negative log-likelihood of the right answers, tasks weighing alike."""
        return -float(self.weights @ log_softmax(scores, axis=1)[np.arange(len(scores)), self.labels])

    def rating(self, scores: np.ndarray) -> tuple[float, float]:
        """Accuracy, tasks weighing alike, then the loss, negative: what is chosen by validation has the largest."""
        return float(self.weights @ self.right(scores)), -self.loss(scores)


@dataclass(frozen=True)
class Mix:
    """Scores from the heads' logits times `scale`, normalised within each task, plus evidence times `weights`."""

    space: Space
    scale: float = 1.0
    weights: tuple[float, ...] = ()

    def scores(self, logits: np.ndarray, evidence: Sequence[np.ndarray] = ()) -> np.ndarray:
        """Scores (N, C) from logits (N, C) of heads side by side and parts of evidence (N, C)."""
        parts = (weight * part for weight, part in zip(self.weights, evidence, strict=True))
        return sum(parts, start=self.space.heads(self.scale * logits))


def fitted_mix(logits: np.ndarray, evidence: Sequence[np.ndarray], answers: Answers) -> Mix:
    """The mix that makes the right answers likeliest, tasks weighing alike; no number is negative.

    The mixture's head has such numbers too, fitted to the same images.
    """
    def mix(numbers: np.ndarray) -> Mix:
        return Mix(answers.space, numbers[0], tuple(numbers[1:]))

    bounds = [(SMALLEST, LARGEST), *[(0, LARGEST)] * len(evidence)]
    found = minimize(lambda numbers: answers.loss(mix(numbers).scores(logits, evidence)), np.ones(1 + len(evidence)),
                     method="L-BFGS-B", bounds=bounds)
    return mix(found.x)
