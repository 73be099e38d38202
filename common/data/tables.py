"""Images in tables with columns `image` and `label`: Parquet files, and what `datasets` saved."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, DatasetDict, Features, concatenate_datasets, load_from_disk

from common.data.images import Encoded
from common.data.sources import NO_LABEL, NO_SPLIT, Source, ordered, readable, split_number
from common.data.walk import File
from common.errors import UserError
from common.tasks import class_name

ROWS_AT_ONCE = 32  # an image may have a megabyte


def local_parquet_source(files: Sequence[File], where: str, kind: str) -> Source:
    """Parquet files on this machine, each of the split that its name or a folder that leads to it says.

    Raises UserError, beginning with `where`, if they are several configurations of a dataset, or cannot be read.
    """
    splits, parents = zip(*(_split_of(Path(*file.parts)) for file in files), strict=True)
    found = {folder for folder, split in zip(parents, splits, strict=True) if split != NO_SPLIT}
    if len(found) > 1:
        raise UserError(f"{where} has splits in several folders ({', '.join(sorted(map(str, found)))}); give one")
    # A piece at a time is read: a row group may have gigabytes.
    opened = partial(pq.ParquetFile, buffer_size=2**20, pre_buffer=False)
    source = parquet_source([file.content for file in files], splits, opened, partial(readable, where, kind), where)
    return replace(source, blocks=np.zeros_like(source.labels))  # to read of many row groups costs little here


def _split_of(path: Path) -> tuple[int, Path]:
    """By a folder, or a word of the file's name as in train-00000-of-00003.parquet; and the folder that all splits are in."""
    for folder in [*reversed(path.parents)][1:]:
        if (number := split_number(folder.name)) != NO_SPLIT:
            return number, folder.parent
    return split_number(*re.split(r"[\W\d_]+", path.name)), path.parent


def parquet_source(
        files: Sequence[Any], splits: Sequence[int], opened: Callable[[Any], pq.ParquetFile],
        guard: Callable[[], AbstractContextManager], where: str, features: Features | None = None) -> Source:
    """Images in Parquet files, of which only what is asked for is read; a row group is a block.

    splits: of each file, as in Source. opened: makes a ParquetFile of one of `files`. guard: what every read happens
    within, to name what goes wrong. features: what is known better than the files know it. Raises UserError, beginning
    with `where`, on other columns.
    """
    values: list[Any] = []
    groups = []  # file, row group in it, number of its first row in all files, how many rows it has
    split_of: list[int] = []
    columns: list[Any] = []  # what `image` and `label` are in the first file, and have to be in every other
    for path, split in zip(files, splits, strict=True):
        with guard(), opened(path) as file:
            found = features or Features.from_arrow_schema(file.schema_arrow)
            found = [found.get(name) for name in ("image", "label")]
            columns = columns or found
            if found != columns:
                raise ValueError(f"{path} has other columns or classes than {files[0]}")
            _check_columns(file.schema_arrow, where)
            for group in range(file.num_row_groups):
                groups.append((path, group, len(values), file.metadata.row_group(group).num_rows))
                values += _group_labels(file, group)
            split_of += [split] * (len(values) - len(split_of))

    def read(rows: np.ndarray) -> Iterator[Encoded]:
        for path, group, start, count in groups:
            wanted = rows[(rows >= start) & (rows < start + count)] - start
            if len(wanted):
                with guard(), opened(path) as file:
                    first = 0
                    for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=["image"]):
                        inside = wanted[(wanted >= first) & (wanted < first + len(batch))] - first
                        yield from map(_encoded, batch.column("image").take(inside).to_pylist())
                        first += len(batch)

    with guard():
        classes, labels = _class_labels(values, columns[1])
    blocks = np.repeat(np.arange(len(groups)), [count for *_, count in groups])
    return Source(classes, labels, read, np.array(split_of, dtype=np.int64), blocks)


def _group_labels(file: pq.ParquetFile, group: int) -> list[Any]:
    """The labels of a row group. Where they are one number, as in a sorted dataset, the file's footer has it already."""
    columns = file.metadata.row_group(group)
    column = next(c for c in map(columns.column, range(columns.num_columns)) if c.path_in_schema == "label")
    known = column.statistics if column.physical_type in ("INT32", "INT64") else None
    if known and known.has_min_max and known.null_count == 0 and known.min == known.max:
        return [known.min] * columns.num_rows
    return file.read_row_group(group, columns=["label"])["label"].to_pylist()


def saved_source(folder: Path, where: str) -> Source:
    """A Dataset or all splits of a DatasetDict that `save_to_disk` wrote."""
    guard = partial(readable, where, "a saved dataset")
    with guard():
        saved = load_from_disk(str(folder))
        parts = saved if isinstance(saved, DatasetDict) else {"": saved}
        dataset = concatenate_datasets([*parts.values()])
        _check_columns(dataset.features.arrow_schema, where)
        classes, labels = _class_labels(dataset.with_format(None)["label"], dataset.features["label"])
    images = dataset.with_format("arrow")

    def read(rows: np.ndarray) -> Iterator[Encoded]:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            with guard():
                yield from map(_encoded, images[rows[start : start + ROWS_AT_ONCE]]["image"].to_pylist())

    splits = np.repeat([split_number(name) for name in parts], [len(part) for part in parts.values()])
    return Source(classes, labels, read, splits, np.zeros_like(labels))


def _check_columns(schema: pa.Schema, where: str) -> None:
    """Raises UserError if the columns are not images with class labels."""
    if not {"image", "label"} <= set(schema.names):
        raise UserError(f"{where} has no columns 'image' and 'label' but {', '.join(schema.names)}")
    image, label = schema.field("image").type, schema.field("label").type
    is_struct = pa.types.is_struct(image)
    is_image = image.get_field_index("bytes") >= 0 if is_struct else image in (pa.binary(), pa.large_binary())
    if not is_image or pa.types.is_nested(label):
        raise UserError(f"{where}: column 'image' or 'label' does not hold images or class labels but {image} and {label}")


def _class_labels(values: Iterable[Any], feature: Any) -> tuple[list[str], np.ndarray]:
    """Class names and the label (N,) of every row. Where there are no names, the values are the names.

    A row without a value, or with a number that no class has, as -1 in test splits whose labels are kept back, has no label.
    """
    if isinstance(feature, ClassLabel):
        named = dict(enumerate(map(class_name, feature.names)))
        classes = list(dict.fromkeys(filter(None, named.values())))
        names = [class_name(value) if isinstance(value, str) else named.get(value) for value in values]
    else:
        names = [class_name(value) for value in values]
        classes = ordered(filter(None, names))
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, np.array([numbers.get(name, NO_LABEL) for name in names], dtype=np.int64)


def _encoded(image: Any) -> Encoded:
    """What a row holds: the bytes of an image, alone or beside its path, or the path alone."""
    if isinstance(image, dict):
        return image["bytes"] or (Path(image["path"]) if image.get("path") else None)
    return image
