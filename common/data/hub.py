"""A dataset on the Hub, of which only the byte ranges that are needed are fetched, each once."""

import hashlib
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset_builder
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import HfFileSystem, HfFileSystemFile, cached_assets_path
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from tqdm import tqdm

from common.data.images import Encoded
from common.data.sources import Source, split_number
from common.data.tables import parquet_source
from common.errors import UserError
from common.files import locked, writing
from common.tasks import HUB, Task

PIECE_BYTES = 2**23  # what one request fetches, and what is fetched anew when it breaks off
CONNECTIONS = 4
DIGEST_BYTES = 32  # of SHA-256


def hub_source(task: Task) -> Source:
    """A task's dataset, in Parquet files, as it is now.

    What was fetched stays in the cache of huggingface_hub, below HF_HOME: an interrupted fetch goes on, and no other run
    fetches it again. Raises UserError with the way out if something cannot be had.
    """
    name = task.source.removeprefix(HUB)
    print(f"{task.name}: fetching {name} from the Hub", flush=True)
    guard = partial(_way_out, task)
    with guard():
        builder = load_dataset_builder(name)
        files = {split: list(paths) for split, paths in (builder.config.data_files or {}).items()}
        paths = [path for found in files.values() for path in found]
        if not paths or not all(path.endswith(".parquet") for path in paths):
            raise ValueError("it has no images in Parquet files")
        fetch = _Fetch(task, paths)
    with guard(), locked(fetch.folder, wait=True), ThreadPoolExecutor(CONNECTIONS) as pool:
        deque(pool.map(fetch.opened, paths), maxlen=0)  # so that the footers arrive together
        split_of = [split_number(str(split)) for split, found in files.items() for _ in found]
        source = parquet_source(paths, split_of, fetch.opened, guard, name, builder.info.features)

    def fetch_rows(rows: np.ndarray) -> None:
        block_of = source.blocks[rows]
        wanted = [np.sort(rows[block_of == block]) for block in np.unique(block_of)]
        with locked(fetch.folder, wait=True), fetch.progress(np.unique(block_of)), ThreadPoolExecutor(CONNECTIONS) as pool:
            deque(pool.map(lambda part: deque(source.read(part), maxlen=0), wanted), maxlen=0)

    def read(rows: np.ndarray) -> Iterator[Encoded]:
        for image in source.read(rows):
            yield image if isinstance(image, bytes) else None  # a path would be one of this machine, not of the Hub

    return replace(source, read=read, fetch=fetch_rows)


@contextmanager
def _way_out(task: Task) -> Iterator[None]:
    """Turn what goes wrong into one line that says what to do. What was fetched stays."""
    name = task.source.removeprefix(HUB)
    local = (f"use --demo for generated images, or --{task.key}_source for a local copy" if task.demo else
             f"give a local copy: --task {task.key}=FOLDER")
    try:
        yield
    except (DatasetNotFoundError, RepositoryNotFoundError) as error:
        raise UserError(f"the Hub has no dataset {name} that you may read; {local}") from error
    except (OSError, ValueError, TypeError, RuntimeError, DatasetsError, HTTPError, pa.ArrowException) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
        raise UserError(f"{name} could not be fetched from the Hub ({reason}); check the network and run the same "
                        f"command again, which goes on from here, or {local}") from error


class _Fetch:
    """The Parquet files of one dataset at one revision, what of them is cached, and how much was fetched."""

    def __init__(self, task: Task, paths: list[str]):
        self.name, self.paths, self.files = task.name, paths, HfFileSystem()
        revision = self.files.resolve_path(paths[0]).revision
        self.folder = cached_assets_path("context-gated-moe", task.source.removeprefix(HUB), revision)
        self.sizes = {path: self.files.info(path)["size"] for path in paths}
        self.footers: dict[str, pq.FileMetaData] = {}
        self.lock = threading.Lock()
        self.fetched = self.cached = 0
        self.bar = tqdm(disable=True)

    def opened(self, path: str) -> pq.ParquetFile:
        """Open one of the files; only its footer is read now."""
        file = _CachedFile(self, path)
        if path not in self.footers:
            end = self.sizes[path]
            length = int.from_bytes(file._fetch_range(end - 8, end)[:4], "little")
            self.footers[path] = pq.read_metadata(pa.BufferReader(file._fetch_range(end - 8 - length, end)))
        return pq.ParquetFile(file, metadata=self.footers[path], buffer_size=PIECE_BYTES, pre_buffer=False)

    @contextmanager
    def progress(self, blocks: np.ndarray) -> Iterator[None]:
        """A bar while these row groups, numbered through all files, are fetched, and a line on how much that was."""
        footers = [self.footers[path] for path in self.paths]
        groups = [footer.row_group(number) for footer in footers for number in range(footer.num_row_groups)]
        columns = [groups[block].column(number) for block in blocks for number in range(groups[block].num_columns)]
        size = sum(column.total_compressed_size for column in columns if column.path_in_schema.startswith("image"))
        with tqdm(desc=f"{self.name}: fetching", total=size, unit="B", unit_scale=True, disable=None) as self.bar:
            yield
        total = sum(self.sizes.values())
        before = f"; {self.cached:,} were here from before" if self.cached else ""
        print(f"{self.name}: fetched {self.fetched:,} of {total:,} bytes ({self.fetched / total:.1%}){before}", flush=True)


class _CachedFile(HfFileSystemFile):
    """A file on the Hub of which each range that is read is fetched once and kept as a file of its own, behind its SHA-256."""

    def __init__(self, fetch: _Fetch, path: str):
        super().__init__(fetch.files, path, cache_type="none", size=fetch.sizes[path])
        self.fetch = fetch

    def _fetch_range(self, start: int, end: int) -> bytes:
        piece = self.fetch.folder / self.resolved_path.path_in_repo / f"{start}-{end}"
        stored = piece.read_bytes() if piece.is_file() else b""
        content = stored[DIGEST_BYTES:]
        cached = len(content) == end - start and hashlib.sha256(content).digest() == stored[:DIGEST_BYTES]
        if not cached:
            content = super()._fetch_range(start, end)
            if len(content) != end - start:
                raise ConnectionError(f"the Hub sent {len(content)} bytes of {self.path} where {end - start} were asked for")
            try:
                with writing(piece) as part:
                    part.write_bytes(hashlib.sha256(content).digest() + content)
            except UserError as error:
                raise UserError(f"{self.fetch.folder} cannot be written ({error.__cause__}); make room or let HF_HOME name a "
                                "folder elsewhere, then run the same command again, which goes on from here") from error
        with self.fetch.lock:
            self.fetch.cached += len(content) if cached else 0
            self.fetch.fetched += 0 if cached else len(content)
            self.fetch.bar.update(len(content))
        return content
