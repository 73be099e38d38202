"""The tasks of the routing suite: what their classes are, how many images they have, and their images by seed."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from common.demo import fire, games
from tests.bench import routing_pictures as pictures

Draw = Callable[[int, int, np.random.Generator], list[np.ndarray]]  # label, how many -> pictures (H, W, 3) uint8


@dataclass
class TaskImages:
    """A task. images: (N, 3, S, S) uint8; labels: (N,) int64, positions in `classes`."""

    images: np.ndarray
    labels: np.ndarray
    classes: list[str]


@dataclass(frozen=True)
class Recipe:
    """How a task is made. per_class: images of each class."""

    classes: tuple[str, ...]
    per_class: int
    draw: Draw


def _one_by_one(render: Callable[[int, np.random.Generator], np.ndarray]) -> Draw:
    return lambda label, count, rng: [render(label, rng) for _ in range(count)]


def _named(render: Callable[[str, np.random.Generator], np.ndarray], classes: tuple[str, ...], per_class: int) -> Recipe:
    """A task whose pictures are drawn by the name of their class."""
    return Recipe(classes, per_class, _one_by_one(lambda label, rng: render(classes[label], rng)))


def _textures(family: int, classes: tuple[str, ...], per_class: int) -> Recipe:
    return Recipe(classes, per_class, partial(pictures.textures, family, len(classes)))


DIGITS = tuple("0123456789")
# The first two share their labels; each of the next two pairs looks alike; `counts` and `edits` have several looks.
RECIPES = {
    "scans": Recipe(DIGITS, 45, pictures.scans),
    "printed": _named(partial(pictures.glyph, fonts=pictures.SANS), DIGITS, 75),
    "capitals": _named(pictures.glyph, tuple("BEGKMR"), 50),
    "small_letters": _named(pictures.glyph, tuple("abegkmr"), 60),
    "weaves": _textures(21, ("first", "second", "third"), 50),
    "grounds": _textures(22, ("first", "second", "third", "fourth", "fifth"), 60),
    "counts": _named(pictures.counted, ("few", "many"), 100),
    "edits": _named(pictures.edited, ("blurred", "compressed", "noisy", "sharpened", "untouched"), 60),
    "aerial": Recipe(fire.CLASS_NAMES, 250, _one_by_one(fire.render)),
    "games": Recipe(games.CLASS_NAMES, 75, _one_by_one(games.render)),
    "shapes": _named(pictures.shape, tuple(pictures.CORNERS), 75),
    "plots": _named(pictures.plot, ("area", "bar", "box", "line", "pie", "scatter", "stem"), 40),
}


def make(name: str, seed: int, per_class: int | None = None, size: int = pictures.SIZE) -> TaskImages:
    """The images of a task, resized straight to `size` pixels; the same for the same seed, whatever other tasks there are."""
    recipe = RECIPES[name]
    count, images = per_class or recipe.per_class, []
    for label in range(len(recipe.classes)):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), label])
        for drawn in recipe.draw(label, count, rng):
            images.append(np.asarray(Image.fromarray(drawn).resize((size, size), Image.Resampling.BILINEAR)))
    labels = np.repeat(np.arange(len(recipe.classes)), count)
    return TaskImages(np.stack(images).transpose(0, 3, 1, 2), labels, list(recipe.classes))
