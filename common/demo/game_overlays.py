"""What lies over a game's frame and says nothing about the game: scores, stream parts, and the lens it is seen through."""

from __future__ import annotations

import io
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from common.demo.game_looks import SIZE, Box, Colour, Draw, Field, Look, Size, darker, draw_tile, hsv, mix
from common.demo.game_rules import TETROMINOES

# How much is laid over a frame.
MOST_HUD_PARTS = 1
STREAM_CHANCE = 0.05

# What happens to the finished picture.
ZOOM_CHANCE, LARGEST_ZOOM = 0.1, 1.2
SCANLINES_CHANCE = 0.05
BLUR_CHANCE, LARGEST_BLUR = 0.1, 0.9
TONE_CHANCE = 0.5
JPEG_CHANCE, JPEG_QUALITY = 0.3, (25, 80)
NOISE_CHANCE, LARGEST_NOISE = 0.15, 8.0

# A glyph is five rows of three pixels; each row is one octal digit.
GLYPHS = {
    "0": "75557", "1": "26227", "2": "71747", "3": "71717", "4": "55711", "5": "74717", "6": "74757",
    "7": "71122", "8": "75757", "9": "75717", "C": "74447", "E": "74647", "H": "55755", "I": "72227",
    "L": "44447", "M": "57755", "O": "75557", "P": "75744", "R": "65655", "S": "74717", "T": "72222",
    "V": "55552", " ": "00000",
}  # fmt: skip
WORDS = ("", "", "HI ", "P1 ", "SCORE ", "LEVEL ", "TIME ", "LIVES ")
BANNERS = ("LIVE", "HI SCORE", "LEVEL 2", "HI THERE", "PRO SERIES")
GLYPH_PITCH = 4


def draw_overlays(frame: Image.Image, field: Field, look: Look, dice: random.Random) -> None:
    """Scores and boxes as games show them, and what streams lay over games."""
    draw = ImageDraw.Draw(frame)
    parts = dice.choices(HUD_PARTS, k=dice.randint(0, MOST_HUD_PARTS))
    parts += [part for part in STREAM_PARTS if dice.random() < STREAM_CHANCE]
    for part, size in parts:
        part(draw, quiet_spot(size, field, dice), look, dice)


def quiet_spot(size: Size, field: Field, dice: random.Random) -> Box:
    """Of a few random places the one that hides least of the board."""
    left, top, right, bottom = field.box

    def hidden(box: Box) -> int:
        """How many pixels of the board a box hides."""
        across = min(box[2], right) - max(box[0], left)
        down = min(box[3], bottom) - max(box[1], top)
        return max(across, 0) * max(down, 0)

    corners = [[dice.randint(1, room - 1 - side) for room, side in zip(SIZE, size, strict=False)] for _ in range(5)]
    return min(((x, y, x + size[0] - 1, y + size[1] - 1) for x, y in corners), key=hidden)


def draw_text(draw: Draw, place: tuple[int, int], text: str, colour: Colour) -> None:
    """Text in the built-in font, with a shadow that keeps it readable on anything."""
    pixels = [
        (place[0] + GLYPH_PITCH * nth + column, place[1] + row)
        for nth, letter in enumerate(text)
        for row, bits in enumerate(GLYPHS[letter])
        for column in range(3)
        if int(bits) & 4 >> column
    ]
    draw.point([(x + 1, y + 1) for x, y in pixels], mix(colour, (128, 128, 128), 0.9))
    draw.point(pixels, colour)


def draw_score(draw: Draw, box: Box, look: Look, dice: random.Random) -> None:
    """A number, often with a word before it."""
    number = str(dice.randrange(10 ** dice.randint(1, 5))).zfill(dice.choice((0, 5)))
    draw_text(draw, box[:2], dice.choice(WORDS) + number, look.text)


def draw_gauge(draw: Draw, box: Box, look: Look, dice: random.Random) -> None:
    """A bar that is filled in part."""
    left, top, right, bottom = box
    draw.rectangle(box, darker(look.sky[0]), look.text)
    draw.rectangle((left + 1, top + 1, dice.randint(left + 1, right - 1), bottom - 1), dice.choice(look.inks))


def draw_lives(draw: Draw, box: Box, look: Look, dice: random.Random) -> None:
    """Some round tokens in a row."""
    colour, (left, top, _, bottom) = dice.choice(look.inks), box
    for nth in range(dice.randint(1, 4)):
        x = left + nth * (bottom - top + 2)
        draw.ellipse((x, top, x + bottom - top, bottom), colour)


