"""What is kept of an expert's images: sums by which the gates of any set of experts are found in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINKAGE = 0.1  # of the correlations towards none; see the table of what was tried in the README
TOO_FLAT = 1e-6  # a feature whose deviation is below this share of the largest tells nothing


@dataclass
class Statistics:
    """Sums over one expert's images, of the features that a gate sees in the plain base model.

    counts: (C,) images of each class. means: (C, K) mean features of each class. scatter: (K * (K + 1) / 2,) sum of the
    products of features, each less its class's mean; the matrix is symmetric, so this is its upper half. All on the CPU.
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, classes: int) -> "Statistics":
        """Of features (N, K) with labels (N,), positions in the expert's classes."""
        features, labels = features.double().cpu(), labels.cpu()
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
    """Linear discriminants of the classes of all experts, and the directions in which the classes differ.

    weight (C, K), bias (C,): scores of the classes, log-likelihoods up to what they share. axes (R, K), origin (R,): features
    to whitened coordinates in the space of the classes' means. centres (R, C): the means there, of length one.
    """

    weight: Tensor
    bias: Tensor
    axes: Tensor
    origin: Tensor
    centres: Tensor


def discriminant(experts: list[Statistics], shrinkage: float = SHRINKAGE) -> Discriminant:
    """The discriminants of all experts' classes, with one covariance for all in which every expert weighs alike.

    The correlations are shrunk (Friedman 1989, regularised discriminant analysis, with the diagonal as target).
    """
    means = torch.cat([expert.means for expert in experts]).double()  # (C, K)
    half = sum(expert.scatter.double() / expert.counts.sum().clamp_min(1) for expert in experts) / len(experts)
    covariance = symmetric(half, means.shape[1])
    deviation = covariance.diagonal().sqrt()
    flat = deviation <= TOO_FLAT * deviation.max()
    scale = torch.where(flat, torch.inf, deviation)
    correlation = covariance / scale[:, None] / scale
    shrunk = (1 - shrinkage) * correlation
    shrunk.diagonal().fill_(1 + 1e-3)
    root = torch.linalg.cholesky(shrunk)
    whitened = torch.linalg.solve_triangular(root, (means / scale).T, upper=False).T  # (C, K)
    weight = torch.linalg.solve_triangular(root.T, whitened.T, upper=True).T / scale
    # The mean of n images is off by a covariance / n, which makes it seem further away: rare classes would lose.
    counts = torch.cat([expert.counts for expert in experts]).double().clamp_min(1)
    bias = (torch.cholesky_solve(correlation, root).trace() / counts - whitened.square().sum(1)) / 2
    # Where the classes differ: the space of their means, each expert's centre weighing alike.
    centre = torch.stack([part.mean(0) for part in whitened.split([len(expert.means) for expert in experts])]).mean(0)
    left, sizes, right = torch.linalg.svd(whitened - centre, full_matrices=False)
    kept = sizes > 1e-6 * sizes.max().clamp_min(1e-12)
    directions = right[kept]  # (R, K)
    axes = torch.linalg.solve_triangular(root.T, directions.T, upper=True).T / scale
    centres = (left * sizes)[:, kept].T  # (R, C)
    return Discriminant(*(tensor.float() for tensor in (
        weight, bias, axes, directions @ centre, centres / centres.norm(dim=0).clamp_min(1e-12))))
