"""From probabilities to the table of predictions, and from that table to every score."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from common.data.tensors import TaskData

NONE = "none"  # predicted task and class of an image that the mixture was asked to refuse
NAMES = ("Predicted Class", "Actual Class", "Predicted Task")  # the columns of a table of predictions that hold names
ANOTHER_TASK = "another task"  # a column of confusion matrices
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class JointPredictions:
    """What a mixture says of the N test images of one task, without being told the task.

    probabilities: (N, C) over the classes of all tasks; labels: those C classes as (task key, class name);
    gates: expert -> mean gate weight (N,); familiarity: (N,), higher is more familiar; refused: (N,) bool, True where the
    answer is "none", or None if nothing is refused.
    """

    probabilities: np.ndarray
    labels: list[tuple[str, str]]
    gates: dict[str, np.ndarray]
    familiarity: np.ndarray
    refused: np.ndarray | None = None


def predictions_table(probabilities: np.ndarray, labels: np.ndarray, classes: list[str]) -> pd.DataFrame:
    """One row per image, in order: row number, predicted and actual class, a probability per class.

    probabilities: (N, C); labels: (N,).
    """
    names = np.array(classes, dtype=object)
    return pd.DataFrame({
        "Image": np.arange(len(labels)), "Predicted Class": names[probabilities.argmax(1)], "Actual Class": names[labels],
        **{f"Probability {name}": probabilities[:, index] for index, name in enumerate(classes)},
    })


def joint_table(predictions: JointPredictions, data: TaskData) -> pd.DataFrame:
    """One row per test image of a task: the answer among all tasks' classes, and what led to it (DESIGN section 5)."""
    best = predictions.probabilities.argmax(1)
    refused = np.zeros(len(best), dtype=bool) if predictions.refused is None else predictions.refused
    tasks, classes = (np.where(refused, NONE, np.array(names, dtype=object)[best])
                      for names in zip(*predictions.labels, strict=True))
    return pd.DataFrame({
        "Image": np.arange(len(best)), "Predicted Class": classes,
        "Actual Class": np.array(data.classes, dtype=object)[data.test.labels.cpu().numpy()], "Predicted Task": tasks,
        **{probability_column(*label): predictions.probabilities[:, index] for index, label in enumerate(predictions.labels)},
        **{f"Gate {expert}": weights for expert, weights in predictions.gates.items()},
        "Familiarity": predictions.familiarity,
    })


def probability_column(task: str, name: str) -> str:
    """The column of a joint table that holds the probability of a class of a task."""
    return f"Probability {task}: {name}"


def scores(table: pd.DataFrame, task: str | None = None) -> dict[str, float]:
    """Accuracy with its 95 % Wilson interval, macro F1 and expected calibration error, all between 0 and 1, from a table of
    predictions.

    task: key of the images' task, for a joint table: a prediction is then right if task and class are.
    """
    names = pd.Index(sorted(set(table["Actual Class"])))
    actual, predicted = (names.get_indexer(table[f"{kind} Class"]) for kind in ("Actual", "Predicted"))  # -1: another class
    if task is not None:
        predicted = np.where(table["Predicted Task"] == task, predicted, -1)
    right = actual == predicted
    interval = binomtest(int(right.sum()), len(table)).proportion_ci(0.95, method="wilson")
    return {
        "accuracy": float(right.mean()), "accuracy_low": interval.low, "accuracy_high": interval.high,
        "macro_f1": float(f1_score(actual, predicted, labels=range(len(names)), average="macro", zero_division=0)),
        "calibration_error": calibration_error(table.filter(regex="^Probability ").to_numpy().max(1), right),
    }


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error (Guo et al. 2017): how far the share of right answers is from the mean confidence, over bins
    of equal width, each weighing as its answers are many. confidence: (N,) between 0 and 1; right: (N,) bool."""
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    off = np.bincount(bins, weights=right, minlength=CALIBRATION_BINS) - np.bincount(bins, weights=confidence,
                                                                                     minlength=CALIBRATION_BINS)
    return float(np.abs(off).sum() / len(right))


def told_scores(table: pd.DataFrame, task: str, classes: list[str]) -> dict[str, float]:
    """Accuracy of a joint table if the task were told, and the share of images whose predicted task is the right one.

    The first takes the best of the task's own `classes`, whether the image was refused or not.
    """
    own = table[[probability_column(task, name) for name in classes]].to_numpy()
    best = np.array(classes, dtype=object)[own.argmax(1)]
    return {"accuracy_told_task": float((best == table["Actual Class"]).mean()),
            "right_task": float((table["Predicted Task"] == task).mean())}


def confusion(table: pd.DataFrame, classes: list[str], task: str | None = None) -> tuple[np.ndarray, list[str]]:
    """Counts (C, K) with actual classes as rows, and the names of the K columns.

    The columns are the classes and, for a joint table (`task`: key of the images' task), "another task" and "none" where
    these were predicted.
    """
    names = pd.Index(classes)
    predicted = names.get_indexer(table["Predicted Class"])
    if task is not None:
        refused = table["Predicted Task"] == NONE
        predicted = np.where(table["Predicted Task"] == task, predicted, np.where(refused, len(classes) + 1, len(classes)))
    return _counts(names.get_indexer(table["Actual Class"]), predicted, classes, [*classes, ANOTHER_TASK, NONE])


def joint_confusion(tables: dict[str, pd.DataFrame], labels: list[tuple[str, str]]) -> tuple[np.ndarray, list[str], list[str]]:
    """Counts (R, K) over the classes of all tasks, and the names of rows and columns.

    tables: task key -> joint table; labels: (task key, class name) of every column; those of tasks with a table are rows.
    """
    places = {label: index for index, label in enumerate(labels)}
    actual = [places[task, name] for task, table in tables.items() for name in table["Actual Class"]]
    predicted = [places.get(pair, len(labels)) for table in tables.values()
                 for pair in zip(table["Predicted Task"], table["Predicted Class"], strict=True)]
    names = [f"{task}: {name}" for task, name in labels]
    counts, columns = _counts(np.array(actual), np.array(predicted), names, [*names, NONE])
    rows = [index for index, (task, _) in enumerate(labels) if task in tables]
    return counts[rows], [names[index] for index in rows], columns


def _counts(actual: np.ndarray, predicted: np.ndarray, rows: list[str], columns: list[str]) -> tuple[np.ndarray, list[str]]:
    """Counts without those columns behind the classes that nothing is in."""
    counts = np.zeros((len(rows), len(columns)), dtype=int)
    np.add.at(counts, (actual, predicted), 1)
    kept = [index for index in range(len(columns)) if index < len(rows) or counts[:, index].any()]
    return counts[:, kept], [columns[index] for index in kept]
