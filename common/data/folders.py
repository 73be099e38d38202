"""Folders and zips of images: class folders, these inside split folders, or a metadata file; whatever fits none is refused."""

import csv
import io
import json
import os
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.data.sources import NO_LABEL, NO_SPLIT, TRAIN, Source, ordered, readable, some, split_number
from common.data.walk import File, hidden
from common.errors import UserError
from common.files import is_unicode
from common.tasks import class_name

LARGEST_IMAGE = 2**30  # bytes in a zip, where a small file may unpack to any size
METADATA_FILES = ("metadata.csv", "metadata.jsonl")
METADATA_COLUMNS = ("file_name", "label")
UTF8_NAME = 0x800  # the flag of an entry of a zip whose name is UTF-8
UNICODE_PATH = 0x7075  # the extra field that has the name as UTF-8 where the name itself is in an older encoding
ENCRYPTED = 1
COMPRESSIONS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}


@dataclass(frozen=True)
class Labelled:
    """An image with its class, None if it has none, and the split that the source has it in."""

    file: File
    label: str | None
    split: int = NO_SPLIT


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
    try:
        archive = zipfile.ZipFile(path, metadata_encoding=encoding)
    except UnicodeError as error:
        raise UserError(f"{where} has names that are not in {encoding} ({error}); give another --zip_encoding") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{where} cannot be read as a zip ({error})") from error
    return files_source(list(_entries(archive, where)), where)


def _entries(archive: zipfile.ZipFile, where: str) -> Iterator[File]:
    """Every file in a zip. Of two of one name the later counts, as it does when the zip is unpacked."""
    found, outside, guessed = {}, [], []
    for entry in archive.infolist():
        name, sure = _name(entry, archive.metadata_encoding)
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if entry.is_dir() or name.endswith("/") or not parts or any(map(hidden, (part for part in parts if part != ".."))):
            continue
        if name.startswith("/") or ".." in parts:
            outside.append(name)
            continue
        if entry.flag_bits & ENCRYPTED:
            raise UserError(f"{where} is encrypted; unpack it and give the folder")
        if entry.compress_type not in COMPRESSIONS:
            raise UserError(f"{where} is compressed in a way that Python does not read ({name}); unpack it and give the folder")
        file = File(parts, _ZipMember(archive, entry, "/".join(parts)))
        if entry.file_size > LARGEST_IMAGE and file.is_image:
            raise UserError(f"{where} holds {name} of {entry.file_size / 1e9:.0f} GB, too large for an image; remove it")
        found[parts] = file
        guessed += [] if sure else [name]
    if guessed:
        print(f"{where}: {len(guessed):,} names are not in UTF-8 and read as code page 437 ({some(guessed)}); if they look "
              "wrong, add --zip_encoding with the one they were written in, such as cp866 or gbk", flush=True)
    if outside:
        print(f"{where}: passed over {len(outside)} entries whose paths lead out of the zip ({some(outside)})", flush=True)
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
    """The images among the files of a folder or a zip; those that are passed over are told of.

    Raises UserError, beginning with `where`, if their labels are not clear or an image would be left out.
    """
    images = [file for file in files if file.is_image]
    others = [file for file in files if not file.is_image]
    if not images:
        endings = f"; its files end in {', '.join(sorted({file.ending or 'nothing' for file in others}))}" if others else ""
        raise UserError(f"{where} has neither subfolders with images nor Parquet files nor a saved dataset{endings}")
    metadata = [file for file in others if file.parts[-1].lower() in METADATA_FILES]
    rows = [_rows(file, where) for file in metadata]
    if metadata and all(set(METADATA_COLUMNS) <= set(row) for part in rows for row in part):
        labelled = _by_metadata(images, dict(zip(metadata, rows, strict=True)), where)
        others = [file for file in others if file not in metadata]
    else:
        labelled = _by_folders(images, others, where, metadata)
    if others:
        endings = Counter(file.ending or "no ending" for file in others)
        print(f"{where}: passed over {len(others):,} files that are no images by their endings: "
              f"{', '.join(f'{count:,} {ending}' for ending, count in endings.most_common())}", flush=True)
    return _sorted_by_class(labelled, where)


def _sorted_by_class(labelled: list[Labelled], where: str) -> Source:
    named = [replace(image, label=class_name(image.label)) for image in labelled]
    classes = ordered(image.label for image in named if image.label is not None)
    for name in classes:
        if not is_unicode(name):
            raise UserError(f"{where} has a class whose name is no UTF-8: {name}; rename the folder")
    number: dict[str | None, int] = {name: place for place, name in enumerate(classes)}
    named.sort(key=lambda image: (number.get(image.label, NO_LABEL), image.file.parts))
    labels = np.array([number.get(image.label, NO_LABEL) for image in named], dtype=np.int64)
    splits = np.array([image.split for image in named], dtype=np.int64)
    return Source(classes, labels, lambda rows: (named[row].file.content for row in rows), splits, np.zeros_like(labels))


