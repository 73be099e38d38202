"""Answers of many methods to the same test images, scored side by side."""

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.stats import binomtest, norm

from common.comparison.answers import Answers
from common.data.tensors import TaskData

MIXTURE, ORACLE = "mixture", "oracle (told the task)"
EVERY_TASK = "All"


@dataclass
class Method:
    """What is known of a method. runs: its scores (N, C) for the test images, one array for each seed.

    seconds: of one image; trainable: numbers it trains besides the experts; total: all that it needs to answer.
    """

    group: str
    seconds: float
    trainable: int
    total: int
    runs: list[np.ndarray] = field(default_factory=list)


class Comparison:
    """Collects what methods say of the same test images. An answer is one of all tasks' classes, the largest score."""

    def __init__(self, tasks: list[TaskData], answers: Answers):
        self.titles = [data.task.title for data in tasks]
        self.answers = answers
        self.methods: dict[str, Method] = {}

    def put(self, name: str, group: str, scores: np.ndarray, seconds: float, trainable: int, total: int) -> None:
        """Take over the scores (N, C) of a method, one more seed of it if there are some already."""
        method = self.methods.setdefault(name, Method(group, seconds, trainable, total))
        method.runs.append(scores)
        if len(method.runs) == 1:
            print(f"{name}: {self._mean(self.answers.right(scores)):.1%}", flush=True)

    def table(self) -> pd.DataFrame:
        """One row for each method and task, and one, "All", for all tasks together, which weigh alike there.

        accuracy: share of images whose task and class are right, with its 95 % interval (Wilson 1927); accuracy_told_task:
        if the task were told; right_task: share of images whose answer is a class of the right task. mcnemar_p: exact
        two-sided McNemar test against the mixture, of "All" over all images; mcnemar_p_holm: corrected for the number of
        methods (Holm 1979). All of these are of the first seed. accuracy_mean and accuracy_spread (standard deviation) are
        over seeds. images_per_second is that of the median batch but the first.
        """
        rows = []
        for name, method in self.methods.items():
            first = method.runs[0]
            told, task = self.answers.right_told(first), self.answers.right_task(first)
            for title, images in zip([*self.titles, EVERY_TASK], self._images(), strict=True):
                accuracy, *interval = self._interval(self.answers.right(first), images)
                by_seed = [self._mean(self.answers.right(run), images) for run in method.runs]
                rows.append({
                    "group": method.group, "method": name, "task": title, "accuracy": accuracy,
                    "accuracy_low": interval[0], "accuracy_high": interval[1],
                    "accuracy_told_task": self._mean(told, images), "right_task": self._mean(task, images),
                    "seeds": len(by_seed), "accuracy_mean": float(np.mean(by_seed)),
                    "accuracy_spread": float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else math.nan,
                    "mcnemar_p": math.nan if name == MIXTURE else self._mcnemar(first, images),
                    "trainable_parameters": method.trainable, "total_parameters": method.total,
                    "images_per_second": 1 / method.seconds,
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
        ours, theirs = (self.answers.right(run)[images] for run in (self.methods[MIXTURE].runs[0], scores))
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
