"""A third task, for the tests only: the project as it is with one more entry in TASKS.

`python -m tests.three_tasks` runs the demo with it, to compare the mixture of three experts with each on its own task.
"""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from common.cli.flags import SCRIPTS

CLASS_NAMES = ("stripes", "bars", "checks", "plain")


def render(label: int, rng: np.random.Generator) -> np.ndarray:
    """A small pattern in random colours, (48, 64, 3) uint8."""
    rows, columns = np.indices((48, 64)) // 8 % 2
    pattern = (rows, columns, (rows + columns) % 2, np.zeros_like(rows))[label]
    colours = rng.integers(0, 256, (2, 3))
    return (colours[pattern] + rng.normal(0, 8, (48, 64, 3))).clip(0, 255).astype(np.uint8)


@contextmanager
def three_tasks() -> Iterator[type]:
    """Import the project anew with a third task in TASKS; gives the class `Workspace` of that project.

    The command line is made from TASKS when common.config is imported, so nothing less would do.
    """
    packages = {"common", "pipeline", *SCRIPTS}
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in packages}
    try:
        tasks = importlib.import_module("common.tasks").TASKS
        third = {"key": "third", "title": "Third", "name": "patterns", "hub_id": "nobody/patterns"}
        tasks.append(dataclasses.replace(tasks[0], **third, demo="third"))
        sys.modules["common.demo.third"] = sys.modules[__name__]
        yield importlib.import_module("pipeline").Workspace
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
            del sys.modules[name]
        sys.modules.update(kept)


def main() -> None:
    """Run the demo's scripts that lead to the mixture, with three tasks; the summary they print has the accuracies."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--root", default="demo_of_three", help="folder for images and results (default: %(default)s)")
    root = parser.parse_args().root
    with three_tasks():
        config, cli = (importlib.import_module(f"common.cli.{name}") for name in ("flags", "parser"))
        for script in ("Data_Preparation", "Generate_Base_Model", "Lora_Finetune", "CGM_Lora"):
            importlib.import_module(script).main(cli.parse(config.SCRIPTS[script], ["--demo", "--root", root]))


if __name__ == "__main__":
    main()