def draw_preview(draw: Draw, box: Box, look: Look, dice: random.Random) -> None:
    """A framed box with a few tiles in it: the next piece, a map or an item."""
    draw.rectangle(box, look.sky[0], look.text)
    colour = dice.choice(look.inks)
    for x, y in dice.choice(TETROMINOES):
        left, top = box[0] + 3 + 4 * x, box[1] + 5 + 4 * y
        draw_tile(draw, (left, top, left + 3, top + 3), colour, look)


def draw_facecam(draw: Draw, box: Box, look: Look, dice: random.Random) -> None:
    """A framed head and shoulders."""
    left, top, right, bottom = box
    hue, middle = dice.random(), (left + right) // 2
    draw.rectangle(box, hsv(hue, 0.4, dice.uniform(0.2, 0.8)))
    draw.chord((left + 4, bottom - 8, right - 4, bottom + 6), 180, 360, hsv(hue + 0.4, 0.6, 0.6))
    draw.ellipse((middle - 4, top + 3, middle + 4, top + 13), hsv(0.07, 0.45, dice.uniform(0.35, 0.95)))
    draw.rectangle(box, None, look.text)


def draw_chat(draw: Draw, box: Box, look: Look, dice: random.Random) -> None:
    """Lines too small to read, each with a name in colour."""
    left, top, right, bottom = box
    draw.rectangle(box, mix(look.surround[0], (0, 0, 0), 0.5))
    for y in range(top + 2, bottom - 1, 4):
        name = left + dice.randint(5, 9)
        draw.line((left + 2, y, name, y), dice.choice(look.inks))
        draw.line((name + 2, y, dice.randint(name + 3, right - 2), y), (190, 190, 190))


def draw_banner(draw: Draw, box: Box, look: Look, dice: random.Random) -> None:
    """A coloured strip with a word."""
    colour = dice.choice(look.inks)
    draw.rectangle(box, darker(colour), colour)
    draw_text(draw, (box[0] + 4, box[1] + 2), dice.choice(BANNERS), (255, 255, 255))


HUD_PARTS = (
    (draw_score, (44, 7)),
    (draw_score, (44, 7)),
    (draw_gauge, (30, 5)),
    (draw_lives, (22, 4)),
    (draw_preview, (21, 18)),
)
STREAM_PARTS = ((draw_facecam, (27, 22)), (draw_chat, (38, 30)), (draw_banner, (60, 9)))


def through_lens(frame: Image.Image, dice: random.Random, rng: np.random.Generator) -> np.ndarray:
    """The picture as it comes out of a zoomed, worn, badly set or badly stored recording."""
    if dice.random() < ZOOM_CHANCE:
        frame = zoomed(frame, dice)
    if dice.random() < BLUR_CHANCE:
        frame = frame.filter(ImageFilter.GaussianBlur(dice.uniform(0.3, LARGEST_BLUR)))
    if dice.random() < TONE_CHANCE:
        frame = retoned(frame, dice)
    if dice.random() < JPEG_CHANCE:
        stored = io.BytesIO()
        frame.save(stored, "JPEG", quality=dice.randint(*JPEG_QUALITY))
        frame = Image.open(stored)
    pixels = np.array(frame)
    if dice.random() < SCANLINES_CHANCE:
        dim = pixels[dice.randrange(2) :: 2]
        dim[:] = dim * dice.uniform(0.6, 0.85)
    if dice.random() < NOISE_CHANCE:
        noise = rng.standard_normal(pixels.shape, np.float32) * dice.uniform(2, LARGEST_NOISE)
        pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return pixels


def zoomed(frame: Image.Image, dice: random.Random) -> Image.Image:
    """A part of the frame at full size."""
    zoom = dice.uniform(1.05, LARGEST_ZOOM)
    wide, high = SIZE[0] / zoom, SIZE[1] / zoom
    left, top = dice.uniform(0, SIZE[0] - wide), dice.uniform(0, SIZE[1] - high)
    return frame.resize(SIZE, Image.Resampling.BILINEAR, (left, top, left + wide, top + high))


def retoned(frame: Image.Image, dice: random.Random) -> Image.Image:
    """Other brightness, contrast and gamma."""
    gamma, contrast, shift = dice.uniform(0.75, 1.3), dice.uniform(0.75, 1.15), dice.uniform(-15, 15)
    curve = [128 + contrast * (255 * (value / 255) ** gamma - 128) + shift for value in range(256)]
    return frame.point([min(max(round(value), 0), 255) for value in curve] * 3)
