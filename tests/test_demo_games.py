"""Tests of the demo games: their rules hold at every step, and frames are varied but repeatable."""

import random
from itertools import pairwise

import numpy as np

from common.demo import games
from common.demo.game_rules import FallingBlocks, PaddleAndBall, Platformer, Snake

LABELS = range(len(games.CLASS_NAMES))


def steps(kind):
    """Games on boards of random size, once as each begins and again after each step."""
    for seed in range(6):
        dice = random.Random(seed)
        game = kind(dice.randint(9, 30), dice.randint(9, 18), dice)
        yield game, True
        for _ in range(300):
            game.step()
            yield game, False


def frame(label, seed):
    """The frame that belongs to a seed."""
    return games.render(label, np.random.default_rng([label, seed]))


def test_a_seed_gives_one_frame_of_the_promised_shape():
    assert list(games.CLASS_NAMES) == sorted(games.CLASS_NAMES)
    for label in LABELS:
        for seed in range(4):
            image = frame(label, seed)
            assert image.shape == (games.SIZE[1], games.SIZE[0], 3) and image.dtype == np.uint8 and image.std() > 2
            assert np.array_equal(image, frame(label, seed)) and not np.array_equal(image, frame(label, seed + 1))


def test_falling_blocks_keep_no_full_row_and_nothing_outside():
    for game, _ in steps(FallingBlocks):
        assert max(sum(y == row for _, y in game.stack) for row in range(game.rows)) < game.cols
        cells = [*game.stack, *game.piece_cells()]
        assert len(set(cells)) == len(cells) and all(0 <= x < game.cols and 0 <= y < game.rows for x, y in cells)
    game = FallingBlocks(9, 9, random.Random(0))  # a full row is cleared, and what lay above sinks
    game.stack = {(x, 8): 0 for x in range(9) if x > 3} | {(8, 7): 5}
    game.piece, game.x, game.y, game.target = tuple((x, 0) for x in range(4)), 0, 8, 0
    game.step()
    assert game.stack == {(8, 8): 5}


def test_balls_stay_in_the_field_and_bricks_that_are_hit_never_come_back():
    before, hit = set(), 0
    for game, begins in steps(PaddleAndBall):
        if not begins:
            assert before.issuperset(game.bricks)
            hit += len(before) - len(game.bricks)
        before = set(game.bricks)
        for ball in game.balls:
            assert game.RADIUS <= ball.x <= game.width - game.RADIUS and game.RADIUS <= ball.y <= game.depth - game.RADIUS
            assert (int(ball.x), int(ball.y)) not in game.bricks
    assert hit


def test_the_platform_player_is_never_inside_a_tile_and_gets_ahead():
    furthest = []
    for game, begins in steps(Platformer):
        assert game.stands_free() and not game.coins & game.solid.keys()
        furthest = [*furthest, 0] if begins else [*furthest[:-1], max(furthest[-1], game.x)]
    assert np.median(furthest) > 5


def test_a_snake_is_one_chain_on_free_cells_of_the_board():
    length = 0
    for game, begins in steps(Snake):
        assert begins or length <= len(game.body) <= length + 1
        length = len(game.body)
        assert len(set(game.body)) == length and not game.walls.intersection(game.body)
        assert all(0 <= x < game.cols and 0 <= y < game.rows for x, y in game.body)
        assert all(abs(x - other_x) + abs(y - other_y) == 1 for (x, y), (other_x, other_y) in pairwise(game.body))


def test_colours_alone_do_not_name_the_game():
    """The nearest class mean in colour space is right for few frames; chance is a quarter."""
    means = np.array([[frame(label, seed).mean((0, 1)) for seed in range(30)] for label in LABELS])
    known, asked = means[:, :15], means[:, 15:]
    gaps = np.linalg.norm(asked[:, :, None] - known.mean(1), axis=-1)
    assert (gaps.argmin(-1) == np.arange(len(LABELS))[:, None]).mean() < 0.45