def _by_folders(images: list[File], others: list[File], where: str, metadata: list[File]) -> list[Labelled]:
    """Labels by the folder an image is in: CLASS/IMAGE or SPLIT/CLASS/IMAGE, below any number of folders around all of it."""
    skipped = 0  # of such folders
    while len({file.parts[skipped] for file in images}) == 1 and min(len(file.parts) for file in images) > skipped + 2:
        skipped += 1
    tops = ordered(file.parts[skipped] for file in images if len(file.parts) > skipped + 1)
    known = {split_number(top) for top in tops} - {NO_SPLIT}
    split = bool(tops) and all(split_number(top) != NO_SPLIT for top in tops) or (  # or splits beside folders of other names
        len(known) > 1 and TRAIN in known and all(len(file.parts) == skipped + 3 for file in images))
    depth = skipped + 1 + split  # where an image's name is
    elsewhere = [str(file) for file in images if len(file.parts) != depth + 1]
    if elsewhere and not split and all(len(file.parts) == depth + 2 for file in images):
        raise UserError(f"{where} has classes in several folders ({', '.join(tops)}); give one of them")
    if elsewhere:
        listed = f"no {' or '.join(METADATA_FILES)} lists these with columns {' and '.join(METADATA_COLUMNS)}"
        if metadata:
            listed = f"{metadata[0]} has no columns {' and '.join(METADATA_COLUMNS)}"
        raise UserError(f"{where}: {len(elsewhere):,} images are not directly in a class folder "
                        f"({some(elsewhere)}), and {listed}; move or remove them")
    around = images[0].parts[:skipped]
    classes = {file.parts[depth - 1] for file in images}
    empty: dict[str, list[File]] = {}
    for file in others:
        if len(file.parts) > depth and file.parts[:skipped] == around and file.parts[depth - 1] not in classes:
            empty.setdefault("/".join(file.parts[:depth]), []).append(file)
    for name, inside in empty.items():
        endings = ", ".join(sorted({file.ending or "nothing" for file in inside}))
        raise UserError(f"{where}: the folder {name} has no images, only {len(inside):,} files that end in {endings}; convert "
                        "them to a format that Pillow opens, or remove the folder")
    return [Labelled(file, file.parts[depth - 1], split_number(file.parts[skipped]) if split else NO_SPLIT) for file in images]


def _rows(file: File, where: str) -> list[dict[str, Any]]:
    """The rows of a metadata file."""
    with readable(f"{where}: {file}", "a table"):
        text = file.content.read_bytes().decode("utf-8-sig")
        if file.ending == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a line is no object")
            return rows
        return list(csv.DictReader(io.StringIO(text, newline="")))


def _by_metadata(images: list[File], tables: dict[File, list[dict[str, Any]]], where: str) -> list[Labelled]:
    """Labels by tables of file names, each relative to the folder the table is in; the split by a folder of such a name."""
    labels: dict[str, str | None] = {}
    for table, rows in tables.items():
        for row in rows:
            path = _composed(os.path.normpath("/".join([*table.parts[:-1], str(row["file_name"]).replace("\\", "/")])))
            try:
                label = class_name(row["label"])
            except ValueError as error:
                raise UserError(f"{where}: {table}, {path}: {error}; give every image one label") from error
            if labels.setdefault(path, label) != label:
                raise UserError(f"{where}: {table} lists {path} as {label!r}, which is listed as {labels[path]!r} too; keep one "
                                "of these rows")
    paths = [_composed(str(file)) for file in images]
    if missing := sorted(set(labels) - set(paths)):
        raise UserError(f"{where}: {some([str(table) for table in tables])} lists {len(missing):,} images that are not there "
                        f"({some(missing)})")
    if unlisted := [path for path in paths if path not in labels]:
        raise UserError(f"{where}: {some([str(table) for table in tables])} leaves out {len(unlisted):,} images "
                        f"({some(unlisted)}); list or remove them")
    splits = [next((number for part in file.parts[:-1] if (number := split_number(part)) != NO_SPLIT), NO_SPLIT)
              for file in images]
    return [Labelled(file, labels[path], split) for file, path, split in zip(images, paths, splits, strict=True)]


def _composed(path: str) -> str:
    """A path as NFC: of two that look alike, macOS writes the one and a spreadsheet the other."""
    return unicodedata.normalize("NFC", path)
