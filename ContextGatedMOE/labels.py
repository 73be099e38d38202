"""The names of an expert's classes and their order: one check for everything that takes them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ContextGatedMOE.errors import MixtureError


def class_lists(classes: Mapping[str, Any] | None) -> dict[str, list[str]] | None:
    """The classes of every expert as lists, in the order of their heads' outputs; None for None. See `class_names`."""
    return None if classes is None else {expert: class_names(expert, given) for expert, given in classes.items()}


def class_names(expert: str, given: Any) -> list[str]:
    """Names of an expert's classes as a list: from names in an order, or from the `id2label` of a model's configuration.

    Raises MixtureError if they are no names, not different, have no order (a set), or a number of an `id2label` is missing.
    """
    ordered = isinstance(given, Iterable) and not isinstance(given, (str, set, frozenset))
    own = from_id2label(expert, given) if isinstance(given, Mapping) else list(given) if ordered else []
    if not own or not all(isinstance(name, str) for name in own) or len(set(own)) < len(own):
        raise MixtureError(f"expert {expert!r} needs its classes as a list of one or more different names, in the order of its "
                           f"head's outputs, not {given!r}")
    return own


def from_id2label(expert: str, id2label: Mapping[Any, Any]) -> list[Any]:
    """The names of an `id2label` by their numbers, which are text in a JSON file. Raises MixtureError if one is missing."""
    by_number = {str(key): name for key, name in id2label.items()}
    if set(by_number) != {str(number) for number in range(len(id2label))}:
        raise MixtureError(f"expert {expert!r} has its classes as a mapping that is no id2label: its keys are to be the "
                           f"numbers from 0 to {len(id2label) - 1}")
    return [by_number[str(number)] for number in range(len(id2label))]


def check_order(expert: str, stated: Sequence[str] | None, classes: Sequence[str]) -> None:
    """Raise MixtureError if an adapter states the same classes (`id2label`) in another order than `classes`."""
    if stated is not None and sorted(stated) == sorted(classes) and list(stated) != list(classes):
        raise MixtureError(f"expert {expert!r} states its classes in another order than classes=...; pass them in the order of "
                           f"its id2label: {', '.join(stated)}")


def output_columns(names: Sequence[str], classes: Mapping[str, Sequence[str]],
                   same: Sequence[Sequence[tuple[str, str]]]) -> tuple[list[tuple[str, str]], list[str], list[int]]:
    """Labels of the outputs as (expert, class), what they are called, and for each class of each expert the output it adds to.

    same: groups of (expert, class) that are one class; their output stands where the first of them does. Raises MixtureError
    if a class is not there, or in two groups.
    """
    groups: dict[tuple[str, str], int] = {}
    for number, group in enumerate(same):
        for expert, name in group:
            if name not in classes.get(expert, ()):
                raise MixtureError(f"same=...: expert {expert!r} has no class {name!r}")
            if groups.setdefault((expert, name), number) != number:
                raise MixtureError(f"same=...: class {name!r} of expert {expert!r} is in two groups")
    entries = [(expert, name) for expert in names for name in classes[expert]]
    members: dict[object, list[tuple[str, str]]] = {}  # of each output, the classes that add to it
    for entry in entries:
        members.setdefault(groups.get(entry, entry), []).append(entry)
    numbers = {key: number for number, key in enumerate(members)}
    called = [f"{' / '.join(dict.fromkeys(expert for expert, _ in own))}: {own[0][1]}" for own in members.values()]
    return [own[0] for own in members.values()], called, [numbers[groups.get(entry, entry)] for entry in entries]
