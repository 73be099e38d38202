"""Frames of four small video games that are really simulated and rendered with varied looks."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from common.demo.game_looks import (
    BACKDROPS,
    SIZE,
    Backdrop,
    Box,
    Colour,
    Draw,
    Field,
    Look,
    Shape,
    darker,
    draw_tile,
    flat,
    gradient,
    hills,
    lattice,
    lighter,
    random_field,
    random_look,
    speckle,
    stars,
    tile_colour,
)
from common.demo.game_overlays import draw_overlays, through_lens
from common.demo.game_rules import Scene, Thing, play

CLASS_NAMES = ("falling blocks", "paddle and ball", "platformer", "snake")

MIRROR_CHANCE = 0.5


@dataclass(frozen=True)
class Custom:
    """How a game is usually presented. shape: of the board; rim: what is usually round it."""

    shape: Shape
    backdrops: tuple[Backdrop, ...]
    rim: str


# How often each custom is kept, else anything goes: the higher, the easier the games are to tell apart. The rim helps
# a head on frozen features most, the shape of the board helps those who learn.
SHAPE_CHANCE, BACKDROP_CHANCE, RIM_CHANCE = 0.95, 0.95, 0.5
# In the order of CLASS_NAMES.
CUSTOMS = (
    Custom(((0.3, 0.45), (0.9, 1.0)), (flat, lattice), "bezel"),
    Custom(((0.8, 1.0), (0.8, 1.0)), (flat, stars), "nothing"),
    Custom(((1.0, 1.0), (1.0, 1.0)), (gradient, hills), "nothing"),
    Custom(((0.5, 0.75), (0.75, 1.0)), (lattice, speckle), "wall"),
)
ANY_SHAPE: Shape = ((0.4, 1.0), (0.75, 1.0))
RIMS = ("nothing", "nothing", "bezel", "wall")


def render(label: int, rng: np.random.Generator) -> np.ndarray:
    """One frame of the game CLASS_NAMES[label], as (90, 160, 3) uint8."""
    # Plain Python dice: single draws, of which a game needs thousands, are slow with numpy.
    dice, custom = random.Random(int(rng.integers(2**63))), CUSTOMS[label]
    look = random_look(dice)
    field = random_field(custom.shape if dice.random() < SHAPE_CHANCE else ANY_SHAPE, dice)
    backdrops = custom.backdrops if dice.random() < BACKDROP_CHANCE else BACKDROPS
    rim = custom.rim if dice.random() < RIM_CHANCE else dice.choice(RIMS)
    scene = play(label, field.cols, field.rows, dice)
    frame = dice.choice(BACKDROPS)(SIZE, look.surround, dice)
    draw_rim(frame, field, rim, look, dice)
    board = dice.choice(backdrops)(field.size, look.sky, dice)
    draw_scene(board, scene, field, look)
    frame.paste(ImageOps.mirror(board) if dice.random() < MIRROR_CHANCE else board, (field.left, field.top))
    draw_overlays(frame, field, look, dice)
    return through_lens(frame, dice, rng)


def draw_scene(board: Image.Image, scene: Scene, field: Field, look: Look) -> None:
    """The tiles and figures on the board."""
    draw, (wide, high) = ImageDraw.Draw(board), field.tile
    for (x, y), group in scene.tiles.items():
        box = x * wide, y * high, (x + 1) * wide - 1, (y + 1) * high - 1
        draw_tile(draw, box, tile_colour(look, x, y, group), look)
    for thing in scene.things:
        left, top = round(thing.x * wide), round(thing.y * high)
        right, bottom = round((thing.x + thing.width) * wide) - 1, round((thing.y + thing.height) * high) - 1
        draw_thing(draw, thing, (left, top, max(right, left + 1), max(bottom, top + 1)), look)


def draw_thing(draw: Draw, thing: Thing, box: Box, look: Look) -> None:
    """A figure of any game."""
    colour = look.inks[thing.group % len(look.inks)]
    if thing.kind == "bar":
        draw_tile(draw, box, colour, look)
    elif thing.kind == "ball":
        (draw.ellipse if look.round_balls else draw.rectangle)(box, lighter(colour))
    elif thing.kind == "coin":
        left, top, right, bottom = box
        draw.ellipse((left + 1, top, right - 1, bottom), colour, lighter(colour))
    else:
        draw_figure(draw, thing.kind, box, colour, look)


def draw_figure(draw: Draw, kind: str, box: Box, colour: Colour, look: Look) -> None:
    """A head that fills its box, or a creature that also has two legs; both may have eyes."""
    left, top, right, bottom = box
    if kind == "face":
        draw_tile(draw, box, colour, look)
    else:
        draw.rounded_rectangle((left, top, right, bottom - 1), 2, colour)
        for x in (left + 1, right - 1):
            draw.point((x, bottom), darker(colour))
    if look.eyes:
        eye = top + (bottom - top) // 3
        for x in (left + 1, right - 1):
            draw.point((x, eye), (255, 255, 255))
            draw.point((x, eye + 1), (0, 0, 0))


def draw_rim(frame: Image.Image, field: Field, rim: str, look: Look, dice: random.Random) -> None:
    """Nothing, a plain bezel, or a wall of tiles round the board."""
    draw, colour = ImageDraw.Draw(frame), dice.choice(look.inks)
    left, top, right, bottom = field.box
    if rim == "bezel":
        thick = dice.randint(1, 3)
        draw.rectangle((left - thick, top - thick, right + thick, bottom + thick), colour)
    elif rim == "wall":
        wide, high = field.tile
        for x in range(left - wide, right + 2, wide):
            for y in (top - high, bottom + 1):
                draw_tile(draw, (x, y, x + wide - 1, y + high - 1), colour, look)
        for y in range(top, bottom, high):
            for x in (left - wide, right + 1):
                draw_tile(draw, (x, y, x + wide - 1, y + high - 1), colour, look)
