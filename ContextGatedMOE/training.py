"""Training the gates with any loader: AdamW on the loss of the joint answer, the best epoch stays."""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ContextGatedMOE.adapters import MixtureError
from ContextGatedMOE.fitting import Batches, batches


def train_gates(model: nn.Module, loader: Batches, validation: Batches | None, epochs: int, learning_rate: float,
                weight_decay: float) -> list[dict[str, float]]:
    """See `ContextGatedMOE.train_gates`."""
    parameters = model.gate_parameters()
    if not parameters:
        raise MixtureError("a mixture without experts has no gates to train")
    start = best = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    history: list[dict[str, float]] = []
    lowest = math.inf
    modes = {module: module.training for module in model.modules()}
    finished = False
    try:
        for epoch in range(epochs + 1):
            entry = {"epoch": epoch}
            if epoch:
                entry["loss"] = _epoch(model, loader, optimizer)
            if validation is not None:
                entry["validation_loss"] = _epoch(model, validation, None)
            history.append(entry)
            if validation is None or entry["validation_loss"] < lowest:
                lowest = entry.get("validation_loss", lowest)
                best = [parameter.detach().clone() for parameter in parameters]
        finished = True
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, best if finished else start, strict=True):
                parameter.copy_(value)
        optimizer.zero_grad()
        for module, mode in modes.items():
            module.training = mode
    return history


def _epoch(model: nn.Module, loader: Batches, optimizer: torch.optim.Optimizer | None) -> float:
    """One pass over a loader, training where there is an optimizer. Returns the mean loss per image."""
    model.train(optimizer is not None)
    total, count = 0.0, 0
    for inputs, labels in batches(loader, model):
        with torch.set_grad_enabled(optimizer is not None):
            loss = _loss(model, inputs, labels.to(model.device))
        if not math.isfinite(loss.item()):
            raise MixtureError(f"the loss is {loss.item()}: a smaller learning_rate may help")
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        total, count = total + loss.item() * len(labels), count + len(labels)
    if not count:
        raise MixtureError("there are no batches; a generator can be read once only, a list or a DataLoader again and again")
    return total / count


def _loss(model: nn.Module, inputs: dict[str, object], labels: Tensor) -> Tensor:
    """The base model's own loss, else cross-entropy; of log-probabilities both are the negative log-likelihood."""
    if "labels" in inspect.signature(model.forward).parameters:
        return model(**inputs, labels=labels).loss
    output = model(**inputs)
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())
