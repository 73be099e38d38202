"""Tests of the demo games: their rules hold at every step, and frames are varied but repeatable."""

import random
from itertools import pairwise

import numpy as np

from common.demo import games
from common.demo.game_rules import FallingBlocks, PaddleAndBall, Platformer, Snake

LABELS = range(len(games.CLASS_NAMES))


def steps(kind):
    """Games on boards of random size, once as each begins and again after each step."""
    for seed in range(4):
        dice = random.Random(seed)
        game = kind(dice.randint(9, 30), dice.randint(9, 18), dice)
        yield game, True
        for _ in range(300):
            game.step()
            yield game, False


def frame(label, seed):
    """The frame that belongs to a seed."""
    return games.render(label, np.random.default_rng([label, seed]))


def test_a_seed_gives_one_frame_and_colours_alone_do_not_name_the_game():
    """The nearest class mean in colour space is right for few frames; chance is a quarter."""
    assert list(games.CLASS_NAMES) == sorted(games.CLASS_NAMES)
    frames = np.array([[frame(label, seed) for seed in range(30)] for label in LABELS])
    assert frames.shape[2:] == (games.SIZE[1], games.SIZE[0], 3) and frames.dtype == np.uint8
    assert frames.std(axis=(2, 3, 4)).min() > 2
    for label in LABELS:
        assert np.array_equal(frames[label, 0], frame(label, 0)) and not np.array_equal(*frames[label, :2])
    means = frames.mean((2, 3))
    gaps = np.linalg.norm(means[:, 15:, None] - means[:, :15].mean(1), axis=-1)
    assert (gaps.argmin(-1) == np.arange(len(LABELS))[:, None]).mean() < 0.45


def test_falling_blocks_keep_no_full_row_and_nothing_outside():
    for game, _ in steps(FallingBlocks):
        assert max(sum(y == row for _, y in game.stack) for row in range(game.rows)) < game.cols
        cells = [*game.stack, *game.piece_cells()]
        assert len(set(cells)) == len(cells) and all(0 <= x < game.cols and 0 <= y < game.rows for x, y in cells)


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


def test_players_and_snakes_are_never_inside_a_wall_and_get_ahead():
    furthest, length = [], 0
    for game, begins in steps(Platformer):
        assert game.stands_free() and not game.coins & game.solid.keys()
        furthest = [*furthest, 0] if begins else [*furthest[:-1], max(furthest[-1], game.x)]
    assert np.median(furthest) > 5
    for game, begins in steps(Snake):
        assert begins or length <= len(game.body) <= length + 1
        length = len(game.body)
        assert len(set(game.body)) == length and not game.walls.intersection(game.body)
        assert all(0 <= x < game.cols and 0 <= y < game.rows for x, y in game.body)
        assert all(abs(x - other_x) + abs(y - other_y) == 1 for (x, y), (other_x, other_y) in pairwise(game.body))
