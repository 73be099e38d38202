"""How a field of a dataclass becomes a flag."""

from dataclasses import field
from typing import Any


def option(default: Any, help: str) -> Any:
    """A dataclass field that becomes a flag."""
    return field(default=default, metadata={"help": help})
