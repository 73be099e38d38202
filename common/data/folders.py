"""Folders and zips of images: class folders, these inside split folders, or a metadata file; whatever fits none is refused."""

import csv
import io
import json
import os
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.data.sources import NO_LABEL, NO_SPLIT, TRAIN, Source, first_few, ordered, readable, split_number
from common.data.walk import HIDDEN, File
from common.errors import UserError
from common.files import is_unicode
from common.tasks import class_name

LARGEST_IMAGE = 2**30  # bytes in a zip, where a small file may unpack to any size
METADATA_FILES = ("metadata.csv", "metadata.jsonl")
METADATA_COLUMNS = {"file_name", "label"}
UTF8_NAME = 0x800  # the flag of an entry of a zip whose name is UTF-8
UNICODE_PATH = 0x7075  # the extra field that has the name as UTF-8 where the name itself is in an older encoding


@dataclass(frozen=True)
class _ZipMember:
    """A file in a zip, read in place."""

    archive: zipfile.ZipFile
    entry: zipfile.ZipInfo
    name: str

    def read_bytes(self) -> bytes:
        return self.archive.read(self.entry)

    def __str__(self) -> str:
        return f"{self.archive.filename}/{self.name}"


def zip_source(path: Path, where: str, encoding: str | None) -> Source:
    """Images in a zip, read in place: nothing is unpacked, so none of its paths can lead anywhere else.

    encoding: of names that do not tell it. Raises UserError, as `files_source` does, or if the zip cannot be read.
    """
    with readable(where, f"a zip with names in {encoding}, the --zip_encoding" if encoding else "a zip"):
        archive = zipfile.ZipFile(path, metadata_encoding=encoding)
    return files_source(list(_entries(archive, where)), where)


def _entries(archive: zipfile.ZipFile, where: str) -> Iterator[File]:
    """Every file in a zip. Of two of one name the later counts, as it does when the zip is unpacked."""
    found, guessed = {}, []
    for entry in archive.infolist():
        name, sure = _name(entry, archive.metadata_encoding)
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if not parts or name[0] == "/" or name[-1] == "/" or any(part.startswith(HIDDEN) for part in parts):  # so does `..`
            continue
        file = found[parts] = File(parts, _ZipMember(archive, entry, "/".join(parts)))
        if file.is_image and entry.file_size > LARGEST_IMAGE:
            raise UserError(f"{where} holds {name} of {entry.file_size / 1e9:.0f} GB, too large for an image; remove it")
        guessed += [] if sure else [name]
    if guessed:
        print(f"{where}: {len(guessed):,} names are not in UTF-8 and read as code page 437 ({first_few(guessed)}); if they look "
              "wrong, add --zip_encoding with the one they were written in, such as cp866 or gbk", flush=True)
    yield from found.values()


def _name(entry: zipfile.ZipInfo, encoding: str | None) -> tuple[str, bool]:
    """The name of an entry of a zip, and whether that is sure.

    Wherever the zip does not say UTF-8, Python takes names for those of `encoding` or, without, of code page 437.
    """
    name, sure = entry.orig_filename, True
    if not entry.flag_bits & UTF8_NAME:
        raw, extra = name.encode(encoding or "cp437"), entry.extra
        while len(extra) >= 4:
            kind, size = (int.from_bytes(extra[start : start + 2], "little") for start in (0, 2))
            if kind == UNICODE_PATH and size > 5:  # after a version and a checksum of the other name
                raw, encoding = extra[9 : 4 + size], None
            extra = extra[4 + size :]
        try:
            name = name if encoding else raw.decode()
        except UnicodeDecodeError:
            sure = False
    return name.partition("\0")[0].replace("\\", "/"), sure


def files_source(files: list[File], where: str) -> Source:
    """The images among the files of a folder or a zip; how many other files there are is printed.

    Raises UserError, beginning with `where`, if their labels are not clear or an image would be left out.
    """
    images = [file for file in files if file.is_image]
    others = [file for file in files if not file.is_image]
    if not images:
        endings = ", ".join(sorted({file.ending or "nothing" for file in others})) or "nothing: there are none"
        raise UserError(f"{where} has neither subfolders with images nor Parquet files nor a saved dataset; its files end in "
                        f"{endings}")
    tables = {file: _rows(file, where) for file in others if file.parts[-1].lower() in METADATA_FILES}
    if tables and all(set(row) >= METADATA_COLUMNS for rows in tables.values() for row in rows):
        labels, splits = _by_metadata(images, tables, where)
        others = [file for file in others if file not in tables]
    else:
        labels, splits = _by_folders(images, others, where)
    if others:
        endings = Counter(file.ending or "no ending" for file in others)
        print(f"{where}: passed over {len(others):,} files that are no images by their endings: "
              f"{', '.join(f'{count:,} {ending}' for ending, count in endings.most_common())}", flush=True)
    return _sorted_by_class(images, labels, splits, where)


