"""Where images come from: generated ones, folders, zips, Parquet, saved datasets. All are read label first, images later."""

import importlib
import os
import signal
import threading
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, concatenate_datasets, load_from_disk
from datasets.exceptions import DatasetsError
from PIL import Image as PILImage

from common.data.images import IMAGE_FILES, Encoded, ImageFile, png
from common.errors import UserError
from common.files import is_unicode
from common.tasks import Task

NESTING = 3  # folders within folders that are searched for those of the classes
ROWS_AT_ONCE = 32  # of Arrow and Parquet; an image may have a megabyte
LARGEST_IMAGE = 2**30  # bytes in a zip, where a small file may unpack to any size
NO_LABEL = -1


@dataclass
class Source:
    """Labelled images, of which any rows can be read in ascending order, a few at a time.

    labels: (N,) int64, positions in `classes` or NO_LABEL. blocks: (N,) int64, rows of one number come together or not
    at all, so the choice of images keeps to few of them. read: ascending row numbers -> these images, in this order.
    fetch: brings these rows here before they are read.
    """

    classes: list[str]
    labels: np.ndarray
    blocks: np.ndarray
    read: Callable[[np.ndarray], Iterator[Encoded]]
    fetch: Callable[[np.ndarray], None] = lambda rows: None


def local_source(source: Path, task: Task) -> Source:
    """Open a folder of class subfolders, a zip of it, a saved Dataset or DatasetDict, or Parquet files.

    Raises UserError if there is nothing of the kind, or it cannot be read.
    """
    flag = task.source_flag
    if not source.exists():
        raise UserError(f"{flag} does not exist")
    if zipfile.is_zipfile(source):
        return _zip_source(source, flag)
    kind, parquet = "Parquet", [source]
    if source.is_file():
        kind += "" if source.suffix.lower() == ".parquet" else " or a zip"
    elif any((source / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _saved_source(source, flag)
    else:
        parquet = sorted(path for path in source.rglob("*.parquet") if path.is_file() and not path.name.startswith("."))
    if not parquet:
        return _folder_source(source, flag)
    return parquet_source(parquet, _open_local, partial(_readable, flag, kind), flag)


# ---- generated ----


def demo_source(task: Task, seed: int, per_class: int) -> Source:
    """Generate the demo's images, the same for the same seed, on all cores."""
    classes = generator(task).CLASS_NAMES
    labels = np.repeat(np.arange(len(classes)), per_class)

    def read(rows: np.ndarray) -> Iterator[bytes]:
        jobs = [(task, seed, int(labels[row]), int(row) % per_class) for row in rows]
        with ProcessPoolExecutor(initializer=_serve, initargs=(os.getpid(),)) as pool:
            yield from pool.map(_demo_image, jobs, chunksize=16)

    return Source(list(classes), labels, np.zeros_like(labels), read)


def generator(task: Task) -> ModuleType:
    """The module that generates a task's images."""
    return importlib.import_module(f"common.demo.{task.demo}")


def _serve(parent: int) -> None:
    """Leave Ctrl-C to the parent process, and end when that ends, however it does: a pool would wait for it for ever."""
    def watch() -> None:
        while os.getppid() == parent:
            watching.wait(1)
        os._exit(1)

    watching = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _demo_image(job: tuple[Task, int, int, int]) -> bytes:
    task, seed, label, index = job
    rng = np.random.default_rng([zlib.crc32(task.key.encode()), seed, label, index])
    return png(PILImage.fromarray(generator(task).render(label, rng)))


# ---- folders and zips ----


def _zip_source(path: Path, flag: str) -> Source:
    """A zip of class folders, read in place: nothing is unpacked, so none of its paths can lead anywhere else."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{flag} cannot be read as a zip ({error})") from error
    for entry in archive.infolist():
        if entry.flag_bits & 1:
            raise UserError(f"{flag} is encrypted; unpack it and give the folder")
        if entry.file_size > LARGEST_IMAGE and Path(entry.filename).suffix.lower() in IMAGE_FILES:
            size = f"{entry.file_size / 1e9:.0f} GB"
            raise UserError(f"{flag} holds {entry.filename} of {size}, too large for an image; remove it")
    return _folder_source(zipfile.Path(archive), flag)


def _folder_source(source: Path | zipfile.Path, flag: str) -> Source:
    """Images in one subfolder a class."""
    folders = _class_folders(source, flag, NESTING)
    if not folders:
        raise UserError(f"{flag} has neither subfolders with images nor Parquet files nor a saved dataset")
    images = [image for _, found in folders for image in found]
    labels = np.repeat(np.arange(len(folders)), [len(found) for _, found in folders])
    return Source([name for name, _ in folders], labels, np.zeros_like(labels), lambda rows: (images[row] for row in rows))


def _class_folders(folder: Path | zipfile.Path, flag: str, depth: int) -> list[tuple[str, list[ImageFile]]]:
    """Name and images of every subfolder that holds images; those one level deeper if there are none."""
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))]
    found = [(unicodedata.normalize("NFC", inner.name), images) for inner in folders if (images := _images_in(inner))]
    for name, _ in found:
        if not is_unicode(name):
            raise UserError(f"{flag} has a class whose name is no UTF-8: {name}; rename the folder")
    if found or depth == 1:
        return found
    deeper = {inner.name: classes for inner in folders if (classes := _class_folders(inner, flag, depth - 1))}
    if len(deeper) > 1:
        raise UserError(f"{flag} has classes in several folders ({', '.join(deeper)}); give one of them")
    return next(iter(deeper.values()), [])


def _images_in(folder: Path | zipfile.Path) -> list[ImageFile]:
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    return [entry for entry in entries if Path(entry.name).suffix.lower() in IMAGE_FILES and not entry.name.startswith(".")]


# ---- Parquet and saved datasets ----


def parquet_source(
        files: Sequence[Any], opened: Callable[[Any], pq.ParquetFile], guard: Callable[[], AbstractContextManager],
        where: str, features: Features | None = None) -> Source:
    """Images in Parquet files with columns `image` and `label`, of which only what is asked for is read.

    opened: makes a ParquetFile of one of `files`. guard: what every read happens within, to name what goes wrong.
    features: what is known better than the files know it. Raises UserError, beginning with `where`, on other columns.
    """
    values: list[Any] = []
    groups = []  # file, row group in it, number of its first row in all files, how many rows it has
    columns: list[Any] = []  # what `image` and `label` are in the first file, and have to be in every other
    for path in files:
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

    def read(rows: np.ndarray) -> Iterator[Encoded]:
        for path, group, start, count in groups:
            wanted = rows[(rows >= start) & (rows < start + count)] - start
            if len(wanted):
                with guard(), opened(path) as file:
                    for first, batch in _batches(file, group):
                        inside = wanted[(wanted >= first) & (wanted < first + len(batch))] - first
                        yield from map(_encoded, batch.column("image").take(inside).to_pylist())

    with guard():
        classes, labels = _class_labels(values, columns[1])
    return Source(classes, labels, np.repeat(np.arange(len(groups)), [count for *_, count in groups]), read)


def _batches(file: pq.ParquetFile, group: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The images of a row group a few at a time, each time with the number of the first."""
    first = 0
    for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=["image"]):
        yield first, batch
        first += len(batch)


def _group_labels(file: pq.ParquetFile, group: int) -> list[Any]:
    """The labels of a row group. Where they are one number, as in a sorted dataset, the file's footer has it already."""
    columns = file.metadata.row_group(group)
    column = next(c for c in map(columns.column, range(columns.num_columns)) if c.path_in_schema == "label")
    known = column.statistics if column.physical_type in ("INT32", "INT64") else None
    if known and known.has_min_max and known.null_count == 0 and known.min == known.max:
        return [known.min] * columns.num_rows
    return file.read_row_group(group, columns=["label"])["label"].to_pylist()


def _open_local(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)  # a piece at a time: a row group may have gigabytes


@contextmanager
def _readable(where: str, kind: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, DatasetsError, pa.ArrowException) as error:
        raise UserError(f"{where} cannot be read as {kind} ({error})") from error


def _saved_source(folder: Path, where: str) -> Source:
    """A Dataset or all splits of a DatasetDict that `save_to_disk` wrote."""

    def opened() -> Dataset:
        with _readable(where, "a saved dataset"):
            saved = load_from_disk(str(folder))
            saved = concatenate_datasets([*saved.values()]) if isinstance(saved, DatasetDict) else saved
            return saved.with_format("arrow")

    def read(rows: np.ndarray) -> Iterator[Encoded]:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            with _readable(where, "a saved dataset"):  # opened anew each time, so that what was read leaves the memory
                images = opened()[rows[start : start + ROWS_AT_ONCE]]["image"].to_pylist()
            yield from map(_encoded, images)

    dataset = opened()
    _check_columns(dataset.features.arrow_schema, where)
    with _readable(where, "a saved dataset"):
        classes, labels = _class_labels(dataset.with_format(None)["label"], dataset.features["label"])
    return Source(classes, labels, np.zeros_like(labels), read)


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
    """Class names and the label (N,) of every row. Where there are no names, the values are the names."""
    values = list(values)
    if not isinstance(feature, ClassLabel):
        values = [None if value is None else str(value) for value in values]
        feature = ClassLabel(names=sorted({value for value in values if value is not None}))
    known = {name: number for number, name in enumerate(feature.names)}
    labels = [NO_LABEL if value is None else known.get(value, value) for value in values]
    return feature.names, np.array(labels, dtype=np.int64)


def _encoded(image: Any) -> Encoded:
    """What a row holds: the bytes of an image, alone or beside its path, or the path alone."""
    if isinstance(image, dict):
        return image["bytes"] or (Path(image["path"]) if image.get("path") else None)
    return image
