"""What results were made from: fingerprints, versions of packages, and how two such records differ."""

import hashlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import allowed

PROVENANCE_FILE = "provenance.json"
PACKAGES = ("datasets", "peft", "torch", "transformers")


def versions() -> dict[str, str]:
    """The versions of the packages that results depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def file_hashes(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file below a folder but the provenance, which holds these.

    Raises UserError if one cannot be read.
    """
    hashes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != PROVENANCE_FILE):
        with allowed(f"{path} cannot be read"), path.open("rb") as file:
            hashes[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def tensor_fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, types and shapes, in the order of the names."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """What differs between two records, nested ones too, as "key = old, not new", in the order of `wanted`."""
    for key in {**wanted, **found}:
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} = {old}, not {new}"


def changes(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """What differs in what two results were made from: a backbone of the same weights is the same wherever it lies."""
    same = found.get("backbone") == wanted["backbone"]
    return differences(found, {**wanted, "model": found.get("model")} if same else wanted)
