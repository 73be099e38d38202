"""Which finished results can stay: what they were made from, against what they would be made from now."""

from typing import Any

from common.cli.flags import FOLLOWING, RunFlags, TrainingFlags
from common.data.tensors import TaskData
from common.errors import UserError
from common.provenance import changes

DATA = "data"


def difference(recorded: dict[str, Any], wanted: dict[str, Any], kinds: list[str], one_model: bool) -> str | None:
    """How what finished results were made from differs from what is wanted, "key = old, not new"; None if it does not.

    kinds: entries that hold a fingerprint for each task (or expert), None if it is not known; the others are settings. Tasks
    that have no results yet do not count, nor, unless `one_model` is of all tasks, do results of tasks that are gone.
    """
    compared = {**wanted, "packages": recorded["packages"]}
    for kind in kinds:
        compared[kind] = {key: recorded[kind].get(key) if value is None else value for key, value in wanted[kind].items()
                          if key in recorded[kind] or key in recorded[DATA]}
        if not one_model:
            compared[kind] = {**recorded[kind], **compared[kind]}
    return next(changes(recorded, compared), None)


def without(recorded: dict[str, Any], kinds: list[str], tasks: set[str]) -> dict[str, Any]:
    """What the results of all but these tasks were made from."""
    return {**recorded, **{kind: {key: value for key, value in recorded[kind].items() if key not in tasks} for kind in kinds}}


def joined(recorded: dict[str, Any], new: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    """What the results of the tasks that stay and of the new ones were made from."""
    return {**new, **{kind: {**recorded[kind], **new[kind]} for kind in kinds}}


def completed(recorded: dict[str, Any], kinds: list[str], where: str, fix: str) -> dict[str, Any]:
    """A record of what results were made from, with an empty entry for each of `kinds` that it lacks.

    Raises UserError, ending with `fix`, if it does not tell what every record does.
    """
    record = {**{kind: {} for kind in kinds if kind != DATA}, **recorded}
    for kind in (DATA, *kinds, "packages"):
        if not isinstance(record.get(kind), dict):
            raise UserError(f"{where} does not tell {kind!r}; {fix}")
    return record


def recipes(config: RunFlags, tasks: list[TaskData]) -> dict[str, dict[str, dict[str, Any]]]:
    """How each task's model is trained, as far as that may follow from the number of its images: the kind "recipe", or nothing
    for a script that trains none."""
    if not isinstance(config, TrainingFlags):
        return {}
    resolved = {data.task.key: config.for_images(len(data.train)) for data in tasks}
    return {"recipe": {key: {name: getattr(chosen, name) for name in FOLLOWING} for key, chosen in resolved.items()}}
