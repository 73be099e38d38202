"""A dataset on the Hub, of which only the byte ranges that are needed are fetched, each once."""

import hashlib
import io
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset_builder
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import HfFileSystem, cached_assets_path
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
    with _way_out(task):
        builder = load_dataset_builder(name)
        files = {split: list(paths) for split, paths in (builder.config.data_files or {}).items()}
        paths = [path for found in files.values() for path in found]
        if not paths or not all(path.endswith(".parquet") for path in paths):
            raise ValueError("it has no images in Parquet files")
        fetch = _Fetch(task, paths)
    guard = partial(_way_out, task, fetch)
    with guard(), locked(fetch.folder, wait=True), ThreadPoolExecutor(CONNECTIONS) as pool:
        deque(pool.map(fetch.opened, paths), maxlen=0)  # so that the footers arrive together
        split_of = [split_number(str(split)) for split, found in files.items() for _ in found]
        source = parquet_source(paths, split_of, fetch.opened, guard, name, builder.info.features)

    def bring(rows: np.ndarray) -> None:
        block_of = source.blocks[rows]
        wanted = [np.sort(rows[block_of == block]) for block in np.unique(block_of)]
        with locked(fetch.folder, wait=True), fetch.progress(np.unique(block_of)), ThreadPoolExecutor(CONNECTIONS) as pool:
            deque(pool.map(lambda part: deque(source.read(part), maxlen=0), wanted), maxlen=0)

    def read(rows: np.ndarray) -> Iterator[Encoded]:
        for image in source.read(rows):
            yield image if isinstance(image, bytes) else None  # a path would be one of this machine, not of the Hub

    return replace(source, read=read, fetch=bring)


@contextmanager
def _way_out(task: Task, fetch: "_Fetch | None" = None) -> Iterator[None]:
    """Turn what goes wrong into one line that says what to do.

    What was fetched stays. A piece that was damaged here does not match its checksum and is fetched anew when it is read;
    deleted are only those pieces of a file that arrived as they are and that Parquet cannot be read from.
    """
    name = task.source.removeprefix(HUB)
    local = (f"use --demo for generated images, or --{task.key}_source for a local copy" if task.demo else
             f"give a local copy: --task {task.key}=FOLDER")
    try:
        yield
    except (DatasetNotFoundError, RepositoryNotFoundError) as error:
        raise UserError(f"the Hub has no dataset {name} that you may read; {local}") from error
    except (OSError, ValueError, TypeError, RuntimeError, DatasetsError, HTTPError, pa.ArrowException) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
        if fetch:
            fetch.forget()
        raise UserError(f"{name} could not be fetched from the Hub ({reason}); check the network and run the same "
                        f"command again, which goes on from here, or {local}") from error


class _Fetch:
    """The Parquet files of one dataset at one revision, what of them is here, and how much was fetched."""

    def __init__(self, task: Task, paths: list[str]):
        self.name, self.paths, self.files = task.name, paths, HfFileSystem()
        revision = self.files.resolve_path(paths[0]).revision
        self.folder = cached_assets_path("context-gated-moe", task.source.removeprefix(HUB), revision)
        self.sizes = {path: self.files.info(path)["size"] for path in paths}
        self.footers: dict[str, pq.FileMetaData] = {}
        self.counting, self.opened_here = threading.Lock(), threading.local()
        self.fetched = self.here_before = 0
        self.bar = tqdm(disable=True)

    def opened(self, path: str) -> pq.ParquetFile:
        """Open one of the files; only its footer is read now."""
        file = self.opened_here.file = _RemoteFile(self, path)
        if path not in self.footers:
            end = self.sizes[path]
            length = int.from_bytes(file.range(end - 8, end)[:4], "little")
            try:
                self.footers[path] = pq.read_metadata(pa.BufferReader(file.range(end - 8 - length, end)))
            except (OSError, ValueError, pa.ArrowException):
                self.forget()
                raise
        return pq.ParquetFile(file, metadata=self.footers[path], buffer_size=PIECE_BYTES, pre_buffer=False)

    def forget(self) -> None:
        """Delete what of the file that this thread opened last was read, if all of it arrived and still it is of no use."""
        file = getattr(self.opened_here, "file", None)
        if file and not file.failed:
            for piece in file.used:
                piece.unlink(missing_ok=True)

    @contextmanager
    def progress(self, blocks: np.ndarray) -> Iterator[None]:
        """Show the fetching of these row groups, numbered through all files, and tell at its end what it came to."""
        footers = [self.footers[path] for path in self.paths]
        groups = [footer.row_group(number) for footer in footers for number in range(footer.num_row_groups)]
        columns = [groups[block].column(number) for block in blocks for number in range(groups[block].num_columns)]
        size = sum(column.total_compressed_size for column in columns if column.path_in_schema.startswith("image"))
        with tqdm(desc=f"{self.name}: fetching", total=size, unit="B", unit_scale=True, disable=None) as self.bar:
            yield
        total = sum(self.sizes.values())
        before = f"; {self.here_before:,} were here from before" if self.here_before else ""
        print(f"{self.name}: fetched {self.fetched:,} of {total:,} bytes ({self.fetched / total:.1%}){before}", flush=True)

    def count(self, here: bool, size: int) -> None:
        """Note that `size` bytes have been fetched, or were here."""
        with self.counting:
            self.here_before += size if here else 0
            self.fetched += 0 if here else size
            self.bar.update(size)


class _RemoteFile(io.RawIOBase):
    """A file on the Hub to read as if it were here: each range that is read is fetched and kept as a file of its own.

    Such a piece begins with the SHA-256 of the rest.
    """

    def __init__(self, fetch: _Fetch, path: str):
        self.fetch, self.path, self.position = fetch, path, 0
        self.pieces = fetch.folder / fetch.files.resolve_path(path).path_in_repo
        self.used: list[Path] = []
        self.failed = False  # a piece could not be had

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to another place."""
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.fetch.sizes[self.path]}
        self.position = starts[whence] + offset
        return self.position

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, or all that follow."""
        start, end = self.position, self.fetch.sizes[self.path]
        self.position = end if size < 0 else min(start + size, end)
        return self.range(start, self.position)

    def range(self, start: int, end: int) -> bytes:
        """These bytes, from here or from the Hub, which is asked again and again, less and less often, if it fails."""
        piece = self.pieces / f"{start}-{end}"
        self.used.append(piece)
        known = piece.read_bytes() if piece.is_file() else b""
        digest, content = known[:DIGEST_BYTES], known[DIGEST_BYTES:]
        here = len(content) == end - start and hashlib.sha256(content).digest() == digest
        if not here:
            self.failed = True
            with self.fetch.files.open(self.path, "rb", cache_type="none") as remote:
                remote.seek(start)
                content = remote.read(end - start)
            if len(content) != end - start:
                raise ConnectionError(f"the Hub sent {len(content)} bytes of {self.path} where {end - start} were asked for")
            self.failed = False
            try:
                with writing(piece) as part:
                    part.write_bytes(hashlib.sha256(content).digest() + content)
            except UserError as error:
                raise UserError(f"{self.fetch.folder} cannot be written ({error.__cause__}); make room or let HF_HOME name a "
                                "folder elsewhere, then run the same command again, which goes on from here") from error
        self.fetch.count(here, end - start)
        return content
