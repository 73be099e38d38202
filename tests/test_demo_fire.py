"""Tests of the fire scenes: they repeat, the fields give the class, and colour does not give it away."""

from dataclasses import replace

import numpy as np
import pytest

from common.demo import fire

LABELS = range(len(fire.CLASS_NAMES))


def generator(seed: int) -> np.random.Generator:
    """A fresh source of random numbers."""
    return np.random.default_rng(seed)


@pytest.mark.parametrize("label", LABELS)
def test_a_seed_gives_one_image(label):
    """The same seed repeats the image bit for bit; another seed gives another image."""
    image = fire.render(label, generator(1))
    assert image.shape == (fire.SIZE, fire.SIZE, 3) and image.dtype == np.uint8
    assert np.array_equal(image, fire.render(label, generator(1)))
    assert not np.array_equal(image, fire.render(label, generator(2)))


@pytest.mark.parametrize("label", LABELS)
def test_images_show_something(label):
    """No image is flat, black or blown out."""
    rng = generator(3)
    for image in (fire.render(label, rng) for _ in range(5)):
        assert 30 < image.mean() < 150 and image.std() > 8


@pytest.mark.parametrize("label", LABELS)
def test_class_follows_from_the_fields(label):
    """Rothermel's factors, worked out anew from a scene's fields, put it in the band of its class."""
    rng = generator(4)
    for scene in (fire.draw_scene(label, rng) for _ in range(5)):
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


def test_risk_rises_with_dryness_slope_and_fuel():
    """All else equal, a drier, a steeper and a heavier-laden scene each scores higher."""
    scene = fire.draw_scene(fire.CLASS_NAMES.index("moderate"), generator(5))
    assert replace(scene, moisture=0.8 * scene.moisture).risk() > scene.risk()
    assert replace(scene, slope=1.2 * scene.slope).risk() > scene.risk()
    assert replace(scene, load=1.2 * scene.load).risk() == pytest.approx(1.2 * scene.risk(), rel=1e-5)


def test_bands_leave_gaps():
    """Between two classes lies a gap in which a scene has no class."""
    bands = [fire.RISK_BAND[name] for name in ("low", "moderate", "high")]
    for (_, below), (above, _) in zip(bands, bands[1:]):
        assert below < above and fire.band_of((below + above) / 2) is None


def test_mean_colour_does_not_give_the_class():
    """Nearest class centroid of the mean colour, fitted and scored on separate halves, is often wrong."""
    rng = generator(6)
    colours = np.array([[fire.render(label, rng).mean(axis=(0, 1)) for _ in range(24)] for label in LABELS])
    centroids = colours[:, :12].mean(axis=1)
    distances = np.linalg.norm(colours[:, 12:, None] - centroids, axis=-1)
    accuracy = np.mean(distances.argmin(axis=-1) == np.arange(len(LABELS))[:, None])
    assert accuracy < 0.55  # chance is 0.25
