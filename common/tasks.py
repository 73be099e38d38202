"""The tasks of the experiment. A new task is one more entry in TASKS; every script then includes it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.demo import fire, games


@dataclass(frozen=True)
class Task:
    """Where the images of one task come from and what its files are called.

    key: in folder names and flags; title: in file names; name: in plots and messages. hub_id: the dataset's name on
    the Hub. render(label, rng) -> (H, W, 3) uint8 and demo_classes: the generated stand-in of `--demo`.
    """

    key: str
    title: str
    name: str
    hub_id: str
    render: Callable[[int, np.random.Generator], np.ndarray]
    demo_classes: tuple[str, ...]

    @property
    def dataset_folder(self) -> str:
        """Name of the folder of prepared data."""
        return f"{self.key}_dataset"


TASKS = [
    Task("fire", "Fire_Risk", "fire risk", "blanchon/FireRisk", fire.render, fire.CLASS_NAMES),
    Task("game", "Game", "video games", "Bingsu/Gameplay_Images", games.render, games.CLASS_NAMES),
]
