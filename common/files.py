"""Files that are whole or not there at all: atomic writing, locks, JSON, CSV."""

import glob
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from common.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

LOCK_FILE = ".lock"
JSON_TYPES = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, for a file or a folder; move it into place if the block succeeds.

    Raises UserError, naming `path`, if the file system refuses something; what was there before is then still there. Errors
    of the block that are not of the file system pass through.
    """
    part, old = path.with_name(f".{path.name}.{os.getpid()}.part"), path.with_name(f".{path.name}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tidy(path)
        try:
            yield part
            if path.is_dir() and not path.is_symlink():  # a full folder cannot be replaced in one step
                os.replace(path, old)
            os.replace(part, path)
            remove(old)
        finally:
            recover(path)
            remove(part)
    except (OSError, SafetensorError) as error:
        if not getattr(error, "errno", None) and "os error" not in str(error):  # the text that safetensors has for such errors
            raise
        raise UserError(f"{path} cannot be written ({error}); what was there before is untouched: make room or choose another "
                        "--root, then run the same command again") from error


@contextmanager
def allowed(what: str) -> Iterator[None]:
    """Raise UserError, beginning with `what`, if the file system refuses something in the block."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} ({error.strerror}); allow it or choose another --root, then run the same command again"
                        ) from error


def recover(path: Path) -> Path:
    """Put the folder `path` back if its replacement was cut short after it had been moved aside; return `path`.

    Raises UserError if the file system refuses.
    """
    old = path.with_name(f".{path.name}.old")
    with allowed(f"{path} cannot be read or put back from {old.name}"):
        if old.exists() and not os.path.lexists(path):
            with suppress(FileNotFoundError):  # another process was faster
                os.replace(old, path)
    return path


def tidy(path: Path) -> None:
    """Undo what a killed run left half-way of one file or folder; only for who holds a lock on it."""
    remove(recover(path).with_name(f".{path.name}.old"))
    for part in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*.part"):
        remove(part)


def sweep(folder: Path) -> None:
    """Undo, in a folder and all below it, what a killed run left half-way; only for who holds the folder's lock."""
    for old in list(folder.rglob(".*.old")):
        tidy(old.with_name(old.name[1:].removesuffix(".old")))
    for part in list(folder.rglob(".*.part")):
        remove(part)


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if need be. The lock dies with the process, however it ends.

    Raises UserError if another process holds it, unless `wait`. Where no lock can be had, as on a file system that has
    none or cannot be written to, it goes on without.
    """
    lock = FileLock(folder / LOCK_FILE, blocking=wait, fallback_to_soft=False)  # a soft one would outlive the process
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"another run is at work in {folder}; wait until it has ended, or choose another --root") from error
    except OSError:
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows keeps files that are open
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there. Raises UserError if the file system refuses."""
    with allowed(f"{path} cannot be deleted"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary as JSON with sorted keys."""
    with writing(path) as part:
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        part.write_text(text, encoding="utf-8", errors="backslashreplace")  # in a path: bytes that are no UTF-8


def read_json(path: Path, fix: str, form: Any = dict) -> dict[str, Any]:
    """Read a JSON object, as this project wrote it or as an editor has saved it since.

    form: what it must hold: a type; [form] for a list of any length; {key: form} for an object, which may hold more.
    Raises UserError, ending with `fix`, if it cannot be read or is not of this form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if misfit := _misfit(content, form, ""):
            raise ValueError(f"changed or damaged: {misfit}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); {fix}") from error
    return content


def _misfit(content: Any, form: Any, name: str) -> str:
    """What is not of the form, in words; nothing if all is."""
    kind = form if isinstance(form, type) else type(form)
    if not isinstance(content, kind):
        return f"{name or 'it'} is not {JSON_TYPES[kind]}"
    inner = []
    if isinstance(form, dict):
        inner = [(f"{name}.{key}".lstrip("."), content.get(key), part) for key, part in form.items()]
    elif isinstance(form, list):
        inner = [(f"{name}[{index}]", value, form[0]) for index, value in enumerate(content)]
    return next(filter(None, (_misfit(value, part, inner_name) for inner_name, value, part in inner)), "")


def write_csv(path: Path, table: "pd.DataFrame", float_format: str = "%.6f") -> None:
    """Write a table without its index, numbers with six decimals unless `float_format` says otherwise."""
    with writing(path) as part:
        table.to_csv(part, index=False, float_format=float_format, lineterminator="\n", encoding="utf-8")


def read_csv(path: Path, texts: Iterable[str]) -> "pd.DataFrame":
    """Read a table that this project wrote: the columns `texts` as texts, whatever they look like, all others as numbers."""
    import pandas as pd

    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    numbers = [name for name in table if name not in set(texts)]
    table[numbers] = table[numbers].apply(pd.to_numeric)
    return table


def check_unchained(path: str | Path, where: str) -> None:
    """Raise UserError, beginning with `where`, for a path that `datasets` would take for two, one inside the other."""
    if "::" in os.path.abspath(path):
        raise UserError(f"{where} has '::' in its path, by which datasets means two places; choose or rename the folder")


def is_unicode(text: str) -> bool:
    """False for the name of a file or a folder that holds bytes that are no UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
