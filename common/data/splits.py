"""Which images are used, and on which side of train, validation and test each is."""

import numpy as np

from common.cli.flags import PreparationConfig
from common.data.sources import SPLITS, Source
from common.errors import UserError
from common.tasks import Task

CLASSES_PER_TASK = 4
FEWEST = 5  # images of a class, so that each split has one


def choose(source: Source, task: Task, config: PreparationConfig) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The wanted classes, a seeded choice of images of each as row numbers (N,), class by class, and their labels (N,).

    Labels are positions in the list of classes. Raises UserError on a class that is not there or has too few images.
    """
    names = source.classes
    classes = task.classes or (names[:CLASSES_PER_TASK] if task.demo else names)
    if list(classes) == ["all"] and "all" not in names:
        classes = names
    for name in classes:
        if name not in names:
            raise UserError(f"{task.classes_flag}: there is no class {name!r}; there are {', '.join(names)}")
        for other in names:
            if other != name and other.casefold() == name.casefold():
                raise UserError(f"{task.name} has the classes {name!r} and {other!r}, which differ only by case; rename one "
                                "of them")
    if len(set(classes)) < max(2, len(classes)):
        raise UserError(f"{task.classes_flag}: needs two or more different classes, not {', '.join(classes)}")
    rng = np.random.default_rng(config.seed)
    blocks = source.blocks if config.hub_choice == "clustered" else np.zeros_like(source.blocks)
    turn = np.random.default_rng([config.seed, 1]).permutation(blocks.max(initial=0) + 1)
    chosen = []
    for name in classes:
        rows = rng.permutation(np.flatnonzero(source.labels == names.index(name)))
        number = config.number_of_images(task)
        count = len(rows) if number == "all" else int(number) if task.demo else min(int(number), len(rows))
        if len(rows) < max(count, FEWEST):
            raise UserError(f"class {name!r} of {task.name} has {len(rows)} images, fewer than {max(count, FEWEST)}; "
                            "lower --images_per_class or choose other classes")
        taken = []
        for part, number_of_rows in _shares(rows, source.splits[rows], count):
            turns = turn[blocks[part]]  # as many blocks as it takes, in an order that all classes share
            taken.append(part[turns <= np.sort(turns)[number_of_rows - 1]][:number_of_rows])
        chosen.append(np.sort(np.concatenate(taken)))
    return list(classes), np.concatenate(chosen), np.repeat(np.arange(len(classes)), [len(rows) for rows in chosen])


def _shares(rows: np.ndarray, splits: np.ndarray, count: int) -> list[tuple[np.ndarray, int]]:
    """The rows of each split, and how many of them to take: as they are to each other, one or more, at most `count` in all."""
    parts = [rows[splits == number] for number in np.unique(splits)]
    parts.sort(key=len)
    numbers = [max(1, round(len(part) * count / len(rows))) for part in parts[:-1]]
    return list(zip(parts, [*numbers, min(count - sum(numbers), len(parts[-1]))], strict=True))


def own_splits(splits: np.ndarray) -> list[str]:
    """Which splits a source has of its own, by the split (N,) of every row: none if there is no train, or nothing else."""
    found = [name for number, name in enumerate(SPLITS) if (splits == number).any()]
    return found if found[:1] == ["train"] and found != ["train"] else []


def random_split(labels: np.ndarray, seed: int, own: np.ndarray | None = None,
                 classes: list[str] | None = None) -> dict[str, np.ndarray]:
    """Cut every class 60/20/20, then shuffle each split, both by the seed. labels: (N,); split -> positions in it.

    own: (N,) the split that a row is in already: only what no row is in is cut, from train, in the same proportions.
    Raises UserError if a class, of these names, has no image, or too few to cut, in one of the splits that are kept.
    """
    rng = np.random.default_rng(seed)
    kept = [] if own is None else own_splits(own)
    shares = {name: share for name, share in SPLITS.items() if name == "train" or name not in kept}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for label in np.unique(labels):
        own_rows = {name: np.flatnonzero((labels == label) & (own == list(SPLITS).index(name))) for name in kept}
        rows = rng.permutation(own_rows.pop("train") if kept else np.flatnonzero(labels == label))
        for name, needed, found in [("train", len(shares), rows), *((name, 1, part) for name, part in own_rows.items())]:
            if len(found) < needed:
                raise UserError(f"class {classes[label]!r} has {len(found)} images in {name}, fewer than {needed}; choose "
                                "other classes, or add --split random to cut all of the source's images anew")
        ends = np.round(np.cumsum([*shares.values()]) / sum(shares.values()) * len(rows)).astype(int)
        ends = np.minimum(ends, len(rows) - np.arange(len(shares))[::-1])  # one or more is left for each
        for name, part in [*zip(shares, np.split(rows, ends[:-1]), strict=True), *own_rows.items()]:
            parts[name].append(part)
    return {name: rng.permutation(np.concatenate(part)) for name, part in parts.items()}


def grouped_split(labels: np.ndarray, groups: np.ndarray, seed: int, classes: list[str]) -> dict[str, np.ndarray]:
    """Cut every class as near to 60/20/20 as whole groups allow, then shuffle each split. labels, groups: (N,) from 0 on.

    The largest groups choose first, each the split that it overfills least, then the one that is emptiest for its size.
    Raises UserError if a split is left without a class.
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros((groups.max() + 1, labels.max() + 1))
    np.add.at(counts, (groups, labels), 1)
    wanted = np.outer(list(SPLITS.values()), counts.sum(axis=0))  # (splits, classes)
    room, split_of = wanted.copy(), np.zeros(len(counts), dtype=int)
    shuffled = rng.permutation(len(counts))
    for group in shuffled[np.argsort(-counts[shuffled].sum(axis=1), kind="stable")]:
        overfull = np.maximum(counts[group] - room, 0).sum(axis=1)
        free = (room / wanted) @ counts[group]
        split_of[group] = np.lexsort((-free, overfull))[0]
        room[split_of[group]] -= counts[group]
    splits = {name: rng.permutation(np.flatnonzero(split_of[groups] == number)) for number, name in enumerate(SPLITS)}
    for name, rows in splits.items():
        for label in np.setdiff1d(labels, labels[rows]):
            number = len(np.unique(groups[labels == label]))
            raise UserError(f"--split grouped leaves {name} without {classes[label]!r}, whose images are only {number} "
                            "groups of near-duplicates; use --split random, or more varied images")
    return splits
