"""The tasks of the experiment. A new task is one more entry in TASKS; every script then includes it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """Where the images of one task come from and what its files are called.

    key: in folder names and flags; title: in file names; name: in plots and messages. hub_id: the dataset's name on
    the Hub. demo: the module of `common.demo` that generates its stand-in of `--demo`: CLASS_NAMES, and
    render(label, rng) -> (H, W, 3) uint8.
    """

    key: str
    title: str
    name: str
    hub_id: str
    demo: str

    @property
    def dataset_folder(self) -> str:
        """Name of the folder of prepared data."""
        return f"{self.key}_dataset"


TASKS = [
    Task("fire", "Fire_Risk", "fire risk", "blanchon/FireRisk", "fire"),
    Task("game", "Game", "video games", "Bingsu/Gameplay_Images", "games"),
]
