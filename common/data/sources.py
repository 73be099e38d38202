"""What a source of images is, whatever kind: labels first, images later; and how classes and splits are named."""

import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets.exceptions import DatasetsError

from common.data.images import Encoded
from common.errors import UserError

NO_LABEL = -1
SPLITS = {"train": 0.6, "validation": 0.2, "test": 0.2}
NO_SPLIT = -1
TRAIN = 0  # the position of train in SPLITS
SPLIT_NAMES = {"train": 0, "training": 0, "validation": 1, "valid": 1, "val": 1, "dev": 1, "test": 2, "testing": 2}


@dataclass
class Source:
    """Labelled images, of which any rows can be read in ascending order, a few at a time.

    labels: (N,) int64, positions in `classes` or NO_LABEL. read: ascending row numbers -> these images, in this order.
    splits: (N,) int64, positions in SPLITS of the split that the source itself has a row in, or NO_SPLIT. blocks: (N,)
    int64, rows of one number come together or not at all, so the choice of images keeps to few of them. fetch: brings
    these rows here before they are read.
    """

    classes: list[str]
    labels: np.ndarray
    read: Callable[[np.ndarray], Iterator[Encoded]]
    splits: np.ndarray
    blocks: np.ndarray
    fetch: Callable[[np.ndarray], None] = lambda rows: None


def split_number(*names: str) -> int:
    """The position in SPLITS of the first of these names that a split may have, NO_SPLIT if it is none of them.

    The Hub calls the beginning of a split `partial-`.
    """
    keys = (name.casefold().removeprefix("partial-") for name in names)
    return next((SPLIT_NAMES[key] for key in keys if key in SPLIT_NAMES), NO_SPLIT)


def ordered(names: Iterable[str]) -> list[str]:
    """Class names in their order: by number if all are numbers, else by text; none twice."""
    names = set(names)
    numbers = all(re.fullmatch(r"[+-]?\d+(\.\d+)?", name) for name in names)
    return sorted(names, key=lambda name: (float(name) if numbers else 0, name))


def first_few(names: Sequence[object], most: int = 3) -> str:
    """A list for a message: its first entries, and how many more there are."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most:,} more" if len(names) > most else "")


@contextmanager
def readable(where: str, kind: str) -> Iterator[None]:
    """Raise UserError, naming the source, if something in it cannot be read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile, DatasetsError, pa.ArrowException) as error:
        raise UserError(f"{where} cannot be read as {kind} ({error})") from error
