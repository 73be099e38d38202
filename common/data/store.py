"""The folder of prepared images of one task: a DatasetDict that plain `datasets` opens, written and read as a stream."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Image

from common.cli.flags import RunFlags
from common.cli.parser import command
from common.errors import UserError
from common.files import read_json
from common.tasks import Task

MANIFEST_FILE = "manifest.json"
# What every manifest holds, among other things.
MANIFEST = {
    "classes": [str], "images": {"train": int, "validation": int, "test": int}, "fingerprint": str, "source": str,
    "damaged": int, "near_duplicates_in_test": int,
}
ROWS_AT_ONCE = 32  # images in one record batch

Row = tuple[bytes, int]  # an encoded image and its label


def write_splits(folder: Path, splits: dict[str, Iterable[Row]], classes: list[str], fingerprint: str) -> None:
    """Write every split; no more than a batch of images is in memory."""
    features = Features({"image": Image(), "label": ClassLabel(names=classes)})
    schema = features.arrow_schema
    DatasetDict({
        name: Dataset(schema.empty_table(), DatasetInfo(features=features), fingerprint=f"{fingerprint[:12]}_{name}")
        for name in splits
    }).save_to_disk(folder, num_shards=dict.fromkeys(splits, 1))  # the frame; its data files are empty yet
    for name, rows in splits.items():
        path, = (folder / name).glob("data-*.arrow")
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            rows = iter(rows)
            while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
                images = [{"bytes": content, "path": None} for content, _ in batch]
                columns = [pa.array(images, schema.field("image").type), pa.array([label for _, label in batch], pa.int64())]
                writer.write_batch(pa.record_batch(columns, schema=schema))


def read_split(folder: Path, name: str) -> Iterator[list[Row]]:
    """The rows of one split, some at a time. If it is damaged, pyarrow raises whatever it comes upon."""
    for path in sorted((folder / name).glob("data-*.arrow")):
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:  # not mapped: what was read leaves memory
            for batch in reader:
                batch.validate(full=True)
                images = batch.column("image").to_pylist()
                yield list(zip([image["bytes"] for image in images], batch.column("label").to_pylist(), strict=True))


def fingerprint(splits: dict[str, Iterable[tuple[bytes, int]]]) -> str:
    """SHA-256 of all images, each given by its own SHA-256 and its label, in the order of the splits."""
    digest = hashlib.sha256()
    for name, rows in splits.items():
        digest.update(name.encode())
        for image, label in rows:
            digest.update(image + label.to_bytes(max(1, (label.bit_length() + 7) // 8)))
    return digest.hexdigest()


def read_manifest(task: Task, config: RunFlags) -> dict[str, Any]:
    """What the prepared data of a task were made from. Raises UserError if there are none."""
    folder = Path(config.root) / task.dataset_folder
    if not (folder / MANIFEST_FILE).exists():
        raise UserError(f"there are no images of {task.name} in {folder}; run {command('Data_Preparation', config)}")
    fix = f"run {command('Data_Preparation', config)} --overwrite"
    manifest = read_json(folder / MANIFEST_FILE, fix, MANIFEST)
    info = read_json(folder / "train" / "dataset_info.json", fix)  # as datasets wrote it
    if manifest["classes"] != info.get("features", {}).get("label", {}).get("names"):
        raise UserError(f"{folder / MANIFEST_FILE} names other classes than the images have; {fix}")
    return manifest
