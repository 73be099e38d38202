"""The flag that takes finished adapters in place of trained ones."""

import re
from dataclasses import dataclass, field
from typing import ClassVar

from common.errors import UserError


@dataclass
class ExpertFlags:
    """Finished adapters in place of trained ones."""

    _argument_group_name: ClassVar[str] = "experts"
    expert: list[str] = field(default_factory=list, metadata={
        "help": "NAME=ADAPTER: take a finished peft LoRA adapter as the expert of the task NAME instead of training one: a "
                "folder, or OWNER/NAME on the Hub, with a revision and a subfolder as OWNER/NAME@REVISION:SUBFOLDER. "
                "Lora_Finetune.py --overwrite then makes only these tasks' experts anew"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for entry in self.expert:
            if not re.fullmatch(r"[\w-]+=.+", entry):
                raise UserError(f"--expert takes NAME=ADAPTER, NAME being that of a task, not {entry}")
        if len(self.experts()) < len(self.expert):
            raise UserError("--expert is given twice for one task; choose one adapter")

    def experts(self) -> dict[str, str]:
        """The finished adapters: name of the task -> where the adapter is."""
        return {name: source for name, _, source in (entry.partition("=") for entry in self.expert)}
