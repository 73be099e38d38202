"""What all demo games share in their looks: colours, tiles, fields and backdrops."""

from __future__ import annotations

import colorsys
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Duo = tuple[Colour, Colour]
Size = tuple[int, int]
Box = tuple[int, int, int, int]
Draw = ImageDraw.ImageDraw
Shape = tuple[tuple[float, float], tuple[float, float]]

SIZE = (160, 90)  # width and height of a frame, pixels

TILE_HEIGHT = 10  # pixels; smaller tiles make all games harder to tell apart
TILE_STRETCHES = (1.0, 1.0, 1.0, 1.25, 1.5)
FEWEST_TILES = 9
DARK_CHANCE = 0.8

TILE_STYLES = ("flat", "bevel", "outline", "round", "dot", "hollow")
# What picks the ink of a tile: its part of the game, or only its place. Every game may use every way.
COLOURINGS = (
    lambda x, y, group: group,
    lambda x, y, group: group % 2,
    lambda x, y, group: y,
    lambda x, y, group: x,
    lambda x, y, group: x + y,
    lambda x, y, group: 5 * x * x + 3 * y,
)
COLOURING_WEIGHTS = (4, 1, 1, 1, 1, 1)


@dataclass(frozen=True)
class Look:
    """Everything about the looks of one frame that does not depend on the game."""

    sky: Duo
    surround: Duo
    inks: list[Colour]
    text: Colour
    tile_style: str
    tile_gap: int
    colouring: Callable[[int, int, int], int]
    round_balls: bool
    eyes: bool


