"""Frames of four small video games on a board of tiles, each drawn in one of many looks."""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.demo.drawing import Colour, mixed, photographed

CLASS_NAMES = ("falling blocks", "paddle and ball", "platformer", "snake")
SIZE = (160, 90)  # width and height of a frame, pixels
TILE = 10  # pixels
EMPTY = -1
TETROMINOES = ("####", "## ##", "### .#.", "### #..", "### ..#", ".## ##.", "##. .##")
STYLES = ("flat", "bevel", "outline", "round", "hollow")
BACKDROPS = ("flat", "flat", "gradient", "stars", "lattice", "stripes")
# How often a game has its usual shape of board, backdrop and frame round it, else any: the higher, the easier to tell apart.
USUAL_CHANCES = 0.9, 0.7, 0.4


@dataclass
class Scene:
    """What a game shows. tiles: (rows, columns) of ink numbers, EMPTY where there is none; things: kind and box in tiles."""

    tiles: np.ndarray
    things: list[tuple[str, tuple[float, float, float, float]]] = field(default_factory=list)


def falling_blocks(cols: int, rows: int, rng: np.random.Generator) -> Scene:
    """Pieces that fell onto a stack, each where it left the fewest holes of some places tried, and one that is falling."""
    tiles, tried = np.full((rows, cols), EMPTY), int(rng.integers(2, 7))
    for _ in range(rng.integers(3, 30)):
        ink = int(rng.integers(len(TETROMINOES)))
        piece = np.array([[mark == "#" for mark in row] for row in TETROMINOES[ink].split()])
        tops = np.where((tiles != EMPTY).any(0), (tiles != EMPTY).argmax(0), rows)
        places = []
        for _ in range(tried):
            turned = np.rot90(piece, rng.integers(4))
            left = int(rng.integers(cols - turned.shape[1] + 1))
            room = tops[left : left + turned.shape[1]] - turned.shape[0] + turned[::-1].argmax(0)
            places.append((3 * (room - room.min()).sum() - room.min(), len(places), left, int(room.min()), turned))
        *_, left, top, turned = min(places)
        if top < 4:
            break
        tiles[top : top + turned.shape[0], left : left + turned.shape[1]][turned] = ink
        kept = tiles[(tiles == EMPTY).any(1)]
        tiles = np.vstack([np.full((rows - len(kept), cols), EMPTY), kept])
    top, left = int(rng.integers(5 - turned.shape[0])), int(rng.integers(cols - turned.shape[1] + 1))
    tiles[top : top + turned.shape[0], left : left + turned.shape[1]][turned] = int(rng.integers(len(TETROMINOES)))
    return Scene(tiles)