def _sorted_by_class(files: list[File], labels: list[str | None], splits: list[int], where: str) -> Source:
    """The images of these files, with the class of each, None if it has none, and the split that the source has it in."""
    names = [class_name(label) for label in labels]
    classes = ordered(name for name in names if name is not None)
    for name in classes:
        if not is_unicode(name):
            raise UserError(f"{where} has a class whose name is no UTF-8: {name}; rename the folder")
    number: dict[str | None, int] = {name: label for label, name in enumerate(classes)}
    numbers = np.array([number.get(name, NO_LABEL) for name in names], dtype=np.int64)
    order = sorted(range(len(files)), key=lambda row: (numbers[row], files[row].parts))
    return Source(classes, numbers[order], lambda rows: (files[order[row]].content for row in rows),
                  np.array(splits, dtype=np.int64)[order], np.zeros_like(numbers))


def _by_folders(images: list[File], others: list[File], where: str) -> tuple[list[str], list[int]]:
    """Labels and splits by folders: CLASS/IMAGE or SPLIT/CLASS/IMAGE, below any number of folders around all of it."""
    skipped = 0  # of such folders
    while len({file.parts[skipped] for file in images}) == 1 and min(len(file.parts) for file in images) > skipped + 2:
        skipped += 1
    tops = ordered(file.parts[skipped] for file in images if len(file.parts) > skipped + 1)
    known = {split_number(top) for top in tops} - {NO_SPLIT}
    split = bool(tops) and all(split_number(top) != NO_SPLIT for top in tops) or (  # or splits beside folders of other names
        len(known) > 1 and TRAIN in known and all(len(file.parts) == skipped + 3 for file in images))
    depth = skipped + 1 + split  # where an image's name is
    elsewhere = [file for file in images if len(file.parts) != depth + 1]
    if elsewhere and not split and all(len(file.parts) == depth + 2 for file in images):
        raise UserError(f"{where} has classes in several folders ({', '.join(tops)}); give one of them")
    if elsewhere:
        raise UserError(f"{where}: {len(elsewhere):,} images are not directly in a class folder ({first_few(elsewhere)}), and no "
                        f"{' or '.join(METADATA_FILES)} lists them with columns file_name and label; move or remove them")
    classes = {file.parts[depth - 1] for file in images}
    for file in others:
        beside = len(file.parts) > depth and file.parts[:skipped] == images[0].parts[:skipped]
        if beside and file.parts[depth - 1] not in classes:
            raise UserError(f"{where}: the folder {file.parts[depth - 1]} has no images, only files such as {file}; convert them "
                            "to a format that Pillow opens, or remove the folder")
    return ([file.parts[depth - 1] for file in images],
            [split_number(file.parts[skipped]) if split else NO_SPLIT for file in images])


def _rows(file: File, where: str) -> list[dict[str, Any]]:
    """The rows of a metadata file."""
    with readable(f"{where}: {file}", "a table"):
        text = file.content.read_bytes().decode("utf-8-sig")
        if file.ending == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
        return [dict(json.loads(line)) for line in text.splitlines() if line.strip()]


def _by_metadata(images: list[File], tables: dict[File, list[dict[str, Any]]], where: str
                 ) -> tuple[list[str | None], list[int]]:
    """Labels by tables of file names, each relative to the folder the table is in; the split by a folder of such a name."""
    labels: dict[str, str | None] = {}
    for table, rows in tables.items():
        for row in rows:
            path = _composed(os.path.normpath("/".join([*table.parts[:-1], str(row["file_name"]).replace("\\", "/")])))
            with readable(f"{where}: {table}, {path}", "one label of each image"):
                label = class_name(row["label"])
                if labels.setdefault(path, label) != label:
                    raise ValueError(f"it is {label!r} here and {labels[path]!r} elsewhere")
    paths = [_composed(str(file)) for file in images]
    for reason, wrong in (("not listed", set(paths) - set(labels)), ("missing", set(labels) - set(paths))):
        if wrong:
            raise UserError(f"{where}: {len(wrong):,} images are {reason} ({first_few(sorted(wrong))}), by {first_few([*tables])}; list "
                            "all that there are and no others")
    return [labels[path] for path in paths], [split_number(*file.parts[:-1]) for file in images]


def _composed(path: str) -> str:
    """A path as NFC: of two that look alike, macOS writes the one and a spreadsheet the other."""
    return unicodedata.normalize("NFC", path)
