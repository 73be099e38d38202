"""From a command line to the settings of a script, and back to the command that a message names.

transformers' HfArgumentParser takes dataclasses too, but to import it takes half as long as to import torch, and `--help`
is to be there at once.
"""

import argparse
import dataclasses
import inspect
import os
import shlex
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from common.cli.flags import RunFlags

Config = TypeVar("Config", bound=RunFlags)
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a bad flag in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parse(config_class: type[Config], argv: list[str] | None = None, description: str | None = None) -> Config:
    """Read the command line into `config_class`: one flag per field, grouped as the dataclasses are.

    Raises SystemExit(2) on a flag that cannot be read, UserError on a value that makes no sense.
    """
    parser = _Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    demo_defaults = _demo_defaults(config_class)
    for title, fields in _groups(config_class).items():
        group = parser.add_argument_group(title)
        for field in fields:
            if field.metadata.get("positional"):
                parser.add_argument(field.name, nargs="+", metavar=field.name.upper(), help=field.metadata["help"])
                continue
            names = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
            group.add_argument(*names, dest=field.name, help=_help(field, demo_defaults), **_how_to_read(field.type))
    given = vars(parser.parse_args(argv))
    return config_class(**{**(demo_defaults if given.get("demo") else {}), **given})


def _groups(config_class: type[Config]) -> dict[str, list[dataclasses.Field]]:
    """Title -> fields, each in the group of the class that first declares it, with its final default."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    groups: dict[str, list[dataclasses.Field]] = {}
    for base in reversed(config_class.__mro__):
        for name in inspect.get_annotations(base):
            if name in fields:
                groups.setdefault(base._argument_group_name, []).append(fields.pop(name))
    return groups


def _demo_defaults(config_class: type[Config]) -> dict[str, Any]:
    """The values `--demo` puts in place of the defaults, those of the script over those of its groups."""
    return {
        name: value for base in reversed(config_class.__mro__) for name, value in vars(base).get("demo_defaults", {}).items()
    }


def _help(field: dataclasses.Field, demo_defaults: dict[str, Any]) -> str:
    """What a flag means, its default, and its default with --demo."""
    defaults = [] if field.default in (None, dataclasses.MISSING) else [f"default: {_as_typed(field.default)}"]
    if field.name in demo_defaults:
        defaults.append(f"with --demo {_as_typed(demo_defaults[field.name])}")
    text = field.metadata["help"] + (f" ({'; '.join(defaults)})" if defaults else "")
    return text.replace("%", "%%")


def _as_typed(value: Any) -> str:
    """A default as it would be typed."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return os.path.relpath(value) if os.path.isabs(str(value)) else str(value)


def _how_to_read(kind: Any) -> dict[str, Any]:
    """What argparse needs to know of a field's type; of an optional one, the type itself counts."""
    if get_origin(kind) is UnionType:
        kind = get_args(kind)[0]
    if kind is bool:
        return {"nargs": "?", "const": True, "type": _boolean, "metavar": "yes|no"}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind), "type": type(get_args(kind)[0])}
    if get_origin(kind) is list:
        return {"nargs": "+", "action": "extend", "type": get_args(kind)[0]}
    return {"type": kind}


def _boolean(text: str) -> bool:
    try:
        return BOOLEANS[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no") from None


def command(script: str, config: RunFlags) -> str:
    """The command line that runs `script` on the same root with the same model and seed, for messages."""
    defaults = {**vars(RunFlags), **(RunFlags.demo_defaults if config.demo else {})}
    given = [f"--{name} {shlex.quote(str(getattr(config, name)))}" for name in ("root", "model", "seed")
             if getattr(config, name) != defaults[name]]
    return " ".join(["python", f"{script}.py", *(["--demo"] if config.demo else []), *given])