@dataclass(frozen=True)
class Field:
    """Where the board lies in the frame, and its tiles."""

    left: int
    top: int
    cols: int
    rows: int
    tile: Size

    @property
    def size(self) -> Size:
        """Width and height in pixels."""
        return self.cols * self.tile[0], self.rows * self.tile[1]

    @property
    def box(self) -> Box:
        """First and last pixel column and row: left, top, right, bottom."""
        return self.left, self.top, self.left + self.size[0] - 1, self.top + self.size[1] - 1


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """A colour from hue (any number, whole turns do not count), saturation and value (0 to 1)."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """The colour that has this share of the second colour."""
    return tuple(round(a + share * (b - a)) for a, b in zip(first, second, strict=False))


def lighter(colour: Colour) -> Colour:
    """The colour of a lit edge."""
    return mix(colour, (255, 255, 255), 0.45)


def darker(colour: Colour) -> Colour:
    """The colour of an edge in the shade."""
    return mix(colour, (0, 0, 0), 0.45)


def random_look(dice: random.Random) -> Look:
    """Colours and styles: background and inks always differ clearly in brightness."""
    dark = dice.random() < DARK_CHANCE
    hue, spread = dice.random(), dice.choice((0.05, 0.2, 1.0, 1.0))
    vivid = dice.uniform(0.3, 1.0)

    def ground() -> Colour:
        """A quiet colour for backdrops."""
        value = dice.uniform(0.0, 0.3) if dark else dice.uniform(0.85, 1.0)
        return hsv(hue + dice.choice((0, 0.08, 0.5)), dice.uniform(0, 0.8 if dark else 0.35), value)

    def ink() -> Colour:
        """A strong colour for all that is played with."""
        value = dice.uniform(0.75, 1.0) if dark else dice.uniform(0.25, 0.65)
        return hsv(hue + 0.4 + dice.uniform(-0.5, 0.5) * spread, vivid * dice.uniform(0.6, 1.0), value)

    sky, style = (ground(), ground()), dice.choice(TILE_STYLES)
    return Look(
        sky=sky,
        surround=sky if dice.random() < 0.3 else (ground(), ground()),
        inks=[ink() for _ in range(dice.randint(3, 7))],
        text=(250, 250, 245) if dark else (20, 20, 30),
        tile_style=style,
        # Without any seam a snake that runs along itself would melt into one blob.
        tile_gap=1 if style == "flat" else dice.choice((0, 0, 1)),
        colouring=dice.choices(COLOURINGS, COLOURING_WEIGHTS)[0],
        round_balls=dice.random() < 0.6,
        eyes=dice.random() < 0.75,
    )


def random_field(shape: Shape, dice: random.Random) -> Field:
    """A board of random tiles at a random place, its width and height within these shares of the frame."""
    tile = round(TILE_HEIGHT * dice.choice(TILE_STRETCHES)), TILE_HEIGHT
    cols, rows = (
        min(max(FEWEST_TILES, round(dice.uniform(*shares) * room / side)), room // side)
        for room, side, shares in zip(SIZE, tile, shape, strict=False)
    )
    left = dice.randint(0, SIZE[0] - cols * tile[0])
    return Field(left, dice.randint(0, SIZE[1] - rows * tile[1]), cols, rows, tile)


def tile_colour(look: Look, x: int, y: int, group: int) -> Colour:
    """The ink of a tile under the colouring of this frame."""
    return look.inks[look.colouring(x, y, group) % len(look.inks)]


def draw_tile(draw: Draw, box: Box, colour: Colour, look: Look) -> None:
    """A tile, or any rectangle that shall look like one."""
    left, top, right, bottom = box
    if look.tile_gap:
        right, bottom = right - 1, bottom - 1
    inner = (left, top, right, bottom)
    if look.tile_style == "round":
        draw.rounded_rectangle(inner, 2, colour)
    elif look.tile_style == "outline":
        draw.rectangle(inner, colour, darker(colour))
    elif look.tile_style == "hollow":
        draw.rectangle(inner, mix(colour, look.sky[0], 0.6), colour)
    else:
        draw.rectangle(inner, colour)
    if look.tile_style == "bevel":
        draw.line((left, bottom, right, bottom, right, top), darker(colour))
        draw.line((left, bottom, left, top, right, top), lighter(colour))
    elif look.tile_style == "dot":
        draw.rectangle((left + 1, top + 1, left + 2, top + 2), lighter(colour))


def flat(size: Size, colours: Duo, dice: random.Random) -> Image.Image:
    """One colour."""
    return Image.new("RGB", size, colours[0])


def gradient(size: Size, colours: Duo, dice: random.Random) -> Image.Image:
    """From one colour at the top to the other at the bottom, in a few bands as old machines had them."""
    bands = Image.new("RGB", (1, dice.choice((6, 12, size[1]))))
    for y in range(bands.height):
        bands.putpixel((0, y), mix(*colours, y / bands.height))
    return bands.resize(size, Image.Resampling.NEAREST)


def stars(size: Size, colours: Duo, dice: random.Random) -> Image.Image:
    """Scattered points, dim and bright."""
    image = flat(size, colours, dice)
    draw = ImageDraw.Draw(image)
    for _ in range(dice.randint(15, 60)):
        place = dice.randrange(size[0]), dice.randrange(size[1])
        draw.point(place, mix(colours[0], dice.choice(((255, 255, 255), colours[1])), dice.random()))
    return image


def lattice(size: Size, colours: Duo, dice: random.Random) -> Image.Image:
    """Thin lines across and down."""
    image = flat(size, colours, dice)
    draw, line = ImageDraw.Draw(image), mix(colours[0], (128, 128, 128), 0.25)
    pitch = dice.randint(4, 12)
    for x in range(0, size[0], pitch):
        draw.line((x, 0, x, size[1]), line)
    for y in range(0, size[1], pitch):
        draw.line((0, y, size[0], y), line)
    return image


def stripes(size: Size, colours: Duo, dice: random.Random) -> Image.Image:
    """Slanted or upright stripes."""
    image = flat(size, colours, dice)
    draw, stripe = ImageDraw.Draw(image), mix(*colours, 0.6)
    pitch, slant = dice.randint(5, 16), dice.choice((0, size[1], -size[1]))
    for x in range(-size[1], size[0] + size[1], pitch):
        draw.line((x, 0, x + slant, size[1]), stripe, pitch // 2)
    return image


def hills(size: Size, colours: Duo, dice: random.Random) -> Image.Image:
    """Two or three ranges of hills, one behind the other."""
    image = gradient(size, (colours[0], mix(*colours, 0.5)), dice)
    draw, ranges = ImageDraw.Draw(image), dice.randint(2, 3)
    for nth in range(1, ranges + 1):
        base, swing = size[1] * (0.35 + 0.5 * nth / ranges), dice.uniform(0.03, 0.15) * size[1]
        pitch, start = dice.uniform(5, 20), dice.uniform(0, 6)
        crest = [(x, base + swing * math.sin(start + x / pitch)) for x in range(0, size[0] + 3, 3)]
        colour = mix(mix(*colours, 0.5), (128, 128, 128), 0.2 * nth)
        draw.polygon([(0, size[1]), *crest, size], colour)
    return image


def speckle(size: Size, colours: Duo, dice: random.Random) -> Image.Image:
    """Coarse random patches between the two colours."""
    mask = Image.frombytes("L", (20, 12), dice.randbytes(240)).resize(size, Image.Resampling.NEAREST)
    return Image.composite(flat(size, colours, dice), Image.new("RGB", size, mix(*colours, 0.5)), mask)


Backdrop = Callable[[Size, Duo, random.Random], Image.Image]
BACKDROPS: tuple[Backdrop, ...] = (flat, flat, gradient, stars, lattice, stripes, hills, speckle)
