"""The order of the classes in a finished adapter's head, which may be another than that of the task."""

import re
from collections.abc import Sequence

import numpy as np

SURE = 3  # standard deviations of the difference of two counts of right answers


def stated_order(stated: Sequence[str] | None, classes: Sequence[str]) -> list[int] | None:
    """For each of `classes` the output of a head whose outputs are called `stated`; None if these are not the same names."""
    if stated is None or sorted(stated) != sorted(classes):
        return None
    return [list(stated).index(name) for name in classes]


def usual_orders(classes: Sequence[str]) -> list[list[str]]:
    """The orders in which tools put class names: as they are, by characters (1, 10, 2), without case, by numbers (1, 2, 10)."""
    def by_number(name: str) -> list[tuple[int, int, str]]:
        return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]

    orders = [list(classes), sorted(classes), sorted(classes, key=str.casefold), sorted(classes, key=by_number)]
    return [order for at, order in enumerate(orders) if order not in orders[:at]]


def tested_order(predicted: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> list[int] | None:
    """For each of `classes` the output of a head, if answers are right far more often in another usual order than as they are.

    predicted: (N,) the output that is highest for each image; labels: (N,) positions in `classes`. "Far": by `SURE` standard
    deviations, and twice as often. None if they are not.
    """
    orders = usual_orders(classes)
    right = [int(sum(order[output] == classes[label] for output, label in zip(predicted, labels, strict=True)))
             for order in orders]
    best = int(np.argmax(right))
    if right[best] < 2 * right[0] or right[best] - right[0] <= SURE * np.sqrt(right[best] + right[0]):
        return None
    return stated_order(orders[best], classes)


def is_chance(predicted: np.ndarray, labels: np.ndarray) -> bool:
    """Whether answers are hardly more often right than if one class were said of all images: by less than `SURE` deviations."""
    share = np.bincount(labels).max() / len(labels)
    return (predicted == labels).mean() - share <= SURE * np.sqrt(share * (1 - share) / len(labels))
