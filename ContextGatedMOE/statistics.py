"""What is kept of an expert's images: sums by which the gates of any set of experts are found in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINKAGE = 0.1  # of the correlations towards none, where no validation images have chosen it
OWN_SHRINKAGE = 0.2  # the same, within one expert
DRAWN_TO_COMMON = 200.0  # images as which the common covariance counts beside those of one expert
ENOUGH_FREEDOM = 100.0  # images beyond the number of classes at which an expert counts half as much as with endless ones
RIDGE = 1e-3  # added to the correlations' diagonal
TOO_FLAT = 1e-6  # a feature whose deviation is below this share of the largest tells nothing


@dataclass
class Statistics:
    """Sums over one expert's images, of the features that a gate sees of them.

    counts: (C,) images of each class. means: (C, K) mean features of each class. scatter: (K * (K + 1) / 2,) sum of the
    products of features, each less its class's mean; the matrix is symmetric, so this is its upper half. All on the CPU.
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, classes: int) -> "Statistics":
        """Of features (N, K) with labels (N,), positions in the expert's classes."""
        features, labels = features.cpu().double(), labels.cpu()  # not every device has fp64
        counts = torch.bincount(labels, minlength=classes).double()
        sums = torch.zeros(classes, features.shape[1], dtype=torch.float64).index_add_(0, labels, features)
        means = sums / counts.clamp_min(1)[:, None]
        centred = features - means[labels]
        return cls(counts, means, upper_half(centred.T @ centred))

    def __add__(self, other: "Statistics") -> "Statistics":
        """Of both sets of images together (Chan et al. 1983, pairwise update)."""
        counts = self.counts + other.counts
        shift = other.means - self.means
        share = (other.counts / counts.clamp_min(1))[:, None]
        between = (shift * (self.counts[:, None] * share)).T @ shift
        return Statistics(counts, self.means + share * shift, self.scatter + other.scatter + upper_half(between))

    def rounded(self) -> "Statistics":
        """The same in float32, as they are kept and saved once all images have been seen."""
        return Statistics(*(tensor.float() for tensor in vars(self).values()))


def upper_half(matrix: Tensor) -> Tensor:
    """The upper half (K * (K + 1) / 2,) of a symmetric matrix (K, K), row by row."""
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns]


def symmetric(half: Tensor, size: int) -> Tensor:
    """The symmetric matrix (K, K) with this upper half."""
    rows, columns = torch.triu_indices(size, size)
    matrix = half.new_zeros(size, size)
    matrix[rows, columns] = matrix[columns, rows] = half
    return matrix


@dataclass
class Discriminant:
    """Linear discriminants of the classes of all experts, and the space in which the classes differ.

    weight (C, K), bias (C,): scores of the classes, log-likelihoods up to what they share. axes (R, K), origin (R,): features
    to whitened coordinates in the space of the classes' means, as seen from the middle of the classes. centres (R, C): the
    means there. precision (R, R): the inverse covariance of images of any class there.
    """

    weight: Tensor
    bias: Tensor
    axes: Tensor
    origin: Tensor
    centres: Tensor
    precision: Tensor


def discriminant(experts: list[Statistics], shrinkage: float = SHRINKAGE) -> Discriminant:
    """The discriminants of all experts' classes, with one covariance for all: which expert's class an image is of."""
    return _discriminant(experts, _Whitening(common_covariance(experts), shrinkage))


def own_discriminants(experts: list[Statistics], shrinkage: float = OWN_SHRINKAGE) -> tuple[Tensor, Tensor]:
    """The discriminants within each expert, weight (C, K) and bias (C,): which class of an expert an image is of, if it is its.

    Each expert has a covariance of its own, drawn to the common one as by so many images more (Friedman 1989): what varies
    within the classes of one task may tell those of another.
    """
    common, found = common_covariance(experts), []
    for expert in experts:
        freedom = (expert.counts.sum() - len(expert.counts)).clamp_min(0)
        own = (symmetric(expert.scatter.double(), common.shape[0]) + DRAWN_TO_COMMON * common) / (freedom + DRAWN_TO_COMMON)
        found.append(_discriminant([expert], _Whitening(own, shrinkage)))
    return torch.cat([part.weight for part in found]), torch.cat([part.bias for part in found])


def common_covariance(experts: list[Statistics]) -> Tensor:
    """The covariance (K, K) within the classes of all experts.

    An expert counts by the degrees of freedom of its images, n - C, but hardly more than others once it has many.
    """
    freedom = torch.stack([expert.counts.sum() - len(expert.counts) for expert in experts]).double().clamp_min(0)
    share = 1 / (freedom + ENOUGH_FREEDOM)
    half = sum(weight * expert.scatter.double() for weight, expert in zip(share, experts, strict=True))
    return symmetric(half / (share * freedom).sum().clamp_min(1e-6), experts[0].means.shape[1])


class _Whitening:
    """Features to coordinates in which a covariance (K, K), its correlations shrunk towards none, is the identity."""

    def __init__(self, covariance: Tensor, shrinkage: float):
        deviation = covariance.diagonal().sqrt()
        flat = deviation <= TOO_FLAT * deviation.max()
        self.scale = torch.where(flat, torch.inf, deviation)
        correlation = (covariance / self.scale).div_(self.scale[:, None]).mul_(1 - shrinkage)
        correlation.diagonal().fill_(1 + RIDGE)
        self.root = torch.linalg.cholesky(correlation)
        # The expected square of an image's distance from its class, the trace of the correlations by what is inverted here; for
        # that one number fp32 is enough, and half the work.
        kept, root = ~flat, self.root.float()
        inverse = torch.linalg.solve_triangular(root, torch.eye(len(root)), upper=False)
        spread = inverse.square_().sum(0, dtype=torch.float64)[kept].sum()
        self.noise = (kept.sum() - (shrinkage + RIDGE) * spread) / (1 - shrinkage)

    def __call__(self, features: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.root, (features / self.scale).T, upper=False).T

    def axes(self, directions: Tensor) -> Tensor:
        """Directions (R, K) there as weights (R, K) of features."""
        return torch.linalg.solve_triangular(self.root.T, directions.T, upper=True).T / self.scale


def _discriminant(experts: list[Statistics], whiten: _Whitening) -> Discriminant:
    """A class's mean is shrunk towards the middle of the classes by what its images cannot tell (James and Stein 1961).

    The mean of few images lies far off in many directions; without this such a class is hardly ever found.
    """
    whitened = whiten(torch.cat([expert.means for expert in experts]).double())  # (C, K)
    centre = torch.stack([part.mean(0) for part in whitened.split([len(expert.means) for expert in experts])]).mean(0)
    # The mean of n images is off by a covariance / n: its square is larger by this much than that of the true mean.
    excess = whiten.noise / torch.cat([expert.counts for expert in experts]).double().clamp_min(1)
    offsets = whitened - centre
    between = (offsets.square().sum(1) - excess).median().clamp_min(1e-6)
    offsets = offsets * (between / (between + excess))[:, None]
    shifted = centre + offsets
    left, sizes, right = torch.linalg.svd(offsets, full_matrices=False)
    kept = sizes > 1e-6 * sizes.max().clamp_min(1e-12)
    directions = right[kept]  # (R, K)
    centres = (left * sizes)[:, kept].T  # (R, C)
    total = torch.eye(len(directions), dtype=centres.dtype) + centres @ centres.T / len(whitened)
    return Discriminant(*(tensor.float() for tensor in (
        whiten.axes(shifted), -shifted.square().sum(1) / 2, whiten.axes(directions), directions @ centre, centres,
        torch.linalg.inv(total))))
