"""Rules of the four demo games: small simulations that play themselves and tell what is on the board."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

Cell = tuple[int, int]
NEIGHBOURS = ((1, 0), (0, 1), (-1, 0), (0, -1))


class Thing(NamedTuple):
    """A figure on the board: what it is, its box in tiles, and the number that picks its colour."""

    kind: str
    x: float
    y: float
    width: float = 1.0
    height: float = 1.0
    group: int = 0


class Scene(NamedTuple):
    """All that a game shows: the colour group of every filled tile, and the figures in drawing order."""

    tiles: dict[Cell, int]
    things: list[Thing]


TETROMINOES = (
    ((0, 0), (1, 0), (2, 0), (3, 0)),
    ((0, 0), (1, 0), (0, 1), (1, 1)),
    ((0, 0), (1, 0), (2, 0), (1, 1)),
    ((0, 0), (1, 0), (2, 0), (0, 1)),
    ((0, 0), (1, 0), (2, 0), (2, 1)),
    ((1, 0), (2, 0), (0, 1), (1, 1)),
    ((0, 0), (1, 0), (1, 1), (2, 1)),
)


def quarter_turn(shape: tuple[Cell, ...]) -> tuple[Cell, ...]:
    """The shape turned clockwise by a quarter, moved back into the corner at (0, 0)."""
    lowest = max(y for _, y in shape)
    return tuple((lowest - y, x) for x, y in shape)


class FallingBlocks:
    """Tetrominoes fall onto a stack; a bot that looks at only a few placements steers them."""

    STEPS = (100, 600)
    HOLE_COST = 3.0

    def __init__(self, cols: int, rows: int, dice: random.Random) -> None:
        self.cols, self.rows, self.dice = cols, rows, dice
        self.placements_seen = dice.randint(2, 10)
        self.stack: dict[Cell, int] = {}
        self._add_garbage(dice.choice((0, 0, 1, rows // 4)))
        self._spawn()

    def step(self) -> None:
        """Move the piece one column towards its target and one row down, or lock it where it lies."""
        sideways = (self.target > self.x) - (self.target < self.x)
        if self._fits(self.piece, self.x + sideways, self.y):
            self.x += sideways
        if self._fits(self.piece, self.x, self.y + 1):
            self.y += 1
        else:
            self._lock()

    def piece_cells(self) -> list[Cell]:
        """The cells of the falling piece."""
        return [(self.x + dx, self.y + dy) for dx, dy in self.piece]

    def scene(self) -> Scene:
        """The stack and the falling piece."""
        return Scene(self.stack | dict.fromkeys(self.piece_cells(), self.group), [])

    def _add_garbage(self, height: int) -> None:
        """Start with some bottom rows that have a few gaps each."""
        for y in range(self.rows - height, self.rows):
            gaps = self.dice.sample(range(self.cols), self.dice.randint(1, self.cols // 3))
            for x in set(range(self.cols)).difference(gaps):
                self.stack[x, y] = self.dice.randrange(len(TETROMINOES))

    def _fits(self, piece: tuple[Cell, ...], x: int, y: int) -> bool:
        """Whether the piece may be at (x, y): inside the walls, above the floor and off the stack."""
        return all(
            0 <= x + dx < self.cols and y + dy < self.rows and (x + dx, y + dy) not in self.stack
            for dx, dy in piece
        )

    def _spawn(self) -> None:
        """Put a new piece at the top and choose where it shall go; a full field starts a new round."""
        self.group = self.dice.randrange(len(TETROMINOES))
        tops = [self.rows] * self.cols
        for x, y in self.stack:
            tops[x] = min(tops[x], y)
        _, self.piece, self.target = min(self._random_placement(tops) for _ in range(self.placements_seen))
        # The piece may enter at any column near its target: a wide field is too wide to cross while falling.
        width = 1 + max(dx for dx, _ in self.piece)
        self.x = min(max(self.target + self.dice.randint(-4, 4), 0), self.cols - width)
        self.y = 0
        if not self._fits(self.piece, self.x, self.y):
            self.stack.clear()
            self._add_garbage(self.rows // 4)

    def _random_placement(self, tops: list[int]) -> tuple[float, tuple[Cell, ...], int]:
        """A random turn and column of the new shape, led by its cost: high or hollow landings are bad."""
        piece = TETROMINOES[self.group]
        for _ in range(self.dice.randrange(4)):
            piece = quarter_turn(piece)
        x = self.dice.randrange(self.cols - max(dx for dx, _ in piece))
        room_below = [tops[x + dx] - 1 - dy for dx, dy in piece]
        y = min(room_below)
        return self.HOLE_COST * (sum(room_below) - len(piece) * y) / len(piece) - y, piece, x

    def _lock(self) -> None:
        """Make the piece part of the stack, take out full rows and bring the next piece."""
        self.stack.update(dict.fromkeys(self.piece_cells(), self.group))
        for y in sorted({y for _, y in self.piece_cells()}):
            if all((x, y) in self.stack for x in range(self.cols)):
                self._clear_row(y)
        self._spawn()

    def _clear_row(self, full: int) -> None:
        """Take out one row and let all above it sink by one."""
        self.stack = {(x, y + (y < full)): group for (x, y), group in self.stack.items() if y != full}


@dataclass
class Ball:
    """A ball in flight: its centre and its way per step, in tiles."""

    x: float
    y: float
    vx: float
    vy: float


class PaddleAndBall:
    """Balls fly between walls, bricks and one or two paddles that follow the nearest ball.

    The simulation always has its paddles at the bottom and top; a sideways game is transposed when shown.
    """

    STEPS = (30, 600)
    RADIUS = 0.4
    SPEED = 0.45
    TWO_PADDLES = 0.3
    BRICKS_WITH_TWO_PADDLES = 0.6
    SIDEWAYS = 0.3

    def __init__(self, cols: int, rows: int, dice: random.Random) -> None:
        self.dice = dice
        self.two_paddles = dice.random() < self.TWO_PADDLES
        self.sideways = dice.random() < self.SIDEWAYS
        self.width, self.depth = (rows, cols) if self.sideways else (cols, rows)
        self.reach = dice.uniform(2, max(3, self.width / 4))
        self.quickness = dice.uniform(0.15, 0.5)
        self.paddles = [self.width / 2] * (1 + self.two_paddles)
        self.bricks = self._build_wall()
        self.balls = [self._serve() for _ in range(dice.choice((1, 1, 1, 2, 3)))]

    def step(self) -> None:
        """Move every ball and then every paddle."""
        self.balls = [ball if self._fly(ball) else self._serve() for ball in self.balls]
        for number, place in enumerate(self.paddles):
            goal = (min if number else max)(self.balls, key=lambda ball: ball.y).x
            place += min(max(goal - place, -self.quickness), self.quickness)
            self.paddles[number] = min(max(place, self.reach / 2), self.width - self.reach / 2)

    def scene(self) -> Scene:
        """Bricks as tiles; paddles and balls as figures."""
        size = 2 * self.RADIUS
        things = [Thing("ball", ball.x - size / 2, ball.y - size / 2, size, size) for ball in self.balls]
        for place, y in zip(self.paddles, (self.depth - 0.9, 0.1), strict=False):
            things.append(Thing("bar", place - self.reach / 2, y, self.reach, 0.8, 1))
        if not self.sideways:
            return Scene(dict(self.bricks), things)
        turned = [Thing(kind, y, x, height, width, group) for kind, x, y, width, height, group in things]
        return Scene({(y, x): group for (x, y), group in self.bricks.items()}, turned)

    def _build_wall(self) -> dict[Cell, int]:
        """A band of bricks, whole or with a pattern of holes, that leaves room to play."""
        first, last = self.dice.randint(0, 2), self.dice.randint(3, self.depth // 2)
        if self.two_paddles:
            if self.dice.random() > self.BRICKS_WITH_TWO_PADDLES:
                return {}
            first, last = self.depth // 2 - 1, self.depth // 2 + self.dice.randint(0, 1)
        period, keep = self.dice.randint(2, 5), self.dice.choice((1.0, 1.0, 0.75))
        holes = self.dice.choice((
            lambda x, y: False,
            lambda x, y: x % period == 0,
            lambda x, y: (x + y) % period == 0,
            lambda x, y: abs(x - self.width // 2) < y - first,
        ))
        cells = [(x, y) for y in range(first, last + 1) for x in range(self.width) if not holes(x, y)]
        return {cell: cell[1] for cell in cells if self.dice.random() < keep}

    def _serve(self) -> Ball:
        """A new ball that leaves the bottom paddle upwards."""
        angle = self.dice.uniform(-1, 1)
        vx, vy = self.SPEED * math.sin(angle), -self.SPEED * math.cos(angle)
        return Ball(self.dice.uniform(1, self.width - 1), self.depth - 2.0, vx, vy)

    def _fly(self, ball: Ball) -> bool:
        """Move the ball by one step; False if it went past a paddle."""
        x, y = ball.x + ball.vx, ball.y + ball.vy
        if not self.RADIUS <= x <= self.width - self.RADIUS or self._break_brick(x, ball.y):
            x, ball.vx = ball.x, -ball.vx
        if self._break_brick(x, y):
            y, ball.vy = ball.y, -ball.vy
        ball.x = x
        if y < self.RADIUS + self.two_paddles:
            return self._bounce(ball, self.paddles[1] if self.two_paddles else None, 1)
        if y > self.depth - self.RADIUS - 1:
            return self._bounce(ball, self.paddles[0], -1)
        ball.y = y
        return True

    def _break_brick(self, x: float, y: float) -> bool:
        """Take away the brick at a point; whether there was one."""
        return self.bricks.pop((int(x), int(y)), None) is not None

    def _bounce(self, ball: Ball, paddle: float | None, way: int) -> bool:
        """Send the ball back from a wall, or from a paddle if that is there: off-centre hits slant it."""
        offset = 0.0 if paddle is None else (ball.x - paddle) / self.reach
        if abs(offset) > 0.5 + self.RADIUS / self.reach:
            return False
        ball.vx = min(max(ball.vx + self.SPEED * offset, -0.9 * self.SPEED), 0.9 * self.SPEED)
        ball.vy = way * math.sqrt(self.SPEED**2 - ball.vx**2)
        return True


class Platformer:
    """A figure runs and jumps through a side-scrolling level with gaps, ledges, coins and enemies."""

    STEPS = (20, 240)
    WIDTH, HEIGHT = 0.8, 0.9
    GRAVITY, JUMP, RUN, FASTEST_FALL = 0.06, 0.62, 0.2, 0.8
    # Keeps a resting figure just off the tile below, so that rounding cannot put it inside.
    SKIN = 1e-6

    def __init__(self, cols: int, rows: int, dice: random.Random) -> None:
        self.cols, self.rows, self.dice = cols, rows, dice
        self.length = 3 * cols
        self.solid: dict[Cell, int] = {}
        self._build_ground()
        self._build_ledges()
        floor = min(y for x, y in self.solid if x == 0)
        self.x, self.y, self.fall, self.heading = 0.1, floor - 1.0, 0.0, 1
        self.on_ground, self.safe = False, (self.x, self.y)
        perches = [(x, y - 1) for x, y in self.solid if y > 1 and x > 4 and (x, y - 1) not in self.solid]
        self.coins = {(x, y - dice.randint(0, 1)) for x, y in self._some(perches, 5)} - self.solid.keys()
        self.enemies = [(x, y, dice.choice((-1, 1))) for x, y in self._some(perches, 8)]

    def step(self) -> None:
        """Let the bot jump or turn, move the figure under gravity, and move the enemies now and then."""
        if self.on_ground and (self._trouble_ahead() or self.dice.random() < 0.03):
            self.fall = -self.JUMP
        self._run()
        self._drop()
        self.coins -= set(self._touched(self.x, self.y))
        if self.dice.random() < 0.2:
            self.enemies = [self._patrol(*enemy) for enemy in self.enemies]
        self._meet_enemies()

    def scene(self) -> Scene:
        """The part of the level that the camera sees; it keeps the figure near the middle."""
        left = min(max(int(self.x - self.cols * 0.4), 0), self.length - self.cols)
        tiles = {(x - left, y): group for (x, y), group in self.solid.items() if 0 <= x - left < self.cols}
        things = [Thing("coin", x - left, y, group=2) for x, y in sorted(self.coins)]
        things += [Thing("creature", x - left, y, group=3) for x, y, _ in self.enemies]
        things.append(Thing("creature", self.x - left, self.y, self.WIDTH, self.HEIGHT, 1))
        return Scene(tiles, [thing for thing in things if 0 <= thing.x <= self.cols - 1])

    def stands_free(self) -> bool:
        """Whether no solid tile overlaps the figure."""
        return not self._blocked(self.x, self.y)

    def _some(self, cells: list[Cell], one_in: int) -> list[Cell]:
        """A random part of the cells."""
        return self.dice.sample(cells, len(cells) // one_in)

    def _build_ground(self) -> None:
        """Stretches of level ground at changing heights; some levels are thin bridges, not solid earth."""
        thickness = self.dice.choice((1, 2, self.rows, self.rows))
        gap_chance = self.dice.uniform(0.1, 0.6)
        x, height = 0, self.dice.randint(1, self.rows // 3)
        while x < self.length:
            for _ in range(self.dice.randint(2, 8)):
                top = self.rows - height
                self.solid.update({(x, y): y > top for y in range(top, min(self.rows, top + thickness))})
                x += 1
            height = min(max(height + self.dice.randint(-2, 2), 1), self.rows // 2)
            x += self.dice.randint(1, 3) * (self.dice.random() < gap_chance)

    def _build_ledges(self) -> None:
        """Short rows of tiles in the air, away from the start."""
        for _ in range(self.dice.randint(self.length // 12, self.length // 4)):
            start, y = self.dice.randint(4, self.length), self.dice.randint(1, self.rows - 3)
            group = self.dice.randint(2, 4)
            for x in range(start, start + self.dice.randint(1, 6)):
                self.solid.setdefault((x, y), group)

    def _touched(self, x: float, y: float) -> list[Cell]:
        """The cells under the corners of the figure at (x, y); it is smaller than a tile, so that is all."""
        return [
            (math.floor(corner_x), math.floor(corner_y))
            for corner_x in (x, x + self.WIDTH)
            for corner_y in (y, y + self.HEIGHT)
        ]

    def _blocked(self, x: float, y: float) -> bool:
        """Whether the figure cannot be at (x, y)."""
        outside = x < 0 or x + self.WIDTH > self.length
        return outside or any(cell in self.solid for cell in self._touched(x, y))

    def _trouble_ahead(self) -> bool:
        """Whether a wall or a gap comes next."""
        x, y = math.floor(self.x + self.WIDTH / 2) + self.heading, math.floor(self.y)
        return (x, y) in self.solid or not any((x, below) in self.solid for below in range(y, self.rows))

    def _run(self) -> None:
        """Move sideways, and now and then turn round at what cannot be passed."""
        x = self.x + self.heading * self.RUN
        if not self._blocked(x, self.y):
            self.x = x
        elif self.dice.random() < 0.08:
            self.heading = -self.heading

    def _drop(self) -> None:
        """Move up or down, land on tiles, and come back from a fall out of the level."""
        self.fall = min(self.fall + self.GRAVITY, self.FASTEST_FALL)
        y = self.y + self.fall
        self.on_ground = False
        if not self._blocked(self.x, y):
            self.y = y
        elif self.fall > 0:
            self.y = math.floor(y + self.HEIGHT) - self.HEIGHT - self.SKIN
            self.fall, self.on_ground, self.safe = 0.0, True, (self.x, self.y)
        else:
            self.fall = 0.0
        if self.y > self.rows:
            self._respawn()

    def _respawn(self) -> None:
        """Put the figure back to where it last stood."""
        (self.x, self.y), self.fall = self.safe, 0.0

    def _patrol(self, x: int, y: int, way: int) -> tuple[int, int, int]:
        """One step of an enemy, which turns at walls and edges."""
        if (x + way, y) in self.solid or (x + way, y + 1) not in self.solid:
            return x, y, -way
        return x + way, y, way

    def _meet_enemies(self) -> None:
        """An enemy that is landed on is gone; any other touch sends the figure back."""
        touched = [enemy for enemy in self.enemies if enemy[:2] in self._touched(self.x, self.y)]
        if touched and self.fall > 0:
            self.enemies = [enemy for enemy in self.enemies if enemy not in touched]
        elif touched:
            self._respawn()


class Snake:
    """A snake grows with all it eats, and is over once it is shut in; its bot is greedy."""

    STEPS = (40, 320)
    WHIM = 0.12

    def __init__(self, cols: int, rows: int, dice: random.Random) -> None:
        self.cols, self.rows, self.dice = cols, rows, dice
        self.body = [(cols // 2, rows // 2)]
        self.walls: set[Cell] = set()
        for _ in range(dice.choice((0, 0, 2, 4, 6))):
            self._build_wall()
        self.growth, self.to_grow = dice.randint(1, 4), dice.randint(3, 10)
        self.food = {self._free_cell() for _ in range(dice.choice((1, 1, 2, 3)))}

    def step(self) -> None:
        """Move the head to a free neighbour, and the tail after it unless the snake grows."""
        ways = [cell for cell in self._around(self.body[0]) if self._is_free(cell)]
        if not ways:
            return
        head = self.dice.choice(ways) if self.dice.random() < self.WHIM else min(ways, key=self._cost)
        self.body.insert(0, head)
        if self.to_grow:
            self.to_grow -= 1
        else:
            self.body.pop()
        if head in self.food:
            self.food.remove(head)
            self.food.add(self._free_cell())
            self.to_grow += self.growth

    def scene(self) -> Scene:
        """Walls and body as tiles; the head and the food as figures."""
        tiles = dict.fromkeys(sorted(self.walls), 1) | dict.fromkeys(self.body, 0)
        things = [Thing("coin", x, y, group=2) for x, y in sorted(self.food)]
        return Scene(tiles, [*things, Thing("face", *self.body[0])])

    def _build_wall(self) -> None:
        """Add a straight wall somewhere, off the middle where the snake starts."""
        (x, y), (dx, dy) = self._free_cell(), self.dice.choice(NEIGHBOURS)
        wall = {(x + n * dx, y + n * dy) for n in range(self.dice.randint(2, self.cols // 2))}
        self.walls |= {cell for cell in wall if self._is_free(cell)}

    def _free_cell(self) -> Cell:
        """A random cell with neither wall nor snake; on a full board the snake may have it all."""
        for _ in range(self.cols * self.rows):
            cell = self.dice.randrange(self.cols), self.dice.randrange(self.rows)
            if self._is_free(cell):
                break
        return cell

    def _is_free(self, cell: Cell) -> bool:
        """Whether the cell is on the board and neither wall nor snake."""
        on_board = 0 <= cell[0] < self.cols and 0 <= cell[1] < self.rows
        return on_board and cell not in self.walls and cell not in self.body

    def _around(self, cell: Cell) -> list[Cell]:
        """The four neighbours of a cell."""
        return [(cell[0] + dx, cell[1] + dy) for dx, dy in NEIGHBOURS]

    def _cost(self, cell: Cell) -> tuple[bool, int]:
        """Dead ends are bad, and so is the way to the nearest food."""
        dead_end = not any(self._is_free(other) for other in self._around(cell))
        return dead_end, min(abs(cell[0] - x) + abs(cell[1] - y) for x, y in self.food)


# In the order of games.CLASS_NAMES.
GAMES = (FallingBlocks, PaddleAndBall, Platformer, Snake)


def play(label: int, cols: int, rows: int, dice: random.Random) -> Scene:
    """What one game shows after a random number of steps on a board of this size."""
    game = GAMES[label](cols, rows, dice)
    for _ in range(dice.randint(*game.STEPS)):
        game.step()
    return game.scene()
