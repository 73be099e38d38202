"""Images of one shape in a NumPy file: written as a stream, read row by row through a memory map, so that few are in memory."""

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass
class StoredImages:
    """Images (N, C, H, W) on disk. Indexing, as of a tensor along its first axis, reads the images asked for and no others.

    parts: memory maps of images (M, C, H, W). rows: (N, 2) int64, part and row in it of each image.
    """

    parts: list[np.memmap]
    rows: np.ndarray

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self.rows), *self.parts[0].shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors that indexing gives."""
        return torch.from_numpy(np.empty(0, self.parts[0].dtype)).dtype

    @property
    def ndim(self) -> int:
        """Four."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all images."""
        return self.shape.numel() * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor | slice | int) -> Tensor:
        """The images of these rows, on the CPU."""
        rows = self.rows[rows.cpu().numpy() if isinstance(rows, Tensor) else rows]
        images = np.empty((*rows.shape[:-1], *self.shape[1:]), self.parts[0].dtype)
        for image, (part, row) in zip(images.reshape(-1, *self.shape[1:]), rows.reshape(-1, 2), strict=True):
            image[...] = self.parts[part][row]
        for part in self.parts:
            part._mmap.madvise(mmap.MADV_DONTNEED)  # what was read leaves this process's memory
        return torch.from_numpy(images)

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
    with path.open("wb") as file:  # not through a map: a full disk would end the process
        every: list[int] = []
        for images, labels in batches:
            if not every:
                np.lib.format.write_array_header_1_0(file, {
                    "descr": images.numpy().dtype.str, "fortran_order": False, "shape": (sum(counts.values()), *images.shape[1:])})
            file.write(images.numpy().data)
            every += labels
        np.save(file, np.array(every))
        np.save(file, np.array(of))


def read(path: Path, counts: dict[str, int], of: str) -> dict[str, tuple[StoredImages, Tensor]] | None:
    """The images and labels (N,) of each split; None if there is no such file, or it is cut short or of something else."""
    try:
        images = np.load(path, mmap_mode="r")
        with path.open("rb") as file:
            file.seek(images.offset + images.nbytes)
            labels = np.load(file)
            if str(np.load(file)) != of or not len(images) == len(labels) == sum(counts.values()):
                return None
    except Exception:  # NumPy raises whatever it comes upon in a damaged file
        return None
    ends = np.cumsum([0, *counts.values()])
    rows = np.stack([np.zeros_like(labels), np.arange(len(labels))], axis=1)
    return {split: (StoredImages([images], rows[start:end]), torch.from_numpy(labels[start:end]))
            for split, start, end in zip(counts, ends[:-1], ends[1:], strict=True)}
