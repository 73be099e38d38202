"""The files below a folder: the same for preparation, of images and of Parquet files, and for `predict`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.data.images import ImageFile, image_endings
from common.errors import UserError

# How the names begin of what systems put beside files: ._00.png and .ipynb_checkpoints, of macOS zips, Synology, Windows.
HIDDEN = (".", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")


@dataclass(frozen=True)
class File:
    """A file below a folder or in a zip. parts: the folders that lead to it, and its name."""

    parts: tuple[str, ...]
    content: ImageFile

    @property
    def ending(self) -> str:
        """`.png`, in lower case."""
        return Path(self.parts[-1]).suffix.lower()

    @property
    def is_image(self) -> bool:
        """By its ending."""
        return self.ending in image_endings()

    def __str__(self) -> str:
        return "/".join(self.parts)


def walk(folder: Path) -> Iterator[File]:
    """Every file below a folder, in the order of their parts: links followed, hidden ones left out, and what is no file on a
    disk, such as a FIFO; but not a link to nothing, which is an image that is missing.

    Raises UserError if a folder may not be read.
    """
    try:
        yield from _walk(folder, (), (Path(os.path.realpath(folder)),))
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read ({error.strerror}); allow it or leave it out") from error


def _walk(folder: Path, parts: tuple[str, ...], above: tuple[Path, ...]) -> Iterator[File]:
    """above: the real paths of all folders that led here; a link to what one of these is in has no end."""
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name.startswith(HIDDEN):
            continue
        if path.is_dir():
            real = Path(os.path.realpath(path))
            if not any(one.is_relative_to(real) for one in above):
                yield from _walk(path, (*parts, name), (*above, real))
        elif path.is_file() or not path.exists():
            yield File((*parts, name), path)
