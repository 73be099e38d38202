"""A router on the plain backbone finds the likeliest task, then that task's expert answers alone."""

from dataclasses import dataclass

import numpy as np
from sklearn.covariance import shrunk_covariance

from common.comparison.answers import fitted_mix
from common.comparison.features import EARLY, HEAD_INPUT, depth_text
from common.comparison.inputs import Inputs
from common.comparison.linear import SHRINKAGES, ridges
from common.comparison.ranpac import random_features
from common.comparison.score import Scores


@dataclass
class TaskRouter:
    """Scores (N, T) of the tasks for the validation and the test images, and the seconds after which an image has them."""

    validation: np.ndarray
    test: np.ndarray
    seconds: float
    parameters: int
    choice: str


def ridge_router(inputs: Inputs) -> Scores:
    """Any-SSR (Tong et al. 2025, analytic router): ridge regression of the tasks on random features of early tokens.

    They are those behind block 3 or 4; which, and the ridge, is chosen by validation images.
    """
    features, targets = inputs.features, np.eye(len(inputs.tasks), dtype=np.float32)[inputs.train_answers.tasks]
    found = []
    for depth in [depth for depth in EARLY if depth in features.train] or [*features.train][:1]:
        expand = random_features(features.train[depth], inputs.config.seed)
        train, validation, test = map(expand, features.together((depth,)))
        found += [TaskRouter(linear(validation), linear(test), features.seconds[depth], linear.parameters,
                             f"{depth_text((depth,))}, ridge {linear.strength:g}")
                  for linear in ridges(train, targets, inputs.train_answers.weights)]
    return one_expert(inputs, found)


def mahalanobis_router(inputs: Inputs) -> Scores:
    """A Gaussian for each task on what reaches the head, the smallest Mahalanobis distance chooses (MaD; Lee et al. 2018).

    The shrinkage, and whether tasks have a covariance each or share one, are chosen by validation images.
    """
    train, *asked = (split.astype(np.float64) for split in inputs.features.together((HEAD_INPUT,)))
    own = [train[inputs.train_answers.tasks == task] for task in range(len(inputs.tasks))]
    each = [np.cov(rows, rowvar=False) for rows in own]
    found = []
    for kind, covariances in (("each", each), ("shared", [np.mean(each, axis=0)])):
        for shrinkage in SHRINKAGES:
            inverses = [np.linalg.inv(shrunk_covariance(matrix, shrinkage)) for matrix in covariances]
            splits = [np.stack([_distances(rows - part.mean(0), inverses[task % len(inverses)])
                                for task, part in enumerate(own)], axis=1) for rows in asked]
            size = train.shape[1] * len(own) + sum(inverse.size for inverse in inverses)
            found.append(TaskRouter(*(-split for split in splits), inputs.features.seconds[HEAD_INPUT], size,
                                    f"{kind} covariance, shrinkage {shrinkage:g}"))
    return one_expert(inputs, found)


def _distances(rows: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    return ((rows @ inverse) * rows).sum(1)


def one_expert(inputs: Inputs, routers: list[TaskRouter]) -> Scores:
    """The answer of the expert that a router chooses, for each image; the router is chosen by validation images."""
    def answer(logits: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        return inputs.space.only(inputs.space.heads(logits), tasks.argmax(1))

    best = inputs.best(routers, lambda router: answer(inputs.experts.validation, router.validation))
    return Scores(answer(inputs.experts.test, best.test), best.seconds + inputs.experts.seconds, best.parameters,
                  inputs.expert_parameters + best.parameters, best.choice)


def best_router(inputs: Inputs) -> Scores:
    """The discriminant of all classes that chooses best, of whatever depth or depths; what it knows of the classes counts too,
    weighed by validation images as the mixture's head weighs what the gates know."""
    space, experts = inputs.space, inputs.experts

    def answer(logits: np.ndarray, evidence: list[np.ndarray]) -> np.ndarray:
        return space.only(mix.scores(logits, evidence), space.owner[evidence[0].argmax(1)])

    found = []
    for router in inputs.discriminants:
        validation, test = map(space.evidence, router.scores(inputs.features))
        mix = fitted_mix(experts.validation, validation, inputs.validation_answers)
        found.append((answer(experts.validation, validation), answer(experts.test, test), router))
    _, scores, router = inputs.best(found, lambda entry: entry[0])
    return Scores(scores, inputs.features.seconds[router.depths[-1]] + experts.seconds, router.parameters,
                  inputs.expert_parameters + router.parameters, str(router))