def paddle_and_ball(cols: int, rows: int, rng: np.random.Generator) -> Scene:
    """A wall of bricks with holes, a paddle and one or two balls; the bricks are above the paddle or beside it."""
    if sideways := rng.uniform() < 0.4:
        cols, rows = rows, cols
    tiles, first, deep = np.full((rows, cols), EMPTY), int(rng.integers(0, 2)), int(rng.integers(1, rows // 2))
    standing = rng.uniform(size=(deep, cols)) < rng.uniform(0.4, 1)
    standing[:, rng.uniform(size=cols) < rng.uniform(0, 0.5)] = False
    tiles[first : first + deep][standing] = np.broadcast_to(np.arange(deep)[:, None], standing.shape)[standing]
    wide = rng.uniform(2, 4)
    things = [("bar", (rng.uniform(0, cols - wide), rows - 1.0, wide, 0.7))]
    for _ in range(rng.integers(1, 3)):
        things.append(("ball", (rng.uniform(0, cols - 1), rng.uniform(first + deep, rows - 2), 0.8, 0.8)))
    if sideways:
        return Scene(tiles.T, [(kind, (y, x, high, wide)) for kind, (x, y, wide, high) in things])
    return Scene(tiles, things)


def platformer(cols: int, rows: int, rng: np.random.Generator) -> Scene:
    """Uneven ground with gaps, platforms above it, a player, enemies and coins."""
    tiles, height = np.full((rows, cols), EMPTY), int(rng.integers(1, 3))
    things = []
    for x in range(cols):
        if rng.uniform() < 0.3:
            height = int(rng.integers(0, 5))
        tiles[rows - height :, x] = 0
    for _ in range(rng.integers(1, 5)):
        y, x, long = int(rng.integers(2, rows - 3)), int(rng.integers(cols)), int(rng.integers(2, 6))
        tiles[y, x : x + long] = 1
    free = np.argwhere((tiles[:-1] == EMPTY) & (tiles[1:] != EMPTY))
    for number, (y, x) in enumerate(free[rng.permutation(len(free))[: rng.integers(2, 6)]].tolist()):
        things.append(("coin" if number and rng.uniform() < 0.4 else "figure", (x, y, 1, 1)))
    return Scene(tiles, things)


def snake(cols: int, rows: int, rng: np.random.Generator) -> Scene:
    """A body that winds over the board without crossing itself, some walls, and food."""
    tiles = np.full((rows, cols), EMPTY)
    for _ in range(rng.integers(0, 3)):
        y, x, long = int(rng.integers(rows)), int(rng.integers(cols)), int(rng.integers(2, 5))
        tiles[(slice(y, y + long), x) if rng.uniform() < 0.5 else (y, slice(x, x + long))] = 5
    (y, x), step = np.argwhere(tiles == EMPTY)[rng.integers((tiles == EMPTY).sum())].tolist(), (0, 1)
    for length in range(rng.integers(8, 45)):
        tiles[y, x] = length // 3 % 2
        ways = [(dy, dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))
                if 0 <= y + dy < rows and 0 <= x + dx < cols and tiles[y + dy, x + dx] == EMPTY]
        if not ways:
            break
        step = step if step in ways and rng.uniform() < 0.75 else ways[rng.integers(len(ways))]
        y, x = y + step[0], x + step[1]
    things = [("figure", (x, y, 1, 1))]
    for y, x in rng.permutation(np.argwhere(tiles == EMPTY))[: rng.integers(1, 4)].tolist():
        things.append(("coin", (x, y, 1, 1)))
    return Scene(tiles, things)


@dataclass(frozen=True)
class Game:
    """A game and how it is usually shown. width, height: of the board, least and most share of the frame."""

    play: Callable[[int, int, np.random.Generator], Scene] | None
    width: tuple[float, float]
    height: tuple[float, float]
    backdrops: tuple[str, ...]
    frames: tuple[str, ...]


GAMES = (  # in the order of CLASS_NAMES
    Game(falling_blocks, (0.3, 0.5), (0.9, 1.0), ("flat", "lattice"), ("bezel",)),
    Game(paddle_and_ball, (0.75, 1.0), (0.8, 1.0), ("flat", "stars"), ("nothing",)),
    Game(platformer, (1.0, 1.0), (1.0, 1.0), ("gradient", "stars"), ("nothing",)),
    Game(snake, (0.5, 0.8), (0.75, 1.0), ("lattice", "stripes"), ("wall",)),
)
ANY = Game(None, (0.4, 1.0), (0.75, 1.0), BACKDROPS, ("nothing", "bezel", "wall"))


def render(label: int, rng: np.random.Generator) -> np.ndarray:
    """One frame of the game CLASS_NAMES[label], (90, 160, 3) uint8."""
    usual = [GAMES[label] if rng.uniform() < chance else ANY for chance in USUAL_CHANCES]
    look = Look(rng)
    cols, rows = (min(max(9, round(rng.uniform(*shares) * room / TILE)), room // TILE)
                  for room, shares in zip(SIZE, (usual[0].width, usual[0].height), strict=True))
    scene = GAMES[label].play(cols, rows, rng)
    image = look.backdrop(str(rng.choice(BACKDROPS)), SIZE)
    board = look.backdrop(str(rng.choice(usual[1].backdrops)), (cols * TILE, rows * TILE))
    look.draw(board, scene)
    left, top = int(rng.integers(SIZE[0] - board.width + 1)), int(rng.integers(SIZE[1] - board.height + 1))
    look.draw_frame(image, str(rng.choice(usual[2].frames)), (left, top, left + board.width - 1, top + board.height - 1))
    image.paste(ImageOps.mirror(board) if rng.uniform() < 0.5 else board, (left, top))
    if rng.uniform() < 0.5:
        words = f"{rng.choice(['SCORE', 'LEVEL', 'TIME', 'P1'])} {rng.integers(100000)}"
        ImageDraw.Draw(image).text((rng.integers(2, 90), rng.integers(0, 78)), words, look.text, ImageFont.load_default(9))
    return photographed(image, rng)


class Look:
    """Colours and styles of one frame, which do not depend on the game; ground and inks always differ in brightness."""

    def __init__(self, rng: np.random.Generator):
        self.rng, dark = rng, rng.uniform() < 0.8
        hue, spread = rng.uniform(), float(rng.choice((0.05, 0.2, 1.0, 1.0)))
        grounds = (0.0, 0.3) if dark else (0.85, 1.0)
        self.grounds = [hsv(hue + shift, rng.uniform(0, 0.8 if dark else 0.35), rng.uniform(*grounds)) for shift in (0, 0.08, 0.5, 0.6)]
        self.inks = [hsv(hue + 0.4 + spread * rng.uniform(-0.5, 0.5), rng.uniform(0.2, 1),
                         rng.uniform(*((0.75, 1.0) if dark else (0.25, 0.65)))) for _ in range(rng.integers(3, 8))]
        self.text = (250, 250, 245) if dark else (20, 20, 30)
        self.style, self.gap = str(rng.choice(STYLES)), int(rng.integers(0, 2))
        self.by_place = rng.uniform() < 0.4  # inks of tiles follow from their place, not from the game

    def backdrop(self, kind: str, size: tuple[int, int]) -> Image.Image:
        """One of BACKDROPS."""
        rng, (first, second) = self.rng, (self.grounds[i] for i in self.rng.permutation(4)[:2])
        image = Image.new("RGB", size, first)
        draw, pitch, line = ImageDraw.Draw(image), int(rng.integers(5, 14)), mixed(first, (128, 128, 128), 0.25)
        if kind == "gradient":
            for y in range(size[1]):
                draw.line((0, y, size[0], y), mixed(first, second, y / size[1]))
        elif kind == "stars":
            for _ in range(rng.integers(15, 60)):
                draw.point(rng.integers(0, size).tolist(), mixed(first, (200, 200, 200), rng.uniform(0, 1)))
        elif kind in ("lattice", "stripes"):
            for x in range(0, size[0], pitch):
                draw.line((x, 0, x, size[1]), line, 1 if kind == "lattice" else pitch // 2)
            for y in range(0, size[1] if kind == "lattice" else 0, pitch):
                draw.line((0, y, size[0], y), line)
        return image

    def draw(self, board: Image.Image, scene: Scene) -> None:
        """The tiles and the things on the board."""
        draw = ImageDraw.Draw(board)
        for y, x in np.argwhere(scene.tiles != EMPTY).tolist():
            self.tile(draw, (x, y, 1, 1), 5 * x * x + 3 * y if self.by_place else int(scene.tiles[y, x]))
        for number, (kind, (x, y, wide, high)) in enumerate(scene.things, start=2):
            left, top, right, bottom = box = [round(TILE * part) for part in (x, y, x + wide, y + high)]
            colour = self.inks[number % len(self.inks)]
            if kind == "bar":
                self.tile(draw, (x, y, wide, high), number)
            elif kind == "figure":
                draw.rounded_rectangle((left + 1, top, right - 2, bottom - 1), 3, colour)
                for eye in (left + 3, right - 4):
                    draw.rectangle((eye, top + 3, eye, top + 4), self.grounds[0])
            else:
                draw.ellipse((left + 1, top + 1, right - 2, bottom - 2), mixed(colour, (255, 255, 255), 0.3))

    def tile(self, draw: ImageDraw.ImageDraw, box: tuple[float, ...], ink: int) -> None:
        """A tile, or a longer bar that looks like one."""
        x, y, wide, high = box
        left, top, right, bottom = inner = (round(TILE * x), round(TILE * y), round(TILE * (x + wide)) - 1 - self.gap,
                                            round(TILE * (y + high)) - 1 - self.gap)
        colour = self.inks[ink % len(self.inks)]
        edge = mixed(colour, (0, 0, 0), 0.45)
        if self.style == "round":
            draw.rounded_rectangle(inner, 2, colour)
        elif self.style == "hollow":
            draw.rectangle(inner, mixed(colour, self.grounds[0], 0.6), colour)
        else:
            draw.rectangle(inner, colour, edge if self.style == "outline" else None)
        if self.style == "bevel":
            draw.line((left, bottom, right, bottom, right, top), edge)
            draw.line((left, bottom, left, top, right, top), mixed(colour, (255, 255, 255), 0.45))

    def draw_frame(self, image: Image.Image, kind: str, box: tuple[int, int, int, int]) -> None:
        """Nothing, a plain bezel, or a wall of tiles round the board."""
        draw, (left, top, right, bottom) = ImageDraw.Draw(image), box
        if kind == "bezel":
            draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), self.inks[0])
        elif kind == "wall":
            for x in range(-1, (right - left) // TILE + 2):
                for y in range(-1, (bottom - top) // TILE + 2):
                    self.tile(draw, (left / TILE + x, top / TILE + y, 1, 1), 0)


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """A colour from hue (any number, whole turns do not count), saturation and value (0 to 1)."""
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue % 1, saturation, value))
