"""Router, then expert: a linear classifier on the plain backbone says which expert an image needs, and that expert runs."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from scipy.special import logsumexp
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from common.cli.flags import MixtureConfig
from common.comparison.answers import Answers, Mix, Space, fitted_mix
from common.comparison.passes import collect
from common.data.tensors import ImageSet
from common.training.blocks import block_names
from common.training.evaluate import logits_of

EARLY_BLOCKS = 3  # behind which mean and deviation over the tokens are tried
LAST, ALL = "the last layer", "all of these layers"
INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C
SHRINKAGES = (0.02, 0.1, 0.3)  # of the covariance that all classes share
LEAST = 1e-300  # in place of a probability that rounds to 0
NOT_CHOSEN = 1e4  # what an expert that does not run loses: only if the task were told would it be asked


def places(body: nn.Module) -> list[str]:
    """The names of the blocks behind the first few, before which tokens are looked at."""
    return block_names(body)[1 : 1 + EARLY_BLOCKS]


def features(body: nn.Module, data: ImageSet, config: MixtureConfig) -> dict[str, np.ndarray]:
    """What a router may see of images, {place: (N, K)}: mean and deviation over the tokens before some blocks of the plain
    backbone, its pooled features behind the last one, and all of these."""
    seen: list[Tensor] = []

    def look(block: nn.Module, args: tuple) -> None:
        tokens = args[0].flatten(1, -2)  # (B, N, D)
        seen.append(torch.cat([tokens.mean(1), tokens.std(1)], dim=1))

    def read(inputs: Tensor) -> tuple[Tensor, ...]:
        seen.clear()
        pooled = logits_of(body, inputs)
        return *seen, pooled

    hooks = [body.get_submodule(name).register_forward_pre_hook(look) for name in places(body)]
    try:
        found = collect(body, data, config, read)[0]
    finally:
        for hook in hooks:
            hook.remove()
    return {**dict(zip([*places(body), LAST], found, strict=True)), ALL: np.concatenate(found, axis=1)}


@dataclass
class Router:
    """A classifier of the standardised features of one place, that tells tasks or, `of_classes`, the classes of all tasks.

    mix: how much its evidence for experts and for classes counts beside what the experts say.
    """

    place: str
    of_classes: bool
    classifier: Pipeline
    space: Space
    mix: Mix | None = None

    def evidence(self, seen: np.ndarray) -> list[np.ndarray]:
        """Log-probabilities of the experts, for each of their classes, and those of the classes if it tells these; (N, C)."""
        found = np.log(np.maximum(self.classifier.predict_proba(seen).astype(np.float64), LEAST))
        if not self.of_classes:
            return [found[:, self.space.owner]]
        experts = [logsumexp(found[:, self.space.own(task)], axis=1) for task in range(len(self.space.sizes))]
        return [np.stack(experts, axis=1)[:, self.space.owner], found]

    def all_experts(self, logits: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Scores (N, C) if all experts run. logits: those of each for its own classes (N, C)."""
        return self.mix.scores(logits, self.evidence(seen))

    def one_expert(self, logits: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Scores (N, C) if only the expert runs that the router finds likeliest."""
        likeliest = self.space.owner[self.evidence(seen)[0].argmax(1)]
        return self.all_experts(logits, seen) - NOT_CHOSEN * (self.space.owner != likeliest[:, None])

    def __str__(self) -> str:
        kind = self.classifier[-1]
        how = f"C = {kind.C:g}" if isinstance(kind, LogisticRegression) else f"shrinkage {kind.shrinkage:g}"
        return f"{type(kind).__name__} of {'classes' if self.of_classes else 'tasks'}, {how}, on {self.place}"

    @property
    def parameters(self) -> int:
        """How many numbers it has learnt."""
        last = self.classifier[-1]
        return last.coef_.size + last.intercept_.size


def routers(train: dict[str, np.ndarray], answers: Answers) -> Iterator[Router]:
    """A router for each place and each strength of regularisation: logistic regressions that tell tasks, or classes, and linear
    discriminants of the classes. Tasks weigh alike.

    train: features of the training images by place; answers: theirs.
    """
    space, share = answers.space, answers.weights * len(answers.weights)
    priors = 1 / (len(space.sizes) * np.array(space.sizes)[space.owner])
    for place, seen in train.items():
        for of_classes, penalty in product((False, True), INVERSE_PENALTIES):
            classifier = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=500))
            right = answers.labels if of_classes else answers.tasks
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # the best on validation counts, not the optimum
                classifier.fit(seen, right, logisticregression__sample_weight=share)
            yield Router(place, of_classes, classifier, space)
        for shrinkage in SHRINKAGES:
            discriminant = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=priors)
            yield Router(place, True, make_pipeline(StandardScaler(), discriminant).fit(seen, answers.labels), space)


def best_routers(train: dict[str, np.ndarray], train_answers: Answers, seen: dict[str, np.ndarray],
                 logits: np.ndarray, answers: Answers) -> tuple[Router, Router]:
    """The best router where the one expert it chooses runs, and the best where all run, by the validation images.

    train, train_answers: of the training images. seen: the validation images' features by place; logits: each expert's
    for them and its own classes (N, C); answers: theirs.
    """
    candidates = []
    for router in routers(train, train_answers):
        router.mix = fitted_mix(logits, router.evidence(seen[router.place]), answers)
        candidates.append(router)
    return (max(candidates, key=lambda router: answers.rating(router.one_expert(logits, seen[router.place]))),
            max(candidates, key=lambda router: answers.rating(router.all_experts(logits, seen[router.place]))))
