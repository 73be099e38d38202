"""Training the gates on the loss of the joint answer, from their start on; the best epoch stays."""

import inspect
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ContextGatedMOE.errors import MixtureError
from ContextGatedMOE.fitting import Batches, ImageFeatures, batches
from ContextGatedMOE.passes import Evidence


DRAWN_BACK = 1e-3  # weight of the squared distance of the second layer from its start, in deviations of the features
STEP = 64  # images of a step on features


def refine(model: nn.Module, train: ImageFeatures, validation: ImageFeatures, epochs: int, learning_rate: float) -> list[dict[str, float]]:
    """Train the gates' second layers on features that were computed once: softmax regressions that go on from the discriminants
    and are drawn back to them, by Adam on the joint loss.

    The epoch of the lowest validation loss stays, which may be the start. Returns loss and accuracy of every epoch, the start
    being epoch 0; experts weigh alike in all of them.
    """
    routing, head = model.routing_gates(), model.joint_head
    layers = [_Layer.of(gate.score, gate.coefficient, train.plain[name], validation.plain[name], True)
              for name, gate in model.gates().items() if name in routing]
    layers += [_Layer.of(gate.class_score, gate.class_coefficient, train.features[name], validation.features[name], False)
               for name, gate in model.gates().items()]

    def answers(seen: ImageFeatures, part: int, rows: Tensor) -> Tensor:
        evidence = Evidence(None, None, seen.logits.new_ones(len(rows), len(model.sizes)), None)
        for layer in layers:
            scores = layer.scores(part, rows)
            evidence = evidence.and_also(*((scores, None) if layer.of_experts else (None, scores)))
        return head.joint(seen.logits[rows], evidence)

    @torch.no_grad()
    def measured(seen: ImageFeatures, part: int) -> tuple[float, float]:
        answered = torch.cat([answers(seen, part, rows) for rows in torch.arange(len(seen.labels)).split(1024)])
        outputs = head.columns[seen.labels]
        right = (answered.argmax(1) == outputs).float()
        losses = F.cross_entropy(answered, outputs, reduction="none")
        return (seen.weights * losses).sum().item(), (seen.weights * right).sum().item()

    trained = [value for layer in layers for value in (layer.weight, layer.bias)]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    generator = torch.Generator().manual_seed(0)
    history: list[dict[str, float]] = []
    best: list[Tensor] = []
    for epoch in range(epochs + 1):
        for rows in torch.randperm(len(train.labels), generator=generator).split(STEP) if epoch else ():
            losses = F.cross_entropy(answers(train, 0, rows), head.columns[train.labels[rows]], reduction="none")
            loss = (losses * train.weights[rows]).sum() * len(train.labels) / len(rows)
            loss = loss + DRAWN_BACK * sum(layer.weight.square().sum() for layer in layers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        (loss, accuracy), (validation_loss, validation_accuracy) = measured(train, 0), measured(validation, 1)
        if not math.isfinite(loss + validation_loss):
            raise MixtureError(f"the loss of the gates is {loss + validation_loss}: a smaller learning_rate may help")
        history.append({"epoch": epoch, "training_loss": loss, "validation_loss": validation_loss,
                        "training_accuracy": accuracy, "validation_accuracy": validation_accuracy})
        if validation_loss == min(row["validation_loss"] for row in history):
            best = [value.detach().clone() for value in trained]
    with torch.no_grad():
        for value, chosen in zip(trained, best, strict=True):
            value.copy_(chosen)
        for layer in layers:
            layer.keep()
    return history


@dataclass
class _Layer:
    """What is added to a second layer in training: weight (C, K) and bias (C,) for features in their own deviations.

    start: the scores (N, C) of training and of validation images before; scaled: their features.
    """

    layer: nn.Linear
    coefficient: Tensor
    of_experts: bool
    centre: Tensor
    scale: Tensor
    start: list[Tensor]
    scaled: list[Tensor]
    weight: Tensor
    bias: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, layer: nn.Linear, coefficient: Tensor, train: Tensor, validation: Tensor, of_experts: bool) -> "_Layer":
        centre, scale = train.mean(0), train.std(0, correction=0)
        scale = torch.where(scale > 1e-6 * scale.max(), scale, torch.inf)
        parts = (train, validation)
        return cls(layer, coefficient.detach(), of_experts, centre, scale, [layer(part) for part in parts],
                   [(part - centre) / scale for part in parts], torch.zeros_like(layer.weight).requires_grad_(),
                   torch.zeros_like(layer.bias).requires_grad_())

    def scores(self, part: int, rows: Tensor) -> Tensor:
        """Scores (B, C), as much as they count, of rows (B,) of the training (0) or validation (1) images."""
        return self.coefficient * (self.start[part][rows] + F.linear(self.scaled[part][rows], self.weight, self.bias))

    def keep(self) -> None:
        """Make what was added a part of the layer."""
        self.layer.weight += self.weight / self.scale
        self.layer.bias += self.bias - (self.weight / self.scale) @ self.centre


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
