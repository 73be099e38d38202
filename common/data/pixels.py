"""Images of one shape in a NumPy file: written as a stream, read row by row through a memory map, so that few are in memory."""

import mmap
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError


@dataclass
class _Part:
    """The images of one file: a memory map (M, C, H, W), and (M,) the CRC-32 of each and whether that was compared."""

    images: np.memmap
    checksums: np.ndarray
    verified: np.ndarray

    def read(self, row: int) -> np.ndarray:
        """One image. Raises UserError if it is damaged."""
        image = self.images[row]
        if not self.verified[row] and zlib.crc32(image) != self.checksums[row]:
            raise UserError(f"{self.images.filename} is damaged or cannot be read; delete it, then run the same command again, "
                            "which makes it anew")
        self.verified[row] = True
        return image


class StoredImages:
    """Images (N, C, H, W) on disk. Indexing, as of a tensor along its first axis, reads the images asked for and no others.

    rows: (N, 2) int64, the part and the row in it of each image. shape, ndim, dtype, nbytes: as of a tensor.
    """

    def __init__(self, parts: list[_Part], rows: np.ndarray):
        self.parts, self.rows = parts, rows
        images = parts[0].images
        self.shape, self.ndim = torch.Size((len(rows), *images.shape[1:])), images.ndim
        self.dtype, self.nbytes = getattr(torch, images.dtype.name), self.shape.numel() * images.itemsize

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor | slice | int) -> Tensor:
        """The images of these rows, on the CPU. Raises UserError the first time that a damaged one is read."""
        rows = self.rows[rows.cpu().numpy() if isinstance(rows, Tensor) else rows]
        images = torch.empty((*rows.shape[:-1], *self.shape[1:]), dtype=self.dtype)
        for image, (part, row) in zip(images.view(-1, *self.shape[1:]).numpy(), rows.reshape(-1, 2), strict=True):
            image[...] = self.parts[part].read(row)
        for part in self.parts:
            part.images._mmap.madvise(mmap.MADV_DONTNEED)  # what was read leaves this process's memory
        return images

    def take(self, rows: Tensor) -> "StoredImages":
        """These rows, which stay on disk."""
        return StoredImages(self.parts, self.rows[rows.cpu().numpy()])

    def followed_by(self, other: "StoredImages") -> "StoredImages":
        """These images and those, which stay on disk."""
        return StoredImages([*self.parts, *other.parts], np.concatenate([self.rows, other.rows + [len(self.parts), 0]]))


def write(path: Path, counts: dict[str, int], batches: Iterable[tuple[Tensor, list[int]]], of: str) -> None:
    """Write splits of these lengths: images (n, C, H, W) with their labels, some at a time, in the order of the splits.

    of: what they are images of, which `read` compares.
    """
    labels: list[int] = []
    checksums: list[int] = []
    with path.open("wb") as file:  # not through a map: a full disk would end the process
        for images, labels_of_batch in batches:
            pixels = images.numpy()
            if not labels:
                np.lib.format.write_array_header_1_0(file, {
                    "descr": pixels.dtype.str, "fortran_order": False, "shape": (sum(counts.values()), *pixels.shape[1:])})
            file.write(pixels.data)
            labels += labels_of_batch
            checksums += map(zlib.crc32, pixels)
        about = np.array(labels, np.int64), np.array(checksums, np.uint32)
        for array in (*about, _seal(of, *about)):
            np.save(file, array)


def read(path: Path, counts: dict[str, int], of: str) -> dict[str, tuple[StoredImages, Tensor]] | None:
    """The images and labels (N,) of each split; None if there is no file, or it is damaged or of something else.

    Only what is no image is read and checked here: the rest when it is used.
    """
    try:
        images = np.load(path, mmap_mode="r")
        with path.open("rb") as file:
            file.seek(images.offset + images.nbytes)
            labels, checksums, seal = (np.load(file) for _ in range(3))
        if seal != _seal(of, labels, checksums) or not len(images) == len(labels) == sum(counts.values()):
            return None
    except Exception:  # NumPy raises whatever it comes upon in a damaged file
        return None
    part = _Part(images, checksums, np.zeros(len(images), dtype=bool))
    rows = np.stack([np.zeros_like(labels), np.arange(len(labels))], axis=1)
    splits = np.split(np.arange(len(labels)), np.cumsum([*counts.values()])[:-1])
    return {name: (StoredImages([part], rows[split]), torch.from_numpy(labels[split]))
            for name, split in zip(counts, splits, strict=True)}


def _seal(of: str, labels: np.ndarray, checksums: np.ndarray) -> np.ndarray:
    """A text that no other images and no damaged numbers have."""
    return np.array(f"{of} {zlib.crc32(labels.tobytes() + checksums.tobytes())}")
