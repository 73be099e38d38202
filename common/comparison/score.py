"""Answers of many methods to the same test images, scored side by side."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binomtest, norm

from common.comparison.answers import Answers
from common.data.tensors import TaskData

MIXTURE = "mixture"
EVERY_TASK = "All"


@dataclass
class Scores:
    """What a method answers: scores (N, C) of the test images among all tasks' classes, the largest being the answer.

    seconds: of one image. trainable: how many numbers were trained or fitted besides the experts; total: how many it needs to
    answer. choice: what was chosen by validation images.
    """

    values: np.ndarray
    seconds: float
    trainable: int
    total: int
    choice: str = ""


class Comparison:
    """Collects what methods say of the same test images. An answer is one of all tasks' classes, the largest score."""

    def __init__(self, tasks: list[TaskData], answers: Answers):
        self.titles = [data.task.title for data in tasks]
        self.answers = answers
        self.groups: dict[str, str] = {}  # of each method
        self.runs: dict[str, list[Scores]] = {}  # of each method, one for each seed

    def put(self, name: str, group: str, scores: Scores) -> None:
        """Take over what a method answers, one more seed of it if there are some already."""
        self.groups[name] = group
        runs = self.runs.setdefault(name, [])
        runs.append(scores)
        if len(runs) == 1:
            choice = f" ({scores.choice})" if scores.choice else ""
            print(f"{name}: {self._mean(self.answers.right(scores.values)):.1%}{choice}", flush=True)

    def table(self) -> pd.DataFrame:
        """One row for each method and task, and one, "All", for all tasks together, which weigh alike there.

        accuracy: share of images whose task and class are right, with its 95 % interval (Wilson 1927). It is right_task, the
        share whose answer is a class of the right task, times accuracy_given_right_task. accuracy_told_task: if the task were
        told. mcnemar_p: exact two-sided McNemar test against the mixture, of "All" over all images; mcnemar_p_holm: corrected
        for the number of methods (Holm 1979). All of these are of the first seed. accuracy_mean and accuracy_spread (standard
        deviation) are over seeds. images_per_second is that of the median batch but the first.
        """
        rows = []
        for name, runs in self.runs.items():
            first = runs[0]
            right_told, task = self.answers.right_told(first.values), self.answers.right_task(first.values)
            for title, images in zip([*self.titles, EVERY_TASK], self._images(), strict=True):
                accuracy, *interval = self._interval(self.answers.right(first.values), images)
                by_seed = [self._mean(self.answers.right(run.values), images) for run in runs]
                right_task = self._mean(task, images)
                rows.append({
                    "group": self.groups[name], "method": name, "task": title, "accuracy": accuracy,
                    "accuracy_low": interval[0], "accuracy_high": interval[1], "right_task": right_task,
                    "accuracy_given_right_task": accuracy / right_task if right_task else math.nan,
                    "accuracy_told_task": self._mean(right_told, images),
                    "seeds": len(by_seed), "accuracy_mean": float(np.mean(by_seed)),
                    "accuracy_spread": float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else math.nan,
                    "mcnemar_p": math.nan if name == MIXTURE else self._mcnemar(first.values, images),
                    "trainable_parameters": first.trainable, "total_parameters": first.total,
                    "images_per_second": 1 / first.seconds,
                })
        table = pd.DataFrame(rows)
        corrected = table.groupby("task")["mcnemar_p"].transform(holm)
        table.insert(table.columns.get_loc("mcnemar_p") + 1, "mcnemar_p_holm", corrected)
        return table

    def _images(self) -> list[np.ndarray]:
        """Which images (N,) are of each task, then of any."""
        tasks = self.answers.tasks
        return [*(tasks == number for number in range(len(self.titles))), np.ones(len(tasks), dtype=bool)]

    def _mean(self, right: np.ndarray, images: np.ndarray | None = None) -> float:
        """The mean over some images, the tasks among them weighing alike."""
        weights = self.answers.weights if images is None else self.answers.weights * images
        return float(weights @ right / weights.sum())

    def _interval(self, right: np.ndarray, images: np.ndarray) -> tuple[float, float, float]:
        """That mean and its 95 % interval. Over several tasks, as of that many images as have the same variance."""
        weights = self.answers.weights[images]
        count = weights.sum() ** 2 / np.square(weights).sum()
        return self._mean(right, images), *wilson(self._mean(right, images), count)

    def _mcnemar(self, scores: np.ndarray, images: np.ndarray) -> float:
        """Are the images that only one of the two gets right split evenly?"""
        ours, theirs = (self.answers.right(run)[images] for run in (self.runs[MIXTURE][0].values, scores))
        only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        return binomtest(only_ours, only_ours + only_theirs).pvalue if only_ours + only_theirs else 1.0


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share of `count` images (Wilson 1927)."""
    square = norm.ppf(0.975) ** 2 / count
    middle, reach = share + square / 2, math.sqrt(square * share * (1 - share) + square**2 / 4)
    return max(0.0, (middle - reach) / (1 + square)), min(1.0, (middle + reach) / (1 + square))


def holm(p_values: pd.Series) -> pd.Series:
    """p-values corrected for their number, those that are missing left out (Holm 1979)."""
    known = p_values.dropna().sort_values()
    steps = known * np.arange(len(known), 0, -1)
    return steps.cummax().clip(upper=1.0).reindex(p_values.index)
