"""Predictions of many methods on one test set, scored side by side."""

import time

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest
from torch import nn

from common.cli.flags import MixtureConfig
from common.data.tensors import ImageSet, TaskData, together
from common.results.metrics import predictions_table, scores
from common.training.evaluate import EVALUATION_BATCH, evaluate

MIXTURE, ORACLE, JOINT = "mixture", "oracle (told the task)", "joint LoRA of the total rank"


MIXTURE, ORACLE, JOINT = "mixture", "oracle (told the task)", "joint LoRA of the total rank"


MIXTURE, ORACLE, JOINT = "mixture", "oracle (told the task)", "joint LoRA of the total rank"


EARLIER = "earlier formulation"


def mixed_test(tasks: list[TaskData], seed: int) -> ImageSet:
    """The test images of all tasks in one seeded random order."""
    data = together([task.test for task in tasks])
    return data.take(torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)))


class Comparison:
    """Collects predictions of many methods on one test set and scores them side by side."""

    def __init__(self, tasks: list[TaskData], config: MixtureConfig):
        self.tasks, self.config = tasks, config
        self.data = mixed_test(tasks, config.seed)
        self.predictions: dict[str, list[np.ndarray]] = {}  # method -> probabilities (N, C), one for each seed
        self.facts: dict[str, dict[str, float]] = {}

    def add(self, method: str, model: nn.Module, trainable: int = 0, pure: bool = False) -> None:
        """Predict with `model`, in mixed batches or, if `pure`, in batches that each hold images of one task only."""
        parts = [torch.from_numpy(rows) for rows in self._rows()] if pure else [torch.arange(len(self.data))]
        probabilities, taken = [], []
        for rows in parts:
            stamps = [time.perf_counter()]
            part = self.data.take(rows)
            probabilities.append(evaluate(model, part, self.config, lambda: stamps.append(time.perf_counter()))[0])
            sizes = np.diff([*range(0, len(rows), EVALUATION_BATCH), len(rows)])
            taken += list(np.diff(stamps) / sizes)
        order = np.argsort(torch.cat(parts).numpy())
        self.put(method, np.concatenate(probabilities)[order], trainable, 1 / np.median(taken[1:] or taken))

    def put(self, method: str, probabilities: np.ndarray, trainable: int = 0, speed: float = float("nan")) -> None:
        """Take over the probabilities (N, C) of a method, one more seed of it if there are some already."""
        self.predictions.setdefault(method, []).append(probabilities)
        self.facts.setdefault(method, {"trainable_parameters": trainable, "images_per_second": speed})

    def add_oracle(self, single: list[str]) -> None:
        """Every image by its own task's expert. single: for each task, the method that is its expert alone."""
        own = np.stack([self.predictions[method][0] for method in single])  # (tasks, N, C)
        speed = float(np.mean([self.facts[method]["images_per_second"] for method in single]))
        self.put(ORACLE, own[self.data.tasks.numpy(), np.arange(len(self.data))], speed=speed)

    def table(self) -> pd.DataFrame:
        """One row per method and task, and one for all tasks together.

        Accuracy, interval, F1 and the exact McNemar test against the mixture are those of the first seed; mean and
        spread (standard deviation) are over seeds. The row "All" counts every image once: with test splits of one size
        its accuracy is the mean of the tasks' accuracies; its F1 is that mean always. Images per second are those of the
        median batch but the first, in batches of one size for all methods. Trainable parameters are those trained besides
        the experts.
        """
        rows = []
        for method, runs in self.predictions.items():
            tables = [predictions_table(runs[0][rows_of], self.data.labels[rows_of].numpy(), data.classes)
                      for rows_of, data in zip(self._rows(), self.tasks, strict=True)]
            by_task = [scores(table) for table in tables]
            correct = int(self._correct(runs[0]).sum())
            interval = binomtest(correct, len(self.data)).proportion_ci(0.95, method="wilson")
            overall = {"accuracy": correct / len(self.data), "accuracy_low": interval.low, "accuracy_high": interval.high,
                       "macro_f1": float(np.mean([row["macro_f1"] for row in by_task]))}
            names, everywhere = [data.task.title for data in self.tasks], np.arange(len(self.data))
            for name, rows_of, row in zip([*names, "All"], [*self._rows(), everywhere], [*by_task, overall], strict=True):
                by_seed = np.array([self._correct(run)[rows_of].mean() for run in runs])
                rows.append({
                    "method": method, "task": name, **row, "seeds": len(runs), "accuracy_mean": by_seed.mean(),
                    "accuracy_spread": by_seed.std(ddof=1) if len(runs) > 1 else 0.0,
                    "mcnemar_p": self._mcnemar(runs[0], rows_of), **self.facts[method],
                })
        return pd.DataFrame(rows)

    def _rows(self) -> list[np.ndarray]:
        return [np.flatnonzero(self.data.tasks.numpy() == task) for task in range(len(self.tasks))]

    def _correct(self, probabilities: np.ndarray) -> np.ndarray:
        return probabilities.argmax(1) == self.data.labels.numpy()

    def _mcnemar(self, probabilities: np.ndarray, rows: np.ndarray) -> float:
        """Exact two-sided McNemar test: are the images only one of the two gets right split evenly?"""
        ours, theirs = self._correct(self.predictions[MIXTURE][0])[rows], self._correct(probabilities)[rows]
        only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        return binomtest(only_ours, only_ours + only_theirs).pvalue if only_ours + only_theirs else 1.0
