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
    """A file below a folder or in a zip. parts: the folders that lead to it from there, and its name."""

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


def hidden(name: str) -> bool:
    """Whether a file or a folder of this name is none of the user's."""
    return name.startswith(HIDDEN)


def walk(folder: Path) -> Iterator[File]:
    """Every file below a folder, in the order of their parts: links followed, hidden ones left out.

    What is no file on a disk, such as a FIFO, is left out too, but not a link to nothing or an empty folder with the name of
    an image, which are images that are missing. Raises UserError if a folder may not be read.
    """
    try:
        yield from _walk(folder, (), (os.path.realpath(folder),))
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read ({error.strerror}); allow it or leave it out") from error


def _walk(folder: Path, parts: tuple[str, ...], above: tuple[str, ...]) -> Iterator[File]:
    """above: the real paths of all folders that led here; a link to what one of these is in has no end."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path, inside = folder / entry.name, (*parts, entry.name)
        if hidden(entry.name):
            continue
        if not entry.is_dir():
            if entry.is_file() or not path.exists():
                yield File(inside, path)
            continue
        real = os.path.realpath(path)
        if any(f"{one}/".startswith(f"{real.rstrip('/')}/") for one in above):
            continue
        if (file := File(inside, path)).is_image and not os.listdir(path):
            yield file
        else:
            yield from _walk(path, inside, (*above, real))
