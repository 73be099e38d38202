"""Tests of the demo images: a seed gives one, games keep their rules, a site's risk is of its class, colour does not give it away."""

import numpy as np
import pytest

from common.demo import fire, games
from common.demo.games import EMPTY


@pytest.mark.parametrize("kind, shape, seeds, most_right", [
    (games, (games.SIZE[1], games.SIZE[0], 3), 30, 0.45), (fire, (fire.SIZE, fire.SIZE, 3), 20, 0.55)])
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


def test_games_keep_their_rules():
    """Boards of any size: no full row of blocks, a snake in one piece, figures on the ground, all things inside the board."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        cols, rows = rng.integers(9, (17, 10)).tolist()
        blocks, balls, player, snake = (game.play(cols, rows, rng) for game in games.GAMES)
        for scene in (blocks, balls, player, snake):
            assert scene.tiles.shape == (rows, cols) and (scene.tiles != EMPTY).any()
            assert all(0 <= x and 0 <= y and x + wide <= cols and y + high <= rows for _, (x, y, wide, high) in scene.things)
        assert (blocks.tiles == EMPTY).any(axis=1).all() and (blocks.tiles == EMPTY).any(axis=0).all()
        assert [kind for kind, _ in balls.things][:2] == ["bar", "ball"]
        for _, (x, y, *_) in player.things:
            assert player.tiles[y, x] == EMPTY and player.tiles[y + 1, x] != EMPTY
        body, (x, y) = {tuple(cell) for cell in np.argwhere(np.isin(snake.tiles, (0, 1)))}, snake.things[0][1][:2]
        reached, edge = set(), {(y, x)}
        while edge:
            reached |= edge
            edge = {(y + dy, x + dx) for y, x in edge for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))} & body - reached
        assert body - reached == set() and len(body) >= 1


def test_the_fire_class_follows_from_the_site():
    """Rothermel's factors, worked out anew from a site's numbers, put it in the band of its class."""
    for name in fire.CLASS_NAMES:
        for seed in range(10):
            site = fire.draw_site(name, np.random.default_rng(seed))
            wet, low, high = site.moisture, *fire.RISK_BAND[name]
            load = 0.2242 * (12 * site.trees + (1 - site.trees) * (6 * site.shrubs + 0.74 * (1 - site.shrubs)))
            damping = 1 - 2.59 * wet + 5.11 * wet**2 - 3.52 * wet**3
            assert low <= load * damping * (1 + 5.275 * fire.PACKING_RATIO**-0.3 * site.slope**2) <= high
            wild = 1 - site.water - site.bare - site.farm - site.built
            assert wild <= 0.05 + 1e-9 if name == "non-burnable" else wild >= 0.7 - 1e-9
