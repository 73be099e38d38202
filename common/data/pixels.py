"""Images of one shape in a safetensors file: written as a stream, read row by row, so that few are ever in memory."""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError

DTYPES = {"U8": torch.uint8, "F32": torch.float32}
TAIL = {"labels": ("I64", "<i8"), "checksums": ("U32", "<u4")}  # what follows the images: a number for each, of these types
LONGEST_HEADER = 2**16  # bytes; a damaged length could ask for any number of them
NO_DIGEST = "0" * 64


class _File:
    """A file that is open for reading, from any thread and any process that was forked, until nothing uses it."""

    def __init__(self, path: Path):
        self.path, self.raw = path, path.open("rb", buffering=0)

    def __del__(self) -> None:
        if hasattr(self, "raw"):
            self.raw.close()

    def fill(self, buffer: memoryview, begin: int) -> bool:
        """Read into all of `buffer` what begins there; False if it cannot be."""
        try:
            content = os.pread(self.raw.fileno(), len(buffer), begin)  # forked processes share the place that seek sets
        except OSError:
            return False
        if whole := len(content) == len(buffer):
            buffer[:] = content
        return whole


@dataclass
class _Part:
    """The images of one split. begin: where they start in the file; known: (N,) which of their checksums (N,) were compared."""

    file: _File
    begin: int
    checksums: np.ndarray
    known: np.ndarray

    def read(self, row: int, image: memoryview) -> None:
        """Fill `image` with the bytes of a row. Raises UserError if they are not those that were written, twice."""
        for _ in range(2):
            whole = self.file.fill(image, self.begin + row * len(image))
            if whole and (self.known[row] or zlib.crc32(image) == self.checksums[row]):
                self.known[row] = True
                return
        raise UserError(f"{self.file.path} is damaged or cannot be read; delete it, then run the same command again, which "
                        "makes it anew")


class StoredImages:
    """Images (N, C, H, W) on disk. Indexing, as of a tensor along its first axis, reads the images asked for and no others.

    The first time that an image is read, its checksum is compared, so that nothing has to be read twice.
    """

    def __init__(self, parts: Sequence[_Part], places: np.ndarray, shape: Sequence[int], dtype: torch.dtype):
        self.parts, self.places = list(parts), places  # (N, 2): number of the part, row in it
        self.shape, self.dtype = torch.Size((len(places), *shape)), dtype

    @property
    def ndim(self) -> int:
        """Four."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all images."""
        return self.shape.numel() * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: Tensor | slice | int) -> Tensor:
        """The images of these rows, on the CPU. Raises UserError if one is damaged."""
        places = self.places[rows.cpu().numpy() if isinstance(rows, Tensor) else rows]
        images = torch.empty((*places.shape[:-1], *self.shape[1:]), dtype=self.dtype)
        size = self.shape[1:].numel() * self.dtype.itemsize
        content = images.view(-1).view(torch.uint8).numpy().reshape(places.size // 2, size)
        for image, (part, row) in zip(content, places.reshape(-1, 2).tolist(), strict=True):
            self.parts[part].read(row, image.data)
        return images

    def take(self, rows: Tensor) -> "StoredImages":
        """These rows, which stay on disk."""
        return StoredImages(self.parts, self.places[rows.cpu().numpy()], self.shape[1:], self.dtype)

    def followed_by(self, other: "StoredImages") -> "StoredImages":
        """These images and those, which stay on disk."""
        places = np.concatenate([self.places, other.places + [len(self.parts), 0]])
        return StoredImages([*self.parts, *other.parts], places, self.shape[1:], self.dtype)


def write(path: Path, counts: dict[str, int], batches: Iterable[tuple[Tensor, list[int]]], of: str) -> None:
    """Write splits of these lengths: images (n, C, H, W) with their labels, some at a time, in the order of the splits.

    of: what they are images of, which `read` compares.
    """
    columns: dict[str, list[int]] = {kind: [] for kind in TAIL}
    blank = b""
    with path.open("wb") as file:
        for images, labels in batches:
            if not blank:
                blank = _header(counts, images.shape[1:], images.dtype, of)
                file.write(blank)
            columns["labels"] += labels
            columns["checksums"] += [zlib.crc32(image) for image in images.numpy()]
            file.write(images.numpy().data)
        tail = b"".join(np.array(column, TAIL[kind][1]).tobytes() for kind, column in columns.items())
        file.write(tail)
        file.seek(0)
        file.write(blank.replace(NO_DIGEST.encode(), hashlib.sha256(blank + tail).hexdigest().encode()))


def _header(counts: dict[str, int], shape: Sequence[int], dtype: torch.dtype, of: str) -> bytes:
    """How a safetensors file begins: the length of a JSON text, and that text, with room for a digest of it and the tail."""
    name = next(name for name, known in DTYPES.items() if known == dtype)
    content: dict[str, Any] = {"__metadata__": {"of": of, "sha256": NO_DIGEST}}
    end = 0
    for kind, of_file, size, of_row in [("images", name, math.prod(shape) * dtype.itemsize, list(shape)), *(
            (kind, of_file, np.dtype(of_numpy).itemsize, []) for kind, (of_file, of_numpy) in TAIL.items())]:
        for split, count in counts.items():
            begin, end = end, end + count * size
            content[f"{split}.{kind}"] = {"dtype": of_file, "shape": [count, *of_row], "data_offsets": [begin, end]}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read(path: Path, counts: dict[str, int], of: str) -> dict[str, tuple[StoredImages, Tensor]] | None:
    """The images and labels (N,) of each split; None if there is no file, or it is damaged or of something else.

    Only what is no image is read and checked here: the rest when it is used.
    """
    total = sum(counts.values())
    try:
        file = _File(path)
        size = file.raw.seek(0, os.SEEK_END)
        tail_at = file.raw.seek(size - total * sum(np.dtype(kind).itemsize for _, kind in TAIL.values()))
        tail = file.raw.read()
        file.raw.seek(0)
        head = file.raw.read(8)
        head += file.raw.read(min(int.from_bytes(head, "little"), LONGEST_HEADER))
        content = json.loads(head[8:])
        digest = content["__metadata__"]["sha256"]
        head = head.replace(digest.encode(), NO_DIGEST.encode())
        if hashlib.sha256(head + tail).hexdigest() != digest or content["__metadata__"]["of"] != of:
            return None
        places = {name: [len(head) + offset for offset in info["data_offsets"]]
                  for name, info in content.items() if name != "__metadata__"}
        if max(end for _, end in places.values()) != size:
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    found = {}
    for split, count in counts.items():
        info = content[f"{split}.images"]
        labels, checksums = (np.frombuffer(tail, of_numpy, count, places[f"{split}.{kind}"][0] - tail_at)
                             for kind, (_, of_numpy) in TAIL.items())
        part = _Part(file, places[f"{split}.images"][0], checksums, np.zeros(count, dtype=bool))
        rows = np.stack([np.zeros(count, dtype=np.int64), np.arange(count)], axis=1)
        found[split] = (StoredImages([part], rows, info["shape"][1:], DTYPES[info["dtype"]]),
                        torch.from_numpy(labels.astype(np.int64)))
    return found
