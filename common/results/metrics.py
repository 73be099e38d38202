"""From probabilities to the table of predictions, and from that table to every score."""

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, f1_score


def predictions_table(
    probabilities: np.ndarray, labels: np.ndarray, classes: list[str], gates: dict[str, np.ndarray] | None = None
) -> pd.DataFrame:
    """One row per image, in order: row number, predicted and actual class, a probability per class, gates if any.

    probabilities: (N, C); labels: (N,); gates: expert name -> mean gate weight (N,).
    """
    table = pd.DataFrame({
        "Image": np.arange(len(labels)),
        "Predicted Class": np.array(classes)[probabilities.argmax(1)],
        "Actual Class": np.array(classes)[labels],
    })
    for index, name in enumerate(classes):
        table[f"Probability {name}"] = probabilities[:, index]
    for name, weights in (gates or {}).items():
        table[f"Gate {name}"] = weights
    return table


def scores(table: pd.DataFrame) -> dict[str, float]:
    """Accuracy with its 95 % Wilson interval and macro F1, all between 0 and 1, from a table of predictions."""
    actual, predicted = table["Actual Class"], table["Predicted Class"]
    correct = int((actual == predicted).sum())
    interval = binomtest(correct, len(table)).proportion_ci(0.95, method="wilson")
    return {
        "accuracy": correct / len(table), "accuracy_low": interval.low, "accuracy_high": interval.high,
        "macro_f1": float(f1_score(actual, predicted, labels=sorted(set(actual)), average="macro", zero_division=0)),
    }


def confusion(table: pd.DataFrame, classes: list[str]) -> np.ndarray:
    """Counts (C, C): rows are actual, columns predicted classes."""
    return confusion_matrix(table["Actual Class"], table["Predicted Class"], labels=classes)
