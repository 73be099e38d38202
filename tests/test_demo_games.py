"""Tests of the demo games: their rules hold at every step, and frames are varied but repeatable."""

import random

import numpy as np
import pytest

from common.demo import games
from common.demo.game_rules import FallingBlocks, PaddleAndBall, Platformer, Snake

LABELS = range(len(games.CLASS_NAMES))
SEEDS = range(12)
STEPS = 300


def new_game(kind, seed):
    """A game on a board of random size."""
    dice = random.Random(seed)
    return kind(dice.randint(9, 30), dice.randint(9, 18), dice)


def frame(label, *seed):
    """The frame that belongs to a seed."""
    return games.render(label, np.random.default_rng([label, *seed]))


def test_class_names_are_in_alphabetical_order():
    assert list(games.CLASS_NAMES) == sorted(games.CLASS_NAMES)


@pytest.mark.parametrize("label", LABELS)
def test_frames_have_the_promised_shape(label):
    for seed in SEEDS:
        image = frame(label, seed)
        assert image.shape == (games.SIZE[1], games.SIZE[0], 3)
        assert image.dtype == np.uint8
        assert image.std() > 2


@pytest.mark.parametrize("label", LABELS)
def test_the_seed_decides_the_frame(label):
    for seed in SEEDS:
        assert np.array_equal(frame(label, seed), frame(label, seed))
        assert not np.array_equal(frame(label, seed), frame(label, seed + 1))


@pytest.mark.parametrize("seed", SEEDS)
def test_falling_blocks_keep_no_full_row_and_nothing_outside(seed):
    game = new_game(FallingBlocks, seed)
    for _ in range(STEPS):
        game.step()
        filled = [sum(y == row for _, y in game.stack) for row in range(game.rows)]
        assert max(filled) < game.cols
        cells = [*game.stack, *game.piece_cells()]
        assert len(set(cells)) == len(cells)
        assert all(0 <= x < game.cols and 0 <= y < game.rows for x, y in cells)


def test_a_full_row_is_cleared_and_what_lay_above_sinks():
    game = FallingBlocks(9, 9, random.Random(0))
    bar = tuple((x, 0) for x in range(4))
    game.stack = {(x, 8): 0 for x in range(9) if x > 3} | {(8, 7): 5}
    game.piece, game.x, game.y, game.target = bar, 0, 8, 0
    game.step()
    assert game.stack == {(8, 8): 5}


@pytest.mark.parametrize("seed", SEEDS)
def test_balls_stay_in_the_field_and_bricks_never_come_back(seed):
    game = new_game(PaddleAndBall, seed)
    for _ in range(STEPS):
        before = set(game.bricks)
        game.step()
        assert before.issuperset(game.bricks)
        for ball in game.balls:
            assert game.RADIUS <= ball.x <= game.width - game.RADIUS
            assert game.RADIUS <= ball.y <= game.depth - game.RADIUS
            assert (int(ball.x), int(ball.y)) not in game.bricks


def test_bricks_are_hit():
    played = [new_game(PaddleAndBall, seed) for seed in SEEDS]
    at_first = sum(len(game.bricks) for game in played)
    for game in played:
        for _ in range(STEPS):
            game.step()
    assert sum(len(game.bricks) for game in played) < at_first


@pytest.mark.parametrize("seed", SEEDS)
def test_the_platform_player_is_never_inside_a_tile(seed):
    game = new_game(Platformer, seed)
    for _ in range(STEPS):
        game.step()
        assert game.stands_free()
        assert not game.coins & game.solid.keys()


def test_platform_players_get_ahead():
    played = [new_game(Platformer, seed) for seed in SEEDS]
    for game in played:
        for _ in range(100):
            game.step()
    assert np.median([game.x for game in played]) > 5


@pytest.mark.parametrize("seed", SEEDS)
def test_a_snake_is_one_chain_on_free_cells_of_the_board(seed):
    game = new_game(Snake, seed)
    for _ in range(STEPS):
        length = len(game.body)
        game.step()
        assert length <= len(game.body) <= length + 1
        assert len(set(game.body)) == len(game.body)
        assert not game.walls.intersection(game.body)
        assert all(0 <= x < game.cols and 0 <= y < game.rows for x, y in game.body)
        links = zip(game.body, game.body[1:])
        assert all(abs(x - other_x) + abs(y - other_y) == 1 for (x, y), (other_x, other_y) in links)


def test_colours_alone_do_not_name_the_game():
    """The nearest class mean in colour space is right for few frames; chance is a quarter."""
    means = np.array([[frame(label, seed).mean((0, 1)) for seed in range(60)] for label in LABELS])
    known, asked = means[:, :30], means[:, 30:]
    gaps = np.linalg.norm(asked[:, :, None] - known.mean(1), axis=-1)
    assert (gaps.argmin(-1) == np.arange(len(LABELS))[:, None]).mean() < 0.45
