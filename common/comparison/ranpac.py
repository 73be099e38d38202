"""No experts either: RanPAC, a ridge regression of all tasks' classes on random features of the plain backbone."""

from collections.abc import Callable

import numpy as np

from common.comparison.features import depth_text
from common.comparison.inputs import Inputs
from common.comparison.linear import ridges
from common.comparison.score import Scores

UNITS = 10_000  # random features, as in the paper


def ranpac(inputs: Inputs) -> Scores:
    """RanPAC (McDonnell et al. 2023, section 4): features times a random matrix, ReLU, ridge regression of the classes.

    The depth, or several together, and the ridge are chosen by validation images.
    """
    features, targets = inputs.features, np.eye(len(inputs.space.owner), dtype=np.float32)[inputs.train_answers.labels]
    found = []
    for depths in features.choices:
        train, validation, _ = features.together(depths)
        expand = random_features(train, inputs.config.seed)
        seen = expand(validation)
        best = inputs.best(ridges(expand(train), targets, inputs.train_answers.weights), lambda linear, seen=seen: linear(seen))
        found.append((depths, best, expand, best(seen)))
    depths, best, expand, _ = inputs.best(found, lambda entry: entry[3])
    return Scores(best(expand(features.together(depths)[2])), features.seconds[depths[-1]], best.parameters,
                  inputs.backbone_parameters + best.parameters, f"{depth_text(depths)}, ridge {best.strength:g}")


def random_features(train: np.ndarray, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from features (N, K) to ReLU of random combinations of them (N, UNITS), as standardised by `train` (N, K)."""
    mean, deviation = train.mean(0), train.std(0)
    shape = train.shape[1], UNITS
    matrix = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) / np.float32(shape[0] ** 0.5)
    scale = np.where(deviation > 0, 1 / np.maximum(deviation, 1e-30), 0).astype(np.float32)
    return lambda features: np.maximum(((features - mean) * scale) @ matrix, 0)
