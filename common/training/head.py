"""Fitting a head to features to the end: a convex problem, solved for falling penalties; validation images choose one."""

import math
import time

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli.flags import TrainingFlags
from common.data.tensors import ImageSet
from common.training.distributed import device_of
from common.training.loop import Fit, NotFiniteError

STRONGEST, WEAKEST = 1.0, 1e-5  # penalties on half the squared weights of a head over standardised features
ITERATIONS = 100  # of LBFGS at each penalty, from where the one before ended


def fit_head(head: nn.Linear, train: ImageSet, validation: ImageSet, config: TrainingFlags) -> Fit:
    """Multinomial logistic regression on features (N, D), with the penalty of the lowest validation loss.

    Each epoch is one of `config.epochs` penalties, the strongest first (regularisation path, Friedman et al. 2010, section
    2.5).
    Nothing is random, and all processes compute the same. Raises NotFiniteError if features are not finite.
    """
    started, device = time.perf_counter(), device_of(config)
    features = {"training": train.inputs.to(device).float(), "validation": validation.inputs.to(device).float()}
    labels = {"training": train.labels.to(device), "validation": validation.labels.to(device)}
    for split, values in features.items():
        if not torch.isfinite(values).all():
            raise NotFiniteError(f"the backbone's features of the {split} images are not finite; try another --model")
    centre, scale = features["training"].mean(0), features["training"].std(0, correction=0).clamp_min(1e-6)
    features = {split: (values - centre) / scale for split, values in features.items()}
    weight = torch.zeros(head.weight.shape, device=device, requires_grad=True)
    bias = torch.zeros(head.bias.shape, device=device, requires_grad=True)
    rows, lowest = [], math.inf
    penalties = torch.logspace(math.log10(STRONGEST), math.log10(WEAKEST), config.epochs, dtype=torch.float64)
    for epoch, penalty in enumerate(penalties.tolist(), start=1):
        _minimise(features["training"], labels["training"], weight, bias, penalty)
        row: dict[str, float] = {"epoch": epoch}
        with torch.no_grad():
            logits = {split: F.linear(values, weight, bias) for split, values in features.items()}
            row |= {f"{split}_loss": F.cross_entropy(outputs, labels[split]).item() for split, outputs in logits.items()}
            row |= {f"{split}_accuracy": (outputs.argmax(1) == labels[split]).float().mean().item()
                    for split, outputs in logits.items()}
            if row["validation_loss"] < lowest:
                lowest = row["validation_loss"]
                head.to(device).weight.copy_(weight / scale)
                head.bias.copy_(bias - head.weight @ centre)
        rows.append({**row, "penalty": penalty})
    history = pd.DataFrame(rows)
    history["chosen"] = (history.index == history["validation_loss"].idxmin()).astype(int)
    return Fit(history, time.perf_counter() - started, len(train) * config.epochs)


def _minimise(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, penalty: float) -> None:
    """Bring weight (C, D) and bias (C,) to the lowest penalised cross-entropy of features (N, D)."""
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = F.cross_entropy(F.linear(features, weight, bias), labels) + penalty / 2 * weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
