"""The flags that tell where images and finished adapters come from."""

import codecs
import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from common.cli.options import option
from common.errors import UserError
from common.tasks import Task, own_tasks

SOURCE_HELP = ("a folder with one subfolder of images a class (these also inside train, validation and test), a .zip of it, "
               "Parquet files, a dataset of save_to_disk, or hub:OWNER/NAME")


@dataclass
class SourceFlags:
    """Where images come from and how many are used."""

    _argument_group_name: ClassVar[str] = "sources"
    task: list[str] = option(
        [], "NAME=SOURCE, once per task: own tasks, which replace the two example tasks; beside tasks that the root has already, "
            f"one more. NAME is of letters, digits, _ and -; SOURCE is {SOURCE_HELP}")
    classes: list[str] = option([], "NAME=class,class,...: classes of the own task NAME to use, in label order; by default all")
    fire_source: str | None = option(None, f"images of fire risk instead of those on the Hub: {SOURCE_HELP}")
    game_source: str | None = option(None, "images of video games instead of those on the Hub, in the same way")
    fire_classes: list[str] = option(
        [], "classes of fire risk to use, in label order; by default the first four; 'all' takes every class")
    game_classes: list[str] = option([], "classes of video games to use, in the same way")
    images_per_class: str = option(
        "auto", "images of each class, chosen by the seed; 'all' takes as many as there are; auto is 1000 for the documented "
                "tasks (250 with --demo) and all for own tasks, of whose classes a number is the most that is taken"
    )
    split: Literal["auto", "own", "random", "grouped"] = option(
        "auto", "how images come to train, validation and test: own keeps the source's own split and cuts what it lacks from "
                "its train; random cuts each class 60/20/20; grouped does so with near-duplicates, as in films, on one side; "
                "auto is random for the documented tasks and own for others"
    )
    hub_choice: Literal["clustered", "uniform"] = option(
        "clustered", "which images of a dataset on the Hub are chosen: clustered takes them from few row groups of its files, "
                     "so that little is fetched, but what lies together comes together; uniform fetches more, gives every "
                     "image the same chance"
    )
    zip_encoding: str | None = option(None, "code page of the file names in a .zip that does not tell it, such as cp866 or gbk")
    skip_damaged: bool = option(False, "leave damaged images out and say how many; by default the first one ends the run")

    def __post_init__(self) -> None:
        super().__post_init__()
        number = self.images_per_class
        if number not in ("auto", "all") and not (number.isdecimal() and int(number) >= 5):
            raise UserError(f"--images_per_class must be 'all' or a number of at least 5, not {number}")
        try:
            codecs.lookup(self.zip_encoding or "utf-8")
        except LookupError as error:
            raise UserError(f"--zip_encoding {self.zip_encoding} is no code page that Python knows; cp866 and gbk are") from error
        for name in ("fire_source", "game_source", "fire_classes", "game_classes"):
            if self.task and getattr(self, name):
                raise UserError(f"--{name} is of the documented tasks, which --task replaces; leave one of them out")
        self.own_tasks()

    def own_tasks(self) -> list[Task]:
        """The tasks of --task, with their sources and classes."""
        return own_tasks(self.task, self.classes)

    def split_of(self, task: Task) -> str:
        """How a task's images are split: own, random or grouped."""
        if self.split != "auto":
            return self.split
        return "random" if task.demo else "own"

    def number_of_images(self, task: Task) -> str:
        """How many images of each class of a task are taken: a number, or 'all'."""
        if self.images_per_class != "auto":
            return self.images_per_class
        return ("250" if self.demo else "1000") if task.demo else "all"


@dataclass
class ExpertFlags:
    """Finished adapters in place of trained ones."""

    _argument_group_name: ClassVar[str] = "experts"
    expert: list[str] = option(
        [], "NAME=ADAPTER: take a finished peft LoRA adapter as the expert of the task NAME instead of training one: a folder, or "
            "OWNER/NAME on the Hub, with a revision and a subfolder as OWNER/NAME@REVISION:SUBFOLDER. Lora_Finetune.py "
            "--overwrite then makes only these tasks' experts anew")

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
