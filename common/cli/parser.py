"""From a command line to the settings of a script."""

import argparse
import dataclasses
import os
from argparse import ArgumentDefaultsHelpFormatter
from dataclasses import field
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser

from common.cli.flags import RunFlags

Config = TypeVar("Config", bound=RunFlags)


class _Parser(HfArgumentParser):
    """HfArgumentParser that reports a bad flag in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parse(config_class: type[Config], argv: list[str] | None = None, description: str | None = None) -> Config:
    """Read the command line into `config_class`.

    Raises SystemExit(2) on a flag that cannot be read, UserError on a value that makes no sense.
    """
    parser = _Parser(
        _flag_groups(config_class), description=description, allow_abbrev=False,
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    demo_defaults = _demo_defaults(config_class)
    for action in parser._actions:
        if action.nargs == "+":  # --task a=x --task b=y is both, as --task a=x b=y is
            action.__class__ = argparse._ExtendAction
        if action.dest in demo_defaults:
            value = demo_defaults[action.dest]
            action.help += f"; with --demo {os.path.relpath(value) if os.path.isabs(str(value)) else value}"
    if parser.parse_args(argv).demo:
        parser.set_defaults(**demo_defaults)
    return config_class(**vars(parser.parse_args(argv)))


def _flag_groups(config_class: type[Config]) -> list[type]:
    """One dataclass per group of flags, each field in the group that first declares it, with its final default."""
    final = {f.name: f for f in dataclasses.fields(config_class)}
    groups: dict[str, list] = {}
    for base in reversed(config_class.__mro__):
        for name in vars(base).get("__annotations__", {}):
            if name in final:
                old = final.pop(name)
                factory = old.default_factory is not dataclasses.MISSING
                default = {"default_factory": old.default_factory} if factory else {"default": old.default}
                entry = (name, old.type, field(**default, metadata=old.metadata))
                groups.setdefault(base._argument_group_name, []).append(entry)
    return [
        dataclasses.make_dataclass("Flags", fields, namespace={"_argument_group_name": name})
        for name, fields in groups.items()
    ]


def _demo_defaults(config_class: type[Config]) -> dict[str, Any]:
    """The values `--demo` puts in place of the defaults, those of the script over those of its groups."""
    return {
        name: value for base in reversed(config_class.__mro__) for name, value in vars(base).get("demo_defaults", {}).items()
    }
