"""What a training minimises and counts, computed from a model's logits: in training and in validation alike."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.tensors import ImageSet


class Objective:
    """Cross-entropy of the images' labels, every image weighing alike. Subclasses change what they need."""

    def labels(self, data: ImageSet) -> Tensor:
        """The right class of every image (N,), a column of the logits."""
        return data.labels

    def weights(self, data: ImageSet) -> Tensor:
        """What every image counts (N,) in loss and accuracy, which are means weighted by it."""
        return torch.ones(len(data.labels), device=data.labels.device)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each image (B,) from logits (B, C) and labels (B,)."""
        return F.cross_entropy(logits, labels, reduction="none")

    def correct(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Which images are right (B,), from logits or probabilities (B, C) and labels (B,)."""
        return scores.argmax(1) == labels


CROSS_ENTROPY = Objective()


class JointObjective(Objective):
    """Cross-entropy among the classes of all tasks, every task weighing alike however many images it has."""

    def __init__(self, first: Tensor):
        """first: (T,) for each task, the column of the logits where its classes begin."""
        self.first = first

    def labels(self, data: ImageSet) -> Tensor:
        """The right class of every image (N,) among all tasks' classes. `data` has tasks."""
        return self.first.to(data.tasks.device)[data.tasks] + data.labels

    def weights(self, data: ImageSet) -> Tensor:
        """What every image counts (N,): the mean over all images is 1, the sum over each task's the same."""
        counts = torch.bincount(data.tasks)
        share = len(data.tasks) / (counts.count_nonzero() * counts)
        return share[data.tasks]
