"""Tests of what the methods of a comparison compute with: discriminants by weight, random features, products, depths."""

import numpy as np
import pytest
import torch
from mixture_models import assert_close

from common.comparison import linear, merges, ranpac
from common.comparison.answers import Space
from common.comparison.features import HEAD_INPUT, Features


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_an_expert_that_does_not_run_answers_only_if_the_task_is_told():
    space, scores, chosen = Space([2, 3], np.repeat([0, 1], [2, 3])), random(16, 5), np.arange(16) % 2
    only = space.only(scores, chosen)
    assert np.array_equal(space.owner[only.argmax(1)], chosen)
    for expert in range(2):
        own = space.own(expert)
        assert np.array_equal(only[:, own].argmax(1), scores[:, own].argmax(1))


def test_images_of_a_discriminant_count_by_their_weights():
    """Twice the weight is as two images, but for the number of images from which deviations are made unbiased."""
    labels = np.arange(40) // 20
    features, weights = random(40, 3) * np.where(labels == 0, [[5], [1], [1]], [[1], [1], [5]]).T, 2.0 - labels
    twice = np.concatenate([np.arange(40), np.arange(20)])
    prior = np.array([0.5, 0.5])
    one = next(linear.discriminants(features, labels, weights / weights.sum(), prior, [0.0001]))
    two = next(linear.discriminants(features[twice], labels[twice], np.full(60, 1 / 60), prior, [0.0001]))
    assert np.allclose(one.weight * one.scale[:, None] * (40 / 38), two.weight * two.scale[:, None] * (60 / 58), rtol=1e-3)


def test_random_features_are_standardised_the_same_for_a_seed_and_not_negative(monkeypatch):
    monkeypatch.setattr(ranpac, "UNITS", 50)
    train = random(20, 4) * [1, 10, 100, 0] + 5
    same, again, other = (ranpac.random_features(train * factor, seed)(train * factor)
                          for factor, seed in ((1, 1), (3, 1), (1, 2)))
    assert same.shape == (20, 50) and np.allclose(same, again, atol=1e-3) and not np.allclose(same, other, atol=1e-1)
    assert (same >= 0).all() and 0.3 < (same > 0).mean() < 0.7 and np.isfinite(same).all()


def test_the_svd_of_a_product_is_that_of_the_whole_matrix():
    down, up = torch.tensor(random(3, 8)), torch.tensor(random(6, 3))
    left, sizes, right = merges.svd_of_product(up, down)
    assert_close(left * sizes @ right.T, up @ down)
    assert_close(sizes, torch.linalg.svdvals(up @ down)[:3])


@pytest.mark.parametrize(("widest", "several"), [(600, [tuple(range(1, 7)), (2, 4, 6)]), (599, [(2, 4, 6), (3, 6)]), (199, [])])
def test_several_depths_are_looked_at_together_as_far_as_there_are_not_too_many_features(monkeypatch, widest, several):
    features = Features({depth: np.zeros((1, 100)) for depth in (*range(1, 7), HEAD_INPUT)}, {}, {}, {}, 6)
    monkeypatch.setattr("common.comparison.features.WIDEST", widest)
    assert features.choices == [*((depth,) for depth in features.train), *several]
