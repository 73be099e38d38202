"""Tests of the fire scenes: they repeat, the fields give the class, and colour does not give it away."""

from dataclasses import replace

import numpy as np
import pytest

from common.demo import fire

LABELS = range(len(fire.CLASS_NAMES))


def generator(seed):
    return np.random.default_rng(seed)


def test_a_seed_gives_one_image_that_shows_something():
    for label in LABELS:
        image = fire.render(label, generator(1))
        assert image.shape == (fire.SIZE, fire.SIZE, 3) and image.dtype == np.uint8
        assert np.array_equal(image, fire.render(label, generator(1)))
        assert not np.array_equal(image, fire.render(label, generator(2)))
        assert 30 < image.mean() < 150 and image.std() > 8


def test_the_class_follows_from_the_fields():
    """Rothermel's factors, worked out anew from a scene's fields, put it in the band of its class."""
    for scene, label in ((fire.draw_scene(label, generator(seed)), label) for label in LABELS for seed in range(3)):
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


def test_risk_rises_with_dryness_slope_and_fuel_and_between_two_bands_is_no_class():
    scene = fire.draw_scene(fire.CLASS_NAMES.index("moderate"), generator(5))
    assert replace(scene, moisture=0.8 * scene.moisture).risk() > scene.risk()
    assert replace(scene, slope=1.2 * scene.slope).risk() > scene.risk()
    assert replace(scene, load=1.2 * scene.load).risk() == pytest.approx(1.2 * scene.risk(), rel=1e-5)
    low, moderate, high = (fire.RISK_BAND[name] for name in ("low", "moderate", "high"))
    for (_, below), (above, _) in ((low, moderate), (moderate, high)):
        assert below < above and fire.band_of((below + above) / 2) is None


def test_mean_colour_does_not_give_the_class():
    """Nearest class centroid of the mean colour, fitted and scored on separate halves, is often wrong; chance is 0.25."""
    rng = generator(6)
    colours = np.array([[fire.render(label, rng).mean(axis=(0, 1)) for _ in range(10)] for label in LABELS])
    distances = np.linalg.norm(colours[:, 5:, None] - colours[:, :5].mean(axis=1), axis=-1)
    assert np.mean(distances.argmin(axis=-1) == np.arange(len(LABELS))[:, None]) < 0.55
