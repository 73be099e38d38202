"""What a task is, the two documented tasks, and the tasks of a root folder, which tasks.json there lists in order."""

import itertools
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import locked, read_json, write_json

TASKS_FILE = "tasks.json"
TASKS_FORM = {"tasks": [{"key": str, "title": str, "name": str}]}
HUB = "hub:"  # how a source on the Hub begins
LONGEST_NAME = 60  # characters, as names are joined to those of files and folders
RESERVED = "all|none|comparison|routing|(.*_)?history"  # other files, rows and answers have such names: CGM_Lora_Routing.csv


@dataclass(frozen=True)
class Task:
    """One task: what it is called, and where its images come from.

    key: in folder names and flags; title: in file names; name: in plots and messages. source: a folder or file, or
    `hub:OWNER/NAME`. classes: those to use, in label order; none stands for all, of a documented task for the first four.
    demo: of a documented task, the module of `common.demo` that generates its images for --demo; it has CLASS_NAMES, and
    render(label, rng) -> (H, W, 3) uint8.
    """

    key: str
    title: str
    name: str
    source: str
    classes: tuple[str, ...] = ()
    demo: str = ""

    @property
    def dataset_folder(self) -> str:
        """Name of the folder of prepared data."""
        return f"{self.key}_dataset"

    @property
    def source_flag(self) -> str:
        """What is given on the command line for its source, for messages."""
        return f"--{self.key}_source {self.source}" if self.demo else f"--task {self.key}={self.source}"

    @property
    def classes_flag(self) -> str:
        """The flag that chooses its classes, for messages."""
        return f"--{self.key}_classes" if self.demo else f"--classes {self.key}="


DOCUMENTED = (
    Task("fire", "Fire_Risk", "fire risk", f"{HUB}blanchon/FireRisk", demo="fire"),
    Task("game", "Game", "video games", f"{HUB}Bingsu/Gameplay_Images", demo="games"),
)


def class_name(value: Any) -> str | None:
    """The name of a class, however a source or a flag writes it: in NFC, without spaces around it; None where there is none.

    Raises ValueError if it is not one name, as a list is.
    """
    if isinstance(value, list | tuple | dict):
        raise ValueError(f"a label is {value}, not the name of one class")
    if value is None or value != value:  # NaN is not itself
        return None
    text = value.decode() if isinstance(value, bytes) else str(value)
    return unicodedata.normalize("NFC", text).strip() or None


def own_tasks(sources: Iterable[str], classes: Iterable[str]) -> list[Task]:
    """The tasks of `--task NAME=SOURCE` and `--classes NAME=a,b,c`. Raises UserError if one of them makes no sense."""
    chosen: dict[str, tuple[str, ...]] = {}
    for entry in classes:
        name, _, listed = unicodedata.normalize("NFC", entry).partition("=")
        names = tuple(class_name(part) or "" for part in listed.split(","))
        if not all(names):
            raise UserError(f"--classes takes NAME=class,class,..., not {entry}")
        if chosen.setdefault(name, names) is not names:
            raise UserError(f"--classes is given twice for {name}; list all its classes in one")
    tasks = []
    for entry in sources:
        name, _, source = entry.partition("=")
        name = unicodedata.normalize("NFC", name)
        if not re.fullmatch(r"\w[\w-]*", name) or not source:
            raise UserError(f"--task takes NAME=SOURCE, where NAME is of letters, digits, _ and -, not {entry}")
        if len(name) > LONGEST_NAME or re.fullmatch(RESERVED, name.lower()):
            raise UserError(f"--task {name}: a name that other results have, or one longer than {LONGEST_NAME} characters; "
                            "choose another")
        tasks.append(Task(name, name, name, absolute(source), chosen.pop(name, ())))
    for name in chosen:
        raise UserError(f"--classes {name}=...: there is no --task {name}=SOURCE beside it")
    _check_names(tasks, "--task")
    return tasks


def absolute(source: str) -> str:
    """A source as the command line gives it, wherever the next command runs."""
    return source if source.startswith(HUB) else str(Path(source).resolve())


def read_tasks(root: str | Path) -> list[Task]:
    """The tasks of a root folder, in order; the documented two where there is no tasks.json.

    Raises UserError if tasks.json is not what Data_Preparation.py wrote. Whether a task's images exist is not asked.
    """
    path = Path(root) / TASKS_FILE
    if not path.exists():
        return list(DOCUMENTED)
    fix = "delete it and run Data_Preparation.py with all tasks again"
    try:
        tasks = [_from_json(entry) for entry in read_json(path, fix, TASKS_FORM)["tasks"]]
        if not tasks or not all(isinstance(text, str) for task in tasks for text in (task.source, *task.classes)):
            raise ValueError("no tasks")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not list tasks; {fix}") from error
    _check_names(tasks, str(path))
    return tasks


def merged_tasks(root: str | Path, tasks: Iterable[Task]) -> list[Task]:
    """The tasks that tasks.json of a root folder lists, with these in place of those of the same key, or behind the others.

    Raises UserError if two of them could not be told apart by the names of their files.
    """
    listed = read_tasks(root) if (Path(root) / TASKS_FILE).exists() else []
    merged = [*({task.key: task for task in listed} | {task.key: task for task in tasks}).values()]
    _check_names(merged, "--task")
    return merged


def add_tasks(root: str | Path, tasks: Iterable[Task]) -> list[Task]:
    """Put tasks into tasks.json of a root folder, as `merged_tasks` does; return all that it lists then."""
    path = Path(root) / TASKS_FILE
    with locked(path.parent, wait=True):
        merged = merged_tasks(root, tasks)
        if not path.exists() or merged != read_tasks(root):
            write_json(path, {"tasks": [_to_json(task) for task in merged]})
    return merged


def _to_json(task: Task) -> dict[str, Any]:
    named = {"key": task.key, "title": task.title, "name": task.name}
    return named if task in DOCUMENTED else {**named, "source": task.source, "classes": list(task.classes)}


def _from_json(entry: dict[str, Any]) -> Task:
    documented = next((task for task in DOCUMENTED if _to_json(task) == entry), None)
    return documented or Task(**{**entry, "classes": tuple(entry["classes"])})


def _check_names(tasks: list[Task], where: str) -> None:
    """Raises UserError if two tasks have one name, or names that are one where file names ignore case."""
    for one, other in itertools.combinations(tasks, 2):
        if one.key.casefold() == other.key.casefold() or one.title.casefold() == other.title.casefold():
            raise UserError(f"{where}: two tasks have one name ({one.key} and {other.key}); rename one of them")
