"""Files that are whole or not there at all: atomic writing, JSON, CSV and what a result was made from."""

import importlib.metadata
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from common.config import RunFlags, UserError

PROVENANCE_FILE = "provenance.json"
PACKAGES = ("datasets", "peft", "torch", "transformers")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, for a file or a folder; move it into place if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    _remove(part)
    try:
        yield part
        if path.is_dir() and not path.is_symlink():  # a full folder cannot be replaced in one step
            _remove(old)
            os.replace(path, old)
        os.replace(part, path)
        _remove(old)
    finally:
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary as JSON with sorted keys."""
    with writing(path) as part:
        part.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, mend: str) -> dict[str, Any]:
    """Read a JSON object that this project wrote. Raises UserError, ending with `mend`, if it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read; {mend}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged; {mend}")
    return content


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table without its index, numbers with six decimals."""
    with writing(path) as part:
        table.to_csv(part, index=False, float_format="%.6f", lineterminator="\n", encoding="utf-8")


def provenance(**made_from: Any) -> dict[str, Any]:
    """What a model was made from: the given fingerprints and names, and the versions of the packages that matter."""
    return {**made_from, "packages": {name: importlib.metadata.version(name) for name in PACKAGES}}


def command(script: str, config: RunFlags) -> str:
    """The command line that runs `script` on the same root with the same model and seed, for messages."""
    defaults = {**vars(RunFlags), **(RunFlags.demo_defaults if config.demo else {})}
    given = [f"--{name} {shlex.quote(str(getattr(config, name)))}" for name in ("root", "model", "seed")
             if getattr(config, name) != defaults[name]]
    return " ".join(["python", f"{script}.py", *(["--demo"] if config.demo else []), *given])
