"""Frames of four small video games that are really simulated and rendered with varied looks."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from common.demo.game_looks import (
    SIZE, Box, Colour, Draw, Field, Look, darker, draw_tile, lighter, random_backdrop, random_field, random_look, tile_colour,
)
from common.demo.game_overlays import draw_overlays, through_lens
from common.demo.game_rules import Scene, Thing, play

CLASS_NAMES = ("falling blocks", "paddle and ball", "platformer", "snake")

# Sights on the board that say nothing about the game.
MOST_DECOYS = 5
DECOY_ROW_CHANCE = 0.15
RIM_CHANCE = 0.4
MIRROR_CHANCE = 0.5


def render(label: int, rng: np.random.Generator) -> np.ndarray:
    """One frame of the game CLASS_NAMES[label], as (90, 160, 3) uint8."""
    # Plain Python dice: single draws, of which a game needs thousands, are slow with numpy.
    dice = random.Random(int(rng.integers(2**63)))
    look, field = random_look(dice), random_field(dice)
    scene = play(label, field.cols, field.rows, dice)
    add_decoys(scene, field, dice)
    frame = random_backdrop(SIZE, look.surround, dice)
    draw_rim(frame, field, look, dice)
    frame.paste(draw_board(scene, field, look, dice), (field.left, field.top))
    draw_overlays(frame, field, look, dice)
    return through_lens(frame, dice, rng)


def add_decoys(scene: Scene, field: Field, dice: random.Random) -> None:
    """Put stray blocks and figures, and sometimes a row of blocks, on free cells of the board."""
    if dice.random() < DECOY_ROW_CHANCE:
        y, group = dice.choice((0, 1, field.rows - 1)), dice.randrange(4)
        for x in range(dice.randint(0, field.cols // 2), dice.randint(field.cols // 2, field.cols)):
            scene.tiles.setdefault((x, y), group)
    for _ in range(dice.randint(0, MOST_DECOYS)):
        x, y = dice.randrange(field.cols), dice.randrange(field.rows)
        kind, group = dice.choice(("block", "ball", "coin", "creature", "bar")), dice.randrange(4)
        if (x, y) in scene.tiles:
            continue
        if kind == "block":
            scene.tiles[x, y] = group
        else:
            scene.things.insert(0, Thing(kind, x, y, dice.randint(2, 4) if kind == "bar" else 1, 0.8, group))


def draw_board(scene: Scene, field: Field, look: Look, dice: random.Random) -> Image.Image:
    """The board with its tiles and figures, mirrored at times."""
    board = random_backdrop(field.size, look.sky, dice)
    draw, (wide, high) = ImageDraw.Draw(board), field.tile
    for (x, y), group in scene.tiles.items():
        box = x * wide, y * high, (x + 1) * wide - 1, (y + 1) * high - 1
        draw_tile(draw, box, tile_colour(look, x, y, group), look)
    for thing in scene.things:
        left, top = round(thing.x * wide), round(thing.y * high)
        right, bottom = round((thing.x + thing.width) * wide) - 1, round((thing.y + thing.height) * high) - 1
        draw_thing(draw, thing, (left, top, max(right, left + 1), max(bottom, top + 1)), look)
    return ImageOps.mirror(board) if dice.random() < MIRROR_CHANCE else board


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


def draw_rim(frame: Image.Image, field: Field, look: Look, dice: random.Random) -> None:
    """Nothing, a plain bezel, or a wall of tiles round the board."""
    if dice.random() > RIM_CHANCE:
        return
    draw, colour = ImageDraw.Draw(frame), dice.choice(look.inks)
    left, top, right, bottom = field.box
    if dice.random() < 0.5:
        thick = dice.randint(1, 3)
        draw.rectangle((left - thick, top - thick, right + thick, bottom + thick), colour)
        return
    wide, high = field.tile
    for x in range(left - wide, right + 2, wide):
        for y in (top - high, bottom + 1):
            draw_tile(draw, (x, y, x + wide - 1, y + high - 1), colour, look)
    for y in range(top, bottom, high):
        for x in (left - wide, right + 1):
            draw_tile(draw, (x, y, x + wide - 1, y + high - 1), colour, look)
