"""Tests of the fire scenes: they repeat, the fields give the class, and colour does not give it away."""

import numpy as np

from common.demo import fire

LABELS = range(len(fire.CLASS_NAMES))


def render(label, seed):
    """The image that belongs to a seed."""
    return fire.render(label, np.random.default_rng([label, seed]))


def test_a_seed_gives_one_image_and_its_mean_colour_does_not_give_the_class():
    """Nearest class centroid of the mean colour, fitted and scored on separate halves, is often wrong; chance is 0.25."""
    images = np.array([[render(label, seed) for seed in range(10)] for label in LABELS])
    assert images.shape[2:] == (fire.SIZE, fire.SIZE, 3) and images.dtype == np.uint8
    for label in LABELS:
        assert np.array_equal(images[label, 0], render(label, 0)) and not np.array_equal(*images[label, :2])
        assert 30 < images[label, 0].mean() < 150 and images[label, 0].std() > 8
    colours = images.mean((2, 3))
    distances = np.linalg.norm(colours[:, 5:, None] - colours[:, :5].mean(axis=1), axis=-1)
    assert np.mean(distances.argmin(axis=-1) == np.arange(len(LABELS))[:, None]) < 0.55


def test_the_class_follows_from_the_fields():
    """Rothermel's factors, worked out anew from a scene's fields, put it in the band of its class; between two is no class."""
    for scene, label in ((fire.draw_scene(label, np.random.default_rng(seed)), label) for label in LABELS for seed in range(3)):
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
    low, moderate, high = (fire.RISK_BAND[name] for name in ("low", "moderate", "high"))
    for (_, below), (above, _) in ((low, moderate), (moderate, high)):
        assert below < above and fire.band_of((below + above) / 2) is None
