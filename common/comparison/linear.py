"""Linear classifiers in closed form, for several strengths of regularisation from one matrix of products."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve

SHRINKAGES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)  # of the correlations towards none
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # in units of the mean square of a feature
TOO_FLAT = 1e-6  # a feature of a smaller deviation, as a share of the largest, tells nothing


@dataclass
class Linear:
    """Scores (N, C) of features (N, K): ((features - mean) * scale) @ weight + bias. strength: of the regularisation."""

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    strength: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return ((features - self.mean) * self.scale) @ self.weight + self.bias

    @property
    def parameters(self) -> int:
        """How many numbers have been learnt."""
        return self.weight.size + self.bias.size


def discriminants(features: np.ndarray, labels: np.ndarray, weights: np.ndarray, priors: np.ndarray,
                  shrinkages: Sequence[float] = SHRINKAGES) -> Iterator[Linear]:
    """Linear discriminants of C classes with one covariance for all; the scores are log-probabilities up to a constant.

    features: (N, K); labels: (N,); weights: (N,) of the images, 1 in all; priors: (C,). The correlations are shrunk towards
    none (Friedman 1989, regularised discriminant analysis), once for each of `shrinkages`.
    """
    counts = np.bincount(labels, minlength=len(priors))
    means = np.eye(len(priors), dtype=features.dtype)[labels].T @ features / np.maximum(counts, 1)[:, None]
    # Deviations are from means of the same images, so without the factor they come out too small.
    unbiased = weights * len(labels) / max(len(labels) - np.count_nonzero(counts), 1)
    within = (features - means[labels]) * np.sqrt(unbiased, dtype=np.float32)[:, None]
    deviation = np.sqrt(np.square(within).sum(0))
    if not deviation.any():  # one image a class tells nothing of the covariance; the nearest mean is left
        deviation = features.std(0)
    scale = np.where(deviation > TOO_FLAT * deviation.max(), 1 / np.maximum(deviation, 1e-30), 0).astype(np.float32)
    middle = means.mean(0)
    centres = (means - middle) * scale  # (C, K)
    solved = _solved(within * scale, centres.T, [shrinkage / (1 - shrinkage) for shrinkage in shrinkages])
    for shrinkage, weight in zip(shrinkages, solved, strict=True):
        weight = weight / (1 - shrinkage)  # (K, C)
        yield Linear(middle, scale, weight, np.log(priors) - (weight.T * centres).sum(1) / 2, shrinkage)


def ridges(features: np.ndarray, targets: np.ndarray, weights: np.ndarray,
           strengths: Sequence[float] = RIDGES) -> Iterator[Linear]:
    """Ridge regressions of targets (N, C) on features (N, K) without intercept, once for each of `strengths`.

    weights: (N,) of the images, 1 in all.
    """
    rows = np.sqrt(weights, dtype=np.float32)[:, None]
    weighted = features * rows
    unit = np.square(weighted).sum() / features.shape[1]
    solved = _solved(weighted, weighted.T @ (targets * rows), [strength * unit for strength in strengths])
    nothing, one = np.zeros(1, dtype=np.float32), np.ones(1, dtype=np.float32)
    for strength, weight in zip(strengths, solved, strict=True):
        yield Linear(nothing, one, weight, np.zeros(targets.shape[1]), strength)


def _solved(rows: np.ndarray, targets: np.ndarray, diagonals: Sequence[float]) -> Iterator[np.ndarray]:
    """(rows' rows + d)^-1 targets (K, C) for each diagonal d, by the smaller of the matrices of products of rows (N, K)."""
    wide = rows.shape[0] < rows.shape[1]
    products, right = (rows @ rows.T, rows @ targets) if wide else (rows.T @ rows, targets)
    for diagonal in diagonals:
        matrix = products.astype(np.float64)
        matrix[np.diag_indices_from(matrix)] += diagonal
        found = solve(matrix, right, assume_a="pos", overwrite_a=True).astype(np.float32)
        # Woodbury's identity, where the smaller matrix is that of the images.
        yield (targets - rows.T @ found) / np.float32(diagonal) if wide else found
