"""Tests of the demo images: a seed gives one, games keep their rules, fields give the fire class, colour gives none."""

import random

import numpy as np
import pytest

from common.demo import fire, games
from common.demo.game_rules import FallingBlocks, PaddleAndBall, Platformer, Snake


@pytest.mark.parametrize("kind, shape, seeds, most_right", [
    (games, (games.SIZE[1], games.SIZE[0], 3), 30, 0.45), (fire, (fire.SIZE, fire.SIZE, 3), 10, 0.55)])
def test_a_seed_gives_one_image_and_its_mean_colour_does_not_give_the_class(kind, shape, seeds, most_right):
    """Nearest class centroid of the mean colour, fitted and scored on separate halves, is often wrong; chance is a quarter."""
    def render(label, seed):
        return kind.render(label, np.random.default_rng([label, seed]))

    labels = range(len(kind.CLASS_NAMES))
    images = np.array([[render(label, seed) for seed in range(seeds)] for label in labels])
    assert images.shape[2:] == shape and images.dtype == np.uint8 and images.std(axis=(2, 3, 4)).min() > 2
    for label in labels:
        assert np.array_equal(images[label, 0], render(label, 0)) and not np.array_equal(*images[label, :2])
    colours, half = images.mean((2, 3)), seeds // 2
    distances = np.linalg.norm(colours[:, half:, None] - colours[:, :half].mean(axis=1), axis=-1)
    assert np.mean(distances.argmin(axis=-1) == np.arange(len(labels))[:, None]) < most_right


def test_games_keep_their_rules_at_every_step():
    """No full row of blocks, nothing outside the board or in a wall, no hit brick comes back, and the player gets ahead."""
    furthest = []
    for seed in range(4):
        dice = random.Random(seed)
        blocks, balls, player, snake = (kind(dice.randint(9, 30), dice.randint(9, 18), dice)
                                        for kind in (FallingBlocks, PaddleAndBall, Platformer, Snake))
        furthest.append(0)
        for _ in range(300):
            bricks = set(balls.bricks)
            for game in (blocks, balls, player, snake):
                game.step()
            assert max(sum(y == row for _, y in blocks.stack) for row in range(blocks.rows)) < blocks.cols
            cells = [*blocks.stack, *blocks.piece_cells()]
            assert len(set(cells)) == len(cells) and all(0 <= x < blocks.cols and 0 <= y < blocks.rows for x, y in cells)
            assert bricks.issuperset(balls.bricks)
            assert not balls.bricks.keys() & {(int(ball.x), int(ball.y)) for ball in balls.balls}
            assert player.stands_free() and not player.coins & player.solid.keys()
            assert len(set(snake.body)) == len(snake.body) and not snake.walls.intersection(snake.body)
            assert all(0 <= x < snake.cols and 0 <= y < snake.rows for x, y in snake.body)
            furthest[-1] = max(furthest[-1], player.x)
    assert np.median(furthest) > 5


def test_the_fire_class_follows_from_the_fields():
    """Rothermel's factors, worked out anew from a scene's fields, put it in the band of its class."""
    for label in range(len(fire.CLASS_NAMES)):
        for seed in range(3):
            scene = fire.draw_scene(label, np.random.default_rng(seed))
            burns = scene.load > 0
            if label == fire.NON_BURNABLE:
                assert burns.mean() <= fire.MAX_NON_BURNABLE
                continue
            wet, tilt = scene.moisture[burns], scene.slope[burns]
            damping = 1 - 2.59 * wet + 5.11 * wet**2 - 3.52 * wet**3
            uphill = 1 + 5.275 * fire.PACKING_RATIO**-0.3 * tilt**2
            low, high = fire.RISK_BAND[fire.CLASS_NAMES[label]]
            assert burns.mean() >= fire.MIN_BURNABLE
            assert low <= np.mean(scene.load[burns] * damping * uphill) <= high
